"""The state of a run: what goes into a checkpoint, comes out of it, and whether it may be continued."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

import pgl
from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig
from pgl.encoder_settings import stride_at
from pgl.files.lock import is_empty_but_for_locks
from pgl.methods.base import Method
from pgl.networks import describe
from pgl.runs.folder import (
    BEST,
    LAST,
    METRICS,
    cases_of,
    checkpoint_path,
    refuse_what_is_no_run,
    steps_measured,
)
from pgl.settings import by_name, differing, since_then, to_plain
from pgl.training.checkpoint import load_checkpoint
from pgl.training.contexts import hold_out

# Settings that a resumed run may change: they move the work elsewhere without changing what is computed.
_FREE_SETTINGS = {
    "data", "output", "resume", "train.workers", "train.prefetch", "train.accelerator", "train.devices",
    "train.num_nodes", "train.threads", "train.channels_last", "train.compile", "train.recompute",
    "train.log_every", "train.checkpoint_every", "train.keep_every", "train.kept", "train.skip_damaged",
    "validation.collapse_threshold",
}  # fmt: skip


def state_of(method: Method, optimizer: Optimizer | None, config: PretrainConfig) -> dict[str, Any]:
    """The parts of a checkpoint that the networks, the optimiser (if given) and the settings make up."""
    return {
        "pgl_ops_version": pgl.__version__,
        "config": to_plain(config),
        "network": describe(config.encoder),
        "feature_level": method.backbone.deepest,
        "feature_stride": list(stride_at(config.encoder, method.backbone.deepest)),
        **{
            side: {name: part.state_dict() for name, part in parts.items()}
            for side, parts in method.parts().items()
        },
        "optimizer": None if optimizer is None else _plain_state(optimizer),
    }


def restore(method: Method, optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Put the networks and the optimiser into the state of a checkpoint."""
    for side, parts in method.parts().items():
        for name, module in parts.items():
            module.load_state_dict(saved[side][name])
    optimizer.load_state_dict(saved["optimizer"])


def refuse_what_is_not_finite(network: nn.Module, step: int) -> None:
    """Stop before weights that a bad gradient has spoilt take the place of a good checkpoint.

    Raises:
        FloatingPointError: a weight is NaN or infinite.
    """
    norms = torch._foreach_norm([p.detach().float() for p in network.parameters()])
    if not torch.stack(norms).isfinite().all():
        raise FloatingPointError(
            f"weights are not finite after step {step}, though the loss still was: lower "
            "optimizer.learning_rate, or use train.precision=32-true; the checkpoints hold the last good "
            "state"
        )


def state_to_resume(config: PretrainConfig, cache: VolumeCache) -> dict[str, Any] | None:
    """The last checkpoint of the run to resume, or None for one that starts at step 0.

    A run that was stopped before its first step was done starts at step 0, too.

    Raises:
        FileExistsError: the output holds something and ``resume`` is not set, or it is set and the output
            is no run.
        FileNotFoundError: there is nothing to resume, or the run's ``last.pt`` is lost.
        ValueError: the settings or the cache differ from those of the run, or its checkpoint is damaged.
    """
    folder = Path(config.output)
    last = checkpoint_path(folder, LAST)
    if not config.resume:
        if folder.exists() and (not folder.is_dir() or not is_empty_but_for_locks(folder)):
            what = "a run" if (folder / METRICS).exists() else "other files"
            raise FileExistsError(
                f"output {folder} already holds {what}: give --resume to continue a run, or another --output"
            )
        return None
    if not last.exists():
        refuse_what_is_no_run(folder)
        step = steps_measured(folder)
        if step or checkpoint_path(folder, BEST).exists():
            raise FileNotFoundError(
                f"{last} is lost, or the run was killed before it was first written (after "
                f"train.checkpoint_every steps): the run in {folder}, which reached step {step}, cannot be "
                "resumed; restore last.pt from a copy, or start a new run with another --output"
            )
        return None
    saved = load_checkpoint(last)
    then, now = since_then(saved["config"], PretrainConfig, str(last)), by_name(to_plain(config))
    changed = differing(then, now, _FREE_SETTINGS)
    if changed:
        key = changed[0]
        raise ValueError(
            f"--resume: {', '.join(changed)} differ from the run in {folder} ({key} was {then.get(key)}, now "
            f"{now.get(key)}); give --config {folder / 'config.yaml'}, or another --output for a new run"
        )
    _refuse_another_cache(config, cache, saved)
    return saved


def _refuse_another_cache(config: PretrainConfig, cache: VolumeCache, saved: dict[str, Any]) -> None:
    differences = []
    then_mm, now_mm = tuple(saved["spacing_mm"]), tuple(cache.spacing_mm)
    if then_mm != now_mm:
        differences.append(f"spacing_mm was {then_mm}, now {now_mm}")
    ids = [case.case_id for case in cache.cases]
    sides = hold_out(ids, config.validation.fraction, config.seed)
    before = cases_of(Path(config.output))
    after = {
        side: [ids[i] for i in numbers]
        for side, numbers in zip(("training", "validation"), sides, strict=True)
    }
    if before != after:
        old = {name for names in before.values() for name in names}
        changes = {"added": sorted(set(ids) - old), "removed": sorted(old - set(ids))}
        told = [f"cases {how}: {_listed(names)}" for how, names in changes.items() if names]
        differences += told or ["the order or the split of the cases changed"]
    if differences:
        raise ValueError(
            f"--resume: the cache {config.data} differs from that of the run in {config.output} "
            f"({'; '.join(differences)}); give the run's own cache with --data, or another --output for a "
            "new run"
        )


def _listed(names: list[str], most: int = 5) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def _plain_state(optimizer: Optimizer) -> dict[str, Any]:
    state = optimizer.state_dict()
    return {"state": dict(state["state"]), "param_groups": [dict(group) for group in state["param_groups"]]}
