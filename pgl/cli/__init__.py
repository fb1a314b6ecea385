"""The command ``pgl``."""

from pgl.cli.commands import main

__all__ = ["main"]
