"""``python -m benchmarks.pretrain``: where the time of a training step goes, and its cost beside the network.

The whole step is what ``pgl pretrain`` does: read the blocks, copy, cut, augment, forward, backward,
optimiser, EMA. The *bare network step* is all the arithmetic of the method's networks and nothing else, on
views that lie on the device: online encoder, projector and predictor forward and backward, target encoder and
projector forward; no aligner and no loss (the projection is cropped to the aligned size, the gradient of the
prediction is given). Whole and bare steps take turns, so that a machine that slows down slows both.

``--check`` ends with 1 if a bar is missed: whole / bare at most 1.10 on the CPU with ``configs/demo.yaml``,
1.08 on a GPU with ``configs/paper.yaml``; the input path alone at least 3 times as fast as the step takes
samples.

A turn of whole steps would begin with what was read ahead during the bare ones. On the CPU that many steps
come before each turn, uncounted, and turns are three times as long. On a GPU, where such turns take minutes,
they are short (``turn`` in the record): there it is the second bar that shows that reading keeps up. All
volumes are read once beforehand, as they have been after the first part of a run.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch

from benchmarks.machine import machine
from benchmarks.pretrain_tables import missed, print_tables
from benchmarks.synthetic_cache import make_cache

ROOT = Path(__file__).resolve().parents[1]
BARS = {"cpu": 1.10, "cuda": 1.08}
INPUT_BAR = 3.0
WARM_UP = 3
# Of --seconds, for what is measured; and the least number of pairs of turns whatever the time.
SHARES = {"input": 0.15, "pairs": 0.5, "parts": 0.1, "memory": 0.25}
FEWEST_PAIRS, FEWEST_ROUNDS = 3, 4


def main(argv: list[str] | None = None) -> int:
    """Measure, print tables, write the record; 1 with ``--check`` if a bar is missed."""
    options = _options(argv)
    with tempfile.TemporaryDirectory() as scratch:
        bench = Bench(options, Path(scratch))
        record = bench.record()
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"pretrain-{bench.device.type}.json"
    path.write_text(json.dumps(record, indent=1) + "\n", "utf-8")
    print_tables(record)
    print(f"written: {path}")
    misses = missed(record)
    for line in misses if options.check else []:
        print(f"MISSED: {line}", file=sys.stderr)
    return int(bool(misses) and options.check)


class Bench:
    """The parts of a run as ``pgl pretrain`` puts them together, and the clocks around them."""

    def __init__(self, options: argparse.Namespace, scratch: Path) -> None:
        from lightning_fabric import Fabric

        from pgl.cache.volumes import VolumeCache
        from pgl.methods.pgl import PGL
        from pgl.networks import seeded_module
        from pgl.training.contexts import ContextDataset
        from pgl.training.devices import precision_of
        from pgl.training.kept_memory import keep_freed_memory
        from pgl.training.step import TrainingStep

        self.options = options
        self.config = config = _config(options, scratch)
        if options.data is None:
            make_cache(scratch / "cache", config.views.context_size)
        if config.train.threads:
            torch.set_num_threads(config.train.threads)
        fabric = Fabric(
            accelerator=config.train.accelerator,
            devices=1,
            precision=precision_of(config.train.precision, config.train.accelerator),  # type: ignore[arg-type]
        )
        self.fabric, self.device = fabric, fabric.device
        self.on_gpu = self.device.type == "cuda"
        if not self.on_gpu:
            keep_freed_memory()
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
        for case in range(len(cache)):
            # Chunks are held against their checksums when first read, which a run soon has behind it.
            cache.damage(case)
        self.numbers = count()

    def record(self) -> dict[str, Any]:
        """Everything that is measured, as plain data."""
        from benchmarks.pretrain_parts import parts, peak_memory

        config = self.config
        with self._stream() as batches:
            input_rate = self._input_rate(batches)
            whole, bare, turn = self._whole_and_bare(batches)
        samples_a_second = config.train.batch_size / median(whole)
        # Of neighbours in time, so that a machine that changes its speed changes both.
        ratios = [w / b for w, b in zip(whole, bare, strict=True)]
        quarter, _, three_quarters = quantiles(ratios, n=4)
        device_ms, host_ms = parts(self, self.while_time("parts", FEWEST_ROUNDS))
        return {
            "machine": machine(self.device),
            "config": str(self.options.config),
            "overrides": self.options.set,
            "data": "synthetic" if self.options.data is None else "cache",
            "batch_size": config.train.batch_size,
            "patch_size": list(config.views.patch_size),
            "workers": config.train.workers,
            "read_ahead_batches": self.ahead,
            "precision": self.fabric._precision.precision,
            "repeats": len(whole),
            "turn": turn,
            "whole_step_ms": median(whole) * 1e3,
            "bare_network_step_ms": median(bare) * 1e3,
            "ratio": median(ratios),
            "ratio_quartiles_of_pairs": [quarter, three_quarters],
            "ratio_bar": BARS[self.device.type],
            "samples_per_second": samples_a_second,
            "input_samples_per_second": input_rate,
            "input_over_step": input_rate / samples_a_second,
            "input_bar": INPUT_BAR,
            "parts_ms": device_ms,
            "parts_host_ms": host_ms,
            "peak_memory_gib": peak_memory(self, self.while_time("memory", 1)) if self.on_gpu else {},
        }

    @property
    def ahead(self) -> int:
        """Batches that are read ahead: by processes, or one by a thread of this process."""
        train = self.config.train
        return train.workers * train.prefetch or 1

    def while_time(self, share: str, least: int) -> Iterator[int]:
        """0, 1, …: as often as asked for, but no longer than this share of ``--seconds`` after ``least``."""
        end = time.monotonic() + SHARES[share] * (self.options.seconds or math.inf)
        for number in range(self.options.repeats):
            if number >= least and time.monotonic() >= end:
                return
            yield number

    def _whole_and_bare(self, batches: Iterator[Any]) -> tuple[list[float], list[float], int]:
        """Seconds a step, taking turns, and the steps of a turn."""
        train = self.config.train
        views = [self.step.inputs(batch) for batch in self.pieces()]
        gradients = [self._bare_forward(each).detach().clone().fill_(1e-3) for each in views]
        steps = count()

        def whole_step() -> None:
            self.step(next(steps) % train.steps, list(islice(batches, train.accumulate)))

        def bare_step() -> None:
            self.step.optimizer.zero_grad()
            for each, gradient in zip(views, gradients, strict=True):
                self._bare_forward(each).backward(gradient)

        for _ in range(WARM_UP):
            self._seconds(whole_step, 1)
            self._seconds(bare_step, 1)
        turn, uncounted = max(4, 3 * self.ahead), self.ahead
        if self.on_gpu:
            turn, uncounted = 2, 0
        whole, bare = [], []
        for _ in self.while_time("pairs", FEWEST_PAIRS):
            self._seconds(whole_step, uncounted)
            whole.append(self._seconds(whole_step, turn))
            bare.append(self._seconds(bare_step, turn))
        return whole, bare, turn

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

    def _input_rate(self, batches: Iterator[Any]) -> float:
        """Samples a second that arrive on the device while nothing else is done."""
        train = self.config.train
        for _ in range(WARM_UP + self.ahead):
            next(batches)
        self.wait()
        began, counted = time.perf_counter(), 0
        end = began + SHARES["input"] * (self.options.seconds or math.inf)
        # As many at least as the processes read at once, as many at most as make it exact.
        while counted < max(10, 4 * self.ahead) and (counted < self.ahead or time.perf_counter() < end):
            next(batches)
            counted += 1
        self.wait()
        return counted * train.batch_size / train.accumulate / (time.perf_counter() - began)

    def pieces(self) -> list[Any]:
        """The pieces of a batch, read here, on the device."""
        from pgl.training.contexts import collate

        train = self.config.train
        size = train.batch_size // train.accumulate
        return [
            collate([self.data[i] for i in islice(self.numbers, size)]).to(self.device)
            for _ in range(train.accumulate)
        ]

    @contextmanager
    def _stream(self) -> Iterator[Iterator[Any]]:
        """The batches of a long run as the trainer gets them."""
        from pgl.training.contexts import GlobalBatches, make_loader
        from pgl.training.device_feed import on_device
        from pgl.training.read_ahead import ReadAhead

        train = self.config.train
        numbers = GlobalBatches(0, 10**6, train.batch_size, pieces=train.accumulate)
        loader: Any = iter(make_loader(self.data, numbers, train.workers, train.prefetch, self.on_gpu))
        if train.workers == 0:
            loader = ReadAhead(loader)
            self.step.have_meanwhile(loader.ask)
        batches = on_device(loader, self.device)
        try:
            yield batches
        finally:
            self.step.have_meanwhile(None)
            if train.workers == 0:
                loader.close()
            # Nothing holds on to the reading processes any more: they end.
            batches.close()
            del loader
            gc.collect()

    def _seconds(self, run: Callable[[], Any], times: int) -> float:
        """Seconds a call, over ``times`` calls."""
        if times == 0:
            return 0.0
        self.wait()
        began = time.perf_counter()
        for _ in range(times):
            run()
        self.wait()
        return (time.perf_counter() - began) / times

    def wait(self) -> None:
        """Until the device has done all that was asked of it."""
        if self.on_gpu:
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
    parser.add_argument("--repeats", type=int, help="pairs of turns; default 40, on a GPU 20")
    parser.add_argument(
        "--seconds",
        type=float,
        help="of measuring, about; start-up comes on top. Default: no limit, on a GPU 60",
    )
    parser.add_argument("--no-memory", action="store_true", help="leave the table of peak memory out")
    parser.add_argument("--check", action="store_true", help="end with 1 if a bar is missed")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results")
    options = parser.parse_args(argv)
    on_gpu = options.device == "cuda"
    options.config = options.config or Path("configs", "paper.yaml" if on_gpu else "demo.yaml")
    options.repeats = options.repeats or (20 if on_gpu else 40)
    if options.repeats < FEWEST_PAIRS:
        parser.error(f"--repeats must be at least {FEWEST_PAIRS}, got {options.repeats}")
    if options.seconds is not None and not options.seconds > 0:
        parser.error(f"--seconds must be positive, got {options.seconds}")
    if options.seconds is None and on_gpu:
        options.seconds = 60.0
    return options


def _config(options: argparse.Namespace, scratch: Path) -> Any:
    import yaml

    from pgl.config import from_plain
    from pgl.config_check import check

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


if __name__ == "__main__":
    sys.exit(main())
