"""The words of ``pgl compare``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pgl.cli.pretrain import add_config
from pgl.cli.text import listed, print_table
from pgl.printing import say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from pgl.comparison.config import Comparison

# What a settings file of the other commands may hold besides is taken, and set anew for each run.
_SET_HERE = {"data", "output", "resume"}


def compare_arguments(parser: ArgumentParser) -> None:
    """Add what is compared, and the settings of ``pgl pretrain`` and ``pgl finetune`` below names of their
    own."""
    from pgl.comparison.config import INITIALISATIONS
    from pgl.config import PretrainConfig
    from pgl.downstream.config import FinetuneConfig

    add_config(parser, "configs/compare/")
    parser.add_argument("--data", required=True, type=str, metavar="CACHE", help="a cache with labels")
    parser.add_argument("--output", required=True, type=str, metavar="DIR", help="folder of the comparison")
    parser.add_argument(
        "--unlabelled",
        type=str | None,
        default=None,
        metavar="CACHE",
        help="a cache to pretrain on (default: --data); test cases are left out of it in any case",
    )
    parser.add_argument(
        "--initialisations",
        type=str | list[str],
        default=list(INITIALISATIONS),
        metavar="A,B,...",
        help=f"of {', '.join(INITIALISATIONS)} (default: all)",
    )
    parser.add_argument(
        "--fractions",
        type=str | float | list[float],
        default=[0.1, 0.25, 1.0],
        metavar="F,F,...",
        help="shares of the training patients whose labels are used",
    )
    parser.add_argument(
        "--ceiling_fractions",
        type=str | float | list[float] | None,
        default=None,
        metavar="F,F,...",
        help="further shares, from random weights with the first seed alone: what more labels would give",
    )
    parser.add_argument(
        "--seeds",
        type=str | int | list[int],
        default=[0, 1, 2],
        metavar="S,S,...",
        help="of pretraining and fine-tuning; three or more tell a spread",
    )
    parser.add_argument(
        "--pretrain_once",
        type=bool,
        default=False,
        help="pretrain with the first seed alone and fine-tune from it with all",
    )
    parser.add_argument(
        "--tasks",
        type=dict[str, dict[str, list[str | int]]] | None,
        default=None,
        metavar="JSON",
        help='name → classes, each fine-tuned by itself, such as \'{"liver": {"liver": [1, 2]}}\'',
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="runs in progress at once, on the same cores and the same GPU (default: 1)",
    )
    parser.add_argument(
        "--keep_going", type=bool, default=False, help="go on with the others when a run fails"
    )
    parser.add_argument(
        "--time_limit_s",
        type=float,
        default=0.0,
        metavar="S",
        help="after so many seconds save what is in progress and stop, with exit code 124 (0: no limit)",
    )
    parser.add_class_arguments(PretrainConfig, "pretrain", skip=_SET_HERE, instantiate=False)
    parser.add_class_arguments(FinetuneConfig, "finetune", skip={*_SET_HERE, "weights"}, instantiate=False)


def check_compare(arguments: Namespace) -> None:
    """Raise ValueError, which names the setting, for what cannot be compared."""
    comparison_of(arguments)


def comparison_of(arguments: Namespace) -> Comparison:
    """The comparison that the arguments ask for.

    Raises:
        ValueError: names the setting that cannot be.
    """
    from pgl.comparison.config import CompareSettings, Comparison
    from pgl.config import PretrainConfig
    from pgl.downstream.config import RANDOM, FinetuneConfig

    settings = CompareSettings(
        data=Path(arguments.data),
        output=Path(arguments.output),
        unlabelled=None if arguments.unlabelled is None else Path(arguments.unlabelled),
        initialisations=tuple(listed(arguments.initialisations, str, "initialisations", "random,pgl")),
        fractions=tuple(listed(arguments.fractions, float, "fractions", "0.1,0.5")),
        ceiling_fractions=tuple(
            listed(
                [] if arguments.ceiling_fractions is None else arguments.ceiling_fractions,
                float,
                "ceiling_fractions",
                "0.5,1",
            )
        ),
        seeds=tuple(listed(arguments.seeds, int, "seeds", "0,1,2")),
        pretrain_once=arguments.pretrain_once,
        tasks=arguments.tasks,
        jobs=arguments.jobs,
        keep_going=arguments.keep_going,
        time_limit_s=arguments.time_limit_s,
    )
    nowhere: dict[str, Any] = {"data": Path(), "output": Path()}
    pretrain = PretrainConfig(**nowhere, **vars(arguments.pretrain))
    finetune = FinetuneConfig(**nowhere, weights=RANDOM, **vars(arguments.finetune))
    return Comparison(settings, pretrain, finetune)


def compare(arguments: Namespace) -> int:
    """Run the comparison; the exit code of a run that did not come to its end is ours, too."""
    import sys

    from rich.table import Table

    from pgl.comparison.classes import CLASSES
    from pgl.comparison.page import REPORT, TABLE
    from pgl.comparison.runs import ComparisonStopped
    from pgl.comparison.runs import compare as run_all
    from pgl.comparison.tables import HEADINGS, table_rows

    comparison = comparison_of(arguments)
    try:
        result = run_all(comparison, say=say)
    except ComparisonStopped as stopped:
        say(f"pgl compare: {stopped}", file=sys.stderr)
        return stopped.exit_code
    table = Table(*HEADINGS, title="Dice, points", title_justify="left")
    print_table(table, table_rows(result["table"]))
    folder = comparison.folder
    say(f"{folder / TABLE}.csv, .json, .md, .png, {folder / CLASSES} and {folder / REPORT}")
    return 0
