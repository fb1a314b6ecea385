"""``pgl ablate``: four alike runs a seed, nothing done twice, and a table of what was measured."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pgl.ablation import dice as dice_module
from pgl.ablation import runs as module
from pgl.ablation.dice import AblationTuning, read_tuning
from pgl.ablation.rows import BEYOND
from pgl.ablation.runs import AblationStopped, ablate, is_done, planned
from pgl.ablation.table import encoder_accuracy, markdown, means_of, row_of
from pgl.cache.volumes import VolumeCache
from pgl.cli import main
from pgl.config import PretrainConfig, from_plain
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.train import finetune
from pgl.methods.pgl import PGL
from pgl.networks import seeded_module
from pgl.pretrain import pretrain
from pgl.runs.facts import read_run
from pgl.runs.folder import LAST, cases_of, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import load_checkpoint
from pgl.training.validation import Validation
from tests.patience import PATIENCE_S, wait_until

from .labelled_data import labelled_cache, small_finetune
from .training_data import make_cache, small_config


def silently(line: str) -> None:
    pass


@pytest.fixture
def config(tmp_path: Path) -> PretrainConfig:
    return small_config(make_cache(tmp_path / "cache"), tmp_path / "ablation", steps=4)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the runs that were started, in this process to save time."""
    names: list[str] = []

    def here(run: PretrainConfig) -> int:
        names.append(Path(run.output).name)
        pretrain(run)
        return 0

    monkeypatch.setattr(module, "_pretrain", here)
    return names


def test_the_four_combinations_of_a_seed_differ_in_nothing_else(config):
    plain = [to_plain(run) for run in planned(config, [3, 5]).values()]
    priors = [(True, True), (True, False), (False, True), (False, False)]
    assert [(p["seed"], p["method"]["crop_prior"], p["method"]["flip_prior"]) for p in plain] == [
        (seed, *both) for seed in (3, 5) for both in priors
    ]
    assert len({p["output"] for p in plain}) == 8
    for p in plain:
        for key in ("seed", "output"):
            p.pop(key)
        for key in ("crop_prior", "flip_prior"):
            p["method"].pop(key)
    assert all(p == plain[0] for p in plain)


def test_an_ablation_writes_what_its_runs_measured_and_does_nothing_twice(config, started, tmp_path):
    rows = ablate(config, [0, 1], say=silently)
    folder = tmp_path / "ablation"
    assert started == [f"seed{seed}-{name}" for seed in (0, 1) for name in ("both", "crop", "flip", "none")]
    for row in rows:
        facts = read_run(folder / row["run"])
        assert row["matching_accuracy"] == facts.measured[-1]["matching_accuracy"]
        assert row["matching_accuracy_untrained"] == facts.validation[0]["matching_accuracy"]
        assert row["downstream_dice"] is None
    for seed in (0, 1):
        own = [row for row in rows if row["seed"] == seed]
        # One initial network and one set of pairs, measured with the true geometry: one number.
        assert len({row["matching_accuracy_untrained"] for row in own}) == 1
        # And yet they learned from different targets.
        weights = [
            load_checkpoint(checkpoint_path(folder / row["run"], LAST))["online"]["encoder"] for row in own
        ]
        name = next(iter(weights[0]))
        assert len({tuple(w[name].flatten().tolist()) for w in weights}) == 4

    with (folder / "ablation.csv").open(encoding="utf-8", newline="") as file:
        table = list(csv.DictReader(file))
    assert [line["run"] for line in table] == started
    assert [float(line["matching_accuracy"]) for line in table] == [row["matching_accuracy"] for row in rows]
    assert table[0]["downstream_dice"] == ""
    written = json.loads((folder / "ablation.json").read_text("utf-8"))
    both = [row["matching_accuracy"] for row in rows if row["crop_prior"] and row["flip_prior"]]
    assert written["combinations"][0]["matching_accuracy"] == pytest.approx(sum(both) / 2)
    assert "seed1-none" in (folder / "report.html").read_text("utf-8")

    started.clear()
    before = (folder / "ablation.csv").read_text("utf-8")
    ablate(config, [0, 1], say=silently)
    assert started == []
    assert (folder / "ablation.csv").read_text("utf-8") == before


