"""Settings as plain data: how config.yaml holds them, by their dotted names, and beside those of a run."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import MISSING, asdict, fields, is_dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, get_args, get_type_hints

from pgl.runs.folder import CONFIG, ENVIRONMENT, METRICS

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

Settings = TypeVar("Settings")


def to_plain(config: Any) -> dict[str, Any]:
    """Settings as nested dicts of plain data, with lists for tuples and text for paths.

    Args:
        config: an instance of a settings dataclass, of whatever command.
    """
    nested: dict[str, Any] = as_plain(asdict(config))
    return nested


def settings_of(kind: type[Settings], plain: dict[str, Any], where: str) -> Settings:
    """The settings that :func:`to_plain` gave.

    Args:
        kind: their dataclass.
        plain: nested plain data; what has a default may be left out.
        where: what they are or which file, for messages.

    Raises:
        ValueError: a key is unknown or has a wrong type; the message names it.
    """
    from jsonargparse import ArgumentError, ArgumentParser

    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind)
    try:
        return kind(**vars(instantiated(parser, parser.parse_object(plain))))
    except ArgumentError as error:
        raise ValueError(f"{where}: {error}") from error


def instantiated(parser: ArgumentParser, parsed: Namespace) -> Namespace:
    """What a parser has read, with its groups of settings as their dataclasses."""
    # The method's name before jsonargparse 4.49, which goes away in 5.
    method = getattr(parser, "instantiate", None) or parser.instantiate_classes
    made: Namespace = method(parsed)
    return made


def flat(nested: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Settings by their dotted names, ``train.steps``."""
    result: dict[str, Any] = {}
    for key, value in nested.items():
        result.update(
            flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
        )
    return result


def by_name(nested: dict[str, Any]) -> dict[str, Any]:
    """As :func:`flat`, but the classes as one setting, a list: their names are values, their order counts."""
    settings = flat({key: value for key, value in nested.items() if key != "classes"})
    if "classes" in nested:
        classes = nested["classes"]
        settings["classes"] = [list(item) for item in classes.items()] if classes else classes
    return settings


def defaults(kind: type[Any]) -> dict[str, Any]:
    """The defaults of a settings dataclass by their dotted names; settings without one are left out."""
    nested: dict[str, Any] = {}
    for one in fields(kind):
        if one.default_factory is not MISSING:
            nested[one.name] = to_plain(one.default_factory())
        elif one.default is not MISSING:
            nested[one.name] = as_plain(one.default)
    return by_name(nested)


def since_then(saved: Any, kind: type[Any], where: str) -> dict[str, Any]:
    """The settings of a run of whatever version, by their dotted names.

    A setting that is newer than the run had its default's meaning when the run was made: that is how
    defaults of new settings are chosen.

    Args:
        saved: what its config.yaml or its checkpoint holds.
        kind: the dataclass of the command that made it.
        where: the file, for messages.

    Raises:
        ValueError: these are no settings.
    """
    if not isinstance(saved, dict):
        raise ValueError(f"{where}: expected settings by their names, got {str(saved)[:60]!r}")
    settings = defaults(kind)
    types = get_type_hints(kind)
    for one in fields(kind):
        # A group may be left out as a whole (``encoder: null``); then it has no defaults of its own.
        allowed = (types[one.name], *get_args(types[one.name]))
        group: Any = next((each for each in allowed if is_dataclass(each)), None)
        given = saved.get(one.name, {})
        if group is None or (given is None and type(None) in allowed):
            continue
        if not isinstance(given, dict):
            raise ValueError(f"{where}: {one.name} must be a group of settings, got {str(given)[:60]!r}")
        if given and one.name in settings:
            del settings[one.name]
            settings |= {f"{one.name}.{key}": value for key, value in defaults(group).items()}
    return {**settings, **by_name(saved)}


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


def read_settings(path: Path, kind: type[Any]) -> dict[str, Any]:
    """The settings of a run, from its config.yaml, by their dotted names.

    Args:
        path: the file.
        kind: the dataclass of the command that made it.

    Raises:
        FileNotFoundError: there is none.
        ValueError: it cannot be read.
    """
    import yaml

    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} cannot be read as YAML: {' '.join(str(error).split())}") from error
    settings = since_then({} if content is None else content, kind, str(path))
    if not isinstance(settings["train.steps"], int):
        raise ValueError(f"{path}: train.steps must be a whole number, got {settings['train.steps']!r}")
    return settings


def refuse_other_settings(folder: Path, wanted: Any, free: Container[str], of: str) -> None:
    """Refuse to take a run that is there with other settings for one that is wanted.

    Args:
        folder: where the run would lie; one without a run is accepted.
        wanted: its settings, of ``pgl pretrain`` or ``pgl finetune``.
        free: settings that may differ.
        of: what its runs must be alike for, "a comparison".

    Raises:
        ValueError: names the settings.
    """
    if not (folder / CONFIG).is_file() or not (
        (folder / METRICS).is_file() or (folder / ENVIRONMENT).is_file()
    ):
        return
    there, now = read_settings(folder / CONFIG, type(wanted)), by_name(to_plain(wanted))
    changed = differing(there, now, free)
    if changed:
        key = changed[0]
        raise ValueError(
            f"{folder} is a run with other settings: {', '.join(changed)} ({key} was {there.get(key)}, now "
            f"{now.get(key)}); runs of {of} must be alike: give the same settings, delete that folder, or "
            "give another --output"
        )


def as_plain(value: Any) -> Any:
    """A value as plain data: lists for tuples, text for paths, also inside."""
    if isinstance(value, dict):
        return {key: as_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(item) for item in value]
    return str(value) if isinstance(value, Path) else value
