"""What a run has written about itself, read back: for its report, its status, and tables of several runs."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pgl.config import PretrainConfig
from pgl.runs.folder import CONFIG, ENVIRONMENT, LOG, METRICS, refuse_fine_tuning
from pgl.settings import read_settings

_WARNING = "WARNING"
_TIME_STAMP = re.compile(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")
# A number with decimals that stands alone: no part of a case's name.
_MEASURED = re.compile(r"(?<![\w.-])\d+\.\d+(?![\w.-])")
_BAD_BATCH = re.compile(r"bad-batch-(\d+)")
_SAME_CASES = "validation uses the training cases"


@dataclass
class RunFacts:
    """A run as its files tell it; it may still be going on.

    Args:
        folder: RUN.
        settings: every setting by its dotted name, ``train.steps``.
        environment: environment.json, empty if it is missing or damaged.
        train: training lines of metrics.jsonl in the order of steps.
        validation: its validation lines.
        log: lines of log.txt.
        bad_steps: steps whose batch was described because its loss was not finite.
    """

    folder: Path
    settings: dict[str, Any]
    environment: dict[str, Any]
    train: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    log: list[str] = field(default_factory=list)
    bad_steps: list[int] = field(default_factory=list)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.folder.resolve().name

    @property
    def steps(self) -> int:
        """Steps of the whole run."""
        return int(self.settings["train.steps"])

    @property
    def step(self) -> int:
        """The last step that metrics.jsonl knows."""
        return max((int(line["step"]) for line in (*self.train[-1:], *self.validation[-1:])), default=0)

    @property
    def untrained(self) -> dict[str, Any] | None:
        """The validation line of the untrained network."""
        first = self.validation[0] if self.validation else None
        return first if first is not None and first["step"] == 0 else None

    @property
    def measured(self) -> list[dict[str, Any]]:
        """The validation lines of the network in training."""
        return [line for line in self.validation if line["step"] > 0]

    @property
    def best(self) -> dict[str, Any] | None:
        """The validation line with the highest matching accuracy; step 0 does not count."""
        known = [line for line in self.measured if number(line, "matching_accuracy") is not None]
        return max(known, key=lambda line: line["matching_accuracy"], default=None)

    @property
    def seconds(self) -> float:
        """Wall time of the steps that metrics.jsonl knows, over all starts, validation included."""
        total, before = 0.0, 0.0
        for line in self.train:
            now = number(line, "seconds") or 0.0
            # The clock starts again with each start of the run.
            total += now - before if now >= before else now
            before = now
        return total

    @property
    def steps_per_s(self) -> float | None:
        """The median speed of training, without validation."""
        speeds = sorted(v for line in self.train if (v := number(line, "steps_per_s")) is not None)
        return speeds[len(speeds) // 2] if speeds else None

    @property
    def starts(self) -> list[dict[str, Any]]:
        """The starts of the run, as environment.json describes them."""
        starts = self.environment.get("starts", [])
        return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []

    def warnings(self) -> list[str]:
        """What a reader must know before believing the curves, each thing once."""
        found: dict[str, tuple[str, int]] = {}
        for line in self.log:
            text = _TIME_STAMP.sub("", line, count=1)
            if text.startswith((_WARNING, _SAME_CASES)):
                # The same warning with other numbers is still the same.
                key = _MEASURED.sub("#", text)
                found[key] = (text, found.get(key, ("", 0))[1] + 1)
        told = [text + (f" (the last of {count})" if count > 1 else "") for text, count in found.values()]
        told += [
            f"The loss was not finite in step {step:,}; bad-batch-{step}.json names the cases and boxes."
            for step in self.bad_steps
        ]
        lost = [int(line["step"]) for line in self.train if number(line, "loss") is None]
        if lost:
            told.append(f"The loss was not finite at step {lost[0]:,}.")
        last, first = self.measured[-1:], self.untrained
        if last and first is not None:
            now, then = number(last[0], "matching_accuracy"), number(first, "matching_accuracy")
            if now is not None and then is not None and now <= then:
                told.append(
                    f"The matching accuracy, {now:.4f} at step {last[0]['step']:,}, is not above that of the "
                    f"untrained network, {then:.4f}."
                )
        return told


def read_run(folder: str | os.PathLike[str]) -> RunFacts:
    """Read what ``pgl pretrain`` has written to ``folder`` so far.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no run.
        ValueError: config.yaml or a line of metrics.jsonl is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"no run at {folder}: give the folder that `pgl pretrain --output` made")
    if not (folder / CONFIG).is_file():
        raise FileNotFoundError(f"no {folder / CONFIG}: {folder} is no run of `pgl pretrain`")
    refuse_fine_tuning(folder)
    settings = read_settings(folder / CONFIG, PretrainConfig)
    metrics = read_metrics(folder / METRICS)
    log = folder / LOG
    lines = log.read_text("utf-8", errors="replace").splitlines() if log.is_file() else []
    # Each process that saw such a batch describes it.
    bad = {
        int(found[1]) for path in folder.glob("bad-batch-*.json") if (found := _BAD_BATCH.match(path.name))
    }
    return RunFacts(
        folder,
        settings,
        _read_environment(folder / ENVIRONMENT),
        metrics["train"],
        metrics["validation"],
        lines,
        sorted(bad),
    )


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """The lines of a run's metrics.jsonl by their kind, each kind in the order of steps.

    A step that occurs twice counts once, with its latest numbers. A last line that is cut short, because the
    run is being written or was killed, is left out.

    Returns:
        ``{"train": [...], "validation": [...]}``, either list possibly empty.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line that is not the last one is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no {path}: was the run started with `pgl pretrain --output {path.parent}`?")
    by_step: dict[str, dict[int, dict[str, Any]]] = {"train": {}, "validation": {}}
    lines = path.read_text("utf-8", errors="replace").splitlines()
    for number_, text in enumerate(lines, start=1):
        try:
            entry = json.loads(text)
            by_step.setdefault(entry["kind"], {})[int(entry["step"])] = entry
        except (ValueError, KeyError, TypeError) as error:
            if number_ < len(lines):
                raise ValueError(
                    f"{path}, line {number_}: expected one JSON object, got {text[:60]!r}"
                ) from error
    return {kind: [entries[step] for step in sorted(entries)] for kind, entries in by_step.items()}


def number(line: dict[str, Any], key: str) -> float | None:
    """The finite number that a line has under ``key``, or None."""
    value = line.get(key)
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _read_environment(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
