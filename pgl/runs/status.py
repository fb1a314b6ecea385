"""``pgl status``: how a run is doing, read from its folder alone: from another shell or machine."""

from __future__ import annotations

import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from pgl.runs.facts import RunFacts, number, read_run
from pgl.runs.folder import LAST, METRICS, checkpoint_path
from pgl.runs.words import duration

# Speed is taken over this many last lines: enough to even out, few enough to follow a change.
_RECENT_LINES = 50
# A run is silent after this many times the usual wait for a line, and never before a minute: validation,
# checkpoints and a cold start write no training lines either.
_PATIENCE, _LEAST_PATIENCE_S = 10.0, 60.0
_STOPPED = "stopped after step"
# Said once last.pt of the last step is written. That there is one says little, for the first is written at
# step 0; and a copy of the folder may have changed its age.
_DONE = re.compile(r"\bdone: (\d+) steps\b")

State = Literal["running", "finished", "stopped", "failed", "silent"]


@dataclass
class Status:
    """A run at one moment.

    Args:
        run: its folder.
        state: ``running``; ``finished``: all steps done and the last checkpoint written; ``stopped``: on
            request, ``--resume`` goes on; ``failed``: its loss became infinite or no number; or ``silent``:
            it should have written a line by now, so it is dead, hangs, or is very slow.
        step, steps: done, and of the whole run.
        loss: of the last training line.
        matching_accuracy, untrained, best, best_step: of the last measurement, at step 0, and at best.
        feature_spread: of the last measurement.
        steps_per_s: over the last lines, everything included.
        seconds_left: at that speed; 0 when finished, None if unknown.
        last_line_s: age of metrics.jsonl.
        patience_s: the age from which the run counts as silent.
        checkpoint_s: age of checkpoints/last.pt, None before the first.
        warnings: see :meth:`pgl.runs.facts.RunFacts.warnings`.
    """

    run: str
    state: State
    step: int
    steps: int
    loss: float | None
    matching_accuracy: float | None
    untrained: float | None
    best: float | None
    best_step: int | None
    feature_spread: float | None
    steps_per_s: float | None
    seconds_left: float | None
    last_line_s: float
    patience_s: float
    checkpoint_s: float | None
    warnings: list[str]

    @property
    def well(self) -> bool:
        """Whether it runs or has finished."""
        return self.state in ("running", "finished")

    def plain(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)


def status_of(run: str | os.PathLike[str], now: float | None = None) -> Status:
    """Look at a run.

    Args:
        run: its folder.
        now: seconds since the epoch; the present unless given.

    Raises:
        FileNotFoundError: the folder is no run, or has no metrics.jsonl yet.
        ValueError: a file of the run is damaged.
    """
    folder, now = Path(run), time.time() if now is None else now
    facts = read_run(folder)
    speed = recent_speed(facts)
    last, first, best = (facts.measured[-1:] or [{}])[0], facts.untrained or {}, facts.best
    age = _age(folder / METRICS, now) or 0.0
    patience = _patience(facts, speed)
    checkpoint = _age(checkpoint_path(folder, LAST), now)
    left = max(0, facts.steps - facts.step)
    state: State
    if not left and checkpoint is not None and _is_done(facts):
        state = "finished"
    elif facts.bad_steps and facts.bad_steps[-1] > facts.step:
        state = "failed"
    elif _was_stopped(facts):
        state = "stopped"
    else:
        state = "running" if age <= patience else "silent"
    return Status(
        run=str(folder),
        state=state,
        step=facts.step,
        steps=facts.steps,
        loss=number(facts.train[-1], "loss") if facts.train else None,
        matching_accuracy=number(last or first, "matching_accuracy"),
        untrained=number(first, "matching_accuracy"),
        best=number(best, "matching_accuracy") if best else None,
        best_step=best["step"] if best else None,
        feature_spread=number(last or first, "feature_spread"),
        steps_per_s=speed,
        seconds_left=left / speed if speed else (None if left else 0.0),
        last_line_s=age,
        patience_s=patience,
        checkpoint_s=checkpoint,
        warnings=facts.warnings(),
    )


def recent_speed(facts: RunFacts) -> float | None:
    """Steps a second over the last lines of the last start: wall time, so with validation and checkpoints."""
    lines = [line for line in facts.train[-_RECENT_LINES:] if number(line, "seconds") is not None]
    for i in range(len(lines) - 1, 0, -1):
        # The clock starts again with each start of the run.
        if lines[i]["seconds"] < lines[i - 1]["seconds"]:
            lines = lines[i:]
            break
    if len(lines) > 1 and lines[-1]["seconds"] > lines[0]["seconds"]:
        return float((lines[-1]["step"] - lines[0]["step"]) / (lines[-1]["seconds"] - lines[0]["seconds"]))
    return number(lines[-1], "steps_per_s") if lines else None


def describe(status: Status) -> str:
    """The status for people, a line a fact."""
    rows = [
        ("run", f"{status.run}: {_state_in_words(status)}"),
        ("step", f"{status.step:,} of {status.steps:,} ({status.step / status.steps:.0%})"),
    ]
    if status.loss is not None:
        rows.append(("loss", f"{status.loss:.4f}"))
    if status.matching_accuracy is not None:
        matching = f"{status.matching_accuracy:.4f}"
        if status.untrained is not None:
            matching += f" (untrained {status.untrained:.4f}"
            matching += (
                f", best {status.best:.4f} at step {status.best_step:,})" if status.best is not None else ")"
            )
        rows.append(("matching accuracy", matching))
    if status.feature_spread is not None:
        rows.append(("feature spread", f"{status.feature_spread:.3f}"))
    if status.steps_per_s is not None:
        rows.append(("speed", f"{status.steps_per_s:.3g} steps/s"))
    if status.seconds_left and status.state == "running":
        rows.append(("time left", f"about {duration(status.seconds_left)}"))
    kept = "none yet" if status.checkpoint_s is None else f"{duration(status.checkpoint_s)} ago"
    rows.append(("last checkpoint", kept))
    rows += [("warning", text) for text in status.warnings]
    width = max(len(name) for name, _ in rows)
    return "\n".join(f"{name:{width}}  {text}" for name, text in rows)


def _state_in_words(status: Status) -> str:
    age = duration(status.last_line_s)
    if status.state == "silent":
        expected = duration(status.patience_s)
        return f"SILENT: the last line of metrics is {age} old, a new one was expected within {expected}"
    if status.state == "stopped":
        return "stopped before its end; `pgl pretrain --resume` goes on"
    if status.state == "failed":
        return "FAILED: the loss is no longer finite, see the warning"
    return "finished" if status.state == "finished" else f"running, last line {age} ago"


def _patience(facts: RunFacts, speed: float | None) -> float:
    between = facts.settings["train.log_every"]
    usual = between / speed if speed else 0.0
    return max(_LEAST_PATIENCE_S, _PATIENCE * usual)


def _is_done(facts: RunFacts) -> bool:
    return any((told := _DONE.search(line)) and int(told[1]) == facts.steps for line in facts.log)


def _was_stopped(facts: RunFacts) -> bool:
    return bool(facts.log) and _STOPPED in facts.log[-1]


def _age(path: Path, now: float) -> float | None:
    try:
        return max(0.0, now - path.stat().st_mtime)
    except OSError:
        return None
