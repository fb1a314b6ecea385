"""The method: its loss written out by hand, what learns, and the target's slow average."""

from __future__ import annotations

import copy
from dataclasses import replace

import pytest
import torch
from torch.nn import functional

from pgl.config import MethodSettings
from pgl.methods.heads import hidden_norm
from pgl.methods.pgl import PGL, VoxelHead, ema_decay
from pgl.views import ViewPairs, sample_view_pairs
from pgl_ops import reference

from .training_data import small_encoder

PATCH = (4, 16, 16)
SETTINGS = MethodSettings(
    aligned_size=(2, 3, 4),
    projector_hidden=16,
    projector_channels=8,
    predictor_hidden=16,
    head_norm="group",
    output_norm="none",
)


def method(seed: int = 0, **changes) -> PGL:
    torch.manual_seed(seed)
    network = PGL(small_encoder(), MethodSettings(**{**vars(SETTINGS), **changes}))
    # A target that differs from the online network, as it does after the first step.
    with torch.no_grad():
        for parameter in [*network.target_backbone.parameters(), *network.target_projector.parameters()]:
            parameter.add_(0.1 * torch.randn_like(parameter))
    return network


def batch(count: int = 3) -> tuple[torch.Tensor, ViewPairs]:
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), count, (8, 28, 28), PATCH)
    return torch.randn(2 * count, 1, *PATCH, generator=torch.Generator().manual_seed(2)), pairs


def mirrored_on_grid(box: list[float], shown: list[float], flips: list[bool]) -> list[float]:
    low, high = [], []
    for axis in range(3):
        zoom = PATCH[axis] / (shown[3 + axis] - shown[axis])
        a, b = ((box[i] - shown[axis]) * zoom for i in (axis, 3 + axis))
        low.append(PATCH[axis] - b if flips[axis] else a)
        high.append(PATCH[axis] - a if flips[axis] else b)
    return low + high


def test_the_loss_is_the_mean_of_both_directions_written_out_view_by_view():
    network, (views, pairs) = method(), batch()
    losses = []
    for sample in range(3):
        boxes = pairs.boxes[sample].tolist()
        region = [max(a, b) for a, b in zip(boxes[0][:3], boxes[1][:3], strict=True)]
        region += [min(a, b) for a, b in zip(boxes[0][3:], boxes[1][3:], strict=True)]

        def aligned(features, view, sample=sample, region=region, boxes=boxes):
            flips = pairs.flips[sample, view]
            box = torch.tensor([[0.0, *mirrored_on_grid(region, boxes[view], flips.tolist())]])
            return reference.roi_align3d(
                features, box, SETTINGS.aligned_size, (1 / 2, 1 / 4, 1 / 4), flips=flips[None]
            )

        for here, there in ((0, 1), (1, 0)):
            own, other = views[[sample + 3 * here]], views[[sample + 3 * there]]
            prediction = network.predictor(aligned(network.projector(network.backbone(own)), here))
            target = aligned(network.target_projector(network.target_backbone(other)), there)
            cosine = torch.cosine_similarity(prediction, target, dim=1)
            losses.append((2 - 2 * cosine).mean())
    torch.testing.assert_close(network(views, pairs), torch.stack(losses).mean(), atol=1e-5, rtol=1e-5)


def cosine_loss_of_resized_views(network: PGL, views: torch.Tensor) -> torch.Tensor:
    """The loss if both feature maps are averaged whole to the aligned size, 2×4×4 → 2×2×2."""
    online = functional.adaptive_avg_pool3d(network.projector(network.backbone(views)), 2)
    target = functional.adaptive_avg_pool3d(network.target_projector(network.target_backbone(views)), 2)
    other = torch.cat(target.chunk(2)[::-1])
    return (2 - 2 * torch.cosine_similarity(network.predictor(online), other, dim=1)).mean()


