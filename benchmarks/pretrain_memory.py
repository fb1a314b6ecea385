"""``python -m benchmarks.pretrain_memory --data CACHE``: does a long pretraining keep its memory?

Runs ``pgl pretrain`` as a process of its own and notes its resident memory, and that of its reading
processes, with the step it has reached. ``--check`` ends with 1 if it grew by more than 50 MB between the
warm-up and the end (the medians of the first and of the last tenth of the notes after the warm-up). It reads
/proc, so it needs Linux.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import torch

from benchmarks.machine import machine
from benchmarks.processes import family, resident_mb

ROOT = Path(__file__).resolve().parents[1]
BAR_MB = 50.0
INTERVAL_S = 0.5


def main(argv: list[str] | None = None) -> int:
    """Run, watch, write the record; 1 with ``--check`` if the memory grew too much or the run failed."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain_memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", type=Path, required=True, help="a cache of `pgl prepare`")
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "sarcoma.yaml")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--warm-up", type=int, default=200, help="steps that do not count")
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--run", type=Path, help="keep the run in this folder")
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as scratch:
        run = options.run or Path(scratch) / "run"
        notes, code = _watch(_command(options, run), run / "metrics.jsonl")
    counted = [mb for step, mb in notes if step >= options.warm_up]
    if code or len(counted) < 20:
        print(f"the run ended with {code}; {len(counted)} notes after the warm-up", file=sys.stderr)
        return 1
    tenth = len(counted) // 10
    first, last = median(counted[:tenth]), median(counted[-tenth:])
    record = {
        "machine": machine(torch.device("cpu")),
        "config": options.config.name,
        "steps": options.steps,
        "warm_up_steps": options.warm_up,
        "workers": options.workers,
        "after_warm_up_mb": round(first, 1),
        "at_the_end_mb": round(last, 1),
        "growth_mb": round(last - first, 1),
        "bar_mb": BAR_MB,
        # Enough points to draw it.
        "step_and_mb": notes[:: max(1, len(notes) // 200)],
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "pretrain-memory.json"
    path.write_text(json.dumps(record) + "\n", "utf-8")
    print(
        f"{options.steps} steps: {first:.0f} MB after the warm-up, {last:.0f} MB at the end, "
        f"{last - first:+.1f} MB (bar {BAR_MB}); written: {path}"
    )
    return int(options.check and last - first > BAR_MB)


def _command(options: argparse.Namespace, run: Path) -> list[str]:
    settings = {
        "--config": options.config,
        "--data": options.data,
        "--output": run,
        "--train.steps": options.steps,
        "--train.workers": options.workers,
        "--train.log_every": 5,
    }
    words = [f"{name}={value}" for name, value in settings.items()]
    return [sys.executable, "-m", "pgl", "pretrain", *words]


def _watch(command: list[str], metrics: Path) -> tuple[list[tuple[int, float]], int]:
    """(step, MB) at intervals while the command runs, and its exit code."""
    notes = []
    process = subprocess.Popen(command, cwd=ROOT)
    try:
        while process.poll() is None:
            time.sleep(INTERVAL_S)
            memory = sum(resident_mb(pid) for pid in family(process.pid))
            if metrics.exists() and memory:
                notes.append((_last_step(metrics), round(memory, 2)))
    finally:
        if process.poll() is None:
            process.terminate()
        process.wait()
    return notes, process.returncode


def _last_step(metrics: Path) -> int:
    with metrics.open("rb") as file:
        file.seek(max(0, metrics.stat().st_size - 2000))
        tail = file.read().decode("utf-8", "replace").splitlines()
    for line in reversed(tail):
        try:
            return int(json.loads(line)["step"])
        except (ValueError, KeyError, TypeError):
            continue
    return 0


if __name__ == "__main__":
    sys.exit(main())
