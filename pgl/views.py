"""The one geometry: a view is a box in a context block, flips, and the size it is cut to.

The same record cuts the view out of the block and later places the region that two views share on the view's
feature map. Both go through :func:`pgl_ops.roi_align3d`. Nothing else in pretraining knows about coordinates;
patches for fine-tuning are drawn in :mod:`pgl.downstream.sampling`.

Coordinates are continuous voxels of the context block in the order (d1, h1, w1, d2, h2, w2); voxel i covers
[i, i + 1). Two views of a sample are kept view by view: rows [0, B) of a flattened batch are the first
views, rows [B, 2B) the second ones, so ``chunk(2)`` separates them.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

import pgl_ops

Triple = tuple[int, int, int]

# Draws before a pair is moved together instead; at 10 % overlap about one draw in ten fails, so it is
# hardly seen.
_MOST_DRAWS = 64


class ViewPairs:
    """Two views of each of B context blocks.

    No dataclass: Lightning Fabric would walk into one and turn the boxes into float32.

    Args:
        boxes: float64 Tensor[B, 2, 6], what each view shows, in voxels of its context block.
        flips: bool Tensor[B, 2, 3], the axes on which each view is mirrored.
        patch_size: (D, H, W) voxels that each view is scaled to.
        regions: float64 Tensor[B, R, 6], the boxes inside both views that are compared, in voxels of the
            context block; by default all that both share, R = 1.

    Raises:
        ValueError: a tensor has another shape or dtype.
    """

    def __init__(
        self, boxes: Tensor, flips: Tensor, patch_size: Triple, regions: Tensor | None = None
    ) -> None:
        if boxes.dtype != torch.float64 or boxes.shape[1:] != (2, 6):
            raise ValueError(
                f"boxes must be a float64 Tensor[B, 2, 6], got {boxes.dtype} {list(boxes.shape)}"
            )
        if flips.dtype != torch.bool or flips.shape != (len(boxes), 2, 3):
            raise ValueError(
                f"flips must be a bool Tensor[{len(boxes)}, 2, 3], got {flips.dtype} {list(flips.shape)}"
            )
        self.boxes = boxes
        self.flips = flips
        if regions is not None and (regions.shape[::2] != (len(boxes), 6) or regions.dtype != torch.float64):
            raise ValueError(
                f"regions must be a float64 Tensor[{len(boxes)}, R, 6], got {regions.dtype} "
                f"{list(regions.shape)}"
            )
        self.patch_size = patch_size
        self.regions = regions

    def __len__(self) -> int:
        return len(self.boxes)

    def flat_boxes(self) -> Tensor:
        """Tensor[2B, 6]: the boxes of all first views, then of all second ones."""
        return self.boxes.transpose(0, 1).flatten(0, 1)

    def flat_flips(self) -> Tensor:
        """bool Tensor[2B, 3] in the order of :meth:`flat_boxes`."""
        return self.flips.transpose(0, 1).flatten(0, 1)

    def placed(self, regions: Tensor) -> Tensor:
        """Tensor[2B, 6]: the regions Tensor[B, 6] of the blocks, placed on the grids of both views."""
        return place(regions.repeat(2, 1), self.flat_boxes(), self.flat_flips(), self.patch_size)

    def to(self, device: torch.device | str) -> ViewPairs:
        """The same pairs on another device, without waiting for it if they are pinned."""
        return self._each(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> ViewPairs:
        """The same pairs in memory from which a GPU copies by itself."""
        return self._each(torch.Tensor.pin_memory)

    def tensors(self) -> list[Tensor]:
        """What the pairs consist of."""
        return [self.boxes, self.flips, *([] if self.regions is None else [self.regions])]

    def _each(self, change: Callable[[Tensor], Tensor]) -> ViewPairs:
        boxes, flips, *regions = map(change, self.tensors())
        return ViewPairs(boxes, flips, self.patch_size, *regions)


def sample_view_pairs(
    generator: torch.Generator,
    batch: int,
    context_size: Triple,
    patch_size: Triple,
    crop_scale: tuple[float, float] = (1.1, 1.4),
    min_overlap: float = 0.1,
    flip_probability: float | tuple[float, float, float] = 0.5,
) -> ViewPairs:
    """Draw two random views for each of ``batch`` context blocks.

    Each axis of each crop is ``patch_size`` times a factor from ``crop_scale``, at a uniform place inside the
    block. Pairs that share too little are drawn again; one that still does after 64 draws gets the second
    crop concentric with the first and, where even that is not enough, of the first one's size.

    Args:
        generator: CPU generator; the result is a function of its state.
        batch: number of pairs B.
        context_size: (D, H, W) voxels of the blocks.
        patch_size: (D, H, W) voxels of a view.
        crop_scale: lowest and highest edge of a crop relative to the patch.
        min_overlap: least shared volume relative to the smaller crop, in (0, 1].
        flip_probability: chance of a mirror for each axis and view, or one for each of D, H and W.

    Returns:
        The pairs, on the CPU.

    Raises:
        ValueError: the largest crop does not fit into the block, or an argument is out of its range.
    """
    if batch < 0:
        raise ValueError(f"batch must not be negative, got {batch}")
    if not 0 < crop_scale[0] <= crop_scale[1]:
        raise ValueError(f"crop_scale must be two positive numbers, lowest first, got {crop_scale}")
    if not 0 < min_overlap <= 1:
        raise ValueError(f"min_overlap must lie in (0, 1], got {min_overlap}")
    chances = torch.as_tensor(flip_probability, dtype=torch.float64)
    if chances.shape not in ((), (3,)) or not ((chances >= 0) & (chances <= 1)).all():
        raise ValueError(f"flip_probability must lie in [0, 1], one number or three, got {flip_probability}")
    # In numpy, since this is done for each sample alone and torch's calls cost more than such small numbers.
    context = np.array(context_size, dtype=np.float64)
    patch = np.array(patch_size, dtype=np.float64)
    if (patch * crop_scale[1] > context).any():
        raise ValueError(
            f"context_size {tuple(context_size)} cannot hold a crop of {crop_scale[1]} × patch_size "
            f"{tuple(patch_size)}: enlarge the context or lower crop_scale"
        )

    def draw(count: int) -> np.ndarray:
        uniform = torch.rand(2, count, 2, 3, generator=generator, dtype=torch.float64).numpy()
        size = patch * (crop_scale[0] + uniform[0] * (crop_scale[1] - crop_scale[0]))
        low = uniform[1] * (context - size)
        return np.concatenate([low, low + size], -1)

    boxes = draw(batch)
    for _ in range(_MOST_DRAWS - 1):
        (apart,) = np.nonzero(_overlap(boxes) < min_overlap)
        if len(apart) == 0:
            break
        boxes[apart] = draw(len(apart))
    else:
        boxes = _move_together(boxes, context, min_overlap)
    flips = torch.rand(batch, 2, 3, generator=generator, dtype=torch.float64) < chances
    return ViewPairs(torch.from_numpy(boxes), flips, tuple(patch_size))  # type: ignore[arg-type]


def overlap(boxes: Tensor) -> Tensor:
    """Shared volume of each pair Tensor[B, 2, 6], on the CPU, relative to the smaller box: Tensor[B] in
    [0, 1]."""
    return torch.from_numpy(_overlap(boxes.numpy()))


def sample_regions(
    generator: torch.Generator, boxes: Tensor, count: int, scale: tuple[float, float]
) -> Tensor:
    """Draw boxes inside what both boxes of each pair share.

    Each edge is that of the shared region times a factor from ``scale``, at a uniform place inside it.

    Args:
        generator: CPU generator; the result is a function of its state.
        boxes: float64 Tensor[B, 2, 6], on the CPU.
        count: boxes a pair, R.
        scale: lowest and highest factor, in (0, 1].

    Returns:
        float64 Tensor[B, R, 6] in the coordinates of ``boxes``.
    """
    low, high = shared_region(boxes)[:, None].chunk(2, -1)
    factor, place = torch.rand(2, len(boxes), count, 3, generator=generator, dtype=torch.float64)
    edge = (high - low) * (scale[0] + factor * (scale[1] - scale[0]))
    first = low + place * (high - low - edge)
    # Rounding must not lead out of the shared region.
    return torch.cat([first, torch.minimum(first + edge, high)], -1)


def shared_region(boxes: Tensor) -> Tensor:
    """The box Tensor[B, 6] that both boxes of each pair Tensor[B, 2, 6] cover, in the same coordinates.

    Raises:
        ValueError: the boxes of a pair do not touch (checked on the CPU only).
    """
    region = torch.cat([boxes[..., :3].amax(1), boxes[..., 3:].amin(1)], -1)
    if boxes.device.type == "cpu" and bool((region[:, 3:] <= region[:, :3]).any()):
        row = int((region[:, 3:] <= region[:, :3]).any(1).nonzero()[0])
        raise ValueError(f"boxes[{row}] share no volume: {boxes[row].tolist()}")
    return region


def place(region: Tensor, box: Tensor, flips: Tensor, patch_size: Triple) -> Tensor:
    """The region of the context block on the view's own grid, mirrored on the axes on which the view is.

    Args:
        region: float64 Tensor[K, 6], in voxels of the context block.
        box: Tensor[K, 6], what the view shows.
        flips: bool Tensor[K, 3] of the view.
        patch_size: (D, H, W) voxels of the view.

    Returns:
        Tensor[K, 6] in voxels of the view.
    """
    # Filled on the device: copying three numbers there would make the CPU wait for it.
    patch = torch.stack([torch.full_like(box[:, 0], size) for size in patch_size], 1)
    zoom = patch / (box[:, 3:] - box[:, :3])
    low = (region[:, :3] - box[:, :3]) * zoom
    high = (region[:, 3:] - box[:, :3]) * zoom
    return torch.cat([torch.where(flips, patch - high, low), torch.where(flips, patch - low, high)], 1)


def assumed(pairs: ViewPairs, crop_prior: bool = True, flip_prior: bool = True) -> tuple[Tensor, Tensor]:
    """What the aligner is told about the views: where the shared region lies, and how they are mirrored.

    Both switches are for ablations, in which the aligner ignores a transform that the views were made with.

    Args:
        pairs: how the views were really cut.
        crop_prior: whether it knows their crops and scales; if not, each whole view counts as shared.
        flip_prior: whether it knows their mirrors; if not, the region is where it is, but is not turned back.

    Returns:
        Tensor[2B·R, 6], in voxels of the views, and bool Tensor[2B·R, 3], both for :func:`align`.
    """
    flips = pairs.flat_flips()
    if crop_prior and pairs.regions is not None:
        count = pairs.regions.shape[1]
        flips = flips.repeat_interleave(count, 0)
        boxes = pairs.flat_boxes().repeat_interleave(count, 0)
        regions = place(pairs.regions.flatten(0, 1).repeat(2, 1), boxes, flips, pairs.patch_size)
    elif crop_prior:
        regions = pairs.placed(shared_region(pairs.boxes))
    else:
        edge = pairs.boxes[:, 0, 0].repeat(2)
        regions = torch.stack([torch.full_like(edge, n) for n in (0, 0, 0, *pairs.patch_size)], 1)
    return regions, flips if flip_prior else torch.zeros_like(flips)


def cut(contexts: Tensor, pairs: ViewPairs) -> Tensor:
    """Cut both views out of the blocks in one call: trilinear samples at the centres of the view's voxels.

    Args:
        contexts: Tensor[B, 1, D, H, W], int16 HU (any dtype that ``roi_align3d`` reads).
        pairs: the views, on the same device.

    Returns:
        Tensor[2B, 1, *patch_size], float32 for integers: all first views, then all second ones.
    """
    index = torch.arange(len(pairs), device=contexts.device, dtype=torch.float64).repeat(2)
    boxes = torch.cat([index[:, None], pairs.flat_boxes()], 1)
    return pgl_ops.roi_align3d(contexts, boxes, pairs.patch_size, sampling_ratio=1, flips=pairs.flat_flips())


def align(
    features: Tensor,
    regions: Tensor,
    flips: Tensor,
    stride: Triple,
    size: Triple,
    sampling_ratio: int = -1,
) -> Tensor:
    """Cut a region out of each view's feature map, back in the orientation of the volume.

    Args:
        features: Tensor[N, C, d, h, w], one feature map a view.
        regions: Tensor[N·R, 6], R regions a view, in voxels of the view (:func:`place`).
        flips: bool Tensor[N·R, 3] of their views, which is undone.
        stride: (D, H, W) view voxels a feature voxel.
        size: (D, H, W) voxels of the result.
        sampling_ratio: samples a bin and axis, −1 for as many as the bin has feature voxels.

    Returns:
        Tensor[N·R, C, *size]; the same voxel of two views of a sample shows the same place.
    """
    return pgl_ops.roi_align3d(
        features, numbered(regions, len(features)), size, scale_of(stride), sampling_ratio, flips=flips
    )


def numbered(regions: Tensor, views: int) -> Tensor:
    """Tensor[N·R, 7]: each row of Tensor[N·R, 6], R for each of N views, with its view's number in front."""
    number = torch.arange(views, device=regions.device, dtype=regions.dtype)
    if len(regions) != views:
        number = number.repeat_interleave(len(regions) // views, output_size=len(regions))
    return torch.cat([number[:, None], regions], 1)


def scale_of(stride: Triple) -> tuple[float, float, float]:
    """The ``spatial_scale`` of a feature map with this stride."""
    return (1 / stride[0], 1 / stride[1], 1 / stride[2])


def _overlap(boxes: np.ndarray) -> np.ndarray:
    low, high = boxes[..., :3], boxes[..., 3:]
    shared = np.maximum(high.min(1) - low.max(1), 0).prod(-1)
    return shared / (high - low).prod(-1).min(-1)


def _move_together(boxes: np.ndarray, context: np.ndarray, min_overlap: float) -> np.ndarray:
    first, second = boxes[:, 0], boxes[:, 1]
    centre = (first[:, :3] + first[:, 3:]) / 2
    size = second[:, 3:] - second[:, :3]
    low = np.minimum(np.maximum(centre - size / 2, 0), context - size)
    concentric = np.stack([first, np.concatenate([low, low + size], -1)], 1)
    boxes = np.where((_overlap(boxes) < min_overlap)[:, None, None], concentric, boxes)
    same = np.stack([first, first], 1)
    # Rounding must not turn two equal boxes into "not quite all of it".
    return np.where((_overlap(boxes) < min_overlap)[:, None, None], same, boxes)
