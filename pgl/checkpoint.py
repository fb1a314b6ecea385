"""Checkpoints: plain tensors and plain data, written atomically, loaded with ``weights_only=True``.

Keys of a checkpoint::

    format             "pgl-checkpoint"
    format_version     1
    pgl_ops_version    version that wrote it
    step               optimiser steps done
    samples            samples seen, which is the data position (a sample is a function of seed and index)
    config             the run's settings as nested plain data, see pgl.config.from_plain
    network            the encoder's class and construction arguments, see pgl.networks.build_encoder
    feature_level      the stage whose features were trained, counted from 0
    feature_stride     [D, H, W] input voxels a feature voxel at that stage
    spacing_mm         [D, H, W] spacing of the cache
    online             {"encoder": state dict, "projector": ..., "predictor": ...}
    target             {"encoder": state dict, "projector": ...}
    metrics            the latest validation numbers, as in metrics.jsonl
    best               the validation numbers of the best step so far
    optimizer          the optimiser's state dict (last.pt only; None elsewhere)

``online["encoder"]`` has exactly the names and shapes of ``build_encoder(network).state_dict()``.
"""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import torch

from pgl.atomic import atomic_path

FORMAT = "pgl-checkpoint"
FORMAT_VERSION = 1
FOLDER = "checkpoints"
INITIAL, LAST, BEST = "initial.pt", "last.pt", "best.pt"

_KEYS = [
    "pgl_ops_version",
    "step",
    "samples",
    "config",
    "network",
    "feature_level",
    "feature_stride",
    "spacing_mm",
    "online",
    "target",
    "metrics",
    "best",
    "optimizer",
]


def checkpoint_path(run: str | os.PathLike[str], name: str = BEST) -> Path:
    """Where checkpoint ``name`` (``initial.pt``, ``last.pt`` or ``best.pt``) of the run's folder lies."""
    return Path(run) / FOLDER / name


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write the keys above (without the two of the format) to ``path``; a crash leaves the old file as it
    was.

    Raises:
        ValueError: a key is missing or unknown.
    """
    if set(content) != set(_KEYS):
        raise ValueError(f"checkpoint content differs from the format in {sorted(set(content) ^ set(_KEYS))}")
    with atomic_path(path) as temporary:
        torch.save({"format": FORMAT, "format_version": FORMAT_VERSION, **content}, temporary)


def load_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint`; nothing but tensors and plain data is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this project, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no checkpoint at {path}: was the run started and its output folder given?")
    try:
        content = torch.load(path, map_location=map_location, weights_only=True)
    except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{path} cannot be read as a checkpoint (damaged, or another kind of file): {error}"
        ) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise ValueError(f"{path} is no checkpoint of `pgl pretrain` (its key 'format' is not {FORMAT!r})")
    if content["format_version"] > FORMAT_VERSION:
        raise ValueError(
            f"{path} has checkpoint format {content['format_version']}, "
            f"this pgl reads up to {FORMAT_VERSION}: update pgl"
        )
    return content
