"""Small labelled caches and settings for the tests of fine-tuning."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgl.cache.volumes import CacheWriter
from pgl.config import AugmentSettings
from pgl.downstream.config import (
    FinetuneConfig,
    FinetuneOptimizerSettings,
    FinetuneTrainSettings,
    InferenceSettings,
    PatchSettings,
)
from pgl.labels.store import write_label
from tests.pgl.training_data import small_encoder

CLASSES = {1: "bright", 2: "dark"}


def tissue(seed: int, shape: tuple[int, int, int] = (10, 32, 36)) -> tuple[np.ndarray, np.ndarray]:
    """int16 HU and uint8 labels: soft tissue with a bright (1) and a dark (2) block at places of its own."""
    rng = np.random.default_rng(seed)
    label = np.zeros(shape, np.uint8)
    for number in (1, 2):
        size = rng.integers([3, 8, 8], [6, 13, 13])
        corner = [int(rng.integers(0, n - s)) for n, s in zip(shape, size, strict=True)]
        label[tuple(slice(c, c + int(s)) for c, s in zip(corner, size, strict=True))] = number
    hu = np.select([label == 1, label == 2], [250.0, -400.0], 40.0) + rng.normal(0, 20, shape)
    return np.rint(hu).astype(np.int16), label


def labelled_cache(path: Path, cases: int = 8, **named: tuple[np.ndarray, np.ndarray]) -> Path:
    """A cache of ``p0``, ``p1``, … or of the given cases (image, label)."""
    writer = CacheWriter(path, (3.0, 1.0, 1.0))
    for name, (hu, label) in (named or {f"p{n}": tissue(n) for n in range(cases)}).items():
        record = writer.add(f"{name}-id", hu)
        write_label(path, record, label, name, CLASSES, "", "")
    writer.finish()
    return path


def small_finetune(data: Path, output: Path, steps: int = 4, **changes) -> FinetuneConfig:
    """A run of a second or two."""
    settings = {
        "data": data,
        "output": output,
        "weights": "random",
        "encoder": small_encoder(),
        "patches": PatchSettings(patch_size=(8, 16, 16), crop_scale=(0.9, 1.1)),
        "augment": AugmentSettings(gamma_probability=0.0, brightness_probability=0.0),
        "optimizer": FinetuneOptimizerSettings(learning_rate=5e-3, warmup_steps=1),
        "train": FinetuneTrainSettings(
            steps=steps, workers=0, accelerator="cpu", threads=1, log_every=2, checkpoint_every=2
        ),
        "inference": InferenceSettings(batch_size=4),
    }
    return FinetuneConfig(**{**settings, **changes})
