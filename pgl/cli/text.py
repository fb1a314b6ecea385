"""Between the command line and its parser: shorthands on the way in, one-line messages on the way out."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from pgl.printing import printable

if TYPE_CHECKING:
    from rich.table import Table

# Import names of the extra `train`.
EXTRAS = {
    "SimpleITK", "blosc2", "dynamic_network_architectures", "jsonargparse", "docstring_parser",
    "jinja2", "lightning_fabric", "matplotlib", "monai", "msgpack", "PIL", "rich", "tensorboard", "yaml",
}  # fmt: skip
OWN_FOLDERS = tuple(str(Path(__file__).resolve().parents[2] / name) for name in ("pgl", "pgl_ops"))
METHOD_NAMES = ("pgl", "byol", "genesis")
_SWITCHES = ("--resume", "--overwrite")
# Settings of two numbers; all other tuples are triples.
_PAIRS = {
    "crop_scale", "region_scale", "clip_hu", "noise_variance", "blur_sigma", "brightness_factor",
    "gamma_exponent",
}  # fmt: skip
_NUMBER = r"-?[\d.]+([eE][+-]?\d+)?"
_NUMBERS = re.compile(rf"{_NUMBER}(,{_NUMBER})+")
Item = TypeVar("Item")


def expand(words: Sequence[str]) -> list[str]:
    """The words in the form that jsonargparse reads.

    ``3,1,1`` becomes a list, a switch such as ``--resume`` gets the value that is meant, ``--method byol`` is
    short for ``--method.name byol``, patterns may be given one by one, and a config file comes first, so that
    the command line overrides it wherever it stands.
    """
    configs, others = [], []
    remaining = list(words)
    while remaining:
        option, equals, value = remaining.pop(0).partition("=")
        if option == "--method" and (value if equals else "".join(remaining[:1])) in METHOD_NAMES:
            option = "--method.name"
        if option == "--config" and (equals or remaining):
            configs.append(f"--config={value if equals else remaining.pop(0)}")
            continue
        if option in _SWITCHES and not equals and remaining[:1] not in (["true"], ["false"]):
            equals, value = "=", "true"
        elif option == "--print_config" and not equals:
            equals, value = "=", "skip_unset"
        elif option in ("--include", "--exclude"):
            option += "+"
        others.append(f"{_bracketed(option)}{equals}{_bracketed(value)}")
    return configs + others


def value_of(option: str, words: Sequence[str]) -> str | None:
    """The value given to ``option``, as ``--option value`` or ``--option=value``; None if it is not there."""
    for number, word in enumerate(words):
        name, equals, value = word.partition("=")
        if name == option:
            return value if equals else next(iter(words[number + 1 :]), None)
    return None


def listed(value: Any, kind: Callable[[Any], Item], name: str, example: str) -> list[Item]:
    """The items of an option that takes several, ``0,1,2``.

    Args:
        value: text with commas, also in brackets, a list, or a single item.
        kind: what each must be.
        name, example: the option's and what it could be, for the message.

    Raises:
        ValueError: an item is of another kind.
    """
    parts = [part.strip() for part in value.strip("[]").split(",")] if isinstance(value, str) else value
    try:
        return [kind(part) for part in (parts if isinstance(parts, list) else [parts])]
    except (TypeError, ValueError):
        raise ValueError(f"--{name} must be such as {example}, got {value}") from None


def print_table(table: Table, rows: Iterable[Sequence[str]]) -> None:
    """Fill a table and print it; on a narrow terminal cells are folded, so that no number is cut."""
    from rich.console import Console
    from rich.text import Text

    for column in table.columns:
        column.overflow = "fold"
    for row in rows:
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)


def usage_message(text: str, positionals: Sequence[str], words: Sequence[str] = ()) -> str:
    """The parser's error in the user's words: options instead of keys, types by their names.

    Args:
        text: the error.
        positionals: keys that are no options.
        words: the command line; the parser does not name the files of settings in it.
    """
    config = value_of("--config", words)
    text = " ".join(text.split()).replace("Problems parsing config", f"cannot read {config}")
    text = re.sub(r'Parser key "([^"]+)":', r"--\1:", text)
    if unknown := re.match(r"Group '(\w+)' does not accept option", text):
        # It stands in a file: on the command line itself it would be an unknown argument.
        files = [file for file in (value_of(f"--{unknown[1]}", words), config) if file is not None]
        text += f" (in {' or '.join(files)})" if files else ""
    text = re.sub(r"<class '(?:\w+\.)*(\w+)'>", r"\1", text).replace("typing.", "")
    method = re.match(r"--([\w.]*method): Unable to load config '([^']*)'", text)
    if method:
        name = method[2] if method[2] in METHOD_NAMES else "NAME"
        return (
            f"--{method[1]}: no settings file called {method[2]!r}; for a method write --{method[1]}.name "
            f"{name}, or in a config file `method: {{name: {name}}}`; there are {', '.join(METHOD_NAMES)}"
        )
    tuple_wanted = re.match(r"--([\w.]+): .*Expected a tuple", text)
    if tuple_wanted and not tuple_wanted[1].startswith("encoder."):
        return _tuple_message(tuple_wanted[1], text)
    required = re.fullmatch(r"the following arguments are required: (.+)", text)
    if not required:
        return text
    names = [name.lstrip("-") for name in re.split(r",\s*", required[1])]
    return "missing " + ", ".join(name.upper() if name in positionals else f"--{name}" for name in names)


def _tuple_message(key: str, text: str) -> str:
    name = key.split(".")[-1]
    form = "LOW,HIGH such as 0.5,1.5" if name in _PAIRS else "D,H,W such as 24,72,80"
    if name == "flip_probability":
        form = "D,H,W such as 0.5,0.5,0"
        if "Expected a float" in text:
            form = f"a number such as 0.5, or {form}"
    given = re.search(r"(?:Got|Given) value: (.+)$", text)
    # What follows a space is no longer seen here.
    came = f", got {given[1].strip('[]').replace(', ', ',')}" if given else ""
    return f"--{key}: expected {form}, with commas and no spaces{came}"


def explain(error: Exception) -> str:
    """One line for an error of a stage; one that nobody foresaw says its class and how to see more."""
    text = " ".join(str(error).split())
    if isinstance(error, ModuleNotFoundError) and (error.name or "").split(".")[0] in EXTRAS:
        return f'{error.name} is not installed; run: pip install "pgl-ops[train]"'
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        return f"{error.strerror}: {error.filename}"
    if text and _raised_by_us(error):
        return text
    return f"{type(error).__name__}: {text or 'no message'} (add --debug for the traceback)"


def _raised_by_us(error: Exception) -> bool:
    """Whether the error comes out of this project's own ``raise``: then its message was written for users."""
    if isinstance(error, AssertionError | AttributeError | KeyError | IndexError | NotImplementedError):
        return False
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and trace.tb_frame.f_code.co_filename.startswith(OWN_FOLDERS)


def _bracketed(word: str) -> str:
    return f"[{word}]" if _NUMBERS.fullmatch(word) else word