def test_validation_knows_the_true_geometry_whatever_the_aligner_knows(config):
    cache = VolumeCache(config.data)
    measured = []
    for run in planned(config, [0]).values():
        network = seeded_module(0, lambda run=run: PGL(run.encoder, run.method))
        measured.append(Validation(cache, [0, 1], run).measure(network))
    losses = [numbers.pop("loss") for numbers in measured]
    assert all(numbers == measured[0] for numbers in measured)
    # The loss is that of training, so it sees what the aligner sees.
    assert len(set(losses)) == 4


def test_a_run_with_other_settings_is_refused_by_name(config, started):
    ablate(config, [0], say=silently)
    other = replace(config, optimizer=replace(config.optimizer, learning_rate=0.5))
    with pytest.raises(ValueError, match=r"seed0-both.*optimizer\.learning_rate \(.*was 0\.002, now 0\.5\)"):
        ablate(other, [0], say=silently)


def test_the_means_and_deviations_are_those_of_the_seeds():
    keys = (
        "matching_accuracy_untrained", "matching_accuracy", "matching_accuracy_best", "encoder_untrained",
        "encoder", "feature_spread",
    )  # fmt: skip
    fixed = {"change": "x", "downstream_dice": None}
    rows = [
        {"row": row, "crop_prior": crop, "flip_prior": flip, **fixed, **dict.fromkeys(keys, value)}
        for row, crop, flip in (("both", True, True), ("crop", True, False))
        for value in (0.1, 0.4)
    ]
    both = means_of(rows)[0]
    assert both["matching_accuracy"] == pytest.approx(0.25)
    assert both["matching_accuracy_deviation"] == pytest.approx(0.3 / 2**0.5)
    text = markdown(means_of(rows))
    assert "| x | on | off | 0.2500 ± 0.2121 |" in text and "over 2 seeds" in text
    assert text.split("Matching")[0].count("±") == 2 * len(keys)
    single = markdown(means_of(rows[::2]))
    assert "one seed" in single and "±" not in single


def test_dice_is_that_of_the_encoder_fine_tuned_on_cases_that_no_run_has_seen(
    config, started, tmp_path, monkeypatch
):
    data = labelled_cache(tmp_path / "labelled")
    file = tmp_path / "finetune.yaml"
    plain = to_plain(replace(small_finetune(data, tmp_path, steps=2), encoder=None))
    for name in ("output", "weights", "resume", "seed"):
        del plain[name]
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")

    def here(run: FinetuneConfig) -> int:
        started.append(f"tuned {Path(run.output).name}")
        finetune(run)
        return 0

    monkeypatch.setattr(dice_module, "run_finetuning", here)
    config.data, config.train.steps = data, 2
    tuning = read_tuning(str(file), config.output)
    rows = ablate(config, [0], ["both", "unet"], silently, tuning)
    assert started == ["seed0-both", "tuned seed0-both", "seed0-unet", "tuned seed0-unet"]
    for row in rows:
        folder = tmp_path / "ablation" / "finetuned" / row["run"]
        results = json.loads((folder / "results.json").read_text("utf-8"))
        by_class = {c: [s["dice"] for s in results["cases"] if s["class"] == c] for c in results["classes"]}
        assert row["downstream_dice"] == pytest.approx(
            sum(sum(own) / len(own) for own in by_class.values()) / len(by_class)
        )
        pretrained_on = {
            name for names in cases_of(tmp_path / "ablation" / row["run"]).values() for name in names
        }
        assert len(results["test"]) == 2 and len(pretrained_on) == 6
        assert not pretrained_on & {f"{subject}-id" for subject in results["test"]}
    assert "Dice: mean over classes" in (tmp_path / "ablation" / "ablation.md").read_text("utf-8")
    started.clear()
    ablate(config, [0], ["both", "unet"], silently, tuning)
    assert started == []
    other = replace(tuning.shared, fraction=0.5)
    with pytest.raises(ValueError, match=r"finetuned/seed0-both.*other settings: fraction"):
        ablate(config, [0], ["both", "unet"], silently, replace(tuning, shared=other))
    # Another encoder has not been fine-tuned yet.
    (tmp_path / "ablation" / "encoders" / "seed0-both.pt").write_bytes(b"another")
    assert tuning.dice(planned(config, [0])[0, "both"]) is None


