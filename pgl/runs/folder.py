"""What lies in a run's folder, and whether a folder is a run that can be resumed."""

from __future__ import annotations

import json
import os
from pathlib import Path

from pgl.files.lock import is_empty_but_for_locks

METRICS, LOG, ENVIRONMENT, CONFIG, TENSORBOARD = (
    "metrics.jsonl", "log.txt", "environment.json", "config.yaml", "tensorboard",
)  # fmt: skip
SPLIT = "split.json"  # of fine-tunings alone
CHECKPOINTS = "checkpoints"
INITIAL, LAST, BEST = "initial.pt", "last.pt", "best.pt"


def checkpoint_path(run: str | os.PathLike[str], name: str = BEST) -> Path:
    """Where checkpoint ``name`` (``initial.pt``, ``last.pt`` or ``best.pt``) of the run's folder lies."""
    return Path(run) / CHECKPOINTS / name


def refuse_what_is_no_run(folder: Path) -> None:
    """Stop before ``--resume`` writes into a folder that holds no run.

    Raises:
        FileNotFoundError: the folder is missing or empty.
        FileExistsError: it holds something else than a run.
    """
    if not folder.exists() or (folder.is_dir() and is_empty_but_for_locks(folder)):
        raise FileNotFoundError(f"no run at {folder} to resume; leave --resume out")
    if not folder.is_dir() or not (folder / CONFIG).is_file() or not (folder / ENVIRONMENT).is_file():
        raise FileExistsError(
            f"{folder} is no run of `pgl pretrain` (it lacks {CONFIG} or {ENVIRONMENT}), so --resume leaves "
            "it as it is: give the run's folder, or another --output without --resume"
        )
    cases_of(folder)


def refuse_fine_tuning(folder: Path) -> None:
    """Raise ValueError for the folder of a fine-tuning where that of a pretraining is wanted."""
    if (folder / SPLIT).is_file():
        raise ValueError(
            f"{folder} is a run of `pgl finetune`: give one of `pgl pretrain` (how a fine-tuning does is in "
            f"its {LOG} and {METRICS}, its scores are in results.csv)"
        )


def cases_of(folder: Path) -> dict[str, list[str]]:
    """The names of a run's cases, in the order of the cache: ``training`` and ``validation``.

    Raises:
        ValueError: environment.json is missing or not one of a run.
    """
    path = folder / ENVIRONMENT
    try:
        content = json.loads(path.read_text("utf-8"))
        cases = {side: [str(name) for name in content["cases"][side]] for side in ("training", "validation")}
        if isinstance(content["starts"], list):
            return cases
    except (OSError, ValueError, KeyError, TypeError):
        pass
    raise ValueError(
        f"{path} is missing, damaged or of another program: it tells which cases the run trains on; restore "
        "it from a copy, or start a new run with another --output"
    )


def steps_measured(folder: Path) -> int:
    """The last step that metrics.jsonl knows, 0 without one."""
    path, last = folder / METRICS, 0
    if path.is_file():
        for line in path.read_text("utf-8", errors="replace").splitlines():
            try:
                last = max(last, int(json.loads(line)["step"]))
            except (ValueError, KeyError, TypeError):
                continue
    return last
