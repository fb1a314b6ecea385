"""Notes of a long run -> figures, and what did not hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any


@dataclass(frozen=True)
class Note:
    """What a run and its reading processes had taken at one moment.

    Attributes:
        seconds: since its first step.
        waited_s: of these, how many it was ready but had no core.
        step: steps done.
        mb: resident memory of all its processes, MiB.
        open_files: file descriptors of all its processes.
        processes: how many these are.
        checkpoints: files in the folder of checkpoints, unfinished ones too.
        checkpoints_mb: their size together, MiB (a second name of a file counts again).
        largest_mb: size of the largest, MiB.
    """

    seconds: float
    waited_s: float
    step: int
    mb: float
    open_files: int
    processes: int
    checkpoints: int
    checkpoints_mb: float
    largest_mb: float


@dataclass(frozen=True)
class Limits:
    """What a run must keep to.

    Attributes:
        warm_up_s: seconds that do not count.
        most_checkpoints: files that may lie there at any moment.
        growth_mb: from the median of the first to that of the last sixth of the time that counts.
        growth_files: of the fewest open files of the first and of the last third. A batch on its way from a
            reading process is some open files, so their number goes up and down; what is never closed raises
            even the lowest.
        slowest: steps a second of the last third over those of the first.
        checkpoint_growth: size of the largest checkpoint, as a multiple of that in the first third. With
            their number it bounds the bytes.
    """

    warm_up_s: float
    most_checkpoints: int
    growth_mb: float = 50.0
    growth_files: int = 3
    slowest: float = 0.9
    checkpoint_growth: float = 1.1


FEWEST_NOTES = 18


def verdict(notes: Sequence[Note], limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """The figures of a run, and a line for each thing that did not hold."""
    counted = [note for note in notes if note.seconds >= limits.warm_up_s]
    if len(counted) < FEWEST_NOTES:
        return {}, [f"only {len(counted)} notes after the warm-up, at least {FEWEST_NOTES} are needed"]
    sixth, third = len(counted) // 6, len(counted) // 3
    first, last = counted[:sixth], counted[-sixth:]
    mb = [median(note.mb for note in part) for part in (first, last)]
    files = [min(note.open_files for note in part) for part in (counted[:third], counted[-third:])]
    own = [_speed(part, waiting=False) for part in (counted[:third], counted[-third:])]
    wall = [_speed(part, waiting=True) for part in (counted[:third], counted[-third:])]
    most = max(note.checkpoints for note in counted)
    largest = [max(note.largest_mb for note in part) for part in (counted[:third], counted)]
    figures = {
        "steps": counted[-1].step,
        "mb_first_and_last": [round(value, 1) for value in mb],
        "fewest_open_files_first_and_last": files,
        "most_open_files": max(note.open_files for note in counted),
        "steps_per_s_first_and_last_third": [round(value, 3) for value in own],
        "throughput_ratio": round(own[1] / own[0], 3) if own[0] else 0.0,
        "throughput_ratio_with_waiting_for_a_core": round(wall[1] / wall[0], 3) if wall[0] else 0.0,
        "waited_for_a_core_s": round(counted[-1].waited_s, 1),
        "most_checkpoints": most,
        "most_checkpoints_mb": round(max(note.checkpoints_mb for note in counted), 2),
        "largest_checkpoint_mb_first_third_and_all": [round(value, 2) for value in largest],
    }
    broken = []
    if mb[1] - mb[0] > limits.growth_mb:
        broken.append(f"memory grew from {mb[0]:.0f} to {mb[1]:.0f} MB, by more than {limits.growth_mb:.0f}")
    if files[1] - files[0] > limits.growth_files:
        broken.append(f"open files grew from {files[0]} to {files[1]} at the least")
    if own[1] < limits.slowest * own[0] or not own[0]:
        broken.append(
            f"{own[0]:.3f} steps/s in the first third, {own[1]:.3f} in the last: below {limits.slowest} of it"
        )
    if most > limits.most_checkpoints:
        broken.append(f"{most} checkpoints at once, more than {limits.most_checkpoints}")
    if largest[1] > limits.checkpoint_growth * largest[0]:
        broken.append(f"the largest checkpoint grew from {largest[0]:.2f} to {largest[1]:.2f} MB")
    return figures, broken


def _speed(part: Sequence[Note], waiting: bool) -> float:
    """Steps a second over the notes, with or without the time spent waiting for a core."""
    seconds = part[-1].seconds - part[0].seconds
    if not waiting:
        seconds -= part[-1].waited_s - part[0].waited_s
    return (part[-1].step - part[0].step) / seconds if seconds > 0 else 0.0
