"""The simulation of how often intervals hold the truth."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest

import benchmarks.interval_coverage as coverage
from benchmarks.interval_coverage import TRUTH, Spread, difference, held, main


def test_a_difference_has_the_spreads_that_were_asked_for():
    table = difference(np.random.default_rng(1), 300, 400, Spread(0.03, 0.02, 0.01))[..., 0]
    assert table.mean() == pytest.approx(TRUTH, abs=0.006)  # three standard errors of 300 seeds
    assert table.mean(1).std() == pytest.approx(0.03, rel=0.15)
    assert table.mean(0).std() == pytest.approx(0.02, rel=0.15)
    rest = table - table.mean(1, keepdims=True) - table.mean(0) + table.mean()
    assert rest.std() == pytest.approx(0.01, rel=0.02)


def test_with_seeds_alone_the_interval_of_three_reaches_from_the_least_to_the_greatest():
    """A draw of three is three times the least in 1 of 27, which is more than the tail of 2.5 %. So the truth
    is missed where all three lie on one side of it: 1 time in 4."""
    effects, repetitions = np.random.default_rng(5), 40
    spread = Spread(0.1, 0.0, 0.0)
    wanted = 0
    for _ in range(repetitions):
        signs = np.sign(difference(effects, 3, 2, spread)[:, 0, 0] - TRUTH)
        wanted += abs(signs.sum()) < 3
    assert held(5, repetitions, 3, 2, spread) == wanted
    assert wanted / repetitions == pytest.approx(0.75, abs=0.2)


def test_a_single_seed_that_moves_everything_is_never_held():
    assert held(0, 10, 1, 4, Spread(1e3, 1e-3, 1e-3)) == 0


def test_the_record_has_a_row_for_each_kind_of_table(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(coverage, "CASES", 3)
    assert main(["--repetitions", "1", "--seed", "3", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "interval-coverage.json").read_text("utf-8"))
    assert {"date", "commit"} <= set(record["machine"])
    assert (record["repetitions"], record["seed"], record["cases"]) == (1, 3, 3)
    assert sorted(row["seeds"] for row in record["tables"]) == [1, 1, 1, 3, 3, 3, 6, 6, 6]
    assert all(row["held"] in (0, 1) for row in record["tables"])
    assert "6 seeds" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["--repetitions", "0"])


def test_the_figures_on_the_page_are_those_of_the_record():
    root = Path(__file__).resolve().parents[2]
    record = json.loads((root / "benchmarks/results/interval-coverage.json").read_text("utf-8"))
    page = (root / "docs/comparing.md").read_text("utf-8")
    shown = re.findall(r"^  \|.* that over cases \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", page, re.M)
    assert [row["seeds"] for row in record["tables"]] == [6, 3, 1] * 3
    figures = [float(figure) for row in shown for figure in row]
    assert figures == pytest.approx([100 * row["held"] for row in record["tables"]], abs=0.051)
