"""Training patches: drawn so that foreground is seen often enough, cut with scale and mirrors.

A patch is a function of (seed, index) alone, so a resumed run sees what an uninterrupted one would.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import pgl_ops
from pgl.augment import Augmentation, augment, normalise, sample_augmentation
from pgl.config import AugmentSettings, IntensitySettings
from pgl.downstream.config import PatchSettings
from pgl.downstream.labels import LabelledCache
from pgl.processes.worker_signals import survive_one_sigterm

Triple = tuple[int, int, int]


@dataclass
class Patches:
    """B samples before they are cut.

    Args:
        images: int16 Tensor[B, 1, *block], HU.
        labels: uint8 Tensor[B, *block], classes.
        boxes: float64 Tensor[B, 6], what is cut, in voxels of the block (d1, h1, w1, d2, h2, w2).
        flips: bool Tensor[B, 3].
        augmentation: of the intensities, kept on the CPU.
    """

    images: Tensor
    labels: Tensor
    boxes: Tensor
    flips: Tensor
    augmentation: Augmentation

    def pin_memory(self) -> Patches:
        """The same in memory that a GPU reads while the CPU goes on; the loader calls it."""
        moved = ("images", "labels", "boxes", "flips")
        return replace(self, **{name: getattr(self, name).pin_memory() for name in moved})

    def to(self, device: torch.device) -> Patches:
        """The same with voxels, boxes and flips on a device."""
        return Patches(
            self.images.to(device, non_blocking=True),
            self.labels.to(device, non_blocking=True),
            self.boxes.to(device, non_blocking=True),
            self.flips.to(device, non_blocking=True),
            self.augmentation,
        )


class Locations:
    """Voxels of each class in each case, in two tensors that reading processes share instead of copying.

    Args:
        cache: labelled cases.
        cases: indices of those to look at.
    """

    def __init__(self, cache: LabelledCache, cases: Sequence[int]) -> None:
        self._row = {case: row for row, case in enumerate(cases)}
        outputs = cache.task.outputs
        bounds, voxels, end = torch.zeros(len(cases), outputs + 1, dtype=torch.int64), [], 0
        for case, row in self._row.items():
            found = cache.locations(case)
            for number in range(outputs):
                bounds[row, number] = end
                if number in found:
                    voxels.append(found[number])
                    end += len(found[number])
            bounds[row, outputs] = end
        self._bounds = bounds  # where each class begins, and the last one ends
        self._voxels = torch.from_numpy(np.concatenate(voxels or [np.zeros((0, 3), np.int32)]))

    def classes(self, case: int) -> np.ndarray:
        """The classes that a case has, ascending."""
        return np.flatnonzero(np.diff(self._bounds[self._row[case]].numpy()))

    def draw(self, rng: np.random.Generator, case: int, number: int) -> np.ndarray:
        """int64 [3], one voxel (D, H, W) of a class that the case has."""
        first, last = self._bounds[self._row[case], number : number + 2].tolist()
        return self._voxels[first + int(rng.integers(last - first))].numpy().astype(np.int64)


class PatchDataset(Dataset[tuple]):
    """Samples by index.

    Args:
        cache: labelled cases.
        cases: indices of those to train on.
        settings: of the patches.
        augmentation: of the intensities.
        seed: of everything that is drawn.
    """

    def __init__(
        self,
        cache: LabelledCache,
        cases: Sequence[int],
        settings: PatchSettings,
        augmentation: AugmentSettings,
        seed: int,
    ) -> None:
        self.cache, self.cases, self.settings = cache, list(cases), settings
        self.augmentation, self.seed = augmentation, seed
        self.locations = Locations(cache, self.cases)
        self.block: Triple = tuple(  # type: ignore[assignment]
            math.ceil(size * settings.crop_scale[1]) for size in settings.patch_size
        )

    def __getitem__(self, index: int) -> tuple:
        rng = np.random.default_rng((self.seed, index))
        case = self.cases[rng.integers(len(self.cases))]
        shape = np.array(self.cache.shape(case))
        centre = self._centre(rng, case, shape)
        block = np.array(self.block)
        # Inside the volume where that is large enough; a smaller one lies in the middle, with air around it.
        start = np.where(
            shape > block, np.clip(centre - block // 2, 0, np.maximum(shape - block, 0)), (shape - block) // 2
        )
        low, high = self.settings.crop_scale
        size = np.array(self.settings.patch_size) * rng.uniform(low, high, 3)
        inside = centre - start  # the voxel that the box has to hold
        first = np.maximum(inside + 1 - size, 0)
        last = np.minimum(inside, block - size)
        corner = first + rng.random(3) * np.maximum(last - first, 0)
        flips = rng.random(3) < np.array(self.settings.flip_probability)
        image, label = self.cache.read_block(case, start.tolist(), self.block)
        return image, label, np.concatenate([corner, corner + size]), flips, sample_augmentation(
            rng, 1, self.augmentation
        )  # fmt: skip

    def _centre(self, rng: np.random.Generator, case: int, shape: np.ndarray) -> np.ndarray:
        classes = self.locations.classes(case)
        if len(classes) and rng.random() < self.settings.foreground:
            return self.locations.draw(rng, case, int(classes[rng.integers(len(classes))]))
        return rng.integers(0, shape)


def collate(samples: Sequence[tuple]) -> Patches:
    """Samples of a :class:`PatchDataset` as one batch."""
    images, labels, boxes, flips, augmentations = zip(*samples, strict=True)
    joined = {
        name: torch.cat([getattr(augmentation, name) for augmentation in augmentations])
        for name in vars(augmentations[0])
    }
    return Patches(
        torch.from_numpy(np.stack(images)[:, None]),
        torch.from_numpy(np.stack(labels)),
        torch.from_numpy(np.stack(boxes)),
        torch.from_numpy(np.stack(flips)),
        Augmentation(**joined),
    )


def make_loader(
    dataset: PatchDataset, first_step: int, steps: int, batch_size: int, workers: int, pinned: bool = False
) -> DataLoader:
    """The batches of steps ``first_step`` to ``steps``, in order; ``pinned`` for a GPU."""

    def batches() -> Iterator[list[int]]:
        for step in range(first_step, steps):
            yield list(range(step * batch_size, (step + 1) * batch_size))

    return DataLoader(
        dataset,
        batch_sampler=list(batches()),
        num_workers=workers,
        collate_fn=collate,
        # As in pretraining (pgl.training.contexts): forked workers may hang.
        multiprocessing_context="spawn" if workers else None,
        pin_memory=pinned,
        worker_init_fn=survive_one_sigterm if workers else None,
    )


def cut(patches: Patches, patch_size: Triple, intensity: IntensitySettings) -> tuple[Tensor, Tensor]:
    """Network input and classes of a batch, on its device.

    Images are interpolated linearly, classes taken from the voxel that a patch voxel's centre lies in: both
    at the same places.

    Returns:
        float32 Tensor[B, 1, *patch], normalised and augmented; int64 Tensor[B, 1, *patch].
    """
    batch = torch.arange(len(patches.boxes), device=patches.boxes.device, dtype=patches.boxes.dtype)
    rows = torch.cat([batch[:, None], patches.boxes], 1)
    views = pgl_ops.roi_align3d(patches.images, rows, patch_size, sampling_ratio=1, flips=patches.flips)
    inputs = augment(normalise(views, intensity), patches.augmentation)
    return inputs, cut_labels(patches.labels, patches.boxes, patches.flips, patch_size)[:, None]


def cut_labels(labels: Tensor, boxes: Tensor, flips: Tensor, patch_size: Triple) -> Tensor:
    """int64 Tensor[B, *patch] of the labels' voxels at the centres of the patches' voxels."""
    places = []
    for axis, size in enumerate(patch_size):
        low, high = boxes[:, axis, None], boxes[:, axis + 3, None]
        step = torch.arange(size, device=boxes.device, dtype=boxes.dtype) + 0.5
        at = (low + step * (high - low) / size).floor().long().clamp(0, labels.shape[axis + 1] - 1)
        places.append(torch.where(flips[:, axis, None], at.flip(1), at))
    rows = torch.arange(len(labels), device=labels.device)
    d, h, w = places
    cut_out = labels[rows[:, None, None, None], d[:, :, None, None], h[:, None, :, None], w[:, None, None, :]]
    return cut_out.long()
