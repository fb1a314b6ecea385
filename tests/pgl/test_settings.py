"""Settings beside those of a run that is there (pgl/settings.py)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml

from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.settings import by_name, defaults, differing, refuse_other_settings, since_then, to_plain


@dataclass
class Group:
    rate: float = 0.5
    sides: tuple[int, int] = (3, 4)


@dataclass
class Some:
    data: Path
    group: Group = field(default_factory=Group)
    classes: dict[str, list[str]] | None = None
    more: Group | None = None


def test_defaults_are_by_dotted_names_and_leave_out_what_has_none():
    assert defaults(Some) == {"group.rate": 0.5, "group.sides": [3, 4], "classes": None, "more": None}


def test_classes_are_one_setting():
    plain = to_plain(Some(Path("a"), classes={"x": ["y"]}))
    assert by_name(plain) == {
        "data": "a", "group.rate": 0.5, "group.sides": [3, 4], "classes": [["x", ["y"]]], "more": None,
    }  # fmt: skip


def test_classes_in_another_order_are_others():
    """Their order numbers them."""
    one, two = ({"classes": {name: [name] for name in names}} for names in ("ab", "ba"))
    assert differing(by_name(one), by_name(two)) == ["classes"] and not differing(by_name(one), by_name(one))


def test_a_newer_setting_had_its_defaults_meaning():
    old = {"data": "a", "group": {"sides": [1, 1]}}
    plain = {"data": "a", "group.rate": 0.5, "group.sides": [1, 1], "classes": None}
    assert since_then(old, Some, "f") == {**plain, "more": None}
    assert since_then({**old, "more": None}, Some, "f") == {**plain, "more": None}
    given = {**plain, "more.rate": 0.1, "more.sides": [3, 4]}
    assert since_then({**old, "more": {"rate": 0.1}}, Some, "f") == given


@pytest.mark.parametrize(("saved", "told"), [
    ([1], "file: expected settings by their names, got '\\[1\\]'"),
    ({"group": None}, "file: group must be a group of settings, got 'None'"),
    ({"more": 3}, "file: more must be a group of settings, got '3'"),
])  # fmt: skip
def test_what_is_no_settings_is_refused(saved, told):
    with pytest.raises(ValueError, match=told):
        since_then(saved, Some, "file")


def test_differing_settings_are_named_in_order_but_for_free_ones_and_free_groups():
    there = {"b": 1, "a": 2, "group.rate": 3, "same": 4, "gone": 5}
    wanted = {"b": 2, "a": 3, "group.rate": 4, "same": 4, "new": 6}
    assert differing(there, wanted) == ["a", "b", "gone", "group.rate", "new"]
    assert differing(there, wanted, ("a", "group")) == ["b", "gone", "new"]


@pytest.mark.parametrize("kind", [PretrainConfig, FinetuneConfig])
def test_a_run_is_taken_only_with_the_settings_that_it_has(tmp_path, kind):
    words = {"weights": "random"} if kind is FinetuneConfig else {}
    config = kind(tmp_path / "cache", tmp_path / "run", **words)
    refuse_other_settings(tmp_path / "run", config, (), "a test")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(to_plain(config)), "utf-8")
    (tmp_path / "run/metrics.jsonl").touch()
    refuse_other_settings(tmp_path / "run", config, (), "a test")
    other = replace(config, seed=7)
    with pytest.raises(ValueError, match=r"other settings: seed \(seed was 0, now 7\); runs of a test must"):
        refuse_other_settings(tmp_path / "run", other, (), "a test")
    refuse_other_settings(tmp_path / "run", other, ("seed",), "a test")
