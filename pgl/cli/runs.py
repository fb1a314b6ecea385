"""The words of ``pgl show``, ``pgl report`` and ``pgl status``: what a run has come to."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

# Exit codes of `pgl status` besides 0 (running or finished) and 1 (no run).
NOT_WELL, WITH_WARNINGS = 3, 4


def show_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl show``."""
    parser.add_argument(
        "run", metavar="RUN", help="the folder of `pgl pretrain`; the run may still be going on"
    )
    parser.add_argument("--output", metavar="DIR", help="folder for the pictures (default: RUN/pictures)")
    parser.add_argument("--pairs", type=int, default=4, metavar="N", help="view pairs to draw")
    _add_data(parser)


def show(arguments: Namespace) -> int:
    """Draw the pictures and say what to look for in each."""
    from pgl.pictures.show import show

    looks = {
        "curves.png": "did the loss fall and the matching accuracy rise, without collapse?",
        "views.png": "do both crops of the shared region show the same anatomy?",
        "features.png": "do the same places get the same colours in both views?",
    }
    for path in show(arguments.run, arguments.output, arguments.pairs, arguments.data):
        say(f"{path}: {looks[path.name]}")
    return 0


def report_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl report``."""
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="the folder of `pgl pretrain`; several are compared in one page"
    )
    parser.add_argument("--output", metavar="FILE", help="the page (default, for one run: RUN/report.html)")
    parser.add_argument(
        "--pairs", type=int, default=4, metavar="N", help="view pairs to show; 0: no pictures"
    )
    _add_data(parser)


def check_report(arguments: Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: names the option.
    """
    if arguments.pairs < 0:
        raise ValueError(f"--pairs must be at least 0, got {arguments.pairs}")
    if len(arguments.run) > 1 and arguments.output is None:
        raise ValueError("several runs need --output FILE, such as compared.html")


def report(arguments: Namespace) -> int:
    """Write the page and say where it is."""
    from pgl.report import write_report

    runs = arguments.run if len(arguments.run) > 1 else arguments.run[0]
    path, lacking = write_report(runs, arguments.output, arguments.pairs, arguments.data)
    say(f"{path}: open it in a browser")
    for reason in lacking:
        say(f"  {reason}")
    return 0


def status_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl status``."""
    parser.add_argument("run", metavar="RUN", help="the folder of `pgl pretrain`")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def status(arguments: Namespace) -> int:
    """Print how a run is doing; the exit code tells it, too."""
    from pgl.runs.status import describe, status_of

    seen = status_of(arguments.run)
    say(json.dumps(seen.plain(), indent=2) if arguments.json else describe(seen))
    if not seen.well:
        return NOT_WELL
    return WITH_WARNINGS if seen.warnings else 0


def _add_data(parser: ArgumentParser) -> None:
    parser.add_argument("--data", metavar="CACHE", help="the cache, if it was moved since the run")
