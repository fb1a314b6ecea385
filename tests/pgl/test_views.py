"""Drawing, sharing, placing and cutting views."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from pgl.views import ViewPairs, align, assumed, cut, overlap, place, sample_view_pairs, shared_region

CONTEXT, PATCH = (24, 80, 72), (16, 48, 40)


def draw(seed: int = 0, batch: int = 500, **settings) -> ViewPairs:
    generator = torch.Generator().manual_seed(seed)
    arguments = {"context_size": CONTEXT, "patch_size": PATCH, **settings}
    return sample_view_pairs(generator, batch, **arguments)


def volume_by_hand(box: list[float]) -> float:
    edges = [max(0.0, high - low) for low, high in zip(box[:3], box[3:], strict=True)]
    return edges[0] * edges[1] * edges[2]


def test_crops_lie_inside_the_context():
    boxes = draw().boxes
    assert (boxes[..., :3] >= 0).all()
    assert (boxes[..., 3:] <= torch.tensor(CONTEXT, dtype=torch.float64) + 1e-9).all()


def test_crop_sizes_fill_the_given_range_on_each_axis_independently():
    boxes = draw(batch=2000, crop_scale=(1.1, 1.4)).boxes.flatten(0, 1)
    scale = (boxes[:, 3:] - boxes[:, :3]) / torch.tensor(PATCH, dtype=torch.float64)
    assert scale.min() >= 1.1 - 1e-9 and scale.max() <= 1.4 + 1e-9
    torch.testing.assert_close(scale.mean(0), torch.full((3,), 1.25, dtype=torch.float64), atol=0.01, rtol=0)
    correlation = torch.corrcoef(scale.T) - torch.eye(3, dtype=torch.float64)
    assert correlation.abs().max() < 0.1


@pytest.mark.parametrize("least", [0.1, 0.5, 0.8])
def test_shared_volume_over_the_smaller_crop_is_at_least_the_minimum(least):
    for pair in draw(context_size=(40, 120, 120), min_overlap=least).boxes.tolist():
        first, second = pair
        shared = [max(a, b) for a, b in zip(first[:3], second[:3], strict=True)]
        shared += [min(a, b) for a, b in zip(first[3:], second[3:], strict=True)]
        fraction = volume_by_hand(shared) / min(volume_by_hand(first), volume_by_hand(second))
        assert fraction >= least - 1e-12


def test_low_overlaps_are_drawn_where_the_context_allows_them():
    fractions = overlap(draw(context_size=(60, 160, 160), min_overlap=0.1).boxes)
    assert fractions.min() < 0.15 and fractions.max() > 0.6


@pytest.mark.parametrize("crop_scale", [(1.1, 1.4), (1.2, 1.2)])
def test_demanding_the_whole_overlap_ends_and_holds(crop_scale):
    pairs = draw(batch=50, context_size=(200, 600, 600), min_overlap=1.0, crop_scale=crop_scale)
    assert (overlap(pairs.boxes) >= 1.0).all()
    assert (pairs.boxes[..., :3] >= 0).all()


def test_each_axis_of_each_view_is_flipped_with_the_given_chance():
    flips = draw(batch=4000, flip_probability=0.3).flips.double()
    torch.testing.assert_close(flips.mean(0), torch.full((2, 3), 0.3, dtype=torch.float64), atol=0.03, rtol=0)
    assert not draw(flip_probability=0.0).flips.any()
    assert draw(flip_probability=1.0).flips.all()
    mirrored = draw(batch=4000, flip_probability=(0.3, 1.0, 0.0)).flips.double().mean(0)
    expected = torch.tensor([0.3, 1.0, 0.0], dtype=torch.float64).expand(2, 3)
    torch.testing.assert_close(mirrored, expected, atol=0.03, rtol=0)


def test_the_same_seed_draws_the_same_views_and_another_seed_others():
    first, again, other = draw(3), draw(3), draw(4)
    assert torch.equal(first.boxes, again.boxes) and torch.equal(first.flips, again.flips)
    assert not torch.equal(first.boxes, other.boxes)


def test_no_pairs_are_an_empty_batch():
    assert draw(batch=0).boxes.shape == (0, 2, 6)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"context_size": (20, 80, 72)}, "context_size .* cannot hold a crop"),
        ({"min_overlap": 0.0}, "min_overlap must lie in"),
        ({"min_overlap": 1.1}, "min_overlap must lie in"),
        ({"flip_probability": 2.0}, "flip_probability must lie in"),
        ({"flip_probability": math.nan}, "flip_probability must lie in"),
        ({"flip_probability": (0.5, 0.5, -0.1)}, "flip_probability must lie in"),
        ({"flip_probability": (0.5, 0.5)}, "flip_probability must lie in"),
        ({"crop_scale": (1.4, 1.1)}, "crop_scale must be two positive numbers"),
        ({"batch": -1}, "batch must not be negative"),
    ],
)
def test_impossible_settings_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        draw(**settings)


def test_shared_region_of_two_boxes_by_hand():
    boxes = torch.tensor([[[0, 2, 4, 10, 12, 14], [3, 0, 6, 13, 10, 9]]], dtype=torch.float64)
    assert shared_region(boxes).tolist() == [[3, 2, 6, 10, 10, 9]]


def test_boxes_that_only_touch_share_no_region():
    boxes = torch.tensor([[[0, 0, 0, 2, 2, 2], [2, 0, 0, 4, 2, 2]]], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"boxes\[0\] share no volume"):
        shared_region(boxes)


def test_place_by_hand_without_and_with_a_flip():
    # The view shows [10, 20] of an axis in 5 voxels: half a voxel a voxel. [12, 16] is [1, 3] of it,
    # mirrored [2, 4].
    box = torch.tensor([[10, 10, 10, 20, 20, 20]], dtype=torch.float64)
    region = torch.tensor([[12, 12, 12, 16, 16, 16]], dtype=torch.float64)
    placed = place(region, box, torch.tensor([[False, True, False]]), (5, 5, 10))
    assert placed.tolist() == [[1, 2, 2, 3, 4, 6]]


def test_the_whole_view_is_placed_on_its_whole_grid_whatever_the_flips():
    box = torch.tensor([[1.5, 2.5, 3.5, 20, 30, 40]], dtype=torch.float64)
    for flips in itertools.product([False, True], repeat=3):
        placed = place(box, box, torch.tensor([flips]), PATCH)
        torch.testing.assert_close(placed, torch.tensor([[0, 0, 0, *PATCH]], dtype=torch.float64))


def test_cutting_a_box_of_the_patch_size_copies_its_voxels():
    contexts = torch.randint(-1000, 1000, (2, 1, 8, 9, 10), dtype=torch.int16)
    boxes = torch.tensor([[[1, 2, 3, 5, 7, 9], [2, 0, 1, 6, 5, 7]]] * 2, dtype=torch.float64)
    flips = torch.zeros(2, 2, 3, dtype=torch.bool)
    flips[1, 0, 1] = True
    views = cut(contexts, ViewPairs(boxes, flips, (4, 5, 6)))
    assert views.dtype == torch.float32
    first, second = contexts[:, :, 1:5, 2:7, 3:9].float(), contexts[:, :, 2:6, 0:5, 1:7].float()
    assert torch.equal(views[0], first[0])
    assert torch.equal(views[1], first[1].flip(2))
    assert torch.equal(views[2:], second)


def test_cut_numbers_views_first_then_second():
    contexts = torch.stack([torch.full((1, 6, 6, 6), 100 * b, dtype=torch.int16) for b in range(3)])
    pairs = draw(batch=3, context_size=(6, 6, 6), patch_size=(4, 4, 4))
    assert cut(contexts, pairs).mean((1, 2, 3, 4)).tolist() == [0, 100, 200, 0, 100, 200]


def test_align_reads_the_cells_of_a_strided_map_and_undoes_flips():
    features = torch.arange(4.0).view(1, 1, 1, 1, 4).expand(2, 1, 2, 2, 4)
    regions = torch.tensor([[0, 0, 8, 4, 4, 16]] * 2, dtype=torch.float64)
    flips = torch.tensor([[False] * 3, [False, False, True]])
    aligned = align(features, regions, flips, stride=(2, 2, 4), size=(1, 1, 2))
    assert aligned.flatten(1).tolist() == [[2, 3], [3, 2]]


def test_view_pairs_refuse_other_shapes_and_dtypes():
    boxes, flips = torch.zeros(2, 2, 6, dtype=torch.float64), torch.zeros(2, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="boxes must be a float64"):
        ViewPairs(boxes.float(), flips, PATCH)
    with pytest.raises(ValueError, match="flips must be a bool"):
        ViewPairs(boxes, flips[:1], PATCH)


def test_an_aligner_without_priors_takes_the_whole_view_as_it_lies():
    pairs = draw(batch=5)
    regions, flips = assumed(pairs)
    assert torch.equal(regions, pairs.placed(shared_region(pairs.boxes)))
    assert torch.equal(flips, pairs.flat_flips())
    for crop_prior, flip_prior in itertools.product((True, False), repeat=2):
        some_regions, some_flips = assumed(pairs, crop_prior, flip_prior)
        expected = regions if crop_prior else torch.tensor([[0.0, 0, 0, *PATCH]] * 10, dtype=torch.float64)
        assert torch.equal(some_regions, expected)
        assert torch.equal(some_flips, flips if flip_prior else torch.zeros(10, 3, dtype=torch.bool))
