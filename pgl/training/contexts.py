"""Samples: one block of a volume with two views drawn in it, a function of (seed, global sample index) alone.

So a run is the same with any number of reading processes, any number of devices, and after an interruption.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from pgl.augment import Augmentation, sample_augmentation
from pgl.cache.integrity import DamagedCase
from pgl.cache.volumes import VolumeCache
from pgl.config import AugmentSettings, ViewSettings
from pgl.processes.worker_signals import survive_one_sigterm
from pgl.views import Triple, ViewPairs, sample_regions, sample_view_pairs

# Air is about −1000 HU with noise, lung about −850: everything above counts as body.
BODY_HU = -900
# Blocks read at most for one sample; the densest is kept, so that flat air does not fill the batch.
_MOST_BLOCKS = 4
TRAINING, VALIDATION = 0, 1
_FEWEST_CASES_TO_SPLIT = 4


@dataclass
class Batch:
    """B samples.

    Args:
        index: int64 Tensor[B], global sample numbers.
        case: int64 Tensor[B], numbers of the cases in the cache.
        start: int64 Tensor[B, 3], the volume's voxel at the block's first one; negative where air was added.
        contexts: int16 Tensor[B, 1, D, H, W], HU.
        pairs: the two views of each sample.
        augmentation: for the 2B views, in the order of ``views.cut``.
        damaged: int64 Tensor[n], the cases that were passed over in drawing these samples.
    """

    index: Tensor
    case: Tensor
    start: Tensor
    contexts: Tensor
    pairs: ViewPairs
    augmentation: Augmentation
    damaged: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def __len__(self) -> int:
        return len(self.index)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with contexts and views on another device; all else stays on the CPU, where it is
        used."""
        return replace(
            self, contexts=self.contexts.to(device, non_blocking=True), pairs=self.pairs.to(device)
        )

    def without_voxels(self) -> Batch:
        """The same batch without its blocks, which are nearly all of it."""
        return replace(self, contexts=self.contexts.new_empty(0))

    def pin_memory(self) -> Batch:
        """The same batch in memory from which a GPU copies by itself; torch's loader calls it."""
        return replace(self, contexts=self.contexts.pin_memory(), pairs=self.pairs.pin_memory())


class ContextDataset(Dataset[Batch]):
    """Sample ``i`` as a :class:`Batch` of one, for any ``i`` ≥ 0.

    A case is drawn uniformly, then a block uniformly inside it; where the volume is smaller than the block
    it lies at a random place inside and air fills the rest. While less than ``views.min_body_fraction`` of
    the block is denser than −900 HU another block of the same case is drawn, at most four in all; the
    densest is taken.

    Args:
        cache: the volumes.
        cases: the cases in use, as numbers in the cache.
        views: how blocks and views are drawn.
        augment: how intensities are changed.
        seed: of the run.
        stream: ``TRAINING`` or ``VALIDATION``; the same index gives unrelated samples in the two.
        regions: boxes drawn inside what both views share, 0 for all of it.
        region_scale: their lowest and highest edge relative to what is shared.
        skip_damaged: draw another case where the file of one is damaged anywhere. For this a process reads
            each file whole before its first sample, so that all processes agree on which cases are left.

    Raises:
        ValueError: ``cases`` is empty.
    """

    def __init__(
        self,
        cache: VolumeCache,
        cases: Sequence[int],
        views: ViewSettings,
        augment: AugmentSettings,
        seed: int,
        stream: int = TRAINING,
        regions: int = 0,
        region_scale: tuple[float, float] = (0.5, 1.0),
        skip_damaged: bool = False,
    ) -> None:
        if len(cases) == 0:
            raise ValueError("cases is empty: the cache holds no volume to draw samples from")
        self.cache = cache
        self.cases = list(cases)
        self.views = views
        self.augment = augment
        self.seed = seed
        self.stream = stream
        self.regions, self.region_scale = regions, region_scale
        self.skip_damaged = skip_damaged

    def __getitem__(self, index: int) -> Batch:
        rng = np.random.default_rng(np.random.SeedSequence([self.seed, self.stream, index]))
        case, damaged = self._draw_case(rng)
        block, start = self._draw_block(rng, case)
        views = self.views
        pairs = sample_view_pairs(
            torch.Generator().manual_seed(int(rng.integers(2**62))),
            1,
            views.context_size,
            views.patch_size,
            views.crop_scale,
            views.min_overlap,
            views.flip_probability,
        )
        augmentation = sample_augmentation(rng, 2, self.augment)
        if self.regions:
            # Drawn last, so that all else is the same with and without them.
            generator = torch.Generator().manual_seed(int(rng.integers(2**62)))
            pairs.regions = sample_regions(generator, pairs.boxes, self.regions, self.region_scale)
        return Batch(
            torch.tensor([index]),
            torch.tensor([case]),
            torch.tensor([start]),
            torch.from_numpy(block)[None, None],
            pairs,
            augmentation,
            torch.tensor(damaged, dtype=torch.int64),
        )

    def _draw_case(self, rng: np.random.Generator) -> tuple[int, list[int]]:
        """A case, and those that were drawn before it but are damaged."""
        case = self.cases[int(rng.integers(len(self.cases)))]
        passed: list[int] = []
        while self.skip_damaged and (damage := self.cache.damage(case)):
            passed.append(case)
            left = [other for other in self.cases if other not in passed]
            if not left:
                raise DamagedCase(f"every case is damaged, the last one so: {damage}")
            case = left[int(rng.integers(len(left)))]
        return case, passed

    def _draw_block(self, rng: np.random.Generator, case: int) -> tuple[np.ndarray, Triple]:
        size = self.views.context_size
        shape = self.cache.cases[case].shape
        best: tuple[np.ndarray, Triple] | None = None
        best_fraction = -1.0
        for _ in range(_MOST_BLOCKS):
            d, h, w = (_draw_start(rng, extent, edge) for extent, edge in zip(shape, size, strict=True))
            start = (d, h, w)
            block = self.cache.read_block(case, start, size)
            fraction = np.count_nonzero(block > BODY_HU) / block.size
            if fraction > best_fraction:
                best, best_fraction = (block, start), fraction
            if fraction >= self.views.min_body_fraction:
                break
        assert best is not None
        return best


