"""The state of a run: what goes into a checkpoint, comes out of it, and whether it may be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch.optim import Optimizer

import pgl
from pgl.checkpoint import LAST, checkpoint_path, load_checkpoint
from pgl.config import PretrainConfig, to_plain
from pgl.method import PGL
from pgl.networks import describe
from pgl.record import METRICS

# Settings that a resumed run may change: they move the work elsewhere without changing what is computed.
_FREE_SETTINGS = {
    "data", "output", "resume", "train.workers", "train.accelerator", "train.devices", "train.num_nodes",
    "train.threads", "train.log_every", "train.checkpoint_every", "validation.collapse_threshold",
}  # fmt: skip


def state_of(method: PGL, optimizer: Optimizer | None, config: PretrainConfig) -> dict[str, Any]:
    """The parts of a checkpoint that the networks, the optimiser (if given) and the settings make up."""
    return {
        "pgl_ops_version": pgl.__version__,
        "config": to_plain(config),
        "network": describe(config.encoder),
        "feature_level": method.backbone.level,
        "feature_stride": list(method.backbone.stride),
        "online": {
            "encoder": method.backbone.encoder.state_dict(),
            "projector": method.projector.state_dict(),
            "predictor": method.predictor.state_dict(),
        },
        "target": {
            "encoder": method.target_backbone.encoder.state_dict(),
            "projector": method.target_projector.state_dict(),
        },
        "optimizer": None if optimizer is None else _plain_state(optimizer),
    }


def restore(method: PGL, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put the networks and the optimiser into the state of a checkpoint."""
    method.backbone.encoder.load_state_dict(saved["online"]["encoder"])
    method.projector.load_state_dict(saved["online"]["projector"])
    method.predictor.load_state_dict(saved["online"]["predictor"])
    method.target_backbone.encoder.load_state_dict(saved["target"]["encoder"])
    method.target_projector.load_state_dict(saved["target"]["projector"])
    optimizer.load_state_dict(saved["optimizer"])


def state_to_resume(config: PretrainConfig) -> dict[str, Any] | None:
    """The last checkpoint of the run to resume, or None for one that starts at step 0.

    Raises:
        FileExistsError: the output holds something and ``resume`` is not set.
        ValueError: the settings differ from those of the run, or its checkpoint is damaged.
    """
    folder = Path(config.output)
    last = checkpoint_path(folder, LAST)
    if not config.resume:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            what = "a run" if (folder / METRICS).exists() else "other files"
            raise FileExistsError(
                f"output {folder} already holds {what}: give --resume to continue a run, or another --output"
            )
        return None
    if not last.exists():
        return None
    saved = load_checkpoint(last)
    then, now = _flat(saved["config"]), _flat(to_plain(config))
    changed = sorted(
        key for key in then.keys() | now.keys() if key not in _FREE_SETTINGS and then.get(key) != now.get(key)
    )
    if changed:
        key = changed[0]
        raise ValueError(
            f"--resume: {', '.join(changed)} differ from the run in {folder} ({key} was {then.get(key)}, now "
            f"{now.get(key)}); give --config {folder / 'config.yaml'}, or another --output for a new run"
        )
    return saved


def _flat(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value})
    return flat


def _plain_state(optimizer: Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"state": dict(state["state"]), "param_groups": [dict(group) for group in state["param_groups"]]}
