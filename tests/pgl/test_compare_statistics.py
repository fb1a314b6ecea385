"""``pgl compare``: means, paired differences and their intervals."""

from __future__ import annotations

import numpy as np
import pytest

from pgl.comparison.statistics import overall, paired_difference
from pgl.comparison.tables import scores_of


def test_dice_is_the_mean_over_cases_then_over_classes_and_what_is_not_there_does_not_count():
    nan = np.nan
    scores = np.array([[[0.5, nan], [0.7, 0.2], [nan, nan]], [[1.0, 0.0], [0.0, 0.0], [0.5, 0.6]]])
    assert overall(scores) == pytest.approx([(0.6 + 0.2) / 2, (0.5 + 0.2) / 2])


def test_a_constant_gain_has_an_interval_of_no_width_and_swapping_turns_it_round():
    base = np.random.default_rng(0).random((3, 6, 2)) * 0.5
    gain = paired_difference([(base + 0.1, base)])
    assert (gain.mean, gain.low, gain.high) == pytest.approx((0.1, 0.1, 0.1))
    assert (gain.wins, gain.seeds) == (3, 3)
    loss = paired_difference([(base, base + 0.1)])
    assert (loss.mean, loss.high, loss.wins) == (pytest.approx(-0.1), pytest.approx(-0.1), 0)
    assert paired_difference([(base[:, :1], base[:, :1])]).low is None


def test_the_interval_is_that_of_a_plain_bootstrap():
    rng = np.random.default_rng(1)
    a, b = rng.random((3, 7, 2)), rng.random((3, 7, 2))
    a[0, 2, 1] = np.nan
    found = paired_difference([(a, b)])
    plain = []
    for _ in range(4000):
        seeds, cases = rng.integers(0, 3, 3), rng.integers(0, 7, 7)
        first, second = a[seeds][:, cases], b[seeds][:, cases]
        plain.append(np.mean(np.nanmean(first, 1).mean(1) - np.nanmean(second, 1).mean(1)))
    low, high = np.nanquantile(plain, [0.025, 0.975])
    # 4,000 draws know a quantile to about a fiftieth of the width.
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.05 * (high - low))
    assert found.low < found.mean < found.high
    assert found == paired_difference([(a, b)])


def test_the_interval_holds_the_truth_about_as_often_as_it_says():
    """Of a known difference, over cases: with one seed the seeds add nothing."""
    rng = np.random.default_rng(2)
    held = 0
    for number in range(120):
        base = rng.random((1, 30, 1))
        found = paired_difference([(base + 0.05 + 0.1 * rng.standard_normal(base.shape), base)], seed=number)
        held += found.low <= 0.05 <= found.high
    # 95 % nominal; a percentile bootstrap of 30 cases holds a little less. Binomial error 2 to 3 %.
    assert 0.86 <= held / 120 <= 1.0


def test_the_mean_over_tasks_is_the_mean_of_their_differences():
    rng = np.random.default_rng(3)
    tasks = [(rng.random((2, 5, 1)), rng.random((2, 5, 1))) for _ in range(3)]
    single = [paired_difference([task]).mean for task in tasks]
    assert paired_difference(tasks).mean == pytest.approx(np.mean(single))


def test_runs_on_other_test_cases_are_not_compared():
    one = {"test": ["a", "b"], "classes": ["x"], "cases": [{"subject": "a", "class": "x", "dice": 0.5}]}
    assert np.isnan(scores_of([one])[0, 1, 0]) and scores_of([one])[0, 0, 0] == 0.5
    with pytest.raises(ValueError, match="tested on different cases or classes"):
        scores_of([one, {**one, "test": ["a", "c"]}])