def _draw_start(rng: np.random.Generator, extent: int, edge: int) -> int:
    return int(rng.integers(min(0, extent - edge), max(0, extent - edge) + 1))


def collate(samples: Sequence[Batch]) -> Batch:
    """Samples to one batch; the augmentations are put in view order, all first views, then all second
    ones."""

    def first_then_second(name: str) -> Tensor:
        return torch.stack([getattr(s.augmentation, name) for s in samples], 1).flatten()

    regions = [s.pairs.regions for s in samples if s.pairs.regions is not None]
    return Batch(
        torch.cat([s.index for s in samples]),
        torch.cat([s.case for s in samples]),
        torch.cat([s.start for s in samples]),
        torch.cat([s.contexts for s in samples]),
        ViewPairs(
            torch.cat([s.pairs.boxes for s in samples]),
            torch.cat([s.pairs.flips for s in samples]),
            samples[0].pairs.patch_size,
            torch.cat(regions) if regions else None,
        ),
        Augmentation(**{f.name: first_then_second(f.name) for f in fields(Augmentation)}),
        torch.cat([s.damaged for s in samples]),
    )


class GlobalBatches(Sampler[list[int]]):
    """The sample numbers that one device reads, step after step, in ``pieces`` lists a step.

    Step t of the run holds samples [t·B, (t+1)·B) whatever the number of devices and pieces; device r of W
    takes its r-th part, cut into pieces of equal length.

    Args:
        first_step: steps already done.
        steps: steps of the whole run.
        batch_size: B, over all devices.
        rank: r.
        world_size: W.
        pieces: how many times the gradients are added up before a step.

    Raises:
        ValueError: ``batch_size`` is no multiple of ``world_size · pieces``.
    """

    def __init__(
        self,
        first_step: int,
        steps: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        pieces: int = 1,
    ) -> None:
        if batch_size % (world_size * pieces):
            each = f" of {pieces} pieces (train.accumulate)" if pieces > 1 else ""
            raise ValueError(
                f"train.batch_size {batch_size} must be a multiple of the {world_size} devices{each}"
            )
        self.steps = range(first_step, steps)
        self.batch_size = batch_size
        self.pieces = pieces
        self.piece = batch_size // world_size // pieces
        self.offset = rank * self.piece * pieces

    def __iter__(self) -> Iterator[list[int]]:
        for step in self.steps:
            first = step * self.batch_size + self.offset
            for piece in range(self.pieces):
                start = first + piece * self.piece
                yield list(range(start, start + self.piece))

    def __len__(self) -> int:
        return len(self.steps) * self.pieces


def make_loader(
    dataset: ContextDataset,
    batches: GlobalBatches,
    workers: int,
    prefetch: int = 2,
    pin_memory: bool = False,
) -> DataLoader[Batch]:
    """The training loader: batches in order, read by ``workers`` processes (0: in this one).

    Args:
        dataset: the samples.
        batches: their numbers.
        workers: reading processes.
        prefetch: batches that each of them reads ahead.
        pin_memory: whether a GPU will copy them.
    """
    return DataLoader(
        dataset,
        batch_sampler=batches,
        num_workers=workers,
        collate_fn=collate,
        # Forked workers hang when the parent has started threads, as torch and blosc2 do.
        multiprocessing_context="spawn" if workers else None,
        persistent_workers=workers > 0,
        prefetch_factor=prefetch if workers else None,
        pin_memory=pin_memory,
        worker_init_fn=survive_one_sigterm if workers else None,
    )


def hold_out(case_ids: Sequence[str], fraction: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the training and of the validation cases.

    A case goes by a hash of its name and the seed, so the split does not depend on the order of the cases.
    With fewer than four cases, or ``fraction`` 0, nothing is held out and both lists hold all cases.
    """
    everything = list(range(len(case_ids)))
    if len(case_ids) < _FEWEST_CASES_TO_SPLIT or fraction == 0:
        return everything, everything
    order = sorted(everything, key=lambda i: hashlib.sha256(f"{seed}/{case_ids[i]}".encode()).digest())
    held_out = min(max(1, round(fraction * len(order))), len(order) - 1)
    return sorted(order[held_out:]), sorted(order[:held_out])
