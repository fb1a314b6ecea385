"""What is watched while a run goes: its losses, its speed, and whether it is asked to stop."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import cast

import torch
from lightning_fabric import Fabric

from pgl.contexts import Batch


class LossWatch:
    """The losses since the last line of metrics, left on the device so that no step waits for them.

    Args:
        fabric: the processes that train together.
        case_ids: names of the cache's cases.
    """

    def __init__(self, fabric: Fabric, case_ids: list[str]) -> None:
        self.fabric, self.case_ids = fabric, case_ids
        self.values: list[torch.Tensor] = []
        self.cases: list[list[int]] = []
        self.began = self.clock = time.perf_counter()
        self.steps = 0

    def add(self, loss: torch.Tensor, batch: Batch) -> None:
        """Note the loss of a step and the cases it saw."""
        self.values.append(loss)
        self.cases.append(batch.case.tolist())
        self.steps += 1

    def check(self) -> None:
        """Stop all processes if a loss is not finite on any.

        Raises:
            FloatingPointError: names the cases of the first such step.
        """
        if not self.values:
            return
        values = torch.stack(self.values)
        bad = (~values.isfinite()).nonzero().flatten().tolist()
        if agree(self.fabric, bool(bad)):
            value, names = "nan", {"of another process"}
            if bad:
                value, names = f"{values[bad[0]]:g}", {self.case_ids[case] for case in self.cases[bad[0]]}
            raise FloatingPointError(
                f"the loss became {value} on cases {', '.join(sorted(names))}: look at them with a "
                "viewer, lower optimizer.learning_rate, or use train.precision=32-true; the checkpoints hold "
                "the last good state"
            )

    def collect(self) -> tuple[float, float]:
        """Mean loss over steps and processes since the last call, and steps a second."""
        self.check()
        loss = float(_reduced(self.fabric, torch.stack(self.values).float().mean(), "mean"))
        speed = self.steps / max(time.perf_counter() - self.clock, 1e-9)
        self.values, self.cases = [], []
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
    """An event that SIGINT and SIGTERM set; a second SIGINT interrupts at once."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
