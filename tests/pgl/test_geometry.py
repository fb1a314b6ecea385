"""The geometry, proved: whatever the crops and flips, the aligned regions of two views show the same places.

With a ramp as volume each stage is exact (trilinear sampling and average pooling of a ramp give the ramp at
the sample's or the cell's centre), so any error in placing, scaling or flipping shows up far above
rounding. The one exception is known: within half a voxel of a grid's border RoIAlign repeats the border
value. There is nothing to compare there, so regions are inset by half a (feature) voxel, or the bins that
read there are left out.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from pgl.views import ViewPairs, align, cut, sample_view_pairs, shared_region

CONTEXT, PATCH = (26, 60, 52), (16, 32, 28)
SARCOMA = Path(__file__).resolve().parents[2].parent / "shared" / "data" / "sarcoma"
SEEDS, BATCH = 16, 12
STRIDES = [(1, 1, 1), (2, 4, 4), (4, 2, 1)]


@pytest.fixture(autouse=True)
def one_thread(_same_threads):
    torch.set_num_threads(1)


def random_pairs(seed: int, batch: int = BATCH) -> ViewPairs:
    return sample_view_pairs(torch.Generator().manual_seed(seed), batch, CONTEXT, PATCH)


def random_ramps(seed: int, batch: int = BATCH) -> tuple[Tensor, Tensor]:
    """float64 contexts Tensor[B, 1, *CONTEXT] and their (slope_d, slope_h, slope_w, offset) Tensor[B, 4]."""
    slopes = torch.randn(batch, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    grids = torch.meshgrid(*(torch.arange(n, dtype=torch.float64) + 0.5 for n in CONTEXT), indexing="ij")
    ramps = sum(slopes[:, i, None, None, None] * grid for i, grid in enumerate(grids))
    return (ramps + slopes[:, 3, None, None, None])[:, None], slopes


def ramp_at_bin_centres(slopes: Tensor, regions: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The ramps' values at the centres of ``size`` bins of each region, from their formula."""
    values = slopes[:, 3, None, None, None].expand(-1, *size)
    for axis in range(3):
        low, high = regions[:, axis, None], regions[:, 3 + axis, None]
        centres = low + (high - low) * (torch.arange(size[axis], dtype=torch.float64) + 0.5) / size[axis]
        shape = [-1, 1, 1, 1]
        shape[1 + axis] = size[axis]
        values = values + (slopes[:, axis, None] * centres).view(shape)
    return values[:, None]


def inset(regions: Tensor, pairs: ViewPairs, stride: tuple[int, int, int]) -> Tensor:
    """The regions less half a feature voxel of either view on every side."""
    scale = (pairs.boxes[..., 3:] - pairs.boxes[..., :3]) / torch.tensor(PATCH, dtype=torch.float64)
    margin = scale.amax(1) * torch.tensor(stride) / 2
    return torch.cat([regions[:, :3] + margin, regions[:, 3:] - margin], 1)


def aligned_views(contexts: Tensor, pairs: ViewPairs, regions: Tensor, stride, size, ratio=-1):
    views = cut(contexts, pairs)
    features = functional.avg_pool3d(views, stride, stride)
    return align(features, pairs.placed(regions), pairs.flat_flips(), stride, size, ratio).chunk(2)


@pytest.mark.parametrize("ratio", [-1, 1, 2])
@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_aligned_regions_of_ramps_agree_and_are_the_ramp(stride, ratio):
    compared = 0
    for seed in range(SEEDS):
        pairs, (contexts, slopes) = random_pairs(seed), random_ramps(seed)
        regions = inset(shared_region(pairs.boxes), pairs, stride)
        kept = (regions[:, 3:] > regions[:, :3]).all(1)
        compared += int(kept.sum())
        size = (3, 5, 4)
        first, second = aligned_views(contexts, pairs, regions, stride, size, ratio)
        expected = ramp_at_bin_centres(slopes, regions, size)
        torch.testing.assert_close(first[kept], second[kept], atol=1e-9, rtol=0)
        torch.testing.assert_close(first[kept], expected[kept], atol=1e-9, rtol=0)
    assert compared > 0.75 * SEEDS * BATCH


@pytest.mark.parametrize("stride", STRIDES, ids=str)
def test_bins_of_the_whole_shared_region_agree_but_for_those_that_read_a_border(stride):
    size, compared, total = (4, 8, 7), 0, 0
    for seed in range(SEEDS):
        pairs, (contexts, slopes) = random_pairs(seed), random_ramps(seed)
        regions = shared_region(pairs.boxes)
        first, second = aligned_views(contexts, pairs, regions, stride, size, ratio=1)
        inner = away_from_borders(pairs, regions, stride, size)
        expected = ramp_at_bin_centres(slopes, regions, size)
        torch.testing.assert_close(first[:, 0][inner], second[:, 0][inner], atol=1e-9, rtol=0)
        torch.testing.assert_close(first[:, 0][inner], expected[:, 0][inner], atol=1e-9, rtol=0)
        compared, total = compared + int(inner.sum()), total + inner.numel()
    assert compared > 0.4 * total


