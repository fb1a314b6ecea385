"""The command ``pgl``: one sub-command for each stage from image files to pretrained weights.

The package only turns words into settings, and errors into one line and an exit code: 0 done, 1 failed
(``prepare``: something was rejected), 2 wrong usage, 130 interrupted. This file holds the table of commands,
the others their words. What a stage needs is imported when it is chosen, so that ``pgl --help`` is quick and
works without the training extra.
"""

from __future__ import annotations

import argparse
import io
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pgl
from pgl.cli import ablate, compare, data, downstream, export, pretrain, runs
from pgl.cli.text import expand, explain, usage_message, value_of
from pgl.printing import printable
from pgl.runs.folder import CONFIG, refuse_what_is_no_run
from pgl.settings import instantiated

if TYPE_CHECKING:
    from argparse import HelpFormatter

    from jsonargparse import ArgumentParser, Namespace

FAILED, WRONG_USAGE, INTERRUPTED, READER_GONE = 1, 2, 130, 141
_POSITIONALS = ("source", "run", "predictions", "labels")
_EXAMPLE = """\
  pgl phantom --output ct --cases 6
  pgl prepare ct/images --output cache
  pgl pretrain --data cache --output run --config configs/smoke.yaml
  pgl report run
  pgl export run --output encoder.pt"""
# A setting of a group is required where the group is made anew, and has a default where it is not.
_REQUIRED_WITH_DEFAULT = re.compile(r"\(required,\s+(type:(?:(?!\(required|\n\s+--).)*?default:)", re.DOTALL)
_TRIPLES = "Triples are in the order (D, H, W) and written 3,1,1."


class UsageError(Exception):
    """The command line is wrong; the message says where."""


