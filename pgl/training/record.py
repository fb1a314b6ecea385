"""What a run leaves behind while it goes: metrics.jsonl, TensorBoard, log.txt, and the line on the
terminal."""

from __future__ import annotations

import errno
import json
import os
import platform
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch.utils.tensorboard import SummaryWriter

import pgl
from pgl.files.atomic import write_json, write_text
from pgl.printing import printable_lines
from pgl.runs.folder import CONFIG, ENVIRONMENT, LOG, METRICS, TENSORBOARD


class RunRecord:
    """The record of one run, written by the first process alone.

    Args:
        folder: RUN.
        step: steps already done; metrics of later steps, left by an interrupted run, are dropped.
        steps: steps of the whole run.
        enabled: False on every process but the first: then nothing is written or shown.
    """

    def __init__(self, folder: Path, step: int, steps: int, enabled: bool) -> None:
        self.folder = folder
        self.enabled = enabled
        self.console = Console(stderr=True, quiet=not enabled)
        if not enabled:
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            if step == 0:
                (folder / METRICS).unlink(missing_ok=True)
            _drop_later_lines(folder / METRICS, step)
            self.tensorboard = SummaryWriter(str(folder / TENSORBOARD), purge_step=step + 1 if step else None)
        except OSError as error:
            raise _not_written(Path(error.filename or folder), error) from error
        self.progress = Progress(
            BarColumn(bar_width=8),
            MofNCompleteColumn(),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(compact=True),
            console=self.console,
        )
        self.task = self.progress.add_task("", total=steps, completed=step, numbers="")
        self.shown: dict[str, str] = {}

    def say(self, text: str, style: str = "") -> None:
        """Print a line and keep it in log.txt."""
        if self.enabled:
            text = printable_lines(text)
            self.console.print(text, style=style, markup=False, highlight=False, soft_wrap=True)
            _append(self.folder / LOG, f"{time.strftime('%Y-%m-%d %H:%M:%S')} {text}")

    def write(self, kind: str, step: int, numbers: dict[str, float]) -> None:
        """Append a line to metrics.jsonl and TensorBoard, and show it."""
        if not self.enabled:
            return
        _append(self.folder / METRICS, json.dumps({"kind": kind, "step": step, **numbers}))
        try:
            for name, value in numbers.items():
                self.tensorboard.add_scalar(f"{kind}/{name}", value, step)
        except OSError as error:
            raise _not_written(self.folder / TENSORBOARD, error) from error
        if kind == "train":
            speed = f"{numbers['steps_per_s']:.2f} steps/s"
            self.show(step, loss=f"loss {numbers['loss']:.3f}", speed=speed)
        else:
            matching, spread = numbers["matching_accuracy"], numbers["feature_spread"]
            self.show(step, matching=f"matching {matching:.3f}", spread=f"spread {spread:.2f}")

    def show(self, step: int, **numbers: str) -> None:
        """Move the progress bar to ``step``, with these numbers changed."""
        if self.enabled:
            self.shown.update(numbers)
            known = [self.shown[key] for key in ("loss", "matching", "spread", "speed") if key in self.shown]
            self.progress.update(self.task, completed=step, numbers=" ".join(known))

    def start(self) -> None:
        """Show the progress bar."""
        if self.enabled:
            self.progress.start()

    def secure(self) -> None:
        """Have the lines so far on the disk, before a checkpoint says that its run got so far."""
        path = self.folder / METRICS
        if not self.enabled or not path.exists():
            return
        try:
            with path.open("ab") as file:
                os.fsync(file.fileno())
        except OSError as error:
            # Some file systems cannot; what they keep over a power cut is their own affair.
            if error.errno not in (errno.EINVAL, errno.ENOTSUP):
                raise _not_written(path, error) from error

    def close(self) -> None:
        """Take the bar away and flush TensorBoard."""
        if self.enabled:
            self.progress.stop()
            # What it holds stands in metrics.jsonl too; an error here would hide the one that ended the run.
            with suppress(OSError):
                self.tensorboard.close()


def write_settings(folder: Path, plain_config: dict[str, Any]) -> None:
    """Write config.yaml, in the order of the settings' definition."""
    import yaml

    write_text(folder / CONFIG, yaml.safe_dump(plain_config, sort_keys=False, default_flow_style=None))


def write_environment(
    folder: Path,
    device: torch.device,
    world_size: int,
    precision: str,
    cases: dict[str, list[str]] | None = None,
) -> None:
    """Add this start of the run to environment.json: versions, machine, command line.

    Args:
        folder: RUN.
        device: on which this process trains.
        world_size: processes that train together.
        precision: Lightning Fabric's name of it.
        cases: which train and which validate; None where another file tells.
    """
    path = folder / ENVIRONMENT
    starts = _earlier_starts(path)
    on_cuda = device.type == "cuda"
    start = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": sys.argv,
        "pgl_ops": pgl.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": torch.cuda.get_device_name(device) if on_cuda else "cpu",
        "processes": world_size,
        "cpu_cores": os.cpu_count(),
        "cpu_threads": torch.get_num_threads(),
        "precision": precision,
    }
    write_json(path, {**({} if cases is None else {"cases": cases}), "starts": [*starts, start]})


def _earlier_starts(path: Path) -> list[object]:
    if not path.exists():
        return []
    try:
        starts = json.loads(path.read_text("utf-8"))["starts"]
        if not isinstance(starts, list):
            raise TypeError(f"starts is {type(starts).__name__}")
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error!r}): delete it; only what it tells is lost") from error
    return starts


def _append(path: Path, line: str) -> None:
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")
    except OSError as error:
        raise _not_written(path, error) from error


def _not_written(path: Path, error: OSError) -> OSError:
    told = OSError(
        f"cannot write {path}: {error.strerror or error}; the checkpoints are unchanged: make room or permit "
        "writing, then go on with --resume"
    )
    told.errno = error.errno
    return told


def _drop_later_lines(path: Path, step: int) -> None:
    if not path.exists():
        return
    kept = []
    for line in path.read_text("utf-8").splitlines():
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            # A crash can cut the last line short.
            continue
    write_text(path, "".join(f"{line}\n" for line in kept))