def test_runs_that_have_seen_the_test_cases_are_not_tuned_for_their_dice(config, started, tmp_path):
    data = labelled_cache(tmp_path / "labelled")
    config.data, config.train.steps = data, 2
    ablate(config, [0], ["both"], silently)
    assert started == ["seed0-both"]
    file = tmp_path / "finetune.yaml"
    plain = to_plain(replace(small_finetune(data, tmp_path, steps=2), encoder=None))
    for name in ("output", "weights", "resume", "seed"):
        del plain[name]
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    with pytest.raises(ValueError, match=r"seed0-both was pretrained on cases that are tested on"):
        ablate(config, [0], ["both"], silently, read_tuning(str(file), config.output))


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        (None, 1, "is no file"),
        ("fraction: 0.5", 2, "must name a labelled cache"),
        ("data: x\nfractoin: 1", 2, "fractoin"),
    ],
)
def test_a_file_for_fine_tuning_that_cannot_be_meant_is_refused(content, code, message, tmp_path, capsys):
    file = tmp_path / "finetune.yaml"
    if content is not None:
        file.write_text(content, encoding="utf-8")
    words = ["ablate", "--data", "x", "--output", str(tmp_path / "y"), "--finetune", str(file)]
    assert main(words) == code
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not (tmp_path / "y").exists()


def test_no_downstream_dice_is_made_up(config, started):
    run = planned(config, [0])[0, "both"]
    row = row_of("both", run, read_run(pretrain(run)), config)
    assert row["downstream_dice"] is None


def test_the_options_beyond_the_paper_are_rows_beside_pgl(config, started, tmp_path):
    rows = {row["row"]: row for row in ablate(config, [4], ["both", *BEYOND], say=silently)}
    assert started == [f"seed4-{name}" for name in ("both", "regions", "levels", "unet", "decorrelated")]
    settings = {name: read_run(tmp_path / "ablation" / f"seed4-{name}").settings for name in rows}
    for name, changes in {
        "both": {},
        "regions": {"method.regions": 4},
        "levels": {"method.more_levels": [1]},
        "unet": {"method.features": "decoder", "method.feature_level": 1},
        "decorrelated": {"method.decorrelation": 0.04},
    }.items():
        differing = {key for key in settings[name] if settings[name][key] != settings["both"][key]}
        assert differing - {"output"} == set(changes)
        assert all(settings[name][key] == value for key, value in changes.items())
        assert rows[name]["crop_prior"] and rows[name]["flip_prior"]
        # The encoder starts alike in all of them.
        assert rows[name]["encoder_untrained"] == rows["both"]["matching_accuracy_untrained"]
    for name in ("both", "regions", "levels", "decorrelated"):
        assert rows[name]["encoder"] == rows[name]["matching_accuracy"]
    # What the trainer measured of the same features is what the table measures of an encoder.
    levels = planned(config, [4], ["levels"])[4, "levels"]
    assert encoder_accuracy(levels, config, LAST) == rows["levels"]["matching_accuracy"]
    assert rows["unet"]["feature_spread"] != rows["both"]["feature_spread"]
    text = (tmp_path / "ablation" / "ablation.md").read_text("utf-8")
    for words in ("| PGL |", "| 4 random regions |", "| stage 1 too |", "| the decoder's stage 1 |",
                  "| decorrelated, weight 0.04 |"):  # fmt: skip
        assert words in text


def test_the_rows_are_those_of_the_configurations(config):
    """Each row changes what its file in configs/beyond-the-paper changes of configs/sarcoma.yaml."""
    folder = Path(__file__).resolve().parents[2] / "configs"
    read = {
        path.stem: yaml.safe_load(path.read_text("utf-8"))
        for path in (folder / "sarcoma.yaml", *(folder / "beyond-the-paper").glob("*.yaml"))
    }
    places = {"data": "x", "output": "y"}
    shared = from_plain({**read.pop("sarcoma"), **places})
    assert set(read) == set(BEYOND)
    for name, plain in read.items():
        assert planned(shared, [0], [name])[0, name].method == from_plain({**plain, **places}).method


def test_wrong_rows_are_refused(config):
    for rows, message in (
        (["both", "both"], "rows must be different"),
        ([], "at least one"),
        (["rows"], "rows must be among both, crop"),
    ):
        with pytest.raises(ValueError, match=message):
            planned(config, [0], rows)
    config.method.feature_level = 0
    with pytest.raises(ValueError, match="above 0 there is none"):
        planned(config, [0], ["levels"])


def test_a_method_without_priors_is_refused(config):
    config.method.name = "genesis"
    with pytest.raises(ValueError, match=r"method.name must be pgl, .* got 'genesis'"):
        planned(config, [0])