@dataclass(frozen=True)
class Command:
    """A sub-command.

    Args:
        summary: one line for ``pgl --help``.
        usage: its arguments in brief.
        describe: adds its arguments to a parser; imports no more than that needs.
        run: does it with the parsed arguments and returns the exit code.
        check: raises ValueError for arguments that cannot work, before ``run`` is called.
        note: what its help says besides.
    """

    summary: str
    usage: str
    describe: Callable[[ArgumentParser], None]
    run: Callable[[Namespace], int]
    check: Callable[[Namespace], object] = lambda arguments: None
    note: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line ``argv`` (default: the process's own) and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if isinstance(sys.stdout, io.TextIOWrapper):
        # Where a locale lacks a character, a mark takes its place, as on stderr: no work is lost for it.
        sys.stdout.reconfigure(errors="backslashreplace")
    debug = "--debug" in words or os.environ.get("PGL_DEBUG", "0") not in ("", "0")
    words = [word for word in words if word != "--debug"]
    name = f"pgl {words[0]}" if words and words[0] in COMMANDS else "pgl"
    try:
        code = _run(words)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt:
        _say(f"{name}: interrupted")
        return INTERRUPTED
    except BrokenPipeError:
        # Whoever read our output has gone: nothing more can be said there, not even by the flush at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return READER_GONE
    except UsageError as error:
        if debug:
            raise
        _say(f"{name}: {error} (see `{name} --help`)")
        return WRONG_USAGE
    except Exception as error:
        if debug:
            raise
        _say(f"{name}: {explain(error)}")
        return FAILED


def _run(words: list[str]) -> int:
    if not words:
        _overview().print_help(sys.stderr)
        return WRONG_USAGE
    if words[0] not in COMMANDS:
        return _without_command(words)
    name, command = words[0], COMMANDS[words[0]]
    words = expand(words[1:])
    if name in ("pretrain", "finetune"):
        words = _settings_to_resume(name, words) + words
    from jsonargparse import ArgumentError

    parser = _parser(name, command)
    try:
        arguments = instantiated(parser, parser.parse_args(words))
        command.check(arguments)
    except ArgumentError as error:
        raise UsageError(usage_message(str(error), _POSITIONALS, words)) from error
    except ValueError as error:  # of a settings class, or of the check
        raise UsageError(explain(error)) from error
    except SystemExit as done:  # --help and --print_config
        return int(done.code or 0)
    return command.run(arguments)


def _settings_to_resume(name: str, words: list[str]) -> list[str]:
    """``--resume`` without ``--config`` goes on with the settings that the run has written."""
    output = value_of("--output", words)
    if output is None or value_of("--resume", words) != "true" or value_of("--config", words) is not None:
        return []
    written = Path(output) / CONFIG
    if written.is_file():
        return [f"--config={written}"]
    if name == "finetune":
        raise FileNotFoundError(f"no run of `pgl finetune` at {output} to resume: it has no {CONFIG}")
    refuse_what_is_no_run(Path(output))
    return []


COMMANDS = {
    "phantom": Command(
        "make synthetic abdominal CT with labels, to try everything without data",
        "--output DIR [--cases N] [--seed S] [--size D,H,W] [--spacing_mm D,H,W] [--overwrite]",
        data.phantom_arguments,
        data.phantom,
        note=_TRIPLES,
    ),
    "prepare": Command(
        "turn folders of CT, DICOM or any other format, into one cache for training",
        "SOURCE [SOURCE ...] --output CACHE [--spacing_mm D,H,W] [--labels DIR] [options]",
        data.prepare_arguments,
        data.prepare,
        data.check_prepare,
        f"{_TRIPLES} Exits with 1 if a file was rejected; the others are in the cache all the same.",
    ),
    "pretrain": Command(
        "pretrain an encoder on a cache, without labels",
        "--data CACHE --output RUN [--config FILE] [--key value ...] [--resume]",
        pretrain.pretrain_arguments,
        pretrain.pretrain,
        pretrain.check_pretrain,
        _TRIPLES,
    ),
    "show": Command(
        "draw a run: its views, its features before and after, its curves",
        "RUN [--output DIR] [--pairs N] [--data CACHE]",
        runs.show_arguments,
        runs.show,
    ),
    "report": Command(
        "write a run, or several compared, as one HTML page that needs no network",
        "RUN [RUN ...] [--output FILE] [--pairs N] [--data CACHE]",
        runs.report_arguments,
        runs.report,
        runs.check_report,
    ),
    "status": Command(
        "say how a run is doing, from another shell",
        "RUN [--json]",
        runs.status_arguments,
        runs.status,
        note="Exits with 0 if the run goes on or has finished, 3 if it was stopped or failed before its end "
        "or is silent, 4 if it goes on or has finished with warnings, and 1 if there is no run.",
    ),
    "ablate": Command(
        "pretrain with the crop and the flip prior each on and off, and compare",
        "--data CACHE --output DIR [--config FILE] [--seeds S,S,...] [--key value ...]",
        ablate.ablate_arguments,
        ablate.ablate,
        ablate.check_ablate,
        f"{_TRIPLES} Runs that are done are kept; the same command goes on with the others.",
    ),
    "export": Command(
        "write a run's weights to one file, for fine-tuning, PyTorch and MONAI, or for nnU-Net",
        "RUN --output FILE [--format encoder|nnunet|nnssl] [--checkpoint last|best|initial] [options]",
        export.export_arguments,
        export.export,
        export.check_export,
        _TRIPLES,
    ),
    "finetune": Command(
        "train a segmentation network from few labels, on pretrained weights or none, and test it",
        "--data CACHE --weights FILE|random --output RUN [--fraction F] [--seed S] [--config FILE] [options]",
        downstream.finetune_arguments,
        downstream.finetune,
        downstream.check_finetune,
        _TRIPLES,
    ),
    "predict": Command(
        "segment images with a fine-tuned network, each on its own grid",
        "RUN SOURCE [SOURCE ...] --output DIR [options]",
        downstream.predict_arguments,
        downstream.predict,
        note="Exits with 1 if a file was rejected; the others are segmented all the same.",
    ),
    "evaluate": Command(
        "score a folder of predicted label maps against the true ones",
        "PREDICTIONS LABELS [--output FILE] [options]",
        downstream.evaluate_arguments,
        downstream.evaluate,
        note="Exits with 1 if something has no partner or cannot be compared.",
    ),
    "compare": Command(
        "pretrain by PGL and the baselines, fine-tune from each and from none, and tabulate Dice",
        "--data CACHE --output DIR [--pretrain FILE] [--finetune FILE] [--fractions F,F,...] "
        "[--seeds S,S,...] [options]",
        compare.compare_arguments,
        compare.compare,
        compare.check_compare,
        f"{_TRIPLES} Runs that are done are kept; the same command goes on with the others.",
    ),
}


def _overview() -> argparse.ArgumentParser:
    width = max(map(len, COMMANDS)) + 2
    stages = "\n".join(f"  {name:{width}}{command.summary}" for name, command in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="pgl",
        usage="pgl COMMAND [arguments]",
        description="Self-supervised pretraining of 3D networks on unlabelled CT (PGL, arXiv 2011.12640).",
        epilog=(
            f"commands, in the order of their use:\n{stages}\n\n"
            f"for example:\n{_EXAMPLE}\n\n`pgl COMMAND --help` tells more."
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        exit_on_error=False,
    )
    parser.add_argument("--version", action="version", version=f"pgl-ops {pgl.__version__}")
    parser.add_argument(
        "--debug", action="store_true", help="show the whole traceback of an error (or PGL_DEBUG=1)"
    )
    return parser


def _without_command(words: list[str]) -> int:
    try:
        _, unknown = _overview().parse_known_args(words)
    except SystemExit as done:  # --help and --version
        return int(done.code or 0)
    kind = "option" if unknown[0].startswith("-") else "command"
    raise UsageError(f"unknown {kind} {unknown[0]!r}, expected one of {', '.join(COMMANDS)}")


def _parser(name: str, command: Command) -> ArgumentParser:
    from jsonargparse import ArgumentParser

    class Parser(ArgumentParser):
        def format_help(self, formatter: HelpFormatter | None = None) -> str:
            # The help of settings is their docstring, whose markup is not for terminals.
            text = re.sub(r"\s+\(default:\s+null\)", "", super().format_help(formatter))
            text = re.sub(r"(\s+\|\s+null)?,\s+default:\s+null\)", ")", text)
            text = _REQUIRED_WITH_DEFAULT.sub(r"(\1", text)
            text = re.sub(r"<class\s+'(\w+)'>", r"\1", text)
            return re.sub(r":\w+:`([^`]*)`", r"\1", text).replace("``", "")

    parser = Parser(
        prog=f"pgl {name}",
        usage=f"pgl {name} {command.usage}",
        description=f"{command.summary[0].upper()}{command.summary[1:]}. {command.note}",
        exit_on_error=False,
        # An abbreviation would change its meaning with the next option.
        allow_abbrev=False,
    )
    command.describe(parser)
    return parser


def _say(line: str) -> None:
    # Names of files and texts of settings end up in messages: they must not steer the terminal.
    print(printable(line), file=sys.stderr, flush=True)
