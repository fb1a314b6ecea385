"""What is watched while a run goes: its losses, its speed, and whether it is asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning_fabric import Fabric

from pgl.files.atomic import write_json
from pgl.processes.worker_signals import handled_by
from pgl.training.contexts import Batch

# A terminal and a launcher may both pass the same Ctrl-C on.
_SECONDS_TO_A_SECOND_ONE = 1.0


class LossWatch:
    """The losses since the last line of metrics, left on the device so that no step waits for them.

    Args:
        fabric: the processes that train together.
        case_ids: names of the cache's cases.
        folder: of the run, where a batch with a bad loss is described.
        step: steps done so far.
        pending: losses of those among them that no line of metrics holds yet.
    """

    def __init__(
        self, fabric: Fabric, case_ids: list[str], folder: Path, step: int = 0, pending: Sequence[float] = ()
    ) -> None:
        self.fabric, self.case_ids, self.folder = fabric, case_ids, folder
        self.step = step
        self.values = [torch.tensor(value, device=fabric.device) for value in pending]
        self.unchecked: list[tuple[int, torch.Tensor, Sequence[Batch]]] = []
        self.began = self.clock = time.perf_counter()
        self.steps = 0

    def add(self, loss: torch.Tensor, pieces: Sequence[Batch]) -> None:
        """Note the loss of the next step and what it saw."""
        self.step += 1
        self.values.append(loss)
        # The voxels need not stay in memory for it.
        self.unchecked.append((self.step, loss, [piece.without_voxels() for piece in pieces]))
        self.steps += 1

    def check(self) -> None:
        """Stop all processes if a loss is not finite on any; describe the first such batch in a file.

        Raises:
            FloatingPointError: names the cases of that batch and the file.
        """
        unchecked, self.unchecked = self.unchecked, []
        if not unchecked:
            return
        fine = torch.stack([loss for _, loss, _ in unchecked]).isfinite().tolist()
        if not agree(self.fabric, not all(fine)):
            return
        value, names, where = "nan", {"of another process"}, ""
        if not all(fine):
            step, loss, pieces = unchecked[fine.index(False)]
            value = f"{float(loss):g}"
            names = {self.case_ids[case] for piece in pieces for case in piece.case.tolist()}
            where = f" in step {step} (its batch is described in {self._describe(step, value, pieces)})"
        raise FloatingPointError(
            f"the loss became {value} on cases {', '.join(sorted(names))}{where}: look at them with a "
            "viewer, lower optimizer.learning_rate, or use train.precision=32-true; the checkpoints hold "
            "the last good state"
        )

    def _describe(self, step: int, value: str, pieces: Sequence[Batch]) -> Path:
        """Write the samples of a batch to RUN/bad-batch-N.json, with boxes in voxels of the volumes."""
        rank = f"-process-{self.fabric.global_rank}" if self.fabric.world_size > 1 else ""
        path = self.folder / f"bad-batch-{step}{rank}.json"
        samples: list[dict[str, Any]] = []
        for piece in pieces:
            boxes = piece.pairs.boxes.cpu() + piece.start.repeat(1, 2)[:, None]
            for row, (index, case) in enumerate(zip(piece.index.tolist(), piece.case.tolist(), strict=True)):
                views = [
                    {"box_voxels": boxes[row, view].tolist(), "flips": piece.pairs.flips[row, view].tolist()}
                    for view in range(2)
                ]
                samples.append({"sample": index, "case": self.case_ids[case], "views": views})
        write_json(path, {"step": step, "loss": value, "axes": "D, H, W", "samples": samples})
        return path

    def pending(self, together: bool = True) -> list[float]:
        """The losses of the steps since the last line, each the mean over processes; all of them must ask
        if ``together``, otherwise they are this process's own."""
        if not self.values:
            return []
        losses = torch.stack(self.values).float()
        return cast(list[float], (_reduced(self.fabric, losses, "mean") if together else losses).tolist())

    def collect(self) -> tuple[float, float]:
        """Mean loss over steps and processes since the last call, and steps a second."""
        self.check()
        loss = float(_reduced(self.fabric, torch.stack(self.values).float().mean(), "mean"))
        speed = self.steps / max(time.perf_counter() - self.clock, 1e-9)
        self.values = []
        self.restart_clock()
        return loss, speed

    def restart_clock(self) -> None:
        """Keep what comes between two lines and is no training out of the speed."""
        self.clock, self.steps = time.perf_counter(), 0

    def seconds_since_start(self) -> float:
        """Wall time since the run was started or resumed."""
        return time.perf_counter() - self.began


def agree(fabric: Fabric, flag: bool) -> bool:
    """Whether the flag is set on any process; all of them must ask."""
    if fabric.world_size == 1:
        return flag
    return bool(_reduced(fabric, torch.tensor(float(flag), device=fabric.device), "sum") > 0)


def _reduced(fabric: Fabric, value: torch.Tensor, how: str) -> torch.Tensor:
    return cast(torch.Tensor, fabric.all_reduce(value, reduce_op=how))


@contextmanager
def finish_the_step_on_signal() -> Iterator[threading.Event]:
    """An event that SIGINT, SIGTERM and SIGUSR1 set; a later, second SIGINT interrupts at once."""
    asked = threading.Event()
    first = 0.0

    def ask(number: int, frame: FrameType | None) -> None:
        nonlocal first
        now = time.monotonic()
        if number == signal.SIGINT and asked.is_set() and now - first > _SECONDS_TO_A_SECOND_ONE:
            raise KeyboardInterrupt
        if not asked.is_set():
            first = now
        asked.set()

    with handled_by(ask):
        yield asked
