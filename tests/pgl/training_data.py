"""Small caches and settings for the tests of the trainer."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from pgl.cache.volumes import CacheWriter, VolumeCache
from pgl.config import (
    MethodSettings,
    OptimizerSettings,
    PretrainConfig,
    TrainSettings,
    ValidationSettings,
    ViewSettings,
)
from pgl.encoder_settings import EncoderSettings

SMALL_VIEWS = ViewSettings(patch_size=(4, 16, 16), context_size=(8, 28, 28))


def small_encoder() -> EncoderSettings:
    """Three stages, stride (2, 4, 4)."""
    return EncoderSettings(
        features_per_stage=[4, 8, 8],
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2)],
        kernel_sizes=[(1, 3, 3), (3, 3, 3), (3, 3, 3)],
        n_blocks_per_stage=[1, 1, 1],
    )


def blobs(shape: tuple[int, int, int] = (12, 40, 44), seed: int = 0) -> np.ndarray:
    """int16 HU: a block of smooth soft tissue with bright and dark blobs, air outside."""
    rng = np.random.default_rng(seed)
    z, y, x = np.meshgrid(*(np.linspace(-1, 1, n) for n in shape), indexing="ij")
    hu = np.where(np.hypot(x, y) < 0.9, 40.0, -1000.0)
    for _ in range(12):
        cz, cy, cx = rng.uniform(-0.8, 0.8, 3)
        blob = np.exp(-((z - cz) ** 2 / 0.1 + (y - cy) ** 2 / 0.03 + (x - cx) ** 2 / 0.03))
        hu += rng.uniform(-300, 400) * blob
    return np.rint(hu + rng.normal(0, 10, shape)).astype(np.int16)


def make_cache(path: Path, volumes: dict[str, np.ndarray] | None = None) -> Path:
    """A cache of the given volumes by name; without any, of five small ones."""
    writer = CacheWriter(path, (3.0, 1.0, 1.0))
    for name, volume in (volumes or {f"case{i}": blobs(seed=i) for i in range(5)}).items():
        writer.add(name, volume)
    writer.finish()
    return path


def small_cache(path: Path) -> VolumeCache:
    return VolumeCache(make_cache(path))


def small_config(data: Path, output: Path, steps: int = 4) -> PretrainConfig:
    """A run of a second or two."""
    return PretrainConfig(
        data=data,
        output=output,
        views=SMALL_VIEWS,
        encoder=small_encoder(),
        method=MethodSettings(
            aligned_size=(2, 4, 4),
            projector_hidden=16,
            projector_channels=8,
            predictor_hidden=16,
            ema_start=0.9,
        ),
        optimizer=OptimizerSettings(name="adamw", learning_rate=2e-3, weight_decay=1e-4, warmup_steps=1),
        train=TrainSettings(
            steps=steps,
            batch_size=2,
            workers=0,
            accelerator="cpu",
            devices=1,
            threads=1,
            log_every=1,
            checkpoint_every=2,
        ),
        validation=ValidationSettings(pairs=3, every=2, fraction=0.2, collapse_threshold=0.0),
    )
