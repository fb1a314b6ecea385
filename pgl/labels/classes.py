"""Class names and numbers: read from the files that data sets bring along, and checked."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

HIGHEST_CLASS = 255  # label volumes are uint8


def read_classes(path: str | os.PathLike[str]) -> dict[int, str]:
    """The classes of a JSON or YAML file: ``{"liver": 1}`` or ``{"1": "liver"}``, background left out.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such mapping.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"classes: no file at {path}; expected JSON or YAML such as {{'liver': 1}}")
    try:
        text = path.read_text("utf-8")
        if path.suffix.lower() in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(text)
        else:
            content = json.loads(text)
    except Exception as error:  # a YAML reader has errors of its own
        raise ValueError(f"{path} cannot be read as class names and numbers: {error}") from error
    return parse_classes(content, str(path))


def parse_classes(content: Any, where: str) -> dict[int, str]:
    """Number → name of a mapping in either direction, in the order of the numbers; 0 is background.

    Raises:
        ValueError: not a mapping of names and whole numbers from 0 to 255, or a name or number twice.
    """
    if not isinstance(content, Mapping) or not content:
        raise ValueError(f"{where}: expected class names and numbers such as {{'liver': 1}}, got {content!r}")
    classes: dict[int, str] = {}
    for key, value in content.items():
        number, name = (value, key) if isinstance(value, int) else (key, value)
        if isinstance(value, list | tuple):
            raise ValueError(
                f"{where}: class {key!r} is made of several numbers ({value}); such regions are not taken: "
                "declare the numbers one by one in a file of your own with --classes"
            )
        try:
            number = int(number)
        except (TypeError, ValueError):
            number = -1
        if not 0 <= number <= HIGHEST_CLASS or not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"{where}: expected a class name and a number from 0 to {HIGHEST_CLASS}, got {key!r}: "
                f"{value!r}"
            )
        if name.strip().lower() == "ignore" and number:
            raise ValueError(
                f"{where}: the class 'ignore' ({number}) of nnU-Net is not supported: relabel those voxels"
            )
        if number in classes:
            raise ValueError(f"{where}: number {number} stands for {classes[number]!r} and for {name!r}")
        classes[number] = name.strip()
    classes.pop(0, None)
    if len(set(classes.values())) != len(classes):
        raise ValueError(f"{where}: two classes have one name: {', '.join(classes.values())}")
    if not classes:
        raise ValueError(f"{where}: declares no class but the background")
    return dict(sorted(classes.items()))
