"""The metrics on features whose answer is known."""

from __future__ import annotations

import pytest
import torch

from pgl.training.metrics import chance, effective_rank, feature_spread, matching_accuracy


def features(seed: int = 0, batch: int = 2, channels: int = 64, size=(2, 4, 4)) -> torch.Tensor:
    return torch.randn(batch, channels, *size, generator=torch.Generator().manual_seed(seed))


def test_equal_views_match_everywhere():
    assert matching_accuracy(features(), features()).tolist() == [1, 1]


def test_length_of_the_features_does_not_matter():
    scale = torch.rand(2, 1, 2, 4, 4) + 0.1
    assert matching_accuracy(features(), features() * scale).tolist() == [1, 1]


def test_swapped_voxels_count_as_wrong_in_their_sample_alone():
    first, second = features(), features().clone()
    second.flatten(2)[0, :, [3, 20]] = second.flatten(2)[0, :, [20, 3]]
    assert matching_accuracy(first, second).tolist() == pytest.approx([30 / 32, 1])


def test_unrelated_features_match_by_chance():
    accuracy = matching_accuracy(features(0, batch=400), features(1, batch=400)).mean()
    assert float(accuracy) == pytest.approx(chance((2, 4, 4)), abs=0.005)


def test_collapsed_features_do_not_pass():
    constant = torch.ones(1, 8, 2, 4, 4)
    assert matching_accuracy(constant, constant).item() <= 1 / 32


def test_neighbours_are_sought_from_the_first_view_in_the_second():
    first = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).T[None, :, None, None]  # two voxels, two channels
    second = torch.tensor([[1.0, 0.1], [1.0, 0.2]]).T[None, :, None, None]
    # Voxel 0 finds 0; voxel 1 finds 1. From the second view both would find voxel 0.
    assert matching_accuracy(first, second).item() == 1.0
    assert matching_accuracy(second, first).item() == 0.5


def test_a_precision_that_is_chosen_for_the_networks_does_not_round_the_cosines():
    own = torch.randn(2, 8, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    features = own + 30 * torch.ones(8)[:, None, None, None]  # all but parallel
    with torch.autocast("cpu", torch.bfloat16):
        assert matching_accuracy(features, features).tolist() == [1, 1]


def test_differing_shapes_are_refused():
    with pytest.raises(ValueError, match="same Tensor"):
        matching_accuracy(features(), features(size=(2, 4, 5)))


def test_spread_is_one_for_isotropic_and_zero_for_collapsed_features():
    assert feature_spread(features(batch=200)) == pytest.approx(1.0, abs=0.01)
    assert feature_spread(torch.ones(4, 8, 2, 4, 4) * (0.1 + torch.rand(4, 1, 2, 4, 4))) == pytest.approx(
        0, abs=1e-6
    )


def test_spread_of_features_with_a_common_offset_lies_between():
    # Unit noise plus an offset three times as long leaves about 1/sqrt(10) of the length to the noise.
    offset = 3 * torch.ones(1, 64, 1, 1, 1)
    assert feature_spread(features(batch=200) + offset) == pytest.approx(10**-0.5, rel=0.05)


def test_effective_rank_counts_directions_in_use():
    basis = torch.linalg.qr(torch.randn(64, 5, generator=torch.Generator().manual_seed(0))).Q
    weights = features(1, batch=500, channels=5)
    in_five = torch.einsum("cr,nrdhw->ncdhw", basis, weights)
    assert effective_rank(in_five) == pytest.approx(5, rel=0.02)
    assert effective_rank(features(batch=2000)) == pytest.approx(64, rel=0.02)
    assert effective_rank(torch.ones(2, 8, 2, 2, 2)) == 1.0
