"""``python -m benchmarks.pretrain``: where the time of a training step goes, and its cost beside the network.

The whole step is what ``pgl pretrain`` does: read the blocks, copy, cut, augment, forward, backward,
optimiser, EMA. The *bare network step* is all the arithmetic of the method's networks and nothing else, on
views that lie on the device: online encoder, projector and predictor forward and backward, target encoder and
projector forward; no aligner and no loss (the projection is cropped to the aligned size, the gradient of the
prediction is given). Whole and bare steps take turns, so that a machine that slows down slows both.

``--check`` ends with 1 if a bar is missed: whole / bare at most 1.10 on the CPU with ``configs/demo.yaml``,
1.08 on a GPU with ``configs/paper.yaml``; the input path alone at least 3 times as fast as the step takes
samples.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
import torch

from benchmarks.machine import machine

ROOT = Path(__file__).resolve().parents[1]
BARS = {"cpu": 1.10, "cuda": 1.08}
INPUT_BAR = 3.0
WARM_UP = 3
MEMORY_BATCHES = (8, 16, 32, 64, 128, 256)
PARTS = ("read", "copy", "cut", "augment", "forward", "backward", "optimiser", "EMA")


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, write the record; 1 with ``--check`` if a bar is missed."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        record = bench.record()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"pretrain-{bench.device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    _print(record)
    print(f"written: {path}")
    missed = _missed(record)
    for line in missed if options.check else []:
        print(f"MISSED: {line}", file=sys.stderr)
    return int(bool(missed) and options.check)


class Bench:
    """The parts of a run as ``pgl pretrain`` puts them together, and the clocks around them."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        from lightning_fabric import Fabric

        from pgl.cache import VolumeCache
        from pgl.contexts import ContextDataset
        from pgl.method import PGL
        from pgl.networks import seeded_module
        from pgl.step import TrainingStep, precision_of

        self.options = options
        self.config = config = _config(options, scratch)
        if options.data is None:
            _make_cache(scratch / "cache", config.views.context_size)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        fabric = Fabric(
            accelerator=config.train.accelerator,
            devices=1,
            precision=precision_of(config.train),  # type: ignore[arg-type]
        )
        self.fabric, self.device = fabric, fabric.device
        method = seeded_module(
            config.seed, lambda: PGL(config.encoder, config.method, config.train.recompute)
        )
        self.step = TrainingStep(config, method, fabric)
        cache = VolumeCache(config.data)
        self.data = ContextDataset(
            cache,
            range(len(cache)),
            config.views,
            config.augment,
            config.seed,
            regions=config.method.regions,
            region_scale=config.method.region_scale,
        )
        self.numbers = count()

    def record(self) -> dict[str, Any]:
        """Everything that is measured, as plain data."""
        config = self.config
        whole, bare = self._whole_and_bare()
        samples_a_second = config.train.batch_size / median(whole)
        # Of neighbours in time, so that a machine that changes its speed changes both.
        ratios = [w / b for w, b in zip(whole, bare, strict=True)]
        quarter, _, three_quarters = quantiles(ratios, n=4)
        input_rate = self._input_rate()
        return {
            "machine": machine(self.device),
            "config": str(self.options.config),
            "overrides": self.options.set,
            "data": "synthetic" if self.options.data is None else "cache",
            "batch_size": config.train.batch_size,
            "patch_size": list(config.views.patch_size),
            "workers": config.train.workers,
            "precision": self.fabric._precision.precision,
            "repeats": len(whole),
            "whole_step_ms": median(whole) * 1e3,
            "bare_network_step_ms": median(bare) * 1e3,
            "ratio": median(ratios),
            "ratio_quartiles_of_pairs": [quarter, three_quarters],
            "ratio_bar": BARS[self.device.type],
            "samples_per_second": samples_a_second,
            "input_samples_per_second": input_rate,
            "input_over_step": input_rate / samples_a_second,
            "input_bar": INPUT_BAR,
            "parts_ms": self._parts(),
            "peak_memory_gib": self._peak_memory(),
        }

    def _whole_and_bare(self) -> tuple[list[float], list[float]]:
        """Seconds a step, taking turns. With reading processes the turns are longer than what they read
        ahead, which they would otherwise do while bare steps are measured."""
        train = self.config.train
        ahead = train.workers * train.prefetch
        turn = 1 if ahead == 0 and self.device.type == "cpu" else max(4, 3 * ahead)
        views = [self.step.views(batch) for batch in self._pieces()]
        gradients = [self._bare_forward(each).detach().clone().fill_(1e-3) for each in views]
        whole, bare = [], []
        with self._stream() as batches:
            steps = count()

            def whole_step() -> None:
                self.step(next(steps) % train.steps, list(islice(batches, train.accumulate)))

            def bare_step() -> None:
                self.step.optimizer.zero_grad()
                for each, gradient in zip(views, gradients, strict=True):
                    self._bare_forward(each).backward(gradient)

            for _ in range(WARM_UP):
                self._seconds(whole_step, turn)
                self._seconds(bare_step, turn)
            for _ in range(self.options.repeats):
                # What was read ahead during the bare steps is not counted as read for nothing.
                self._seconds(whole_step, ahead)
                whole.append(self._seconds(whole_step, turn))
                bare.append(self._seconds(bare_step, turn))
        return whole, bare

    def _bare_forward(self, views: torch.Tensor) -> torch.Tensor:
        method, predictions = self.step.method, []
        with self.fabric.autocast():
            features = method.backbone.maps(views)
            for level, projector in enumerate([method.projector, *method.side_projectors]):
                d, h, w = method.aligned_size
                online = projector(features[level])[:, :, :d, :h, :w]
                if online.shape[2:] != (d, h, w):
                    raise ValueError(f"the bare step needs feature maps of {method.aligned_size} at least")
                predictions.append([method.predictor, *method.side_predictors][level](online))
            with torch.no_grad():
                features = method.target_backbone.maps(views)
                for level, projector in enumerate([method.target_projector, *method.target_side_projectors]):
                    projector(features[level])
        return torch.cat(predictions)

    def _parts(self) -> dict[str, float]:
        """Median milliseconds of each part of a step, with the device idle before and after it."""
        from pgl.augment import augment, normalise
        from pgl.contexts import collate
        from pgl.views import cut

        step, config, train = self.step, self.config, self.config.train
        times: dict[str, list[float]] = {name: [] for name in PARTS}
        for repeat in range(WARM_UP + self.options.repeats):
            now = dict.fromkeys(PARTS, 0.0)

            def timed(name: str, run: Callable[[], Any], now: dict[str, float] = now) -> Any:
                self._wait()
                began = time.perf_counter()
                result = run()
                self._wait()
                now[name] += time.perf_counter() - began
                return result

            step.optimizer.zero_grad()
            for _ in range(train.accumulate):
                numbers = list(islice(self.numbers, train.batch_size // train.accumulate))
                batch = timed("read", lambda: collate([self.data[i] for i in numbers]))  # noqa: B023
                batch = batch.pin_memory() if self.device.type == "cuda" else batch
                batch = timed("copy", lambda: batch.to(self.device))  # noqa: B023
                views = timed("cut", lambda: cut(batch.contexts, batch.pairs))  # noqa: B023
                views = timed(
                    "augment",
                    lambda: augment(normalise(views, config.intensity), batch.augmentation).contiguous(  # noqa: B023
                        memory_format=step.layout
                    ),
                )
                loss = timed("forward", lambda: step.forward(views, batch.pairs))  # noqa: B023
                timed("backward", lambda: self.fabric.backward(loss / train.accumulate))  # noqa: B023
            timed("optimiser", step.optimizer.step)
            timed("EMA", lambda: step.method.update_target(0.99))
            if repeat >= WARM_UP:
                for name, seconds in now.items():
                    times[name].append(seconds)
        return {name: median(seconds) * 1e3 for name, seconds in times.items()}

    def _input_rate(self) -> float:
        """Samples a second that arrive on the device while nothing else is done."""
        train = self.config.train
        ahead = train.workers * train.prefetch
        with self._stream() as batches:
            for _ in range(WARM_UP + ahead):
                next(batches)
            batches_counted = max(10, 4 * ahead)
            seconds = self._seconds(lambda: next(batches), batches_counted)
        return train.batch_size / train.accumulate / seconds

    def _peak_memory(self) -> dict[str, float | None]:
        """GiB that a step takes at most, for several batch sizes; None where they do not fit. GPU only."""
        peaks: dict[str, float | None] = {}
        if self.device.type != "cuda" or self.options.no_memory:
            return peaks
        from pgl.contexts import collate

        for size in MEMORY_BATCHES:
            self.step.optimizer.zero_grad()
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            try:
                for repeat in range(2):
                    samples = [self.data[i % 8] for i in range(size)]
                    self.step(repeat, [collate(samples).to(self.device)])
                self._wait()
            except torch.cuda.OutOfMemoryError:
                peaks[str(size)] = None
                break
            peaks[str(size)] = torch.cuda.max_memory_allocated() / 2**30
        return peaks

    def _pieces(self) -> list[Any]:
        from pgl.contexts import collate

        train = self.config.train
        size = train.batch_size // train.accumulate
        return [
            collate([self.data[i] for i in islice(self.numbers, size)]).to(self.device)
            for _ in range(train.accumulate)
        ]

    @contextmanager
    def _stream(self) -> Iterator[Iterator[Any]]:
        """The batches of a long run as the trainer gets them."""
        from pgl.contexts import GlobalBatches, make_loader
        from pgl.device_feed import on_device

        train = self.config.train
        numbers = GlobalBatches(0, 10**6, train.batch_size, pieces=train.accumulate)
        on_gpu = self.device.type == "cuda"
        loader = iter(make_loader(self.data, numbers, train.workers, train.prefetch, on_gpu))
        yield on_device(loader, self.device)
        # Ends the reading processes.
        del loader
        gc.collect()

    def _seconds(self, run: Callable[[], Any], times: int) -> float:
        """Seconds a call, over ``times`` calls."""
        if times == 0:
            return 0.0
        self._wait()
        began = time.perf_counter()
        for _ in range(times):
            run()
        self._wait()
        return (time.perf_counter() - began) / times

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def _options(argv: list[str] | None) -> argparse.Namespace:
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretrain",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if gpu else "cpu")
    parser.add_argument("--config", type=Path, help="default: configs/demo.yaml, on a GPU configs/paper.yaml")
    parser.add_argument("--data", type=Path, help="a cache of `pgl prepare`; default: synthetic volumes")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="train.batch_size=32")
    parser.add_argument("--repeats", type=int, help="pairs of turns; default 40, on a GPU 8")
    parser.add_argument("--no-memory", action="store_true", help="leave the table of peak memory out")
    parser.add_argument("--check", action="store_true", help="end with 1 if a bar is missed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    options.config = options.config or Path("configs", "paper.yaml" if on_gpu else "demo.yaml")
    options.repeats = options.repeats or (8 if on_gpu else 40)
    return options


def _config(options: argparse.Namespace, scratch: Path) -> Any:
    import yaml

    from pgl.config import check, from_plain

    file = options.config if options.config.exists() else ROOT / options.config
    plain = yaml.safe_load(file.read_text("utf-8"))
    plain["data"] = str(options.data or scratch / "cache")
    plain["output"] = str(scratch / "run")
    for word in options.set:
        key, _, value = word.partition("=")
        *sections, name = key.split(".")
        place = plain
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = yaml.safe_load(value)
    plain.setdefault("train", {})["accelerator"] = options.device
    config = from_plain(plain)
    check(config)
    return config


def _make_cache(folder: Path, context: tuple[int, int, int], cases: int = 4) -> None:
    """Soft tissue with organs, air around it and a scanner's noise: it compresses like CT."""
    from pgl.cache import CacheWriter

    shape = tuple(max(2 * edge, least) for edge, least in zip(context, (64, 192, 192), strict=True))
    writer = CacheWriter(folder, (3.0, 1.0, 1.0))
    for case in range(cases):
        rng = np.random.default_rng(case)
        z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        hu = np.where(np.hypot(x, y * 1.3) < 0.9, np.float32(40), np.float32(-1000))
        for _ in range(20):
            cz, cy, cx = rng.uniform(-0.8, 0.8, 3)
            hu[(z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(0.01, 0.1)] += rng.uniform(
                -150, 250
            )
        hu += rng.normal(0, 12, shape).astype(np.float32)
        writer.add(f"case{case}", np.rint(hu).astype(np.int16))
    writer.finish()


def _missed(record: dict[str, Any]) -> list[str]:
    missed = []
    if record["ratio"] > record["ratio_bar"]:
        missed.append(f"whole / bare is {record['ratio']:.3f}, the bar is {record['ratio_bar']}")
    if record["input_over_step"] < INPUT_BAR:
        missed.append(f"the input path is {record['input_over_step']:.2f} × the step, the bar is {INPUT_BAR}")
    return missed


def _print(record: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    whole, bare = record["whole_step_ms"], record["bare_network_step_ms"]
    low, high = record["ratio_quartiles_of_pairs"]
    console.print(
        f"{record['config']}, batch {record['batch_size']} × 2 views of {record['patch_size']}, "
        f"{record['precision']}, {record['workers']} reading processes, {record['machine']['device']}",
        highlight=False,
    )
    table = Table(
        title="Where a step's time goes",
        caption="Each part alone, with the device idle around it; with reading processes, reading is beside "
        "the rest. Bare network step: online encoder, projector, predictor forward and backward, target "
        "encoder and projector forward, of views on the device.",
    )
    for name in ("part", "ms", "of the bare network step"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for name, ms in record["parts_ms"].items():
        table.add_row(name, f"{ms:.2f}", f"{ms / bare:.1%}")
    table.add_section()
    table.add_row("sum of the parts", f"{sum(record['parts_ms'].values()):.2f}", "")
    table.add_row("whole step", f"{whole:.2f}", f"{record['ratio']:.3f} ×  ({low:.3f} to {high:.3f})")
    table.add_row("bare network step", f"{bare:.2f}", f"bar {record['ratio_bar']} ×")
    console.print(table)
    console.print(
        f"the step takes {record['samples_per_second']:.1f} samples/s, the input path alone gives "
        f"{record['input_samples_per_second']:.1f}: {record['input_over_step']:.1f} × (bar {INPUT_BAR})",
        highlight=False,
    )
    if record["peak_memory_gib"]:
        memory = Table(title="Peak GPU memory")
        memory.add_column("batch", justify="right")
        memory.add_column("GiB", justify="right")
        for size, gib in record["peak_memory_gib"].items():
            memory.add_row(size, "does not fit" if gib is None else f"{gib:.1f}")
        console.print(memory)


if __name__ == "__main__":
    sys.exit(main())
