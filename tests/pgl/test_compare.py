"""``pgl compare``: alike runs from every start, and honest tables."""

from __future__ import annotations

import csv
import json
import re
from dataclasses import MISSING, fields, replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from matplotlib.axes import Axes

from pgl.cli import main
from pgl.comparison import plot
from pgl.comparison import runs as module
from pgl.comparison.classes import COLUMNS
from pgl.comparison.config import CompareSettings, Comparison
from pgl.comparison.page import REPORT, write_results
from pgl.comparison.runs import NOT_COMPARED, ComparisonStopped, compare
from pgl.comparison.tables import MEAN, notes, table_rows
from pgl.config import GENESIS_INTENSITY, IntensitySettings
from pgl.downstream.config import PatchSettings
from pgl.downstream.setup import check_patch
from pgl.export import read_export
from pgl.networks import describe
from pgl.runs.folder import INITIAL, checkpoint_path
from pgl.settings import refuse_other_settings, to_plain
from pgl.training.checkpoint import load_checkpoint

from .comparisons import comparison, run_here, silently
from .labelled_data import labelled_cache, small_finetune
from .training_data import small_config

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "configs" / "compare").glob("*.yaml"))
TASKS = {"light": {"bright": ["bright"]}, "both": {"blocks": ["bright", "dark"]}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("compare") / "cache")


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return run_here(monkeypatch)


# --- which runs there are ---


def test_runs_of_a_seed_and_fraction_differ_in_nothing_but_the_first_weights(data, tmp_path):
    runs = comparison(data, tmp_path / "c", tasks=TASKS)
    assert len(runs.tunings) == 2 * 2 * 4 * 2 and len(runs.pretrainings) == 3 * 2
    groups: dict[tuple, list[dict]] = {}
    for tuning in runs.tunings:
        plain = to_plain(tuning.config)
        weights, intensity = plain.pop("weights"), plain.pop("intensity")
        plain.pop("output")
        if tuning.initialisation == "random":
            assert (weights, intensity["std_hu"]) == ("random", 324.70)
        else:
            # The file brings its own.
            assert weights.endswith(f"{tuning.initialisation}-seed{tuning.seed}.pt") and intensity is None
        groups.setdefault((tuning.task, tuning.fraction, tuning.seed), []).append(plain)
    assert len(groups) == 8
    assert all(plain == own[0] for own in groups.values() for plain in own)
    assert len({str(t.config.output) for t in runs.tunings}) == len(runs.tunings)


