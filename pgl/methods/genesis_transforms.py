"""What Models Genesis does to a picture before it is to be restored: shuffle, bend intensities, paint.

Written from the description in Zhou et al., "Models Genesis", arXiv 1908.06912 / 2004.07882. What happens to
a view is a function of its seed alone. The few numbers of a view are drawn on the CPU; fields of noise and
the windows of the shuffling are drawn on the views' device, where all of the arithmetic runs.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from torch import Tensor

Triple = tuple[int, int, int]

SHUFFLE_PROBABILITY = 0.5
# As many as the authors draw for a view, whatever its size.
SHUFFLED_WINDOWS = 10_000
# The longest side of a shuffled window relative to the axis.
WINDOW_SHARE = 10

CURVE_PROBABILITY = 0.9
FALLING_PROBABILITY = 0.5
CURVE_POINTS = 1000

PAINT_PROBABILITY = 0.9
IN_PAINTING_PROBABILITY = 0.2
MOST_BOXES = 5
# After each box, whether there is another; and for in-painting, whether there is a first.
NEXT_BOX_PROBABILITY = 0.95
MARGIN = 3
UNPAINTED, IN_PAINTED, OUT_PAINTED = 0, 1, 2

# Views whose windows are shuffled at once; it changes memory and nothing else.
_GROUP = 16


@dataclass
class Distortion:
    """What is done to each of N views, all on the CPU.

    Args:
        seed: int64 Tensor[N], of the view's noise and windows.
        shuffled: bool Tensor[N].
        bent: bool Tensor[N], whether intensities go through the curve.
        curve: Tensor[N, 4], the inner points (x1, y1, x2, y2) of the curve.
        falling: bool Tensor[N], whether it falls from 1 to 0.
        painting: int64 Tensor[N]: ``UNPAINTED``, ``IN_PAINTED`` or ``OUT_PAINTED``.
        boxes: int64 Tensor[N, 5, 6], (d1, h1, w1, d2, h2, w2) in voxels: what noise replaces (in-painted) or
            spares (out-painted). Those that are not in use are empty.
    """

    seed: Tensor
    shuffled: Tensor
    bent: Tensor
    curve: Tensor
    falling: Tensor
    painting: Tensor
    boxes: Tensor

    def __len__(self) -> int:
        return len(self.seed)


def sample_distortion(seeds: Tensor, size: Triple) -> Distortion:
    """Draw what is done to views of ``size`` (D, H, W) voxels, each from its own seed (CPU int64[N])."""
    drawn = [_sample_one(int(seed), size) for seed in seeds.tolist()]
    return Distortion(**{f.name: torch.cat([getattr(d, f.name) for d in drawn]) for f in fields(Distortion)})


def _sample_one(seed: int, size: Triple) -> Distortion:
    rng = np.random.default_rng(seed)
    shuffled = rng.random() < SHUFFLE_PROBABILITY
    bent = rng.random() < CURVE_PROBABILITY
    curve = rng.random(4)
    falling = rng.random() < FALLING_PROBABILITY
    painted = rng.random() < PAINT_PROBABILITY
    inside = rng.random() < IN_PAINTING_PROBABILITY
    painting = UNPAINTED if not painted else IN_PAINTED if inside else OUT_PAINTED
    boxes = np.zeros((MOST_BOXES, 6), np.int64)
    if painted:
        more = rng.random(MOST_BOXES) < NEXT_BOX_PROBABILITY
        # Something of an out-painted view is always left to see.
        more[0] |= not inside
        count = MOST_BOXES if more.all() else int(np.argmin(more))
        for box in boxes[:count]:
            box[:] = _draw_box(rng, size, inside)
    return Distortion(
        torch.tensor([seed]),
        torch.tensor([shuffled]),
        torch.tensor([bent]),
        torch.from_numpy(curve.astype(np.float32))[None],
        torch.tensor([falling]),
        torch.tensor([painting]),
        torch.from_numpy(boxes)[None],
    )


def _draw_box(rng: np.random.Generator, size: Triple, inside: bool) -> np.ndarray:
    """A block to paint, a sixth to a third of each axis, or a window to spare, 3/7 to 4/7 short of it; both 3
    voxels from the border, or in the middle of an axis that is too short for that."""
    low, high = [], []
    for axis in size:
        if inside:
            edge = int(rng.integers(max(axis // 6, 1), max(axis // 3, 1) + 1))
        else:
            edge = axis - int(rng.integers(3 * axis // 7, 4 * axis // 7 + 1))
        margin = min(MARGIN, (axis - edge) // 2)
        start = int(rng.integers(margin, axis - edge - margin + 1))
        low.append(start)
        high.append(start + edge)
    return np.array([*low, *high])


def distort(views: Tensor, distortion: Distortion) -> Tensor:
    """Shuffle, bend and paint each view as its own distortion says, in this order.

    Args:
        views: float Tensor[N, 1, D, H, W] in [0, 1].
        distortion: of the same N views.

    Returns:
        A new tensor of the same shape, in [0, 1].
    """
    distorted = views.clone()
    shuffled = distortion.shuffled.nonzero().flatten()
    for rows in shuffled.split(_GROUP) if len(shuffled) else ():
        there = rows.to(views.device, non_blocking=True)
        some = views[there]
        distorted[there] = shuffle_windows(some, *draw_windows(distortion.seed[rows], some))
    bent = distortion.bent.nonzero().flatten()
    if len(bent):
        there = bent.to(views.device, non_blocking=True)
        distorted[there] = bend(distorted[there], distortion.curve[bent], distortion.falling[bent])
    painted = (distortion.painting != UNPAINTED).nonzero().flatten()
    if len(painted):
        there = painted.to(views.device, non_blocking=True)
        distorted[there] = paint(
            distorted[there],
            distortion.boxes[painted],
            distortion.painting[painted] == OUT_PAINTED,
            distortion.seed[painted],
        )
    return distorted


def draw_windows(seeds: Tensor, views: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Windows to shuffle for each view.

    Sides are uniform from 1 to a tenth of the axis (at least 1), places uniform.

    Args:
        seeds: CPU int64[N].
        views: Tensor[N, 1, D, H, W], whose size and device count.

    Returns:
        First voxels and sizes, int64 Tensor[N, 10000, 3], and a random key in [0, 1) for every voxel of every
        window, float64 Tensor[sum of volumes], in the order of views, windows and voxels; on the views'
        device.
    """
    device = views.device
    # Filled on the device: a copy from here would wait for it.
    size = torch.stack([torch.full((), n, device=device, dtype=torch.int64) for n in views.shape[2:]])
    longest = torch.clamp(size // WINDOW_SHARE, min=1)
    own = [torch.Generator(device).manual_seed(seed) for seed in seeds.tolist()]
    share = torch.stack(
        [torch.rand(2, SHUFFLED_WINDOWS, 3, generator=g, device=device, dtype=torch.float64) for g in own]
    )
    sizes = 1 + (share[:, 0] * longest).long()
    starts = (share[:, 1] * (size - sizes + 1)).long()
    # The only place where the CPU waits for the device.
    counts = sizes.prod(2).sum(1).tolist()
    keys = [
        torch.rand(count, generator=g, device=device, dtype=torch.float64)
        for count, g in zip(counts, own, strict=True)
    ]
    return starts, sizes, torch.cat(keys)


def shuffle_windows(views: Tensor, starts: Tensor, sizes: Tensor, keys: Tensor) -> Tensor:
    """Permute the voxels within each window, read from the views as they came; where windows overlap, the
    last one counts.

    Args:
        views: Tensor[N, 1, D, H, W].
        starts, sizes, keys: as :func:`draw_windows` gives them: the first voxel of a window gets that with
            the smallest key, and so on.
    """
    device = views.device
    depth, height, width = views.shape[2:]
    first, edge = starts.flatten(0, 1), sizes.flatten(0, 1)
    volume = edge.prod(1)
    # One row for each voxel of each window.
    number = torch.arange(len(volume), device=device)
    window = number.repeat_interleave(volume, output_size=len(keys))
    inside = torch.arange(len(keys), device=device) - (volume.cumsum(0) - volume)[window]
    d = first[window, 0] + inside // (edge[window, 1] * edge[window, 2])
    h = first[window, 1] + inside // edge[window, 2] % edge[window, 1]
    w = first[window, 2] + inside % edge[window, 2]
    view = window // starts.shape[1]
    voxel = ((view * depth + d) * height + h) * width + w
    # Sorted by window, then by key: each window keeps its rows, in a random order.
    source = voxel[torch.argsort(window.double() + keys)]
    last = torch.full((views.numel(),), -1, device=device)
    last.scatter_reduce_(0, voxel, torch.arange(len(keys), device=device), "amax")
    flat = views.flatten()
    found = torch.where(last >= 0, source[last.clamp(min=0)], torch.arange(len(flat), device=device))
    return flat[found].view_as(views)


def bend(views: Tensor, curve: Tensor, falling: Tensor) -> Tensor:
    """Send intensities through each view's cubic Bézier curve from (0, 0) to (1, 1), or mirrored, so that it
    falls from (0, 1) to (1, 0).

    Args:
        views: Tensor[N, 1, D, H, W] in [0, 1].
        curve: CPU Tensor[N, 4], the inner points (x1, y1, x2, y2) in [0, 1]; the curve is then monotone.
        falling: CPU bool Tensor[N].
    """
    x, y = bezier(curve)
    y = torch.where(falling[:, None], y.flip(1), y)
    x, y = x.to(views.device, non_blocking=True), y.to(views.device, non_blocking=True)
    values = views.flatten(1).to(x.dtype)
    right = torch.searchsorted(x, values).clamp(1, x.shape[1] - 1)
    x0, x1, y0, y1 = (c.gather(1, i) for c in (x, y) for i in (right - 1, right))
    share = ((values - x0) / (x1 - x0).clamp(min=torch.finfo(x.dtype).tiny)).clamp(0, 1)
    return (y0 + share * (y1 - y0)).to(views.dtype).view_as(views)


def bezier(curve: Tensor) -> tuple[Tensor, Tensor]:
    """x and y, each float64 Tensor[N, 1000], along the curves with these inner points Tensor[N, 4]."""
    curve = curve.double()
    t = torch.linspace(0, 1, CURVE_POINTS, dtype=torch.float64)
    first, second, third = 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3
    x, y = (first * curve[:, [i]] + second * curve[:, [i + 2]] + third for i in (0, 1))
    # Rounding must not let a curve turn back where it hardly moves.
    return x.cummax(1).values, y.cummax(1).values


def paint(views: Tensor, boxes: Tensor, outside: Tensor, seeds: Tensor) -> Tensor:
    """Replace what lies inside of a view's boxes, or with ``outside`` what lies in none of them, by uniform
    noise in [0, 1).

    Args:
        views: Tensor[N, 1, D, H, W].
        boxes: CPU int64 Tensor[N, boxes, 6] in voxels, lower ends included, upper ones not.
        outside: CPU bool Tensor[N].
        seeds: CPU int64 Tensor[N], of the noise.
    """
    noise = torch.empty_like(views)
    generator = torch.Generator(views.device)
    for row, seed in enumerate(seeds.tolist()):
        noise[row].uniform_(generator=generator.manual_seed(seed))
    covered = torch.zeros(views.shape, dtype=torch.bool, device=views.device)
    ends = boxes.to(views.device, non_blocking=True)
    for number in range(boxes.shape[1]):
        box = ends[:, number]
        inside = torch.ones_like(covered)
        for axis, extent in enumerate(views.shape[2:]):
            at = torch.arange(extent, device=views.device)
            within = (at >= box[:, [axis]]) & (at < box[:, [axis + 3]])
            shape = [len(views), 1, 1, 1, 1]
            shape[axis + 2] = extent
            inside &= within.view(shape)
        covered |= inside
    return torch.where(
        covered ^ outside.to(views.device, non_blocking=True).view(-1, 1, 1, 1, 1), noise, views
    )
