"""What goes to a terminal, made safe for it."""

from __future__ import annotations

from typing import TextIO


def printable(text: str) -> str:
    """``text`` with escapes for broken bytes and control characters, which could rewrite the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def printable_lines(text: str) -> str:
    """As :func:`printable`, line by line."""
    return "\n".join(map(printable, text.split("\n")))


def say(text: str, file: TextIO | None = None) -> None:
    """Print lines that may hold names from strangers, at once; on standard output if ``file`` is None."""
    print(printable_lines(text), file=file, flush=True)
