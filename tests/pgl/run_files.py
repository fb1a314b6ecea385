"""Runs made of nothing but their record: what `pgl pretrain` writes beside its checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import yaml

from pgl.settings import to_plain

from .training_data import small_config


def training_line(step: int, loss: float = 1.0, seconds: float | None = None, **more: Any) -> dict[str, Any]:
    seconds = step / 2 if seconds is None else seconds
    numbers = {"loss": loss, "learning_rate": 1e-3, "ema": 0.99, "steps_per_s": 2.0, "seconds": seconds}
    return {"kind": "train", "step": step, **numbers, **more}


def validation_line(step: int, accuracy: float, spread: float = 0.7) -> dict[str, Any]:
    return {
        "kind": "validation", "step": step, "matching_accuracy": accuracy, "chance": 0.03, "loss": 1.0,
        "feature_spread": spread, "feature_rank": 5.0, "projected_matching_accuracy": accuracy,
        "projected_spread": 0.8,
    }  # fmt: skip


def write_run(
    folder: Path,
    lines: list[dict[str, Any]],
    steps: int = 100,
    log: list[str] | None = None,
    starts: list[dict[str, Any]] | None = None,
    cases: list[str] | None = None,
) -> Path:
    """A run's folder with settings, metrics, log and environment, without checkpoints."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = to_plain(small_config(folder.parent / "cache", folder, steps))
    (folder / "config.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text, encoding="utf-8")
    stamped = "".join(f"2026-01-02 03:04:05 {line}\n" for line in log or [])
    (folder / "log.txt").write_text(stamped, encoding="utf-8")
    environment = {
        "cases": {"training": cases or ["case0"], "validation": ["case1"]},
        "starts": starts or [{"time": "2026-01-02T03:04:05+0000", "device": "cpu", "command": ["pgl"]}],
    }
    (folder / "environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return folder
