"""``python -m benchmarks.soak``: does a long pretraining stay as it was in its first minutes?

Makes synthetic CT, prepares it, and runs ``pgl pretrain`` on it as a process of its own, with reading
processes, validations, checkpoints and kept checkpoints, all far more often than usual, for the time given.
Meanwhile it notes resident memory and open files of the run and its reading processes, steps done, and number
and bytes of the checkpoints. Then the run gets SIGTERM, as from a cluster, and must save and end.

Ends with 1, and says which, if after the warm-up (the first tenth of the time)

- memory grew by more than 50 MB (medians of the first and the last sixth), or open files by more than 3;
- the last third was slower than 0.9 of the first, in steps a second (``--slowest``);
- there were more checkpoints than the settings allow, or they became larger;
- the run failed, or did not save when it was told to end.

Other programs on the machine make the run wait for a core. Linux counts that time (/proc/PID/schedstat), and
it is left out of the speed that is judged; the record holds both. It reads /proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.machine import machine
from benchmarks.processes import family, open_files, resident_mb, waited_s
from benchmarks.soak_verdict import Limits, Note, verdict

ROOT = Path(__file__).resolve().parents[1]
KEPT = 3
# initial.pt, best.pt, last.pt, the kept ones, and one of each that is just being written.
MOST_CHECKPOINTS = 3 + KEPT + 2
SECONDS_TO_SAVE = 300.0
ENDED_BY_SIGNAL = 130


def main(argv: list[str] | None = None) -> int:
    """Run, watch, judge, write the record; 1 if anything did not hold."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=3600.0, help="how long to pretrain")
    parser.add_argument("--fewest_steps", type=int, default=0, help="and longer, until so many are done")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "smoke.yaml")
    parser.add_argument("--workers", type=int, default=1, help="reading processes")
    parser.add_argument("--log_every", type=int, default=5, help="steps between lines of metrics")
    parser.add_argument("--every", type=int, default=20, help="steps between checkpoints, and validations")
    parser.add_argument("--cases", type=int, default=4, help="synthetic CTs to make")
    parser.add_argument("--size", default="24,80,80", help="voxels of each (D,H,W)")
    parser.add_argument("--slowest", type=float, default=0.9, help="speed of the last third over the first's")
    parser.add_argument("--data", type=Path, help="a cache to take instead of making one")
    parser.add_argument("--folder", type=Path, help="keep data and run here (must not hold a run)")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "soak.json")
    options = parser.parse_args(argv)
    if options.seconds < 10:
        parser.error(f"--seconds must be at least 10, got {options.seconds}")
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        cache = options.data or _prepared(folder, options)
        command = _pretraining(folder, cache, options)
        watched = watch(command, folder / "run", options.seconds, options.fewest_steps)
    limits = Limits(options.seconds / 10, MOST_CHECKPOINTS, slowest=options.slowest)
    figures, broken = verdict(watched.notes, limits)
    if watched.code != ENDED_BY_SIGNAL:
        broken.append(f"the run ended with exit code {watched.code}, not with {ENDED_BY_SIGNAL} after saving")
    record = {
        "machine": machine(torch.device("cpu")),
        "config": options.config.name,
        "seconds": round(watched.notes[-1].seconds, 1) if watched.notes else 0.0,
        "workers": options.workers,
        "steps_between_checkpoints": options.every,
        **figures,
        "broken": broken,
        "columns": ["seconds", "step", "mb", "open_files", "checkpoints"],
        "notes": [
            [round(n.seconds, 1), n.step, round(n.mb, 1), n.open_files, n.checkpoints]
            for n in watched.notes[:: max(1, len(watched.notes) // 200)]
        ],
    }
    options.output.parent.mkdir(parents=True, exist_ok=True)
    options.output.write_text(json.dumps(record) + "\n", "utf-8")
    print("\n".join(f"{name}: {value}" for name, value in figures.items()))
    print(f"written: {options.output}")
    for line in broken:
        print(f"BROKEN: {line}", file=sys.stderr)
    print("soak: " + (f"{len(broken)} things did not hold" if broken else "all held"))
    return int(bool(broken))


@dataclass(frozen=True)
class Watched:
    """A run that was watched: the notes of it, and how it ended."""

    notes: list[Note]
    code: int


def watch(command: list[str], run: Path, seconds: float, fewest_steps: int = 0) -> Watched:
    """Run the command for so long, noting what it takes; then SIGTERM.

    Args:
        command: a pretraining, or anything that writes ``metrics.jsonl`` and ``checkpoints/`` in ``run``.
        run: its folder.
        seconds: from the first step on.
        fewest_steps: and until so many are done.
    """
    notes: list[Note] = []
    interval = min(2.0, seconds / 100)
    began: float | None = None
    waited_before = 0.0
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(interval)
            step = _last_step(run / "metrics.jsonl")
            now = time.monotonic()
            if began is None:
                if step:
                    began, waited_before = now, waited_s(process.pid) or 0.0
                continue
            if now - began > seconds and step >= fewest_steps:
                process.send_signal(signal.SIGTERM)
                process.wait(SECONDS_TO_SAVE)
                break
            notes.append(_note(process.pid, run, now - began, step, waited_before))
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
    return Watched(notes, process.returncode)


def _note(pid: int, run: Path, seconds: float, step: int, waited_before: float) -> Note:
    members = family(pid)
    waited = waited_s(pid)
    sizes_mb = _checkpoints_mb(run / "checkpoints")
    return Note(
        seconds=seconds,
        waited_s=0.0 if waited is None else waited - waited_before,
        step=step,
        mb=sum(map(resident_mb, members)),
        open_files=sum(map(open_files, members)),
        processes=len(members),
        checkpoints=len(sizes_mb),
        checkpoints_mb=sum(sizes_mb),
        largest_mb=max(sizes_mb, default=0.0),
    )


def _checkpoints_mb(folder: Path) -> list[float]:
    sizes = []
    for file in folder.glob("*") if folder.is_dir() else ():
        try:
            sizes.append(file.stat().st_size / 2**20)
        except FileNotFoundError:  # renamed meanwhile
            continue
    return sizes


def _last_step(metrics: Path) -> int:
    try:
        with metrics.open("rb") as file:
            file.seek(max(0, metrics.stat().st_size - 4000))
            tail = file.read().decode("utf-8", "replace")
    except FileNotFoundError:
        return 0
    steps = re.findall(r'"kind": "train", "step": (\d+)', tail)
    return int(steps[-1]) if steps else 0


def _prepared(folder: Path, options: argparse.Namespace) -> Path:
    cache = folder / "cache"
    size = ["--size", options.size, "--cases", options.cases]
    for words in (
        ["phantom", "--output", folder / "ct", "--overwrite", *size],
        ["prepare", folder / "ct" / "images", "--output", cache, "--workers", 1],
    ):
        subprocess.run([sys.executable, "-m", "pgl", *map(str, words)], cwd=ROOT, check=True)
    return cache


def _pretraining(folder: Path, cache: Path, options: argparse.Namespace) -> list[str]:
    settings = {
        "--config": options.config,
        "--data": cache,
        "--output": folder / "run",
        # It never gets there: time ends it.
        "--train.steps": 10**8,
        "--train.workers": options.workers,
        "--train.threads": 1,
        "--train.log_every": options.log_every,
        "--train.checkpoint_every": options.every,
        "--train.keep_every": 2 * options.every,
        "--train.kept": KEPT,
        "--validation.every": options.every,
    }
    return [sys.executable, "-m", "pgl", "pretrain", *(f"{name}={value}" for name, value in settings.items())]


if __name__ == "__main__":
    sys.exit(main())
