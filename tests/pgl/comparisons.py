"""Small comparisons, for the tests of ``pgl compare``."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from pgl.comparison import runs as module
from pgl.comparison.config import CompareSettings, Comparison
from pgl.downstream.train import finetune as run_finetune
from pgl.pretrain import pretrain
from pgl.settings import to_plain

from .labelled_data import small_finetune
from .training_data import small_config


def comparison(
    data: Path, output: Path, steps: int = 2, finetune: dict[str, Any] | None = None, **changes
) -> Comparison:
    settings = {"data": data, "output": output, "fractions": (0.4, 1.0), "seeds": (0, 1)}
    tuning = replace(small_finetune(data, output, steps=steps), encoder=None, **finetune or {})
    return Comparison(CompareSettings(**{**settings, **changes}), small_config(data, output, steps=2), tuning)


def silently(line: str) -> None:
    pass


def run_here(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let runs start in this process, to save time; their names are added to the list as they start."""
    names: list[str] = []

    def pretraining(run) -> int:
        names.append(Path(run.output).name)
        pretrain(run)
        return 0

    def finetuning(run) -> int:
        names.append(Path(run.output).name)
        run_finetune(run)
        return 0

    monkeypatch.setattr(module, "run_pretraining", pretraining)
    monkeypatch.setattr(module, "run_finetuning", finetuning)
    return names


def settings_files(data: Path, folder: Path) -> list[str]:
    pre, tune = to_plain(small_config(data, folder, steps=2)), to_plain(small_finetune(data, folder))
    words = []
    for name, plain in (("pretrain", pre), ("finetune", tune)):
        for key in ("data", "output", "resume", "weights"):
            plain.pop(key, None)
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(plain), encoding="utf-8")
        words += [f"--{name}", str(file)]
    return words
