"""The penalty on channels that tell of each other, against numpy's correlations, and in the method."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from pgl.config import MethodSettings
from pgl.methods.decorrelation import decorrelation
from pgl.methods.pgl import PGL
from pgl.networks import seeded_module
from pgl.views import sample_view_pairs

from .training_data import small_encoder

SETTINGS = MethodSettings(
    aligned_size=(2, 3, 3), projector_hidden=16, projector_channels=8, predictor_hidden=16
)


def some(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def mixed(seed: int = 0) -> Tensor:
    """Channels that tell of each other, of different scales and offsets."""
    values = torch.einsum("ij,njdhw->nidhw", some(5, 3, seed=seed + 1), some(4, 3, 3, 5, 4, seed=seed))
    scale = torch.tensor([1.0, 10, 3, 50, 2], dtype=torch.float64).view(-1, 1, 1, 1)
    return scale * (values + 7)


@pytest.mark.parametrize(
    ("dtype", "near"), [(torch.float64, 1e-4), (torch.float32, 1e-4), (torch.bfloat16, 0.03)]
)
def test_it_is_the_sum_of_numpys_squared_correlations_of_different_channels_over_their_number(dtype, near):
    features = mixed().to(dtype)
    rows = features.double().movedim(1, 0).flatten(1).numpy()
    others = np.corrcoef(rows) - np.eye(5)
    found = decorrelation(features)
    assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(found) == pytest.approx((others**2).sum() / 5, rel=near)
    assert float(found) > 0.5


def test_it_goes_from_none_to_the_number_of_other_channels():
    # The four characters of a 2×2 grid: channels that are orthogonal and have no mean but for the first.
    signs = torch.tensor([[1.0, -1, 1, -1], [1, 1, -1, -1], [1, -1, -1, 1]]).view(1, 3, 1, 2, 2)
    assert float(decorrelation(signs)) == 0
    alike = signs[:, :1] * torch.tensor([1.0, -2, 30]).view(1, 3, 1, 1, 1) + 5
    assert float(decorrelation(alike)) == pytest.approx(2, rel=1e-4)
    assert float(decorrelation(signs[:, :1])) == 0


def test_a_constant_channel_tells_nothing_and_has_a_finite_gradient():
    features = torch.cat([mixed(), torch.full((4, 1, 3, 5, 4), 3.0, dtype=torch.float64)], 1).requires_grad_()
    found = decorrelation(features)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(decorrelation(mixed())) * 5 / 6)
    assert features.grad is not None and features.grad.isfinite().all()


def test_its_gradient_is_that_of_finite_differences():
    features = (mixed() / 20)[:2, :, :2, :2, :2].contiguous().requires_grad_()
    assert torch.autograd.gradcheck(decorrelation, features)


def test_mixed_precision_does_not_round_it():
    features = mixed().float()
    with torch.autocast("cpu", torch.bfloat16):
        inside = decorrelation(features)
    assert inside.dtype == torch.float32 and torch.equal(inside, decorrelation(features))


def test_half_precision_of_any_size_is_computed_in_float32():
    wide = (mixed() * 80).half().requires_grad_()
    found = decorrelation(wide)
    found.backward()
    assert float(found.detach()) == pytest.approx(float(decorrelation(mixed())), rel=0.02)
    assert wide.grad is not None and wide.grad.isfinite().all()


def test_it_is_about_that_of_chance_for_independent_channels_and_of_their_rank_for_others():
    independent, few = some(8, 16, 4, 8, 8), some(8, 4, 4, 8, 8)
    assert float(decorrelation(independent)) == pytest.approx(15 / (8 * 4 * 8 * 8), rel=0.3)
    spread = torch.einsum("ij,njdhw->nidhw", some(64, 4, seed=5), few)
    assert float(decorrelation(spread)) == pytest.approx(64 / 4 - 1, rel=0.3)


def batch() -> tuple[Tensor, object]:
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), 4, (8, 28, 28), (4, 16, 16))
    return torch.randn(8, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), pairs


@pytest.mark.parametrize("more_levels", [[], [1]])
def test_the_loss_is_the_papers_and_so_much_of_the_penalty_of_each_stages_projection(more_levels):
    settings = replace(SETTINGS, more_levels=more_levels)
    views, pairs = batch()
    plain = seeded_module(0, lambda: PGL(small_encoder(), settings))
    with_penalty = seeded_module(0, lambda: PGL(small_encoder(), replace(settings, decorrelation=0.3)))
    with torch.no_grad():
        maps = plain.backbone.maps(views)
    projections = [
        head(one) for head, one in zip([plain.projector, *plain.side_projectors], maps, strict=True)
    ]
    penalty = torch.stack([decorrelation(one) for one in projections]).mean()
    torch.testing.assert_close(with_penalty(views, pairs), plain(views, pairs) + 0.3 * penalty)
    assert float(penalty.detach()) > 0.05


def test_trained_with_it_the_projections_channels_tell_less_of_each_other():
    views, pairs = batch()

    def trained(weight: float) -> float:
        method = seeded_module(0, lambda: PGL(small_encoder(), replace(SETTINGS, decorrelation=weight)))
        optimizer = torch.optim.AdamW([p for p in method.parameters() if p.requires_grad], lr=2e-3)
        for _ in range(30):
            optimizer.zero_grad()
            method(views, pairs).backward()
            optimizer.step()
            method.update_target(0.99)
        with torch.no_grad():
            return float(decorrelation(method.project(method.backbone(views))))

    without, with_it = trained(0.0), trained(0.2)
    assert with_it < 0.5 * without, (with_it, without)
