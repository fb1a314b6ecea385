"""Runs that are killed: ``python killed_runs.py SETTINGS POINT…`` starts a run and kills it at each point in
turn, resuming it in between, then lets it end. Each time is a process of its own, forked before any of them
has used torch. Prints how each one ended.

A point is ``step:N``, ``save:N`` (in the midst of the N-th checkpoint that this start writes),
``before-rename:N``, ``after-rename:N`` (of the N-th file written atomically), ``line:N`` (in the midst of the
N-th line of metrics), or ``after:SECONDS``.
"""

from __future__ import annotations

import io
import os
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import torch
import yaml

from pgl import pretrain as trainer
from pgl.config import from_plain
from pgl.training import record


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def arm(point: str) -> None:
    kind, _, number = point.partition(":")
    seen = iter(range(1, 10**9))

    def now() -> bool:
        return next(seen) == int(number)

    original_step, original_save, original_replace = trainer._Run._training_step, torch.save, os.replace
    original_append = record._append

    def step(self, pieces):
        if self.step == int(number):
            die()
        return original_step(self, pieces)

    def save(content, stream):
        if now():
            whole = io.BytesIO()
            original_save(content, whole)
            stream.write(whole.getvalue()[: len(whole.getvalue()) // 2])
            stream.flush()
            die()
        original_save(content, stream)

    def rename(source, target):
        dying = now()
        if dying and kind == "before-rename":
            die()
        original_replace(source, target)
        if dying:
            die()

    def append(path, line):
        if path.name == "metrics.jsonl" and now():
            with path.open("a", encoding="utf-8") as file:
                file.write(line[: len(line) // 2])
            die()
        original_append(path, line)

    if kind == "step":
        trainer._Run._training_step = step
    elif kind == "save":
        torch.save = save
    elif kind.endswith("rename"):
        os.replace = rename
    elif kind == "line":
        record._append = append
    elif kind == "after":
        threading.Thread(target=lambda: (time.sleep(float(number)), die()), daemon=True).start()
    elif kind:
        raise ValueError(point)


def main() -> int:
    config = from_plain(yaml.safe_load(Path(sys.argv[1]).read_text("utf-8")))
    for point in [*sys.argv[2:], ""]:
        sys.stdout.flush()
        child = os.fork()
        if not child:
            arm(point)
            resume = config.output.exists() and (config.output / "environment.json").exists()
            trainer.pretrain(replace(config, resume=resume))
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(point, status)
        if status > 0 or (status < 0 and status != -signal.SIGKILL):
            return 1
    return status


if __name__ == "__main__":
    sys.exit(main())
