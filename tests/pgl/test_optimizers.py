"""LARS against its formula, parameter groups, and the learning-rate schedule."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from pgl.config import OptimizerSettings
from pgl.training.lars import LARS
from pgl.training.optimizers import build_optimizer, learning_rate_at


def settings(**changes) -> OptimizerSettings:
    return OptimizerSettings(**{"learning_rate": 0.5, "warmup_steps": 4, **changes})


def test_lars_follows_its_formula_over_several_steps():
    rng = np.random.default_rng(0)
    weight = rng.normal(size=(4, 3))
    parameter = nn.Parameter(torch.from_numpy(weight.copy()))
    optimizer = LARS([parameter], lr=0.3, momentum=0.9, weight_decay=0.01, trust=1e-3)
    velocity = np.zeros_like(weight)
    for _ in range(4):
        gradient = rng.normal(size=weight.shape)
        parameter.grad = torch.from_numpy(gradient.copy())
        optimizer.step()
        direction = gradient + 0.01 * weight
        direction *= 1e-3 * np.linalg.norm(weight) / np.linalg.norm(direction)
        velocity = 0.9 * velocity + direction
        weight = weight - 0.3 * velocity
        np.testing.assert_allclose(parameter.detach().numpy(), weight, rtol=1e-12)


def test_lars_treats_each_of_many_parameters_by_its_own_norms():
    """Layers of sizes and dtypes side by side take the steps they would take alone; one has no gradient."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(3,), (4, 2), (2, 3, 3, 3, 3), (1,)]
    dtypes = [torch.float32, torch.float64, torch.float32, torch.float64]
    values = [
        10**i * torch.randn(s, generator=generator).to(d)
        for i, (s, d) in enumerate(zip(shapes, dtypes, strict=True))
    ]
    idle = nn.Parameter(torch.ones(2))
    together = [nn.Parameter(value.clone()) for value in values]
    alone = [nn.Parameter(value.clone()) for value in values]
    chosen = {"lr": 0.3, "weight_decay": 0.01}
    optimizers = [LARS([*together, idle], **chosen), *(LARS([parameter], **chosen) for parameter in alone)]
    for _ in range(3):
        for one, other in zip(together, alone, strict=True):
            one.grad = torch.randn(one.shape, generator=generator).to(one.dtype)
            other.grad = one.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for one, other, value in zip(together, alone, values, strict=True):
        torch.testing.assert_close(one, other)
        assert not torch.equal(one, value)
    assert idle.tolist() == [1, 1]


def test_lars_without_adaptation_is_sgd_with_momentum():
    first, second = (nn.Parameter(torch.ones(3)) for _ in range(2))
    lars = LARS([{"params": [first], "adapt": False}], lr=0.1, momentum=0.9)
    sgd = torch.optim.SGD([second], lr=0.1, momentum=0.9)
    for step in range(3):
        for parameter, optimizer in ((first, lars), (second, sgd)):
            parameter.grad = torch.tensor([1.0, -2.0, step])
            optimizer.step()
    torch.testing.assert_close(first, second)


@pytest.mark.parametrize("which", ["weight", "gradient"])
def test_lars_stays_finite_where_a_norm_is_zero(which):
    parameter = nn.Parameter(torch.zeros(3) if which == "weight" else torch.ones(3))
    parameter.grad = torch.ones(3) if which == "weight" else torch.zeros(3)
    LARS([parameter], lr=0.1).step()
    assert parameter.detach().tolist() == pytest.approx([-0.1] * 3 if which == "weight" else [1.0] * 3)


@pytest.mark.parametrize("name", ["lars", "adamw", "sgd"])
def test_biases_and_norms_are_not_decayed_and_frozen_parameters_are_left_out(name):
    module = nn.Sequential(nn.Conv3d(1, 2, 3), nn.GroupNorm(1, 2), nn.Conv3d(2, 2, 1).requires_grad_(False))
    optimizer = build_optimizer(module, settings(name=name, weight_decay=0.1))
    groups = {group["weight_decay"]: [p.ndim for p in group["params"]] for group in optimizer.param_groups}
    assert groups == {0.1: [5], 0.0: [1, 1, 1]}
    if name == "lars":
        assert [group["adapt"] for group in optimizer.param_groups] == [True, False]


def test_an_unknown_optimizer_is_refused():
    with pytest.raises(ValueError, match=r"optimizer\.name must be"):
        build_optimizer(nn.Linear(2, 2), settings(name="adam"))


def test_the_rate_warms_up_linearly_then_falls_along_a_cosine():
    rates = [learning_rate_at(step, 104, settings()) for step in range(104)]
    assert rates[:5] == pytest.approx([0.125, 0.25, 0.375, 0.5, 0.5])
    assert rates[4 + 50] == pytest.approx(0.25)
    assert rates[-1] == pytest.approx(0.25 * (1 + math.cos(math.pi * 99 / 100)))
    assert all(a >= b for a, b in itertools.pairwise(rates[4:]))


def test_no_warm_up_starts_at_the_full_rate():
    assert learning_rate_at(0, 10, settings(warmup_steps=0)) == 0.5