def test_pretrainings_of_a_seed_differ_in_the_method_alone(data, tmp_path):
    runs = comparison(data, tmp_path / "c")
    for seed in (0, 1):
        plain = [to_plain(runs.pretrainings[name, seed]) for name in ("pgl", "byol", "genesis")]
        intensities = [p.pop("intensity") for p in plain]
        assert [p["method"].pop("name") for p in plain] == ["pgl", "byol", "genesis"]
        assert [p.pop("output").rsplit("/", 1)[1] for p in plain] == [
            f"{name}-seed{seed}" for name in ("pgl", "byol", "genesis")
        ]
        assert plain[0] == plain[1] == plain[2] and plain[0]["seed"] == seed
        assert intensities[0] == intensities[1] and intensities[2]["std_hu"] == GENESIS_INTENSITY.std_hu


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"initialisations": ("random", "simclr")},
            "initialisations must be of random, .* got random, simclr",
        ),
        ({"seeds": (1, 1)}, "seeds must be different"),
        ({"fractions": ()}, "fractions must be different from each other, at least one"),
        ({"fractions": (0.0,)}, "fraction must lie in"),
        ({"tasks": {"a/b": {"x": [1]}}}, "a name must be of letters"),
        ({"tasks": {"a": {}}}, "tasks: a has no classes"),
    ],
)
def test_what_cannot_be_compared_is_refused(data, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(data, tmp_path / "c", **changes)


def test_networks_that_would_not_be_alike_are_refused(data, tmp_path):
    settings = CompareSettings(data, tmp_path / "c")
    pre, tune = small_config(data, tmp_path), small_finetune(data, tmp_path)
    assert Comparison(settings, pre, tune)
    other = replace(tune.encoder, conv_bias=False)
    with pytest.raises(ValueError, match=r"finetune\.encoder differs from pretrain\.encoder"):
        Comparison(settings, pre, replace(tune, encoder=other))
    with pytest.raises(ValueError, match=r"finetune\.intensity must be left out"):
        Comparison(settings, pre, replace(tune, intensity=IntensitySettings()))


@pytest.mark.parametrize(
    ("views", "patches", "axes", "instead"),
    [
        (0.5, (0.5, 0.5, 0.0), "axis W,", "0.5,0.5,0,"),
        ((0.2, 0.5, 0.5), (0.0, 0.5, 0.0), "axis D and axis W,", "0,0.5,0,"),
        ([0, 1, 1], [0, 0, 0], "axis H and axis W,", "0,0,0,"),
        (1, (0, 0, 0), "axis D and axis H and axis W,", "0,0,0,"),
        ((0.5, 0.5, 0.0), (0.5, 0.5, 0.0), None, None),
        (0.5, (0.1, 0.1, 0.1), None, None),
        (0.0, (0.0, 0.0, 0.0), None, None),
    ],
)
def test_mirrors_that_fine_tuning_leaves_out_are_doubted(data, tmp_path, views, patches, axes, instead):
    shared, tuning = small_config(data, tmp_path), small_finetune(data, tmp_path)
    runs = Comparison(
        CompareSettings(data=data, output=tmp_path / "c"),
        replace(shared, views=replace(shared.views, flip_probability=views)),
        replace(tuning, encoder=None, patches=replace(tuning.patches, flip_probability=patches)),
    )
    if axes is None:
        assert runs.doubts == []
    else:
        assert len(runs.doubts) == 1
        assert axes in runs.doubts[0] and f"flip_probability {instead}" in runs.doubts[0]


def test_what_is_doubted_is_said_and_done_all_the_same(data, tmp_path, started):
    runs = comparison(data, tmp_path / "c", initialisations=("random", "pgl"), fractions=(0.4,), seeds=(0,))
    tuning = replace(
        runs._finetune, patches=replace(runs._finetune.patches, flip_probability=(0.5, 0.5, 0.0))
    )
    said: list[str] = []
    compare(Comparison(runs.settings, runs._pretrain, tuning), said.append)
    assert sum("mirrors axis W," in line for line in said) == 1 and len(started) == 3
    # Where nothing is pretrained, or nothing by PGL, there is nothing to doubt.
    for starts in (("random",), ("random", "genesis", "byol")):
        other = replace(runs.settings, initialisations=starts)
        assert Comparison(other, runs._pretrain, tuning).doubts == []


# --- the whole thing ---


def test_a_comparison_tabulates_what_its_runs_scored_and_does_nothing_twice(data, tmp_path, started):
    folder = tmp_path / "c"
    runs = comparison(data, folder, fractions=(1.0,), tasks=TASKS)
    result = compare(runs, silently)
    assert len(started) == 6 + 16 and started[0] == "light-random-fraction1-seed0"
    assert result["complete"] and json.loads((folder / "compare.json").read_text("utf-8")) == result
    with (folder / "compare.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    for row in rows:
        own = json.loads((folder / "finetuned" / row["run"] / "results.json").read_text("utf-8"))
        assert float(row["dice"]) == own["mean"]["dice"] and own["fraction"] == float(row["fraction"])
        assert own["test"] == result["test_cases"] and int(row["training_cases"]) == len(own["training"])

    def dice(task: str, start: str, seed: int) -> float:
        (row,) = (r for r in rows if (r["task"], r["initialisation"], r["fraction"], r["seed"])
                  == (task, start, "1.0", str(seed)))  # fmt: skip
        return float(row["dice"])

    for task in (*TASKS, MEAN):
        (entry,) = (e for e in result["table"] if (e["task"], e["initialisation"], e["fraction"])
                    == (task, "pgl", 1.0))  # fmt: skip
        of = TASKS if task == MEAN else [task]
        ours, base = ([np.mean([dice(t, start, s) for t in of]) for s in (0, 1)] for start in ("pgl", "byol"))
        assert entry["dice"] == pytest.approx(np.mean(ours))
        assert entry["deviation"] == pytest.approx(np.std(ours, ddof=1))
        assert entry["dice_of_seeds"] == {"0": pytest.approx(ours[0]), "1": pytest.approx(ours[1])}
        assert entry["over"]["byol"]["mean"] == pytest.approx(np.mean(ours) - np.mean(base), abs=1e-6)
    assert len(result["table"]) == 3 * 4

    # Fine-tuning started from the pretrained encoders, each with its own intensities.
    for method, expected in (("genesis", 2000.0), ("pgl", 324.70)):
        file = folder / "encoders" / f"{method}-seed0.pt"
        assert read_export(file)["network"]["trained_steps"] == 2
        loaded = json.loads(
            (folder / f"finetuned/both-{method}-fraction1-seed0/weights.json").read_text("utf-8")
        )
        assert loaded["unused"] == [] and all(n.startswith("decoder") for n in loaded["missing"])
        model = torch.load(folder / f"finetuned/both-{method}-fraction1-seed0/model.pt", weights_only=True)
        assert model["intensity"]["std_hu"] == expected
    trained = json.loads((folder / "pretrained/pgl-seed0/environment.json").read_text("utf-8"))["cases"]
    seen = {name.removesuffix("-id") for names in trained.values() for name in names}
    assert seen.isdisjoint(result["test_cases"]) and len(seen) == 8 - len(result["test_cases"])
    # The three methods of a seed began with the same encoder.
    first = [load_checkpoint(checkpoint_path(folder / f"pretrained/{m}-seed1", INITIAL))["online"]["encoder"]
             for m in ("pgl", "byol", "genesis")]  # fmt: skip
    assert all(torch.equal(first[0][k], other[k]) for other in first for k in first[0])

    page = (folder / REPORT).read_text("utf-8")
    titles = Cells(page).cells
    for row in table_rows(result["table"]):
        assert row[4] in titles
    assert "Not finished" not in page and "Only 2 seeds" in page and "://" not in page
    assert (folder / "compare.png").stat().st_size > 10_000
    text = (folder / "compare.md").read_text("utf-8")
    assert text.count("| pgl |") == 3 + 1  # the last in the headings of the classes

    # Of each class: what a run's own file of scores gives.
    with (folder / "classes.csv").open(encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    assert len(classes) == sum(8 * len(names) for names in TASKS.values())
    of: dict[tuple[str, str, str], list[float]] = {}
    for row in classes:
        with (folder / "finetuned" / row["run"] / "results.csv").open(encoding="utf-8", newline="") as file:
            own = [score for score in csv.DictReader(file) if score["class"] == row["class"]]
        dice = [float(score["dice"]) for score in own if score["dice"]]
        assert float(row["dice"]) == pytest.approx(np.mean(dice)) and int(row["cases"]) == len(dice)
        gone = [s for s in own if int(s["voxels_true"]) and not int(s["voxels_predicted"])]
        assert int(row["missed"]) == len(gone)
        of.setdefault((row["task"], row["class"], row["initialisation"]), []).append(float(row["dice"]))
    for (task, name, start), dice in of.items():
        cell = f"{100 * np.mean(dice):.2f} ± {100 * np.std(dice, ddof=1):.2f}"
        (line,) = (line for line in text.splitlines() if line.startswith(f"| {task} | 1 | {name} |"))
        row = line.removeprefix("| ").removesuffix(" |").split(" | ")
        assert row[3 + runs.settings.initialisations.index(start)] == cell
        assert "\n".join(row) in "\n".join(titles)  # the same cells in a row of the page

    started.clear()
    again = compare(comparison(data, folder, fractions=(1.0,), tasks=TASKS), silently)
    assert started == [] and again == result
    with pytest.raises(
        ValueError, match=r"run with other settings: train.steps \(train.steps was 2, now 3\)"
    ):
        compare(comparison(data, folder, steps=3, fractions=(1.0,), tasks=TASKS), silently)
    assert started == []


def test_an_older_pretraining_without_a_newer_setting_is_not_taken_for_one_with_it(data, tmp_path):
    runs = comparison(data, tmp_path / "c", fractions=(1.0,))
    config = runs.pretrainings["pgl", 0]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").touch()
    old = to_plain(config)
    del old["method"]["decorrelation"]
    (folder / "config.yaml").write_text(yaml.safe_dump(old), "utf-8")
    refuse_other_settings(folder, config, NOT_COMPARED, "a comparison")
    config.method.decorrelation = 0.04
    with pytest.raises(ValueError, match=r"method.decorrelation was 0.0, now 0.04"):
        refuse_other_settings(folder, config, NOT_COMPARED, "a comparison")


@pytest.mark.parametrize(("changes", "told"), [
    ({"fractions": (0.05, 1.0)}, r"^fraction 0.05 of 6 training patients leaves no case"),
    ({"tasks": {"good": {"bright": ["bright"]}, "bad": {"liver": ["liver"]}}},
     r"^task bad: classes: 'liver' is made of 'liver', but the labels in .* have only bright \(1\), dark"),
    ({"finetune": {"spacing_mm": (9.0, 9.0, 9.0)}}, r"^spacing_mm is \(9.0, 9.0, 9.0\) .*\(3.0, 1.0, 1.0\)"),
    ({"finetune": {"patches": PatchSettings((9, 16, 16))}}, r"^patches.patch_size \(9, 16, 16\) must be "),
], ids=["fraction", "class", "spacing", "patch"])  # fmt: skip
def test_what_would_stop_a_fine_tuning_stops_the_comparison_before_it_pretrains(
    data, tmp_path, started, changes, told
):
    with pytest.raises(ValueError, match=told):
        compare(comparison(data, tmp_path / "c", **{"fractions": (1.0,), **changes}), silently)
    assert started == [] and not (tmp_path / "c/pretrained").exists()


def test_two_fractions_of_one_number_of_cases_are_drawn_beside_each_other(tmp_path, monkeypatch):
    entry = {"task": "", "training_cases": 1, "deviation": None, "initialisation": "random"}
    entries = [{**entry, "dice": dice, "dice_of_seeds": {"0": dice}} for dice in (0.25, 0.75)]
    drawn: list[Axes] = []
    panel = plot._panel
    monkeypatch.setattr(plot, "_panel", lambda ax, *more: (drawn.append(ax), panel(ax, *more)))
    plot.draw(entries, ["random", "pgl"], tmp_path / "plot.png")
    (ax,) = drawn
    assert [label.get_text() for label in ax.get_xticklabels()] == ["random"]
    across, dice = ax.containers[0].lines[0].get_data()
    assert list(dice) == [25.0, 75.0] and across[0] < across[1] < 0.5
    plot.draw([*entries, {**entries[0], "training_cases": 2}], ["random"], tmp_path / "curve.png")
    assert list(drawn[1].containers[0].lines[0].get_xdata()) == [1, 1, 2]


class Cells(HTMLParser):
    """The text of a page's table cells."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.inside = False
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.inside = tag in ("td", "th")

    def handle_data(self, data):
        if self.inside:
            self.cells.append(data)

    def handle_endtag(self, tag):
        self.inside = False


def test_a_comparison_that_was_stopped_goes_on_and_says_meanwhile_that_it_is_not_finished(
    data, tmp_path, started, monkeypatch
):
    folder, runs = tmp_path / "c", comparison(data, tmp_path / "c", fractions=(1.0,), seeds=(0,))
    working = module.run_finetuning
    monkeypatch.setattr(
        module, "run_finetuning", lambda run: 130 if "byol" in str(run.output) else working(run)
    )
    with pytest.raises(ComparisonStopped, match="byol-fraction1-seed0 ended with exit code 130") as stopped:
        compare(runs, silently)
    assert stopped.value.exit_code == 130
    partial = json.loads((folder / "compare.json").read_text("utf-8"))
    assert not partial["complete"] and [r["initialisation"] for r in partial["runs"]] == ["random", "genesis"]
    assert "Not finished: 2 of 4 fine-tunings are done" in (folder / REPORT).read_text("utf-8")
    assert "2 of 4 fine-tunings are still to be done" in (folder / "compare.md").read_text("utf-8")
    monkeypatch.setattr(module, "run_finetuning", working)
    started.clear()
    assert compare(runs, silently)["complete"]
    assert started == ["byol-fraction1-seed0", "pgl-seed0", "pgl-fraction1-seed0"]


@pytest.mark.parametrize("spoil", [
    lambda results: results.pop("cases"),
    lambda results: results["mean"].update(classes=[]),
    lambda results: results["mean"].update(classes={"bright": None}),
    lambda results: results["mean"]["classes"].update(bright={"dice": 0.5}),
    lambda results: results.clear(),
], ids=["no cases", "a list of classes", "a class without scores", "scores lacking", "nothing"])  # fmt: skip
def test_spoilt_results_are_named_with_what_to_do(data, tmp_path, started, spoil):
    runs = comparison(data, tmp_path / "c", fractions=(1.0,), seeds=(0,), initialisations=("random",))
    compare(runs, silently)
    file = tmp_path / "c/finetuned/random-fraction1-seed0/results.json"
    results = json.loads(file.read_text("utf-8"))
    spoil(results)
    file.write_text(json.dumps(results), "utf-8")
    with pytest.raises(
        ValueError, match=r"results\.json cannot be read .*: delete .*random-fraction1-seed0 "
    ):
        compare(runs, silently)


def test_a_ceiling_is_tuned_from_random_with_the_first_seed_alone(data, tmp_path, started):
    few = {"fractions": (0.4,), "initialisations": ("random", "byol"), "pretrain_once": True}
    runs = comparison(data, tmp_path / "c", ceiling_fractions=(1.0,), **few)
    assert [(t.initialisation, t.seed) for t in runs.tunings if t.fraction == 1.0] == [("random", 0)]
    assert len(runs.tunings) == 2 * 2 + 1
    (entry,) = (e for e in compare(runs, silently)["table"] if e["fraction"] == 1.0)
    assert (entry["initialisation"], entry["seeds"], entry["training_cases"]) == ("random", 1, 6)
    with pytest.raises(ValueError, match="ceiling_fractions must be different"):
        comparison(data, tmp_path / "d", fractions=(0.4, 1.0), ceiling_fractions=(1.0,))


def test_pretraining_once_serves_every_seed(data, tmp_path):
    runs = comparison(data, tmp_path / "c", pretrain_once=True, seeds=(4, 5))
    assert list(runs.pretrainings) == [("genesis", 4), ("byol", 4), ("pgl", 4)]
    assert {t.config.weights.rsplit("-", 1)[-1] for t in runs.tunings} == {"random", "seed4.pt"}
    assert {t.seed for t in runs.tunings} == {4, 5}


# --- the command ---


def test_when_the_time_is_over_the_tables_are_written_and_say_what_is_lacking(data, tmp_path, started):
    kinds = {"initialisations": ("random", "byol"), "fractions": (1.0,), "seeds": (0,)}
    compare(comparison(data, tmp_path / "c", **{**kinds, "initialisations": ("random",)}), silently)
    started.clear()
    with pytest.raises(ComparisonStopped, match=r"limit of 0\.001 s is over, 1 of 2 fine-tunings") as stopped:
        compare(comparison(data, tmp_path / "c", **kinds, time_limit_s=0.001), silently)
    assert stopped.value.exit_code == 124 and started == []
    assert not json.loads((tmp_path / "c" / "compare.json").read_text("utf-8"))["complete"]
    assert compare(comparison(data, tmp_path / "c", **kinds, time_limit_s=3600), silently)["complete"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--jobs", "0"], "jobs must be at least 1, got 0"),
        (["--time_limit_s", "-1"], "time_limit_s must be at least 0, got -1"),
        (["--seeds", "a,b"], "--seeds must be such as 0,1,2, got a,b"),
        (["--initialisations", "moco"], "initialisations must be of random, genesis, byol, pgl, got moco"),
        (["--pretrain.train.stepz", "3"], "stepz"),
        (["--finetune.train.steps", "3"], "optimizer.warmup_steps must lie in"),
    ],
)
def test_wrong_words_are_one_line_and_code_2(tmp_path, capsys, words, message):
    assert main(["compare", "--data", "x", "--output", str(tmp_path / "c"), *words]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and message in err and not (tmp_path / "c").exists()


def test_tables_of_part_of_the_runs_name_what_is_there(data, tmp_path):
    runs = comparison(data, tmp_path / "c", fractions=(1.0,), seeds=(0, 1))
    made_up = {"test": ["p1"], "classes": ["x"], "training": ["p2", "p3"], "steps": 2, "weights_sha256": None,
               "mean": {"dice": 0.5, "hd95_mm": None, "classes": {
                   "x": {"dice": 0.5, "hd95_mm": None, "cases": 1, "missed": 0},
                   "a|b\nc\x1b": {"dice": None, "hd95_mm": None, "cases": 0, "missed": 0}}},
               "cases": [{"subject": "p1", "class": "x", "dice": 0.5}]}  # fmt: skip
    done = [(t, made_up) for t in runs.tunings if t.initialisation != "byol" and t.seed == 0]
    entries = write_results(runs, done)["table"]
    assert [e["initialisation"] for e in entries] == ["random", "genesis", "pgl"]
    assert entries[0]["over"] == {}
    assert entries[2]["over"]["random"] == {"mean": 0.0, "low": None, "high": None, "wins": 0, "seeds": 1}
    assert table_rows(entries)[2] == ["–", "1", "2", "pgl", "50.00", "+0.00, 0 of 1 seeds", "–"]
    text = (tmp_path / "c" / "compare.md").read_text("utf-8")
    assert "| – | 1 | x | 50.00 | 50.00 | – | 50.00 |\n| – | 1 | a\\|b\\nc\\x1b | – | – | – | – |\n" in text
    with (tmp_path / "c" / "classes.csv").open(encoding="utf-8", newline="") as file:
        classes = list(csv.DictReader(file))
    cells = ["random-fraction1-seed0", "", "random", "1.0", "0", "a|b\nc\x1b", "", "", "0", "0"]
    assert classes[1] == dict(zip(COLUMNS, cells, strict=True))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_shipped_comparison_is_one_that_can_be_run(file, tmp_path):
    seen: list[Comparison] = []
    words = ["compare", "--config", str(file), "--data", "cache", "--output", str(tmp_path / "c")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pgl.comparison.runs.compare", lambda one, say: seen.append(one) or {"table": []})
        assert main(words) == 0
    assert {t.initialisation for t in seen[0].tunings} == {"random", "genesis", "byol", "pgl"}
    assert len(seen[0].settings.seeds) >= 3 and len(seen[0].settings.starts()) >= 2
    assert seen[0].doubts == []
    for tuning in seen[0].tunings:
        check_patch(tuning.config, describe(tuning.config.encoder))


@pytest.mark.parametrize(("window", "expected"), [(None, (-1000, 1000)), ((-160.0, 240.0), (-160, 240))])
def test_models_genesis_scales_the_window_of_the_others_to_its_range(tmp_path, window, expected):
    plain = comparison(tmp_path / "cache", tmp_path / "c")
    changed = plain._pretrain
    if window:
        changed = replace(changed, intensity=IntensitySettings(window, 40.0, 100.0))
    runs = Comparison(plain.settings, changed, plain._finetune)
    low, high = expected
    wanted = IntensitySettings(expected, low, high - low)
    assert [r.intensity for (m, _), r in runs.pretrainings.items() if m == "genesis"] == [wanted] * 2
    assert runs.pretrainings["pgl", 0].intensity == changed.intensity
    assert sum(f"HU in [−{-low}, {high}] scaled" in note for note in notes(runs, [])) == 1


def test_the_page_has_a_row_for_every_setting_with_its_default():
    text = (Path(__file__).resolve().parents[2] / "docs" / "comparing.md").read_text("utf-8")
    section = text.split("## Settings", 1)[1].split("\n## ", 1)[0]
    rows = {
        cells[1].strip(" `"): cells[2].strip()
        for line in section.splitlines()
        if (cells := line.split("|"))[1:] and cells[1].strip().startswith("`")
    }
    wanted = {}
    for field in fields(CompareSettings):
        default = field.default
        shown = ",".join(f"{v:g}" if isinstance(v, float) else str(v) for v in default) if isinstance(
            default, tuple) else str(default).lower()  # fmt: skip
        wanted[field.name] = "required" if default is MISSING else shown
    assert rows == {**wanted, "unlabelled": "`data`", "pretrain": "", "finetune": ""}
    parsed = set(re.findall(r"--(\w+)", " ".join(_options())))
    assert parsed - {"help", "config", "print_config"} == set(rows)


def _options() -> list[str]:
    from jsonargparse import ArgumentParser

    from pgl.cli.compare import compare_arguments

    parser = ArgumentParser()
    compare_arguments(parser)
    return [option for action in parser._actions for option in action.option_strings if "." not in option]
