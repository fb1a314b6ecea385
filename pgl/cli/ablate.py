"""The words of ``pgl ablate``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from pgl.cli.pretrain import add_config
from pgl.cli.text import listed, print_table
from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pgl.ablation.dice import AblationTuning
    from pgl.config import PretrainConfig


def ablate_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl ablate``: those of ``pgl pretrain``, and the seeds."""
    from pgl.ablation.rows import PRIORS, ROWS
    from pgl.config import PretrainConfig

    add_config(parser)
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


def check_ablate(arguments: Namespace) -> None:
    """Refuse settings that cannot work before anything is written.

    Raises:
        ValueError: names the setting.
    """
    from pgl.ablation.runs import planned
    from pgl.config_check import check

    for config in planned(*_shared_settings(arguments)).values():
        check(config)
    _tuning(arguments)


def ablate(arguments: Namespace) -> int:
    """Run the ablation; the exit code of a run that did not come to its end is ours, too."""
    import sys

    from rich.table import Table

    from pgl.ablation.runs import AblationStopped
    from pgl.ablation.runs import ablate as run_all
    from pgl.ablation.table import HEADINGS, TABLE, means_of, table_rows

    config, seeds, names = _shared_settings(arguments)
    try:
        rows = run_all(config, seeds, names, say, _tuning(arguments))
    except AblationStopped as stopped:
        say(f"pgl ablate: {stopped}", file=sys.stderr)
        return stopped.exit_code
    table = Table(*HEADINGS, title="Matching accuracy, true geometry")
    print_table(table, table_rows(means_of(rows)))
    folder = Path(config.output)
    say(f"{folder / TABLE}.csv, .json, .md and {folder / 'report.html'}")
    return 0


def _tuning(arguments: Namespace) -> AblationTuning | None:
    from pgl.ablation.dice import read_tuning

    return read_tuning(arguments.finetune, arguments.output) if arguments.finetune else None


def _shared_settings(arguments: Namespace) -> tuple[PretrainConfig, list[int], list[str]]:
    from pgl.ablation.rows import ROWS
    from pgl.config import PretrainConfig

    settings = vars(arguments).copy()
    del settings["config"], settings["finetune"]
    seeds, rows = settings.pop("seeds"), settings.pop("rows")
    names = list(ROWS) if rows == "all" else listed(rows, str, "rows", "both,none")
    config = PretrainConfig(**settings)
    return config, [config.seed] if seeds is None else listed(seeds, int, "seeds", "0,1,2"), names
