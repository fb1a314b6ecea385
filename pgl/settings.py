"""Settings as plain data: how config.yaml holds them, by their dotted names, and beside those of a run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import MISSING, asdict, fields
from pathlib import Path
from typing import Any


def to_plain(config: Any) -> dict[str, Any]:
    """Settings as nested dicts of plain data, with lists for tuples and text for paths.

    Args:
        config: an instance of a settings dataclass, of whatever command.
    """
    plain: dict[str, Any] = _plain(asdict(config))
    return plain


def flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, ``train.steps``."""
    result: dict[str, Any] = {}
    for key, value in plain.items():
        result.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return result


def by_name(plain: dict[str, Any]) -> dict[str, Any]:
    """As :func:`flat`, but the classes as one setting: their names are values."""
    classes = {"classes": plain["classes"]} if "classes" in plain else {}
    return {**flat({key: value for key, value in plain.items() if key != "classes"}), **classes}


def defaults(kind: type[Any]) -> dict[str, Any]:
    """The defaults of a settings dataclass by their dotted names; settings without one are left out."""
    plain: dict[str, Any] = {}
    for one in fields(kind):
        if one.default_factory is not MISSING:
            plain[one.name] = to_plain(one.default_factory())
        elif one.default is not MISSING:
            plain[one.name] = _plain(one.default)
    return by_name(plain)


def since_then(saved: dict[str, Any], kind: type[Any]) -> dict[str, Any]:
    """The settings of a run of whatever version, by their dotted names.

    A setting that is newer than the run had its default's meaning when the run was made: that is how
    defaults of new settings are chosen.

    Args:
        saved: what its config.yaml or its checkpoint holds.
        kind: the dataclass of the command that made it.
    """
    return {**defaults(kind), **by_name(saved)}


def differing(there: dict[str, Any], wanted: dict[str, Any], free: Container[str] = ()) -> list[str]:
    """The names, in order, of the settings that a run has otherwise than wanted.

    Args:
        there: the run's, by their dotted names.
        wanted: the others.
        free: settings, or whole groups of them (``inference``), that may differ.
    """
    return sorted(
        key
        for key in there.keys() | wanted.keys()
        if there.get(key) != wanted.get(key) and key not in free and key.partition(".")[0] not in free
    )


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
