"""Models Genesis' transforms against plain loops and what the description says of them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pgl.methods.genesis_transforms import (
    IN_PAINTED,
    MARGIN,
    OUT_PAINTED,
    SHUFFLED_WINDOWS,
    UNPAINTED,
    Distortion,
    bend,
    bezier,
    distort,
    draw_windows,
    paint,
    sample_distortion,
    shuffle_windows,
)

SIZE = (16, 42, 48)


def pictures(count: int, size=SIZE, seed: int = 0) -> Tensor:
    return torch.rand(count, 1, *size, generator=torch.Generator().manual_seed(seed))


def seeds(count: int) -> Tensor:
    return torch.randint(0, 2**62, (count,), generator=torch.Generator().manual_seed(3))


@pytest.fixture(scope="module")
def many() -> Distortion:
    return sample_distortion(seeds(3000), SIZE)


# --- local shuffling ---


def some_windows(views: Tensor, count: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    rng = np.random.default_rng(seed)
    size = views.shape[2:]
    edges = np.stack([rng.integers(1, 6, (len(views), count)) for _ in size], -1)
    starts = np.stack([rng.integers(0, n - edges[..., a] + 1) for a, n in enumerate(size)], -1)
    keys = rng.random(int(edges.prod(-1).sum()))
    return torch.from_numpy(starts), torch.from_numpy(edges), torch.from_numpy(keys)


def test_shuffling_equals_a_loop_over_the_windows():
    views = pictures(3, (8, 12, 13))
    starts, sizes, keys = some_windows(views, 60)
    expected, used = views.clone(), 0
    for row in range(len(views)):
        for start, size in zip(starts[row].tolist(), sizes[row].tolist(), strict=True):
            window = tuple(slice(s, s + e) for s, e in zip(start, size, strict=True))
            order = keys[used : used + math.prod(size)].argsort()
            used += math.prod(size)
            # Read from the picture as it came: a later window undoes what an earlier one did under it.
            expected[row, 0][window] = views[row, 0][window].flatten()[order].view(size)
    assert used == len(keys)
    shuffled = shuffle_windows(views, starts, sizes, keys)
    assert torch.equal(shuffled, expected)
    assert not torch.equal(shuffled, views)


def test_a_window_keeps_its_values_and_nothing_else_moves():
    views = pictures(1, (8, 12, 13))
    starts, sizes, keys = torch.tensor([[[1, 2, 3]]]), torch.tensor([[[3, 4, 5]]]), torch.rand(60).double()
    shuffled = shuffle_windows(views, starts, sizes, keys)
    window = (0, 0, slice(1, 4), slice(2, 6), slice(3, 8))
    assert torch.equal(shuffled[window].flatten().sort().values, views[window].flatten().sort().values)
    assert not torch.equal(shuffled[window], views[window])
    outside = torch.ones(views.shape, dtype=torch.bool)
    outside[window] = False
    assert torch.equal(shuffled[outside], views[outside])


def test_windows_are_many_lie_inside_and_are_at_most_a_tenth_of_the_axis():
    views = pictures(2, (16, 42, 96))
    starts, sizes, keys = draw_windows(seeds(2), views)
    assert starts.shape == sizes.shape == (2, SHUFFLED_WINDOWS, 3)
    assert len(keys) == int(sizes.prod(-1).sum()) and keys.min() >= 0 and keys.max() < 1
    assert sizes.amin((0, 1)).tolist() == [1, 1, 1] and sizes.amax((0, 1)).tolist() == [1, 4, 9]
    assert starts.min() == 0 and ((starts + sizes) <= torch.tensor([16, 42, 96])).all()
    assert (starts + sizes).amax((0, 1)).tolist() == [16, 42, 96]
    # Each side is as likely as any other: of 20,000 windows the mean is known to about 0.02.
    assert sizes.double().mean((0, 1)).tolist() == pytest.approx([1, 2.5, 5], abs=0.06)


# --- intensities ---


def de_casteljau(points: np.ndarray, t: float) -> np.ndarray:
    while len(points) > 1:
        points = (1 - t) * points[:-1] + t * points[1:]
    return points[0]


def test_curves_are_bezier_curves_from_0_to_1():
    curve = torch.rand(5, 4, generator=torch.Generator().manual_seed(1))
    x, y = bezier(curve)
    for row, (x1, y1, x2, y2) in enumerate(curve.tolist()):
        points = np.array([[0, 0], [x1, y1], [x2, y2], [1, 1]])
        for i in (0, 1, 250, 500, 998, 999):
            expected = de_casteljau(points, i / 999)
            assert (float(x[row, i]), float(y[row, i])) == pytest.approx(tuple(expected), abs=1e-6)


def test_every_curve_is_monotone_the_extreme_ones_too():
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 1.0])] * 4)
    values = torch.linspace(0, 1, 400).view(1, 1, 1, 1, -1).repeat(len(corners), 1, 1, 1, 1)
    for falling in (False, True):
        bent = bend(values, corners, torch.full((len(corners),), falling)).flatten(1)
        steps = bent.diff(dim=1) * (-1 if falling else 1)
        assert (steps >= 0).all() and bent.min() >= 0 and bent.max() <= 1
        ends = [1.0, 0.0] if falling else [0.0, 1.0]
        torch.testing.assert_close(bent[:, [0, -1]], torch.tensor(ends).expand(len(corners), 2))


def test_intensities_go_through_the_curve_and_falling_ones_through_its_mirror():
    views, curve = pictures(4, (4, 8, 8)), torch.rand(4, 4, generator=torch.Generator().manual_seed(2))
    falling = torch.tensor([False, True, False, True])
    bent = bend(views, curve, falling)
    t = np.linspace(0, 1, 20_000)
    for row, (x1, y1, x2, y2) in enumerate(curve.double().numpy()):

        def at(a: float, b: float) -> np.ndarray:
            return 3 * t * (1 - t) ** 2 * a + 3 * t**2 * (1 - t) * b + t**3

        along = at(y1, y2)[::-1] if falling[row] else at(y1, y2)
        expected = np.interp(views[row].numpy().ravel(), at(x1, x2), along)
        np.testing.assert_allclose(bent[row].numpy().ravel(), expected, atol=2e-3)


# --- painting ---


def in_boxes(boxes: Tensor, size=SIZE) -> Tensor:
    """By slicing, one box after the other."""
    covered = torch.zeros(len(boxes), 1, *size, dtype=torch.bool)
    for row, own in enumerate(boxes.tolist()):
        for d1, h1, w1, d2, h2, w2 in own:
            covered[row, 0, d1:d2, h1:h2, w1:w2] = True
    return covered


def test_in_painting_replaces_the_blocks_alone_and_out_painting_all_else(many):
    rows = [int((many.painting == kind).nonzero()[n]) for kind in (IN_PAINTED, OUT_PAINTED) for n in (0, 1)]
    boxes, outside = many.boxes[rows], many.painting[rows] == OUT_PAINTED
    # Noise lies in [0, 1), so no voxel of these views can be noise.
    views = pictures(4) + 2
    painted = paint(views, boxes, outside, many.seed[rows])
    covered = in_boxes(boxes)
    noise = covered ^ outside.view(-1, 1, 1, 1, 1)
    assert torch.equal(painted[~noise], views[~noise])
    assert (painted[noise] < 1).all() and (painted[noise] >= 0).all()
    assert painted[noise].mean() == pytest.approx(0.5, abs=0.01)
    assert painted[noise].std() == pytest.approx(12**-0.5, abs=0.01)
    assert all(0 < noise[row].float().mean() < 1 for row in range(4))


def test_boxes_have_the_sides_of_the_description_and_keep_off_the_border(many):
    used = many.boxes[..., 3] > many.boxes[..., 0]
    assert not used[many.painting == UNPAINTED].any()
    assert used[many.painting == OUT_PAINTED][:, 0].all()
    for kind in (IN_PAINTED, OUT_PAINTED):
        chosen = many.painting == kind
        boxes = many.boxes[chosen][used[chosen]]
        low, high = boxes[:, :3], boxes[:, 3:]
        for axis, n in enumerate(SIZE):
            side = high[:, axis] - low[:, axis]
            least, most = (n // 6, n // 3) if kind == IN_PAINTED else (n - 4 * n // 7, n - 3 * n // 7)
            assert (int(side.min()), int(side.max())) == (least, most)
            assert int(low[:, axis].min()) == MARGIN and int(high[:, axis].max()) == n - MARGIN
        counts = used[chosen].sum(1)
        assert int(counts.max()) == 5
        # Boxes go on with probability .95, up to five; out-painting always has a first one.
        every = 0.95**5 if kind == IN_PAINTED else 0.95**4
        assert (counts == 5).float().mean() == pytest.approx(every, abs=0.08)


def test_axes_too_short_for_the_border_are_painted_all_the_same():
    drawn = sample_distortion(seeds(200), (1, 4, 7))
    boxes = drawn.boxes[drawn.boxes[..., 3] > 0]
    assert (boxes[:, :3] >= 0).all() and (boxes[:, 3:] <= torch.tensor([1, 4, 7])).all()
    assert (boxes[:, 3:] > boxes[:, :3]).all()


# --- all of it ---


def test_how_often_each_transform_is_drawn(many):
    share = {
        "shuffled": many.shuffled.float().mean(),
        "bent": many.bent.float().mean(),
        "falling": many.falling.float().mean(),
        "painted": (many.painting != UNPAINTED).float().mean(),
        "in": (many.painting == IN_PAINTED).float().sum() / (many.painting != UNPAINTED).sum(),
    }
    # 3,000 draws: the standard error is under 0.01.
    expected = {"shuffled": 0.5, "bent": 0.9, "falling": 0.5, "painted": 0.9, "in": 0.2}
    assert {k: float(v) for k, v in share.items()} == pytest.approx(expected, abs=0.035)
    assert many.curve.min() >= 0 and many.curve.max() <= 1
    assert many.curve.mean() == pytest.approx(0.5, abs=0.02)


def test_a_view_is_distorted_the_same_in_any_batch_and_others_are_not():
    views, own = pictures(6), seeds(6)
    together = distort(views, sample_distortion(own, SIZE))
    for row in range(6):
        alone = distort(views[[row]], sample_distortion(own[[row]], SIZE))
        assert torch.equal(alone[0], together[row])
    assert together.min() >= 0 and together.max() <= 1
    again = distort(views, sample_distortion(own.flip(0), SIZE))
    assert not torch.equal(again, together)


def test_a_view_that_nothing_was_drawn_for_stays_as_it_is():
    drawn = sample_distortion(seeds(400), (4, 8, 8))
    spared = ~drawn.shuffled & ~drawn.bent & (drawn.painting == UNPAINTED)
    assert spared.any()
    views = pictures(400, (4, 8, 8))
    kept = views.clone()
    distorted = distort(views, drawn)
    assert torch.equal(distorted[spared], views[spared])
    changed = (distorted != views).flatten(1).any(1)
    # On 4 x 8 x 8 voxels the windows are of one voxel, so shuffling changes nothing.
    assert changed[drawn.bent].all() and not changed[~drawn.bent & (drawn.painting == UNPAINTED)].any()
    assert torch.equal(views, kept)
