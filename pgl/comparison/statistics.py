"""Means over seeds, and how sure a difference between two initialisations is."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """How much one initialisation is better than another.

    Attributes:
        mean: of Dice, in [−1, 1].
        low, high: 95 % bootstrap interval; None if there is one test case only.
        wins, seeds: on how many of the seeds it is better.
    """

    mean: float
    low: float | None
    high: float | None
    wins: int
    seeds: int


def overall(scores: np.ndarray) -> np.ndarray:
    """Each seed's Dice: the mean over cases for each class, then over classes. NaN does not count.

    Args:
        scores: float [seeds, cases, classes], NaN where neither truth nor prediction has the class.

    Returns:
        float [seeds].
    """
    return _weighted(scores, np.ones((1, scores.shape[1])))[0]


def paired_difference(tasks: Sequence[tuple[np.ndarray, np.ndarray]], seed: int = 0) -> Difference:
    """The difference between two initialisations on the same seeds and test cases, averaged over tasks.

    The interval is a percentile bootstrap: seeds and test cases are each drawn anew with replacement, the
    same for both initialisations and, where they have the same cases, for all tasks.

    Args:
        tasks: for each task both initialisations' scores as :func:`overall` takes them.
        seed: of the draws.
    """
    rng = np.random.default_rng(seed)
    seeds = tasks[0][0].shape[0]
    by_seed = np.mean([overall(a) - overall(b) for a, b in tasks], axis=0)
    seed_weights = rng.multinomial(seeds, [1 / seeds] * seeds, DRAWS) / seeds
    weights: dict[int, np.ndarray] = {}
    drawn = []
    for a, b in tasks:
        cases = a.shape[1]
        if cases not in weights:
            weights[cases] = rng.multinomial(cases, [1 / cases] * cases, DRAWS).astype(float)
        drawn.append(_weighted(a, weights[cases]) - _weighted(b, weights[cases]))
    low = high = None
    if min(a.shape[1] for a, _ in tasks) > 1:
        values = (np.mean(drawn, axis=0) * seed_weights).sum(1)
        tail = (1 - LEVEL) / 2
        low, high = (float(v) for v in np.nanquantile(values, [tail, 1 - tail]))
    return Difference(float(by_seed.mean()), low, high, int((by_seed > 0).sum()), seeds)


def _weighted(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """[draws, seeds] of scores [seeds, cases, classes], with the cases weighted by [draws, cases]."""
    known = ~np.isnan(scores)
    sums = np.einsum("bc,sck->bsk", weights, np.where(known, scores, 0.0))
    counts = np.einsum("bc,sck->bsk", weights, known.astype(float))
    with warnings.catch_warnings(), np.errstate(invalid="ignore", divide="ignore"):
        # A draw may hold no case that has any class.
        warnings.simplefilter("ignore", RuntimeWarning)
        return np.nanmean(sums / counts, axis=2)
