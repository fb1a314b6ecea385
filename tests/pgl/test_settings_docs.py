"""docs/pretraining.md has a row for every setting, with the default that the code has."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from pgl.cli.commands import COMMANDS
from pgl.config import PretrainConfig
from pgl.settings import defaults

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