def test_a_fraction_that_leaves_no_case_is_refused_before_pretraining(config, started, tmp_path):
    data = labelled_cache(tmp_path / "labelled")
    config.data = data
    shared = replace(small_finetune(data, tmp_path), encoder=None, fraction=0.05)
    with pytest.raises(ValueError, match=r"fraction 0.05 of 6 training patients leaves no case"):
        ablate(config, [0], ["both"], silently, AblationTuning(shared, Path(config.output)))
    assert started == []


@pytest.mark.parametrize("seeds", [[], [-1], [1, 1]])
def test_wrong_seeds_are_refused(config, seeds):
    with pytest.raises(ValueError, match="seeds must be different whole numbers"):
        planned(config, seeds)


def test_a_run_is_resumed_only_from_a_checkpoint_and_starts_anew_without_one(config, monkeypatch):
    started: list[list[str]] = []

    class Finished:
        def __init__(self, words: list[str], **where: object) -> None:
            started.append(words)

        def wait(self) -> int:
            return 0

    monkeypatch.setattr(subprocess, "Popen", Finished)
    run = planned(config, [0])[0, "both"]
    folder = Path(run.output)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("seed: 0\n", encoding="utf-8")
    assert module._pretrain(run) == 0
    assert not folder.exists() and "--resume" not in started[0]
    checkpoint_path(folder, LAST).parent.mkdir(parents=True)
    checkpoint_path(folder, LAST).write_bytes(b"")
    assert module._pretrain(run) == 0
    assert started[1][-1] == "--resume" and checkpoint_path(folder, LAST).exists()
    # The settings that it is started with are those of the plan.
    written = yaml.safe_load((folder.parent / "seed0-both.yaml").read_text("utf-8"))
    assert from_plain(written) == run


# --- as processes ---


def as_a_process(config: PretrainConfig, tmp_path: Path) -> subprocess.Popen[str]:
    plain = to_plain(config)
    for name in ("data", "output", "resume", "seed"):
        del plain[name]
    (tmp_path / "settings.yaml").write_text(yaml.safe_dump(plain), encoding="utf-8")
    words = ["--data", str(config.data), "--output", str(config.output)]
    words += ["--config", str(tmp_path / "settings.yaml"), "--seeds", "7"]
    return subprocess.Popen(
        [sys.executable, "-m", "pgl", "ablate", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).resolve().parents[2],
    )


def test_an_ablation_that_is_stopped_goes_on_where_it_was(config, tmp_path):
    config.train.steps = 150
    config.validation.every = 1000
    process = as_a_process(config, tmp_path)
    metrics = tmp_path / "ablation" / "seed7-both" / "metrics.jsonl"
    wait_until(lambda: metrics.is_file() and '"train"' in metrics.read_text("utf-8"), process)
    process.send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=PATIENCE_S)
    assert process.returncode == 130, err
    assert "seed7-both ended with exit code 130; the same command goes on from there" in err
    saved = load_checkpoint(checkpoint_path(metrics.parent, LAST))["step"]
    assert 0 < saved < 150
    assert not is_done(metrics.parent, 150)
    assert not (tmp_path / "ablation" / "ablation.csv").exists()

    # It resumes with exactly the settings of the table of runs, and the others follow.
    run = planned(config, [7])[7, "both"]
    assert module._pretrain(run) == 0
    assert is_done(metrics.parent, 150)
    assert "resuming" in (metrics.parent / "log.txt").read_text("utf-8")


def test_a_run_that_fails_ends_the_ablation_with_its_code(config, monkeypatch):
    monkeypatch.setattr(module, "_pretrain", lambda run: 1)
    with pytest.raises(AblationStopped, match="seed0-both ended with exit code 1") as stopped:
        ablate(config, [0], say=silently)
    assert stopped.value.exit_code == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--data", "x"], "missing --output"),
        (["--data", "x", "--output", "y", "--seeds", "0,a"], "--seeds must be such as 0,1,2, got 0,a"),
        (["--data", "x", "--output", "y", "--seeds", "1,1"], "seeds must be different"),
        (["--data", "x", "--output", "y", "--rows", "both,bot"], "rows must be among"),
        (["--data", "x", "--output", "y", "--train.steps", "0"], "train.steps must be at least 1"),
    ],
)
def test_wrong_usage_is_one_line(words, message, capsys):
    assert main(["ablate", *words]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1
