"""Checkpoints: plain tensors and plain data, written atomically, loaded with ``weights_only=True``.

Keys of a checkpoint::

    format             "pgl-checkpoint"
    format_version     1
    pgl_ops_version    version that wrote it
    step               optimiser steps done
    samples            samples seen, which is the data position (a sample is a function of seed and index)
    config             the run's settings as nested plain data, see pgl.config.from_plain
    network            the encoder's class and construction arguments, see pgl.networks.build_encoder
    feature_level      the encoder's deepest stage that was trained, counted from 0
    feature_stride     [D, H, W] input voxels a feature voxel at that stage
    spacing_mm         [D, H, W] spacing of the cache
    online             {"encoder": state dict, "projector": ..., "predictor": ...}, and where they are in use
                       "decoder", "side_projectors", "side_predictors" (method.features, method.more_levels)
    target             {"encoder": state dict, "projector": ...}, and "decoder", "side_projectors"
    metrics            the latest validation numbers, as in metrics.jsonl
    best               the validation numbers of the best step so far
    optimizer          the optimiser's state dict (last.pt and step-N.pt; None elsewhere)
    pending_losses     losses of the steps since the last line of metrics

``online["encoder"]`` has exactly the names and shapes of ``build_encoder(network).state_dict()``.
"""

from __future__ import annotations

import os
import re
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from pgl.files.atomic import PARTIAL_PREFIX, atomic_path
from pgl.files.safe_load import check_header, safe_load
from pgl.runs.folder import CHECKPOINTS, INITIAL, LAST, checkpoint_path

FORMAT = "pgl-checkpoint"
FORMAT_VERSION = 1

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
    "pending_losses",
]
_KEPT = re.compile(r"step-(\d+)\.pt")
_ADVICE = "restore it from a copy, or take another checkpoint of the run"


def save_checkpoint(path: str | os.PathLike[str], content: dict[str, Any]) -> None:
    """Write the keys above (without the two of the format) to ``path``; a crash leaves the old file as it
    was.

    Raises:
        ValueError: a key is missing or unknown.
        OSError: it cannot be written, for example because the disk is full.
    """
    differing = set(content) ^ set(_KEYS)
    if differing:
        raise ValueError(f"checkpoint content differs from the format in {sorted(differing)}")
    file = {"format": FORMAT, "format_version": FORMAT_VERSION, **content}
    try:
        # Opened here, because torch's own writer hides the reason when a write fails.
        with atomic_path(path) as temporary, temporary.open("wb") as stream:
            torch.save(file, stream)
    except OSError as error:
        raise _not_written(Path(path), error) from error
    except RuntimeError as error:
        # Closing its archive, torch raises an error of its own on top of that of the failed write.
        cause = error.__context__
        if not isinstance(cause, OSError):
            raise
        raise _not_written(Path(path), cause) from error


def kept_path(run: str | os.PathLike[str], step: int) -> Path:
    """Where :func:`keep_last` keeps the checkpoint of ``step``."""
    return checkpoint_path(run, f"step-{step:08d}.pt")


def keep_last(run: str | os.PathLike[str], step: int, most: int) -> Path:
    """Let ``last.pt`` of ``step`` stay as ``step-N.pt``, and delete the oldest beyond ``most`` of these.

    Where the file system can, it is a second name of the same file and takes no room until ``last.pt`` is
    replaced.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    path = kept_path(run, step)
    last = path.with_name(LAST)
    try:
        with atomic_path(path) as temporary:
            try:
                os.link(last, temporary)
            except OSError:
                shutil.copyfile(last, temporary)
    except OSError as error:
        raise _not_written(path, error) from error
    kept = sorted(
        (int(found[1]), file) for file in path.parent.iterdir() if (found := _KEPT.fullmatch(file.name))
    )
    for _, file in kept[: max(len(kept) - most, 0)]:
        file.unlink(missing_ok=True)
    return path


def remove_partial(run: str | os.PathLike[str]) -> None:
    """Delete what a killed run left half written."""
    for folder in (Path(run), Path(run) / CHECKPOINTS):
        for file in folder.glob(f"{PARTIAL_PREFIX}*"):
            with suppress(OSError):
                file.unlink()


def load_checkpoint(path: str | os.PathLike[str], map_location: str = "cpu") -> dict[str, Any]:
    """Read a checkpoint of :func:`save_checkpoint`; nothing but tensors and plain data is ever unpickled.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is damaged, or not a checkpoint of this project, or of a later format.
    """
    path = Path(path)
    if not path.is_file():
        if path.name == LAST and path.with_name(INITIAL).is_file():
            train = load_checkpoint(path.with_name(INITIAL))["config"].get("train", {})
            raise FileNotFoundError(
                f"the run has not written {LAST} yet (train.checkpoint_every = "
                f"{train.get('checkpoint_every')}), expected it at {path}: wait for that step, or stop the "
                "run with Ctrl-C, which writes it"
            )
        raise FileNotFoundError(f"no checkpoint at {path}: was the run started and its output folder given?")
    content = safe_load(path, "a checkpoint", _ADVICE, map_location)
    check_header(path, content, FORMAT, FORMAT_VERSION, "checkpoint of `pgl pretrain`", "pgl pretrain")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged; {_ADVICE}")
    for key in ("config", "network", "online", "target"):
        if not isinstance(content[key], dict):
            raise ValueError(
                f"{path}: {key!r} must be a dict, got {type(content[key]).__name__}: it is damaged; {_ADVICE}"
            )
    step = content["step"]
    if not isinstance(step, int) or step < 0:
        raise ValueError(f"{path}: 'step' must be a number of steps, got {step!r}: it is damaged; {_ADVICE}")
    return content


def _not_written(path: Path, error: OSError) -> OSError:
    reason = error.strerror or str(error)
    told = OSError(
        f"cannot write {path}: {reason}; an older file of that name is unchanged: make room or permit "
        "writing, then go on with --resume"
    )
    told.errno = error.errno
    return told
