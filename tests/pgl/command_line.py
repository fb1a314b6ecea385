"""``pgl`` called as from a shell, in this process."""

from __future__ import annotations

from typing import Any

from pgl.cli import main


def run_cli(capsys: Any, *words: object) -> tuple[int, str]:
    """The exit code, and what stood on stderr as one line."""
    code = main([str(word) for word in words])
    return code, " ".join(capsys.readouterr().err.split())
