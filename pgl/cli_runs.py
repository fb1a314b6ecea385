"""The commands about runs as a whole: ``report``, ``status`` and ``ablate``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from pgl.printing import printable, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pgl.ablation_dice import Tuning
    from pgl.config import PretrainConfig

# Exit codes of `pgl status` besides 0 (running or finished) and 1 (no run).
NOT_WELL, WITH_WARNINGS = 3, 4


def report_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl report``."""
    parser.add_argument(
        "run", nargs="+", metavar="RUN", help="the folder of `pgl pretrain`; several are compared in one page"
    )
    parser.add_argument("--output", metavar="FILE", help="the page (default, for one run: RUN/report.html)")
    parser.add_argument(
        "--pairs", type=int, default=4, metavar="N", help="view pairs to show; 0: no pictures"
    )
    parser.add_argument("--data", metavar="CACHE", help="the cache, if it was moved since the run")


def check_report(arguments: Namespace) -> None:
    """Refuse what cannot be meant.

    Raises:
        ValueError: names the option.
    """
    if arguments.pairs < 0:
        raise ValueError(f"--pairs must be at least 0, got {arguments.pairs}")
    if len(arguments.run) > 1 and arguments.output is None:
        raise ValueError("several runs need --output FILE, such as compared.html")


def report(arguments: Namespace) -> None:
    """Write the page and say where it is."""
    from pgl.report import write_report

    runs = arguments.run if len(arguments.run) > 1 else arguments.run[0]
    path, lacking = write_report(runs, arguments.output, arguments.pairs, arguments.data)
    say(f"{path}: open it in a browser")
    for reason in lacking:
        say(f"  {reason}")


def status_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl status``."""
    parser.add_argument("run", metavar="RUN", help="the folder of `pgl pretrain`")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead")


def status(arguments: Namespace) -> int:
    """Print how a run is doing; the exit code tells it, too."""
    from pgl.status import describe, status_of

    seen = status_of(arguments.run)
    say(json.dumps(seen.plain(), indent=2) if arguments.json else describe(seen))
    if not seen.well:
        return NOT_WELL
    return WITH_WARNINGS if seen.warnings else 0


def ablate_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl ablate``: those of ``pgl pretrain``, and the seeds."""
    from pgl.ablation_rows import PRIORS, ROWS
    from pgl.config import PretrainConfig

    parser.add_argument(
        "--config",
        action="config",
        metavar="FILE",
        help="YAML file with settings, see configs/; what the command line says overrides it",
    )
    parser.add_argument(
        "--seeds",
        type=str,
        metavar="S,S,...",
        help="every row is run with each (default: --seed)",
    )
    parser.add_argument(
        "--rows",
        type=str,
        default=",".join(PRIORS),
        metavar="ROW,ROW,...",
        help=f"what is run (default: the four combinations of the priors); all: {','.join(ROWS)}",
    )
    parser.add_argument(
        "--finetune",
        type=str,
        metavar="FILE",
        help="settings of `pgl finetune` with a labelled cache as data: each run's encoder is fine-tuned for "
        "its Dice",
    )
    parser.add_class_arguments(PretrainConfig)


def ablate(arguments: Namespace) -> int:
    """Run the ablation; the exit code of a run that did not come to its end is ours, too."""
    import sys

    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from pgl.ablate import AblationStopped
    from pgl.ablate import ablate as run_all
    from pgl.ablation_table import HEADINGS, TABLE, means_of, table_rows

    config, seeds, names = _shared_settings(arguments)
    try:
        rows = run_all(config, seeds, names, say, _tuning(arguments))
    except AblationStopped as stopped:
        say(f"pgl ablate: {stopped}", file=sys.stderr)
        return stopped.exit_code if stopped.exit_code > 0 else 128 - stopped.exit_code
    table = Table(*HEADINGS, title="Matching accuracy, true geometry")
    for row in table_rows(means_of(rows)):
        table.add_row(*(Text(printable(cell)) for cell in row))
    Console().print(table)
    folder = Path(config.output)
    say(f"{folder / TABLE}.csv, .json, .md and {folder / 'report.html'}")
    return 0


def check_ablate(arguments: Namespace) -> None:
    """Refuse settings that cannot work before anything is written.

    Raises:
        ValueError: names the setting.
    """
    from pgl.ablate import planned
    from pgl.config_check import check

    for config in planned(*_shared_settings(arguments)).values():
        check(config)
    _tuning(arguments)


def _tuning(arguments: Namespace) -> Tuning | None:
    from pgl.ablation_dice import read_tuning

    return read_tuning(arguments.finetune, arguments.output) if arguments.finetune else None


def _shared_settings(arguments: Namespace) -> tuple[PretrainConfig, list[int], list[str]]:
    from pgl.ablation_rows import ROWS
    from pgl.config import PretrainConfig

    settings = vars(arguments).copy()
    del settings["config"], settings["finetune"]
    seeds, rows = settings.pop("seeds"), settings.pop("rows")
    names = list(ROWS) if rows == "all" else [row.strip() for row in rows.strip("[]").split(",")]
    config = PretrainConfig(**settings)
    if seeds is None:
        return config, [config.seed], names
    try:
        return config, [int(seed) for seed in seeds.strip("[]").split(",")], names
    except ValueError:
        raise ValueError(f"--seeds must be whole numbers such as 0,1,2, got {seeds}") from None
