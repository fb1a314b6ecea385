"""The parts of a training step one by one: what each costs on the device, and what launching it costs the
CPU; and how much GPU memory a step takes."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from itertools import islice, pairwise
from statistics import median
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from benchmarks.pretrain import Bench

PARTS = ("read", "copy", "cut", "augment", "forward", "backward", "optimiser", "EMA")
MEMORY_BATCHES = (8, 16, 32, 64, 128, 192, 256)
WARM_UP = 2
# Batches that are read for this on a GPU, where one takes a second, and for the memory table.
_FEW_BATCHES, _FEW_SAMPLES = 2, 8


class PartClock:
    """Times parts that follow each other, on the CPU by its clock, on a GPU by events in its stream.

    Events neither wait nor make the device wait: while the CPU is ahead of the device, as it is in a run, the
    times between them are those of the kernels, without what launching them costs the CPU.
    """

    def __init__(self, on_gpu: bool) -> None:
        self.on_gpu = on_gpu
        self.rounds: list[list[tuple[str, float, Any]]] = []

    def new_round(self) -> None:
        """From now on the parts count for another round."""
        self.rounds.append([])

    def part(self, name: str) -> None:
        """A part begins, and the one before it ends; the name of the last one of a round is not used."""
        event = torch.cuda.Event(enable_timing=True) if self.on_gpu else None
        if event is not None:
            event.record()
        self.rounds[-1].append((name, time.perf_counter(), event))

    def milliseconds(self) -> tuple[dict[str, float], dict[str, float]]:
        """Medians over the rounds of each part's time on the device and on the CPU, by name."""
        if self.on_gpu:
            torch.cuda.synchronize()

        def medians(span: Callable[[Any, Any], float]) -> dict[str, float]:
            sums: dict[str, list[float]] = {}
            for marks in self.rounds:
                now: dict[str, float] = {}
                for begin, end in pairwise(marks):
                    now[begin[0]] = now.get(begin[0], 0.0) + span(begin, end)
                for name, value in now.items():
                    sums.setdefault(name, []).append(value)
            return {name: median(values) for name, values in sums.items()}

        host = medians(lambda begin, end: (end[1] - begin[1]) * 1e3)
        return (medians(lambda begin, end: begin[2].elapsed_time(end[2])) if self.on_gpu else host), host


def parts(bench: Bench, rounds: Iterable[int]) -> tuple[dict[str, float], dict[str, float]]:
    """Median milliseconds of each part of a step on the device, and on the CPU.

    Reading is timed here, by one process; with reading processes it is beside all else.
    """
    from pgl.augment import augment, normalise
    from pgl.training.contexts import collate
    from pgl.views import cut

    step, config, train = bench.step, bench.config, bench.config.train
    reading, clock = PartClock(False), PartClock(bench.on_gpu)

    def read() -> list[Any]:
        pieces = []
        reading.new_round()
        for _ in range(train.accumulate):
            reading.part("read")
            numbers = islice(bench.numbers, train.batch_size // train.accumulate)
            pieces.append(collate([bench.data[i] for i in numbers]))
            reading.part("")
        return [piece.pin_memory() for piece in pieces] if bench.on_gpu else pieces

    def one_round(pieces: list[Any]) -> None:
        step.optimizer.zero_grad()
        clock.new_round()
        for piece in pieces:
            clock.part("copy")
            batch = piece.to(bench.device)
            clock.part("cut")
            views = cut(batch.contexts, batch.pairs)
            clock.part("augment")
            views = augment(normalise(views, config.intensity), batch.augmentation)
            views = views.contiguous(memory_format=step.layout)
            clock.part("forward")
            loss = step.forward(views, batch.pairs) / len(pieces)
            clock.part("backward")
            bench.fabric.backward(loss)
        clock.part("optimiser")
        step.optimizer.step()
        clock.part("EMA")
        step.method.update_target(0.99)
        clock.part("")

    kept: list[list[Any]] = []
    for number in rounds:
        if not bench.on_gpu or len(kept) < _FEW_BATCHES:
            kept.append(read())
        # Else the queue of launches fills, and the CPU's time becomes the device's.
        bench.wait()
        one_round(kept[number % len(kept)])
        if not bench.on_gpu:
            kept.clear()
    # The first rounds bring memory and caches into shape.
    clock.rounds = clock.rounds[WARM_UP:] or clock.rounds[-1:]
    device, host = clock.milliseconds()
    read_ms = reading.milliseconds()[1]["read"]
    together = [{"read": read_ms, **times} for times in (device, host)]
    return together[0], together[1]


def peak_memory(bench: Bench, rounds: Iterable[int]) -> dict[str, Any]:
    """GiB that a step takes at most, for several batch sizes, as long as there is time.

    Returns:
        By batch size: ``allocated`` by tensors and ``reserved`` from the device, or, where it did not fit,
        ``why``; larger ones are not tried then.
    """
    from pgl.training.contexts import collate

    peaks: dict[str, Any] = {}
    if bench.options.no_memory:
        return peaks
    samples = [bench.data[i] for i in range(_FEW_SAMPLES)]
    for _, size in zip(rounds, MEMORY_BATCHES, strict=False):
        why = _try_a_step(bench, lambda size=size: collate([samples[i % _FEW_SAMPLES] for i in range(size)]))
        if why is not None:
            peaks[str(size)] = {"why": why}
            break
        peaks[str(size)] = {
            "allocated": torch.cuda.max_memory_allocated() / 2**30,
            "reserved": torch.cuda.max_memory_reserved() / 2**30,
        }
    return peaks


def _try_a_step(bench: Bench, batch: Callable[[], Any]) -> str | None:
    """Two steps in memory that is free but for the networks; why they were not possible, or None."""
    bench.step.optimizer.zero_grad()
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    try:
        for repeat in range(2):
            bench.step(repeat, [batch().to(bench.device)])
        bench.wait()
    except RuntimeError as error:
        # Besides torch, cuDNN and cuBLAS run out of memory, or of numbers, in words of their own. The error
        # itself must not outlive this: it holds on to the step's tensors.
        return str(error).strip().splitlines()[0][:200]
    return None
