"""The words of ``pgl finetune``, ``pgl predict`` and ``pgl evaluate``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pgl.cli.pretrain import add_config, config_of
from pgl.printing import printable, say

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace


def finetune_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl finetune``."""
    from pgl.downstream.config import FinetuneConfig

    add_config(parser)
    parser.add_class_arguments(FinetuneConfig)


def check_finetune(arguments: Namespace) -> None:
    """Raise ValueError, which names the setting, for what cannot work."""
    from pgl.downstream.config import FinetuneConfig, check

    check(config_of(FinetuneConfig, arguments))


def finetune(arguments: Namespace) -> int:
    """Train a segmentation network and test it."""
    from pgl.downstream.config import FinetuneConfig
    from pgl.downstream.train import finetune

    finetune(config_of(FinetuneConfig, arguments))
    return 0


def predict_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl predict``."""
    from pgl.downstream.config import InferenceSettings

    parser.add_argument("run", metavar="RUN", help="the folder of `pgl finetune`, or its model.pt")
    parser.add_argument("source", nargs="+", metavar="SOURCE", help="folders and files, as for `pgl prepare`")
    parser.add_argument("--output", required=True, metavar="DIR", help="folder for the label maps")
    for name, help in (
        ("include", "patterns of files to take"),
        ("exclude", "patterns of files to leave out"),
    ):
        parser.add_argument(f"--{name}", type=list[str], default=[], help=help)
    parser.add_argument("--accelerator", choices=["auto", "cpu", "cuda"], default="auto", help="the device")
    _add_timeout(parser, "one image")
    parser.add_class_arguments(InferenceSettings, "inference")


def predict(arguments: Namespace) -> int:
    """Segment the images; 1 if a file was rejected."""
    from pgl.downstream.predict import predict

    written, report = predict(
        arguments.run,
        arguments.source,
        arguments.output,
        arguments.include,
        arguments.exclude,
        arguments.accelerator,
        arguments.inference,
        timeout_s=arguments.timeout_s,
    )
    say(f"{arguments.output}: {len(written)} label maps; class numbers are in labels.json")
    return report.exit_code


def evaluate_arguments(parser: ArgumentParser) -> None:
    """Add the arguments of ``pgl evaluate``."""
    parser.add_argument("predictions", metavar="PREDICTIONS", help="folder of predicted label maps")
    parser.add_argument("labels", metavar="LABELS", help="folder of true label maps of the same names")
    parser.add_argument("--prediction_name", default="*", help="how predictions are called, such as '*_0000'")
    parser.add_argument("--label_name", default="*", help="how labels are called, such as '*_seg'")
    parser.add_argument("--classes", metavar="FILE", help="JSON or YAML file of class names and numbers")
    parser.add_argument(
        "--merge",
        type=dict[str, list[int]],
        metavar="JSON",
        help="numbers of the labels that make up each predicted class, such as '{\"kidney\": [4, 5]}'",
    )
    parser.add_argument("--output", metavar="FILE", help="the scores (default: PREDICTIONS/scores.csv)")
    _add_timeout(parser, "one pair of files")


def evaluate(arguments: Namespace) -> int:
    """Score the label maps; 1 if something could not be."""
    from pathlib import Path

    from rich.console import Console
    from rich.text import Text

    from pgl.downstream.evaluate import evaluate
    from pgl.downstream.results import show, write_csv

    scores, problems = evaluate(
        arguments.predictions,
        arguments.labels,
        arguments.prediction_name,
        arguments.label_name,
        arguments.classes,
        arguments.merge,
        arguments.timeout_s,
    )
    errors = Console(stderr=True)
    for path, reason in problems:
        errors.print(Text(printable(f"not scored: {path}: {reason}")), soft_wrap=True)
    show(scores, Console(), f"cases: {len({s.subject for s in scores})}")
    file = write_csv(arguments.output or Path(arguments.predictions) / "scores.csv", scores)
    say(f"{file}: the scores of each case and class")
    return 1 if problems else 0


def _add_timeout(parser: ArgumentParser, what: str) -> None:
    from pgl.processes.workers import TIMEOUT_S

    parser.add_argument(
        "--timeout_s",
        type=float,
        default=TIMEOUT_S,
        help=f"seconds that reading {what} may take before its process is ended; 0 for no limit",
    )
