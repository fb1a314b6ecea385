"""Runs as processes of their own, so that none inherits anything from the one before."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from pgl.config import PretrainConfig
from pgl.files.atomic import write_text
from pgl.files.lock import only_writer
from pgl.processes.safe_path import environment
from pgl.processes.worker_signals import handled_by
from pgl.runs.folder import CONFIG, LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import load_checkpoint

_running: set[subprocess.Popen[bytes]] = set()
_lock = threading.Lock()


class RunsStopped(RuntimeError):
    """Not all of several runs came to their end.

    Args:
        message: which one did not.
        code: how that one ended: its exit code, or the number of the signal that ended it, negative.

    Attributes:
        exit_code: what to end with, as a shell tells it: 128 and the number for a signal.
    """

    def __init__(self, message: str, code: int) -> None:
        super().__init__(message)
        self.exit_code = code if code > 0 else 128 - code


def run_pgl(words: Sequence[str], log: Path | None = None) -> int:
    """Run ``pgl`` with these words, hand signals on to it, and return its exit code.

    Args:
        words: of the command line.
        log: where what it prints is appended to; None leaves it on the terminal.
    """
    started: list[subprocess.Popen[bytes]] = []
    early: list[int] = []

    def hand_on(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT:
            return  # The terminal has told the run as well, which now finishes its step and saves.
        for process in started:
            process.send_signal(number)
        if not started:
            early.append(number)

    # Before the start: a signal between it and the handlers would end this process, and the run would go on.
    with handled_by(hand_on):
        with _printing_to(log) as where:
            process = subprocess.Popen(
                [sys.executable, "-m", "pgl", *words],
                stdout=where,
                stderr=where,
                env={**os.environ, **environment()},
            )
        started.append(process)
        for number in early:
            process.send_signal(number)
        with _lock:
            _running.add(process)
        try:
            return process.wait()
        finally:
            with _lock:
                _running.discard(process)


def signal_running(number: signal.Signals, besides: set[int]) -> set[int]:
    """Send a signal to the runs in progress, but to those named by their process ids; whom it was sent to."""
    with _lock:
        told = {process.pid for process in _running} - besides
        for process in _running:
            if process.pid in told:
                process.send_signal(number)
    return told


def write_child_settings(folder: Path, plain: dict[str, object]) -> Path:
    """The settings of a run as a file beside its folder, which must not exist when it starts."""
    import yaml

    path = folder.parent / f"{folder.name}.yaml"
    kept = {key: value for key, value in plain.items() if key != "resume"}
    write_text(path, yaml.safe_dump(kept, sort_keys=False, default_flow_style=None))
    return path


def pretrain_in_child(run: PretrainConfig, log: Path | None = None) -> int:
    """``pgl pretrain`` with these settings, from its last checkpoint if there is one; its exit code."""
    folder = Path(run.output)
    words = ["pretrain", "--config", str(write_child_settings(folder, to_plain(run)))]
    if checkpoint_path(folder, LAST).is_file():
        words.append("--resume")
    elif (folder / CONFIG).is_file():
        # Killed before its first checkpoint: there is nothing to go on from.
        remove_run(folder)
    return run_pgl(words, log)


def remove_run(folder: Path) -> None:
    """Delete the folder of a run that was killed.

    Raises:
        InUse: it was not killed, but goes on: whoever started it was.
    """
    with only_writer(folder):
        shutil.rmtree(folder)


def is_pretrained(run: Path, steps: int) -> bool:
    """Whether a run's last checkpoint is that of its last step."""
    last = checkpoint_path(run, LAST)
    return last.is_file() and int(load_checkpoint(last)["step"]) >= steps


@contextmanager
def _printing_to(log: Path | None) -> Iterator[int | None]:
    if log is None:
        yield None
        return
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("ab") as file:
        yield file.fileno()