def away_from_borders(pairs: ViewPairs, regions: Tensor, stride, size) -> Tensor:
    """bool Tensor[B, *size]: bins whose centre is at least half a feature voxel inside both views."""
    inner = torch.ones(len(pairs), *size, dtype=torch.bool)
    for view in range(2):
        box = pairs.boxes[:, view]
        for axis in range(3):
            low, high = regions[:, axis, None], regions[:, 3 + axis, None]
            centres = low + (high - low) * (torch.arange(size[axis]) + 0.5) / size[axis]
            margin = stride[axis] / 2 * (box[:, 3 + axis] - box[:, axis])[:, None] / PATCH[axis]
            ok = (centres >= box[:, axis, None] + margin) & (centres <= box[:, 3 + axis, None] - margin)
            shape = [-1, 1, 1, 1]
            shape[1 + axis] = size[axis]
            inner &= ok.view(shape)
    return inner


@pytest.mark.parametrize("stride", STRIDES[:2], ids=str)
def test_smooth_volumes_agree_within_the_bound_of_trilinear_interpolation(stride):
    """Linear interpolation on a grid of spacing h errs by at most h²/8·max|f''| an axis; pooling over a cell
    of width w adds at most w²/24·max|f''|."""
    amplitude = 100.0
    for seed in range(SEEDS):
        pairs = random_pairs(seed)
        rng = np.random.default_rng(seed)
        frequency, phase = rng.uniform(0.1, 0.35, 3), rng.uniform(0, 6, 3)
        grids = np.meshgrid(*(np.arange(n) + 0.5 for n in CONTEXT), indexing="ij")
        waves = [np.sin(f * grid + p) for f, grid, p in zip(frequency, grids, phase, strict=True)]
        contexts = torch.from_numpy(amplitude * sum(waves)).expand(len(pairs), 1, *CONTEXT)
        regions = inset(shared_region(pairs.boxes), pairs, stride)
        kept = (regions[:, 3:] > regions[:, :3]).all(1)
        first, second = aligned_views(contexts, pairs, regions, stride, (3, 5, 4), ratio=1)
        voxel = (pairs.boxes[..., 3:] - pairs.boxes[..., :3]) / torch.tensor(PATCH, dtype=torch.float64)
        cell = voxel * torch.tensor(stride)
        pooled = torch.where(torch.tensor(stride) > 1, cell**2 / 24, 0.0)
        bound = (amplitude * torch.from_numpy(frequency**2) * (1 / 8 + cell**2 / 8 + pooled)).sum((1, 2))
        worst = (first - second).abs().amax((1, 2, 3, 4))
        assert (worst[kept] <= bound[kept]).all()


@pytest.mark.parametrize("stride", STRIDES[:2], ids=str)
def test_on_real_ct_only_the_right_place_and_orientation_fit(stride):
    """Interpolation error on real CT is a few percent of the contrast; a region moved by one feature voxel,
    or a flip that is not undone, costs many times as much."""
    volume = real_ct()
    rng = np.random.default_rng(0)
    right, moved, unflipped, spread = [], [], [], []
    for seed in range(8):
        pairs = random_pairs(seed)
        contexts = torch.from_numpy(np.stack([random_block(volume, rng) for _ in pairs.boxes]))[:, None]
        regions = inset(shared_region(pairs.boxes), pairs, stride)
        large = (regions[:, 3:] - regions[:, :3] > 4 * torch.tensor(stride)).all(1)
        kept = large & (pairs.flips[:, 0] != pairs.flips[:, 1]).any(1)
        size = (4, 6, 6)
        first, second = aligned_views(contexts, pairs, regions, stride, size)
        features = functional.avg_pool3d(cut(contexts, pairs), stride, stride)
        shift = torch.tensor([*stride, *stride], dtype=torch.float64)
        off = align(features, pairs.placed(regions) + shift, pairs.flat_flips(), stride, size).chunk(2)[1]
        no_flips = torch.zeros_like(pairs.flat_flips())
        ignored = align(features, pairs.placed(regions), no_flips, stride, size).chunk(2)
        right.append((first - second)[kept].abs().flatten())
        moved.append((first - off)[kept].abs().flatten())
        unflipped.append((ignored[0] - ignored[1])[kept].abs().flatten())
        spread.append(first[kept].flatten())
    right_error = float(torch.cat(right).mean())
    assert right_error < 0.03 * float(torch.cat(spread).std())
    assert right_error < 0.2 * float(torch.cat(moved).mean())
    assert right_error < 0.1 * float(torch.cat(unflipped).mean())


def random_block(volume: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    start = [rng.integers(0, n - c + 1) for n, c in zip(volume.shape, CONTEXT, strict=True)]
    return volume[tuple(slice(s, s + c) for s, c in zip(start, CONTEXT, strict=True))].clip(-1024, 325)


def real_ct() -> np.ndarray:
    """One sarcoma CT, int16 [D, H, W]."""
    sitk = pytest.importorskip("SimpleITK")
    file = SARCOMA / "STS_004_ct.nii.gz"
    if not file.is_file():
        pytest.skip(f"no real CT at {SARCOMA}")
    return np.rint(sitk.GetArrayFromImage(sitk.ReadImage(str(file)))).astype(np.int16)
