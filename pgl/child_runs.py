"""Runs as processes of their own, so that none inherits anything from the one before."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from pgl.atomic import write_text
from pgl.checkpoint import LAST, checkpoint_path, load_checkpoint
from pgl.config import PretrainConfig, to_plain
from pgl.run_folder import CONFIG


def run_pgl(words: Sequence[str]) -> int:
    """Run ``pgl`` with these words, hand signals on to it, and return its exit code."""
    process = subprocess.Popen([sys.executable, "-m", "pgl", *words])
    with _forwarded(process, signal.SIGTERM, signal.SIGUSR1):
        while True:
            try:
                return process.wait()
            except KeyboardInterrupt:
                # The terminal has told the run as well, which now finishes its step and saves.
                continue


def write_child_settings(folder: Path, plain: dict[str, object]) -> Path:
    """The settings of a run as a file beside its folder, which must not exist when it starts."""
    import yaml

    path = folder.parent / f"{folder.name}.yaml"
    kept = {key: value for key, value in plain.items() if key != "resume"}
    write_text(path, yaml.safe_dump(kept, sort_keys=False, default_flow_style=None))
    return path


def pretrain_in_child(run: PretrainConfig) -> int:
    """``pgl pretrain`` with these settings, from its last checkpoint if there is one; its exit code."""
    folder = Path(run.output)
    words = ["pretrain", "--config", str(write_child_settings(folder, to_plain(run)))]
    if checkpoint_path(folder, LAST).is_file():
        words.append("--resume")
    elif (folder / CONFIG).is_file():
        # Killed before its first checkpoint: there is nothing to go on from.
        shutil.rmtree(folder)
    return run_pgl(words)


def is_pretrained(run: Path, steps: int) -> bool:
    """Whether a run's last checkpoint is that of its last step."""
    last = checkpoint_path(run, LAST)
    return last.is_file() and int(load_checkpoint(last)["step"]) >= steps


@contextmanager
def _forwarded(process: subprocess.Popen[bytes], *numbers: signal.Signals) -> Iterator[None]:
    """Hand signals on to the run, which saves its state and ends."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, lambda got, _: process.send_signal(got)) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
