"""The state of a fine-tuning run on disk: started, stopped, continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from pgl.downstream.config import FinetuneConfig
from pgl.downstream.splits import Split
from pgl.files.atomic import atomic_path
from pgl.files.lock import is_empty_but_for_locks
from pgl.files.safe_load import check_header, safe_load
from pgl.runs.folder import CONFIG, SPLIT
from pgl.settings import by_name, differing, since_then, to_plain

FORMAT, FORMAT_VERSION = "pgl-finetune-state", 1
LAST = "checkpoints/last.pt"
_KEYS = {"step", "config", "weights_sha256", "data_sha256", "split", "network", "optimizer"}
_ADVICE = "start the run anew with another --output"
# They move the work elsewhere, or change what is tested, not what is trained.
_FREE = {
    "data", "output", "resume", "inference", "source", "layout", "train.workers", "train.accelerator",
    "train.threads", "train.log_every", "train.checkpoint_every",
}  # fmt: skip


def prepare_folder(folder: Path, config: FinetuneConfig) -> None:
    """Check that a run may write to its folder.

    Raises:
        FileExistsError: it holds something and ``resume`` is not set, or it holds no run.
        FileNotFoundError: there is nothing to resume.
    """
    occupied = folder.exists() and (not folder.is_dir() or not is_empty_but_for_locks(folder))
    if occupied and not config.resume:
        raise FileExistsError(
            f"output {folder} already holds something: give --resume to continue a run, or another --output"
        )
    if config.resume and not occupied:
        raise FileNotFoundError(f"no run at {folder} to resume; leave --resume out")
    if config.resume and not ((folder / CONFIG).is_file() and (folder / SPLIT).is_file()):
        raise FileExistsError(
            f"{folder} is no run of `pgl finetune` (it lacks {CONFIG} or {SPLIT}): give the run's folder"
        )


def save_state(
    folder: Path,
    config: FinetuneConfig,
    weights_sha256: str | None,
    data_sha256: str,
    split: Split,
    step: int,
    network: nn.Module,
    optimizer: Any,
) -> None:
    """Write last.pt, atomically."""
    state = optimizer.state_dict()
    content = {
        "format": FORMAT,
        "format_version": FORMAT_VERSION,
        "step": step,
        "config": to_plain(config),
        "weights_sha256": weights_sha256,
        "data_sha256": data_sha256,
        "split": dict(vars(split)),
        "network": dict(network.state_dict()),
        "optimizer": {
            "state": dict(state["state"]),
            "param_groups": [dict(g) for g in state["param_groups"]],
        },
    }
    with atomic_path(folder / LAST) as temporary, temporary.open("wb") as stream:
        torch.save(content, stream)


def load_state(
    folder: Path, config: FinetuneConfig, weights_sha256: str | None, data_sha256: str, split: Split
) -> dict[str, Any] | None:
    """The state to go on from; None for a run that starts, or was stopped before its first checkpoint.

    Raises:
        ValueError: the settings, the weights, the cases, or their images or labels differ from those of the
            run, or the file is damaged.
    """
    path = folder / LAST
    if not config.resume or not path.is_file():
        return None
    content = safe_load(path, "the state of a run", _ADVICE)
    check_header(path, content, FORMAT, FORMAT_VERSION, "state of `pgl finetune`", "pgl finetune")
    missing = sorted(_KEYS - set(content))
    if missing:
        raise ValueError(f"{path} lacks {', '.join(missing)}: it is damaged; {_ADVICE}")
    then, now = since_then(content["config"], FinetuneConfig, str(path)), by_name(to_plain(config))
    changed = differing(then, now, _FREE)
    if changed:
        raise ValueError(
            f"--resume: {', '.join(changed)} differ from the run in {folder}; give --config "
            f"{folder / CONFIG}, or another --output for a new run"
        )
    if content["weights_sha256"] != weights_sha256:
        raise ValueError(
            f"--resume: {config.weights} holds other weights than those that the run in {folder} started "
            "from; give these, or another --output for a new run"
        )
    if content["split"] != dict(vars(split)):
        raise ValueError(
            f"--resume: the labelled cases of {config.data} are no longer those of the run in {folder}; give "
            "its own cache, or another --output for a new run"
        )
    if content["data_sha256"] != data_sha256:
        raise ValueError(
            f"--resume: images or labels of {config.data} have changed since the run in {folder} was "
            "stopped; give the cache as it was, or another --output for a new run"
        )
    return content
