"""The runner of the evidence: what it leaves behind, and that it keeps to its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from .labelled_data import labelled_cache

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = """
initialisations: [random]
fractions: [1.0]
seeds: [0]
pretrain:
  encoder:
    features_per_stage: [4, 8]
    strides: [[1, 1, 1], [2, 2, 2]]
    kernel_sizes: [[3, 3, 3], [3, 3, 3]]
    n_blocks_per_stage: [1, 1]
  views: {patch_size: [8, 16, 16], context_size: [12, 24, 24]}
finetune:
  patches: {patch_size: [8, 16, 16]}
  optimizer: {warmup_steps: 1}
  train: {steps: 3, workers: 0, accelerator: cpu}
"""


def run(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    env = {key: value for key, value in os.environ.items() if key != "OUT"}
    command = [sys.executable, "-m", "benchmarks.evidence", *words, "--output", str(folder / "out")]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)


def test_tables_and_scores_come_back_and_weights_stay(tmp_path):
    data = labelled_cache(tmp_path / "cache")
    (tmp_path / "c.yaml").write_text(SETTINGS, encoding="utf-8")
    done = run(tmp_path, f"blocks={tmp_path / 'c.yaml'},{data},2", "--limit", "200")
    assert done.returncode == 0, done.stdout + done.stderr
    with tarfile.open(tmp_path / "out/blocks.tar.gz") as tar:
        names = tar.getnames()
    run_folder = "blocks/finetuned/random-fraction1-seed0"
    for name in ("blocks/compare.md", "blocks/compare.png", "blocks/report.html", f"{run_folder}/results.csv",
                 f"{run_folder}/metrics.jsonl", f"{run_folder}/config.yaml"):  # fmt: skip
        assert name in names
    assert not [name for name in names if name.endswith((".pt", ".b2nd"))]
    facts = json.loads((tmp_path / "out/evidence.json").read_text("utf-8"))
    assert facts["comparisons"]["blocks"]["finished"] == facts["comparisons"]["blocks"]["planned"] == 1
    assert "| random |" in (tmp_path / "out/log.txt").read_text("utf-8")


@pytest.mark.parametrize(
    "words", [["a=x.yaml,cache"], ["a=x.yaml,cache,0"], ["a=x.yaml,cache,1", "--limit", "20"]]
)
def test_wrong_words_start_nothing(tmp_path, words):
    assert run(tmp_path, *words).returncode == 2 and not (tmp_path / "out").exists()
