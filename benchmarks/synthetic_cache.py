"""A cache of volumes that compress and read like CT, for measurements without data."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def make_cache(folder: Path, context: tuple[int, int, int], cases: int = 4) -> None:
    """Soft tissue with organs, air around it and a scanner's noise: it compresses like CT."""
    from pgl.cache.volumes import CacheWriter

    shape = tuple(max(edge * 3 // 2, least) for edge, least in zip(context, (64, 192, 192), strict=True))
    writer = CacheWriter(folder, (3.0, 1.0, 1.0))
    for case in range(cases):
        rng = np.random.default_rng(case)
        z, y, x = np.meshgrid(*(np.linspace(-1, 1, n, dtype=np.float32) for n in shape), indexing="ij")
        hu = np.where(np.hypot(x, y * 1.3) < 0.9, np.float32(40), np.float32(-1000))
        for _ in range(20):
            cz, cy, cx = rng.uniform(-0.8, 0.8, 3)
            hu[(z - cz) ** 2 + (y - cy) ** 2 + (x - cx) ** 2 < rng.uniform(0.01, 0.1)] += rng.uniform(
                -150, 250
            )
        hu += rng.normal(0, 12, shape).astype(np.float32)
        writer.add(f"case{case}", np.rint(hu).astype(np.int16))
    writer.finish()
