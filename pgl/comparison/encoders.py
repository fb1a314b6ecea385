"""The encoder file of a pretraining is what is exported of the pretraining that is there now."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgl.cache.manifest import sha256_of
from pgl.export.checks import WEIGHTS
from pgl.export.encoder import encoder_of_run, read_export, write_tensors

# Who wrote a file changes nothing in its weights.
_OF_THE_WRITER = {"pgl_ops_version", "format_version"}


def keep_exported(run: Path, file: Path) -> str:
    """Make ``file`` the export of a run's last step, unless it is that already.

    Args:
        run: the folder of ``pgl pretrain``.
        file: where its encoder belongs; one of another pretraining, or a damaged one, is replaced.

    Returns:
        The SHA-256 of the file.

    Raises:
        FileNotFoundError: the run has no last checkpoint.
        ValueError: that is damaged.
    """
    content = encoder_of_run(run)
    if not _holds(file, content):
        write_tensors(file, content)
    return sha256_of(file)


def _holds(file: Path, content: dict[str, Any]) -> bool:
    try:
        there = read_export(file)
    except (OSError, ValueError):
        return False
    network = content["network"]
    return all(_alike(there.get(key), content.get(key)) for key in WEIGHTS) and all(
        network.get(key) == value for key, value in there["network"].items() if key not in _OF_THE_WRITER
    )


def _alike(one: dict[str, Tensor] | None, other: dict[str, Tensor] | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.keys() == other.keys() and all(
        tensor.dtype == other[name].dtype and torch.equal(tensor, other[name]) for name, tensor in one.items()
    )


def refuse_tunings(reasons: Sequence[tuple[Path, str]], again: str) -> None:
    """Refuse fine-tunings that were made of something else than is there now.

    Args:
        reasons: the folder of each, and what is wrong with it.
        again: what to do once they are deleted, "compare again".

    Raises:
        ValueError: there is one; names the first reason and all folders.
    """
    if reasons:
        folders = ", ".join(str(folder) for folder, _ in reasons)
        raise ValueError(f"{reasons[0][1]}: delete {folders} and {again}")


def other_weights(tuning: Path, pretraining: Path, file: Path, is_pretrained: bool) -> str:
    """Why a fine-tuning does not belong to a pretraining, for :func:`refuse_tunings`."""
    made = f"{tuning} was made with other weights than "
    if is_pretrained:
        return f"{made}{file} holds now"
    return f"{made}the pretraining {pretraining} will give, which is missing or not finished"
