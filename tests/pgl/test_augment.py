"""Intensity: normalisation and each augmentation against its formula."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from pgl.augment import Augmentation, add_noise, apply_gamma, augment, blur, normalise, sample_augmentation
from pgl.config import AugmentSettings, IntensitySettings


def draw(count: int = 6000, seed: int = 0) -> Augmentation:
    return sample_augmentation(np.random.default_rng(seed), count, AugmentSettings())


def views(count: int = 3, seed: int = 0, shape=(5, 9, 8)) -> torch.Tensor:
    return torch.randn(count, 1, *shape, generator=torch.Generator().manual_seed(seed))


def neutral(count: int) -> Augmentation:
    return Augmentation(
        torch.zeros(count),
        torch.arange(count),
        torch.zeros(count),
        torch.ones(count),
        torch.ones(count),
    )


def test_normalisation_clips_then_shifts_and_scales():
    hu = torch.tensor([-3000, -1024, -158.58, 100, 325, 3071]).view(1, 1, 1, 1, -1)
    expected = [(value + 158.58) / 324.70 for value in (-1024, -1024, -158.58, 100, 325, 325)]
    assert normalise(hu, IntensitySettings()).flatten().tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    ("name", "neutral_value", "chance", "low", "high"),
    [
        ("noise_std", 0.0, 0.1, 0.0, math.sqrt(0.1)),
        ("blur_sigma", 0.0, 0.2, 0.5, 1.0),
        ("brightness", 1.0, 0.5, 0.75, 1.25),
        ("gamma", 1.0, 0.5, 0.7, 1.5),
    ],
)
def test_each_augmentation_has_its_chance_and_range(name, neutral_value, chance, low, high):
    values = getattr(draw(), name)
    active = values[values != neutral_value]
    assert len(active) / len(values) == pytest.approx(chance, abs=0.03)
    assert active.min() >= low and active.max() <= high
    assert active.min() < low + 0.05 * (high - low) + 0.02 and active.max() > high - 0.05 * (high - low)


def test_the_variance_of_the_noise_is_what_is_uniform():
    variance = draw(40_000).noise_std.square()
    assert float(variance[variance > 0].mean()) == pytest.approx(0.05, abs=0.002)


def test_neutral_values_leave_views_bitwise_alone():
    x = views()
    assert torch.equal(augment(x, neutral(3)), x)


def test_inputs_are_not_modified():
    x, parameters = views(8), draw(8)
    before = x.clone()
    augment(x, parameters)
    assert torch.equal(x, before)


def test_a_view_is_augmented_alike_alone_and_in_a_batch():
    x, parameters = views(40), draw(40, seed=1)
    together = augment(x, parameters)
    for row in range(40):
        single = Augmentation(**{name: value[row : row + 1] for name, value in vars(parameters).items()})
        torch.testing.assert_close(augment(x[row : row + 1], single)[0], together[row], atol=1e-6, rtol=0)


def test_noise_has_the_given_deviation_and_depends_on_its_seed_only():
    x = torch.zeros(3, 1, 20, 40, 40)
    noisy = add_noise(x, torch.tensor([0.3, 0.0, 0.3]), torch.tensor([5, 6, 7]))
    assert float(noisy[0].std()) == pytest.approx(0.3, rel=0.02)
    assert float(noisy[0].mean()) == pytest.approx(0.0, abs=0.01)
    assert noisy[1].count_nonzero() == 0
    assert not torch.equal(noisy[0], noisy[2])
    assert torch.equal(add_noise(x[:1], torch.tensor([0.3]), torch.tensor([7]))[0], noisy[2])


def test_blur_of_an_impulse_is_the_product_of_three_gaussians():
    x = torch.zeros(2, 1, 15, 15, 15)
    x[:, :, 7, 7, 7] = 1
    sigmas = (0.6, 1.0)
    blurred = blur(x, torch.tensor(sigmas))
    for row, sigma in enumerate(sigmas):
        profile = np.exp(-0.5 * ((np.arange(15) - 7) / sigma) ** 2)
        profile[np.abs(np.arange(15) - 7) > math.ceil(3 * sigma)] = 0
        profile /= profile.sum()
        expected = np.einsum("i,j,k->ijk", profile, profile, profile)
        np.testing.assert_allclose(blurred[row, 0].numpy(), expected, atol=1e-6)


def test_blur_keeps_a_constant_up_to_its_edges():
    x = torch.full((1, 1, 3, 4, 5), 2.5)
    torch.testing.assert_close(blur(x, torch.tensor([1.0])), x)


def test_brightness_multiplies():
    parameters = neutral(3)
    parameters.brightness = torch.tensor([0.75, 1.0, 1.25])
    x = views()
    torch.testing.assert_close(augment(x, parameters), x * parameters.brightness.view(-1, 1, 1, 1, 1))


def test_gamma_bends_between_each_views_own_minimum_and_maximum():
    x = views(2).double()
    curved = apply_gamma(x, torch.tensor([0.7, 1.5], dtype=torch.float64)).numpy()
    for row, gamma in enumerate((0.7, 1.5)):
        view = x[row].numpy()
        low, high = view.min(), view.max()
        np.testing.assert_allclose(
            curved[row], low + (high - low) * ((view - low) / (high - low)) ** gamma, rtol=1e-9
        )
        assert curved[row].min() == pytest.approx(low) and curved[row].max() == pytest.approx(high)


def test_a_constant_view_survives_everything():
    parameters = neutral(1)
    parameters.gamma = torch.tensor([1.3])
    x = torch.full((1, 1, 4, 4, 4), -2.6)
    torch.testing.assert_close(augment(x, parameters), x)
