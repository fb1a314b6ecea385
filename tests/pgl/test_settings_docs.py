"""The pages have a row for every setting, with the default that the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pgl.cli.commands import COMMANDS
from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.labels.settings import LabelSettings
from pgl.prepare.run import PrepareSettings
from pgl.settings import as_plain, defaults

PAGE = Path(__file__).resolve().parents[2] / "docs" / "pretraining.md"
ORIGINS = {"paper", "second-hand", "ours"}
WITHOUT_DEFAULT = {"data", "output"}


def rows() -> dict[str, list[str]]:
    """The cells of the settings table by key: default, unit, origin, remark."""
    section = PAGE.read_text(encoding="utf-8").split("## Every setting", 1)[1].split("\n## ", 1)[0]
    found: dict[str, list[str]] = {}
    for line in section.splitlines():
        cells = re.fullmatch(r"\| `([\w.]+)` \|(.*)\|(.*)\|(.*)\|(.*)\|", line)
        if cells:
            assert cells[1] not in found, f"{cells[1]} stands twice"
            found[cells[1]] = [cell.strip() for cell in cells.groups()[1:]]
    return found


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"-?\d+(?:\.\d+)?(?:e-?\d+)?", text.replace("−", "-"))]


def flattened(value: Any) -> list[float]:
    if isinstance(value, list):
        return [number for item in value for number in flattened(item)]
    return [float(value)]


def is_the_default(shown: str, value: Any) -> bool:
    if isinstance(value, bool):
        return shown == str(value).lower()
    if value == []:
        return shown == "none"
    if isinstance(value, str):
        return shown == value
    return numbers(shown) == flattened(value)


def test_every_setting_has_a_row_and_every_row_a_setting():
    assert set(rows()) == set(defaults(PretrainConfig)) | WITHOUT_DEFAULT


@pytest.mark.parametrize("key", sorted(defaults(PretrainConfig)))
def test_the_default_in_the_table_is_the_codes(key):
    shown, value = rows()[key][0], defaults(PretrainConfig)[key]
    assert is_the_default(shown, value), f"{key}: the page says {shown!r}, the code {value!r}"


# What a default of None or of no text means, in the words of the tables.
FINETUNE_WORDS = {"source": "none", "spacing_mm": "the cache's", "classes": "all", "split.patient": "none"}
FINETUNE_WORDS |= {"encoder": "the file's", "intensity": "the file's"}
TABLES = {
    "finetuning": ("## Every setting", [FinetuneConfig], {"data", "output", "weights"}, FINETUNE_WORDS),
    "data": (
        "## Settings",
        [PrepareSettings, LabelSettings],
        {"output"},
        {"labels": "none", "classes": "none"},
    ),
}


def plain_rows(page: str, heading: str) -> dict[str, str]:
    """The defaults that a table shows, by setting; a row may hold several, with one for each or for all."""
    text = (PAGE.parent / f"{page}.md").read_text(encoding="utf-8")
    found: dict[str, str] = {}
    for first, shown in re.findall(
        r"^\| (`[^|]*`) \| ([^|]*?) *\|", text.split(f"{heading}\n", 1)[1].split("\n## ", 1)[0], re.M
    ):
        names = [name.removeprefix("--") for name in re.findall(r"`([^`]+)`", first)]
        each = shown.split(", ") if ", " in shown else [shown] * len(names)
        for name, one in zip(names, each, strict=True):
            assert name not in found, f"{name} stands twice"
            found[name] = one.strip("`")
    return found


@pytest.mark.parametrize("page", TABLES)
def test_the_tables_of_the_other_stages_have_the_codes_settings_and_defaults(page):
    heading, kinds, required, words = TABLES[page]
    shown, wanted = plain_rows(page, heading), {}
    for kind in kinds:
        wanted |= defaults(kind) if required >= {"data"} else as_plain(vars(kind()))
    # The augmentation is that of pretraining, and has its rows there.
    wanted = {key: value for key, value in wanted.items() if not key.startswith("augment.")}
    assert set(shown) - {"augment.*"} == set(wanted) | required
    assert {key: shown[key] for key in required} == dict.fromkeys(required, "required")
    assert {key: shown[key] for key in words} == words
    assert [key for key in words if wanted[key]] == []  # the words stand for nothing else
    wrong = {key: shown[key] for key in wanted.keys() - words if not is_the_default(shown[key], wanted[key])}
    assert wrong == {}


def test_a_wrong_default_would_be_seen():
    assert not is_the_default("1.1, 1.5", [1.1, 1.4])
    assert not is_the_default("false", True)
    assert not is_the_default("1024, 325", [-1024.0, 325.0])
    assert is_the_default("−1024, 325", [-1024.0, 325.0]) and is_the_default("1e-6", 1e-6)


def test_every_setting_says_where_its_default_comes_from():
    for key, (_, _, origin, remark) in rows().items():
        assert origin in ORIGINS or key in {*WITHOUT_DEFAULT, "resume"}, key
        # Where name, unit and range do not tell what it is, a remark must.
        assert remark or key.startswith(("augment.", "intensity.", "encoder.")), key


def test_the_page_names_every_command_about_runs():
    text = PAGE.read_text(encoding="utf-8")
    named = set(re.findall(r"pgl (\w+)", text)) & set(COMMANDS)
    assert {"pretrain", "report", "status", "ablate", "show", "export"} <= named