def test_without_priors_the_whole_feature_maps_are_compared_as_they_lie():
    network, (views, pairs) = method(crop_prior=False, flip_prior=False, aligned_size=(2, 2, 2)), batch()
    # A bin of 1 × 2 × 2 feature voxels has one sample in the middle of each of its quarters and so reads
    # every voxel once: RoIAlign of the whole map is a plain average.
    torch.testing.assert_close(
        network(views, pairs), cosine_loss_of_resized_views(network, views), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("ignored", ["crop_prior", "flip_prior"])
def test_without_a_prior_the_loss_does_not_see_that_transform(ignored):
    views, pairs = batch()
    boxes, flips = pairs.boxes, pairs.flips
    if ignored == "crop_prior":
        other = ViewPairs(boxes.roll(1, 0), flips, pairs.patch_size)
    else:
        # Two views of one box share all of it, wherever mirrors put it: only the turning back differs.
        boxes = boxes[:, :1].expand(-1, 2, -1).contiguous()
        first_mirrored = torch.stack([~flips[:, 0], flips[:, 1]], 1)
        pairs, other = ViewPairs(boxes, flips, PATCH), ViewPairs(boxes, first_mirrored, PATCH)
    off, on = method(**{ignored: False}), method()
    assert torch.equal(off(views, pairs), off(views, other))
    assert not torch.isclose(on(views, pairs), on(views, other), rtol=1e-4)


def test_swapping_the_two_views_leaves_the_loss():
    network, (views, pairs) = method(), batch()
    swapped = ViewPairs(pairs.boxes.flip(1), pairs.flips.flip(1), pairs.patch_size)
    torch.testing.assert_close(
        network(views, pairs), network(torch.cat(views.chunk(2)[::-1]), swapped), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_the_online_path_learns_and_the_target_does_not(norm):
    network, (views, pairs) = method(head_norm=norm), batch()
    network(views, pairs).backward()
    for name, parameter in network.named_parameters():
        if name.startswith("target"):
            assert parameter.grad is None
        else:
            assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    assert network.backbone.encoder.stem.convs[0].conv.weight.grad.abs().sum() > 0


def test_one_step_down_the_gradient_lowers_the_loss():
    network, (views, pairs) = method(), batch()
    before = network(views, pairs)
    before.backward()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.grad is not None:
                parameter -= 0.01 * parameter.grad
    assert network(views, pairs) < before


def test_the_target_starts_as_the_online_network():
    torch.manual_seed(0)
    network = PGL(small_encoder(), SETTINGS)
    for target, online in (
        (network.target_backbone, network.backbone),
        (network.target_projector, network.projector),
    ):
        for a, b in zip(target.state_dict().values(), online.state_dict().values(), strict=True):
            assert torch.equal(a, b)


def test_the_target_moves_by_one_minus_the_decay_in_weights_and_running_statistics():
    network, (views, pairs) = PGL(replace(small_encoder(), norm="batch"), SETTINGS), batch()
    network(views, pairs)
    with torch.no_grad():
        for value in [*network.target_backbone.parameters(), *network.target_backbone.buffers()]:
            if value.is_floating_point():
                value.add_(torch.rand_like(value))
    before = copy.deepcopy(network.target_backbone.state_dict())
    online = network.backbone.state_dict()
    network.update_target(0.9)
    assert any(name.endswith("running_mean") for name in before)
    for name, value in network.target_backbone.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, 0.9 * before[name] + 0.1 * online[name])
        else:
            assert torch.equal(value, online[name])


def test_the_decay_rises_from_start_to_end_along_half_a_cosine():
    assert ema_decay(0, 100, 0.98, 1.0) == pytest.approx(0.98)
    assert ema_decay(50, 100, 0.98, 1.0) == pytest.approx(0.99)
    assert ema_decay(25, 100, 0.98, 1.0) == pytest.approx(0.98 + 0.02 * (1 - 0.5**0.5) / 2)
    assert ema_decay(100, 100, 0.98, 1.0) == pytest.approx(1.0)


def test_a_head_treats_every_voxel_alike_and_keeps_the_grid():
    torch.manual_seed(0)
    head = VoxelHead(6, 16, 5, "batch")
    x = torch.randn(2, 6, 3, 4, 5)
    out = head(x)
    assert out.shape == (2, 5, 3, 4, 5)
    order = torch.randperm(3 * 4 * 5)
    shuffled = x.flatten(2)[..., order].view_as(x)
    torch.testing.assert_close(head(shuffled).flatten(2), out.flatten(2)[..., order])


@pytest.mark.parametrize(("output_norm", "axes"), [("batch", (0, 2, 3, 4)), ("instance", (2, 3, 4))])
def test_an_output_norm_leaves_no_direction_that_all_voxels_share(output_norm, axes):
    torch.manual_seed(0)
    head = VoxelHead(6, 16, 5, "batch", output_norm)
    out = head(torch.randn(4, 6, 6, 6, 6) + 3)
    torch.testing.assert_close(out.mean(axes), torch.zeros_like(out.mean(axes)), atol=1e-5, rtol=0)
    torch.testing.assert_close(out.var(axes), torch.ones_like(out.mean(axes)), atol=0.02, rtol=0)


@pytest.mark.parametrize(("hidden", "groups"), [(64, 32), (48, 16), (12, 4), (5, 1)])
def test_the_groups_of_a_norm_divide_the_channels(hidden, groups):
    torch.manual_seed(0)
    x = torch.randn(2, hidden, 3, 4, 5, dtype=torch.float64)
    of_groups = x.reshape(2, groups, -1)
    mean, deviation = of_groups.mean(2, keepdim=True), of_groups.var(2, correction=0, keepdim=True).sqrt()
    expected = ((of_groups - mean) / deviation).reshape(x.shape)
    torch.testing.assert_close(hidden_norm("group", hidden).double()(x), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("words", [("layer", "none"), ("batch", "layer")])
def test_an_unknown_norm_is_refused(words):
    with pytest.raises(ValueError, match=r"method\.\w+_norm must be .*, got 'layer'"):
        VoxelHead(4, 4, 4, *words)
