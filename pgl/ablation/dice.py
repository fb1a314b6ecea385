"""Dice of the runs of an ablation: what they pretrained is fine-tuned on the same labels and tested on the
same cases.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pgl.cache.manifest import sha256_of
from pgl.cache.volumes import VolumeCache
from pgl.comparison.encoders import keep_exported, other_weights, refuse_tunings
from pgl.comparison.runs import NOT_COMPARED, run_finetuning
from pgl.comparison.unseen import write_unseen
from pgl.config import PretrainConfig
from pgl.downstream.beforehand import check_beforehand
from pgl.downstream.config import RANDOM, FinetuneConfig, check
from pgl.downstream.fresh_stages import check_with_pretraining
from pgl.downstream.resume import LAST
from pgl.processes.child_runs import is_pretrained
from pgl.runs.folder import CONFIG, ENVIRONMENT, cases_of
from pgl.settings import refuse_other_settings, settings_of

UNSEEN = "pretraining-cache"


@dataclass
class AblationTuning:
    """What the fine-tunings of an ablation share.

    Args:
        shared: their settings; weights, output and seed are set for each.
        folder: of the ablation.
    """

    shared: FinetuneConfig
    folder: Path

    def without_test_cases(self, config: PretrainConfig, say: Callable[[str], None]) -> PretrainConfig:
        """The settings of the pretrainings, from a cache of their cases without those that are tested on."""
        cache = self.folder / UNSEEN
        kept, left_out = write_unseen(self.shared.data, Path(config.data), cache, self.shared.split)
        say(f"pretraining on {len(kept)} cases, without {len(left_out)} volumes of test cases")
        return replace(config, data=cache)

    def refuse_seen(self, run: PretrainConfig) -> None:
        """Refuse a run that is there and was pretrained on a case that is tested on.

        Raises:
            ValueError: names such cases.
        """
        folder = Path(run.output)
        if not (folder / CONFIG).is_file() or not (folder / ENVIRONMENT).is_file():
            return
        unseen = {case.case_id for case in VolumeCache(self.folder / UNSEEN).cases}
        seen = sorted({name for names in cases_of(folder).values() for name in names} - unseen)
        if seen:
            raise ValueError(
                f"{folder} was pretrained on cases that are tested on ({', '.join(seen[:5])}): it was begun "
                "without --finetune, or the cache or the split has changed since; give another --output"
            )

    def refuse_other_weights(self, runs: Sequence[PretrainConfig]) -> None:
        """Refuse fine-tunings that were made from another pretraining than is there now, or will be.

        The encoder file of a finished pretraining is exported anew if it is of another one.

        Raises:
            ValueError: names them.
        """
        reasons: list[tuple[Path, str]] = []
        for run in runs:
            tuning = self.of(run)
            pretraining, folder, file = Path(run.output), Path(tuning.output), Path(tuning.weights)
            there = is_pretrained(pretraining, run.train.steps)
            wanted = keep_exported(pretraining, file) if there else None
            results = folder / "results.json"
            if results.is_file():
                if not there or _weights_of(results) not in (None, wanted):
                    reasons.append((folder, other_weights(results, pretraining, file, there)))
            elif (folder / LAST).is_file() and not there:
                reasons.append((folder, other_weights(folder, pretraining, file, there)))
        refuse_tunings(reasons, "ablate again")

    def of(self, run: PretrainConfig) -> FinetuneConfig:
        """The fine-tuning of a run's encoder as it is after the last step."""
        name = Path(run.output).name
        return replace(
            self.shared,
            weights=str(self.folder / "encoders" / f"{name}.pt"),
            output=self.folder / "finetuned" / name,
            seed=run.seed,
            resume=False,
        )

    def run(self, run: PretrainConfig) -> int:
        """Fine-tune the encoder of a finished run, unless that is done; the exit code."""
        tuning = self.of(run)
        keep_exported(Path(run.output), Path(tuning.weights))
        return 0 if self.dice(run) is not None else run_finetuning(tuning)

    def check(self, runs: Sequence[PretrainConfig]) -> None:
        """Refuse a fine-tuning that cannot be as it is set or on its data, or is there with other settings.

        Raises:
            ValueError: names them.
        """
        for run in runs:
            tuning = self.of(run)
            check_with_pretraining(tuning.fresh_stages, [run])
            refuse_other_settings(Path(tuning.output), tuning, NOT_COMPARED, "an ablation")
        # All at once: the labels are read but once.
        check_beforehand(
            ("", replace(self.of(run), encoder=self.shared.encoder or run.encoder)) for run in runs
        )

    def dice(self, run: PretrainConfig) -> float | None:
        """Mean Dice over classes and test cases; None if this encoder was not tuned to the end yet."""
        tuning = self.of(run)
        folder = Path(tuning.output)
        try:
            results = json.loads((folder / "results.json").read_text("utf-8"))
            weights = sha256_of(Path(tuning.weights))
        except (OSError, ValueError):
            return None
        if results.get("steps") != tuning.train.steps or results.get("weights_sha256") != weights:
            return None
        value = results["mean"]["dice"]
        return None if value is None else float(value)


def _weights_of(results: Path) -> str | None:
    """SHA-256 of the file that a fine-tuning started from, None if that cannot be read."""
    try:
        content = json.loads(results.read_text("utf-8"))
    except (OSError, ValueError):
        return None
    return content.get("weights_sha256") if isinstance(content, dict) else None


def read_tuning(file: str, output: Path) -> AblationTuning:
    """The fine-tuning that a file of settings of ``pgl finetune`` describes; ``data`` must be among them.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is no such file, or a setting in it cannot be.
    """
    import yaml

    path = Path(file)
    if not path.is_file():
        raise FileNotFoundError(f"--finetune {file} is no file: give a YAML file of settings of pgl finetune")
    plain: Any = yaml.safe_load(path.read_text("utf-8"))
    if not isinstance(plain, dict) or "data" not in plain:
        raise ValueError(f"--finetune {file} must name a labelled cache as data, besides what is tuned how")
    set_here = {"weights": RANDOM, "output": str(output)}
    shared = settings_of(FinetuneConfig, {**plain, **set_here}, f"--finetune {file}")
    check(shared)
    return AblationTuning(shared, Path(output))
