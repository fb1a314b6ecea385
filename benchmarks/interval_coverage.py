"""``python -m benchmarks.interval_coverage``: how often do the intervals of ``pgl compare`` hold the truth?

Simulates tables of a known difference between two starts. What a seed and a test case differ by is the truth
plus an effect of the seed, one of the case and a rest, all drawn from normal distributions. Each table gets
its 95 % interval from ``pgl.comparison.statistics.paired_difference``; counted are those that hold the truth.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import pgl
from benchmarks.machine import machine
from pgl.comparison.statistics import DRAWS, LEVEL, paired_difference

RESULTS = Path(__file__).resolve().parent / "results"
TRUTH = 0.02  # two points of Dice; the intervals move with it, so any other would do
CASES = 20  # as in the comparisons on phantoms
SEEDS = (6, 3, 1)


@dataclass(frozen=True)
class Spread:
    """Standard deviations of what a difference in Dice is the sum of."""

    seeds: float
    cases: float
    rest: float


SPREADS = {
    "seeds spread half as far as cases": Spread(0.01, 0.02, 0.02),
    "seeds spread as far as cases": Spread(0.02, 0.02, 0.02),
    "seeds outweigh all else": Spread(0.2, 0.02, 0.02),
}


def difference(rng: np.random.Generator, seeds: int, cases: int, spread: Spread) -> np.ndarray:
    """One table's differences, float [seeds, cases, 1], around :data:`TRUTH`."""
    of_seeds = spread.seeds * rng.standard_normal((seeds, 1, 1))
    of_cases = spread.cases * rng.standard_normal((1, cases, 1))
    return TRUTH + of_seeds + of_cases + spread.rest * rng.standard_normal((seeds, cases, 1))


def held(seed: int, repetitions: int, seeds: int, cases: int, spread: Spread) -> int:
    """How many of so many tables have an interval that holds the truth."""
    rng = np.random.default_rng(seed)
    count = 0
    for number in range(repetitions):
        scores = difference(rng, seeds, cases, spread)
        found = paired_difference([(scores, np.zeros_like(scores))], seed=number)
        assert found.low is not None and found.high is not None  # there are several cases
        count += found.low <= TRUTH <= found.high
    return count


def main(argv: list[str] | None = None) -> int:
    """Simulate, print a line for each kind of table, write the record."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.interval_coverage",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--repetitions", type=int, default=400, help="tables of each kind (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="of the tables (default: 0)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder of interval-coverage.json")
    options = parser.parse_args(argv)
    if options.repetitions < 1:
        parser.error(f"--repetitions must be at least 1, got {options.repetitions}")
    about, rows = machine(torch.device("cpu")), []
    for name, spread in SPREADS.items():
        for seeds in SEEDS:
            share = held(options.seed, options.repetitions, seeds, CASES, spread) / options.repetitions
            error = math.sqrt(share * (1 - share) / options.repetitions)
            rows.append({"seeds": seeds, "spread": asdict(spread), "held": share, "standard_error": error})
            many = f"{seeds} seed{'s' if seeds > 1 else ''}"
            print(f"{name}, {many}: {100 * share:.1f} ± {100 * error:.1f} of 100", flush=True)
    record = {
        "machine": about,
        "pgl_ops_version": pgl.__version__,
        "repetitions": options.repetitions,
        "seed": options.seed,
        "cases": CASES,
        "truth": TRUTH,
        "level": LEVEL,
        "bootstrap_draws": DRAWS,
        "tables": rows,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / "interval-coverage.json"
    path.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
