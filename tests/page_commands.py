"""The commands of the pages, one by one, as a shell would see them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = [
    "README.md",
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("docs/*.md")),
    *sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("benchmarks/results/*/README.md")),
]
_BLOCK = re.compile(r"^```(\w*)\n(.*?)^```$", re.S | re.M)
_SHELL = ("", "sh")
_INDENTED = re.compile(r"^    ((?:pgl|make|python) [a-z-].*)$", re.M)
_INLINE = re.compile(r"`((?:pgl|make|python -m) [^`]+)`")
# What our own programs print or lay down, in blocks that look like code; it is no command.
_OUTPUT = re.compile(r"^pgl \w+: ")


@dataclass(frozen=True)
class Command:
    """A command of a page; ``brief`` if it stands in a sentence, where required arguments may be left out."""

    page: str
    words: tuple[str, ...]
    brief: bool = False

    def __str__(self) -> str:
        return f"{self.page}: {' '.join(self.words)}"


def commands_of(page: str) -> list[Command]:
    """All of them, in their order: those of shell blocks and indented lines, then those in sentences."""
    text = (ROOT / page).read_text(encoding="utf-8")
    found = []
    for language, block in _BLOCK.findall(text):
        for line in block.replace("\\\n", " ").splitlines() if language in _SHELL else ():
            found += [Command(page, words) for words in split(line)]
    prose = _BLOCK.sub("", text)
    lines = [line for line in _INDENTED.findall(prose) if not _OUTPUT.match(line)]
    found += [Command(page, words) for line in lines for words in split(line)]
    inline = [" ".join(match.split()) for match in _INLINE.findall(prose)]
    found += [Command(page, words, brief=True) for line in inline for words in split(line)]
    return found


def split(line: str) -> list[tuple[str, ...]]:
    """A line's commands: comments and ``…`` are left out, ``;`` and ``&&`` separate."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=";&")
    lexer.whitespace_split = True
    lexer.commenters = "#"
    parts: list[list[str]] = [[]]
    for word in lexer:
        if set(word) <= set(";&"):
            parts.append([])
        elif word.strip("…"):
            parts[-1].append(word)
    return [tuple(part) for part in parts if part]


def python_of(page: str) -> list[str]:
    """The page's blocks of Python."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return [block for language, block in _BLOCK.findall(text) if language == "python"]
