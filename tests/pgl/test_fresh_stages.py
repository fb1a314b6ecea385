"""``fresh_stages``: the deepest pretrained stages start at random all the same."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from pgl.ablation.dice import AblationTuning
from pgl.cli import main
from pgl.comparison.config import Comparison
from pgl.comparison.runs import NOT_COMPARED, compare
from pgl.comparison.tables import notes
from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.model_file import load_model
from pgl.downstream.train import finetune
from pgl.export import load_encoder
from pgl.settings import refuse_other_settings, to_plain

from .comparisons import comparison, run_here, silently
from .encoder_files import encoder_file
from .labelled_data import labelled_cache, small_finetune
from .training_data import small_config, small_encoder

PER_STAGE = ("features_per_stage", "strides", "kernel_sizes", "n_blocks_per_stage")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("fresh") / "cache"
    labelled_cache(folder)
    return folder


def one_step(data: Path, run: Path, weights: Path | str, **changes: Any) -> FinetuneConfig:
    """A fine-tuning of one step, at a rate so small that weights stay what they were."""
    config = small_finetune(data, run, steps=1, weights=str(weights))
    rate = replace(config.optimizer, learning_rate=1e-30, warmup_steps=0)
    return replace(config, optimizer=rate, **changes)


def encoder_of(run: Path) -> dict[str, torch.Tensor]:
    return dict(load_model(run).network.encoder.named_parameters())


def stage_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("stages.") else -1


# The encoder has three stages; of the second file the deepest was not trained.
@pytest.mark.parametrize(("level", "fresh", "kept"), [(2, 1, 1), (2, 2, 0), (2, 3, -1), (1, 1, 0), (1, 0, 2)])
def test_the_deepest_pretrained_stages_are_those_of_random_weights(data, tmp_path, capfd, level, fresh, kept):
    file = encoder_file(tmp_path / "encoder.pt", level=level)
    finetune(one_step(data, tmp_path / "random", "random"))
    capfd.readouterr()
    finetune(one_step(data, tmp_path / "run", file, fresh_stages=fresh))
    told = " ".join(capfd.readouterr().err.split())
    assert (f"stage {', '.join(map(str, range(kept + 1, 3)))} starts at random" in told) == (fresh > 0)
    ours, random = encoder_of(tmp_path / "run"), encoder_of(tmp_path / "random")
    pretrained = dict(load_encoder(file).named_parameters())
    for name, tensor in ours.items():
        expected = pretrained if stage_of(name) <= kept else random
        # Even a rate of 1e-30 moves a bias off its 0.
        assert torch.allclose(tensor, expected[name], rtol=0, atol=1e-20), name
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    left_out = {f"encoder.{name}" for name in pretrained if stage_of(name) > kept}
    assert {f"encoder.{name}" for name in named["unused"]} == left_out <= set(named["missing"])
    assert len(named["loaded"]) == len(pretrained) - len(left_out)


def test_a_decoder_pretrained_on_them_is_left_out_aloud(data, tmp_path, capfd):
    file = encoder_file(tmp_path / "encoder.pt", decoder_level=0)
    finetune(one_step(data, tmp_path / "run", file, fresh_stages=1))
    told = " ".join(capfd.readouterr().err.split())
    assert "the pretrained decoder is left out: fresh_stages is 1" in told
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    assert not [name for name in named["loaded"] if name.startswith("decoder.")]
    assert [name for name in named["unused"] if name.startswith("decoder.")]


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (
            ["--fresh_stages", "3"],
            "fresh_stages must be at most 2, the encoder's stages that were pretrained",
        ),
        (["--fresh_stages", "-1"], "fresh_stages must be at least 0, got -1"),
        (["--fresh_stages", "1", "--optimizer.encoder_factor", "0"], "encoder_factor must be above 0 with"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(data, tmp_path, capsys, options, error):
    file = encoder_file(tmp_path / "encoder.pt", level=1)
    command = ["finetune", "--data", data, "--weights", file, "--output", tmp_path / "run"]
    small = ["--patches.patch_size", "4,16,16", "--train.steps", "1", "--optimizer.warmup_steps", "0"]
    assert main([*map(str, command), *small, *options]) != 0
    assert error in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("fresh", "left"), [(1, None), (2, {1}), (3, {0, 1})])
def test_a_network_of_fewer_stages_than_the_file(data, tmp_path, fresh, left):
    encoder = small_encoder()
    two = replace(encoder, **{name: getattr(encoder, name)[:2] for name in PER_STAGE})
    file = encoder_file(tmp_path / "encoder.pt")
    config = replace(one_step(data, tmp_path / "run", file, fresh_stages=fresh), encoder=two)
    if left is None:
        with pytest.raises(ValueError, match=r"leaves out stages from 2 on .* the network has 2 stages"):
            finetune(config)
        return
    finetune(config)
    missing = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))["missing"]
    stages = {stage_of(n.removeprefix("encoder.")) for n in missing if n.startswith("encoder.")}
    assert stages == left


def test_from_random_weights_it_says_that_it_says_nothing(data, tmp_path, capfd):
    finetune(one_step(data, tmp_path / "run", "random", fresh_stages=1))
    assert "weights: random, so fresh_stages says nothing" in " ".join(capfd.readouterr().err.split())


def rename(content: dict[str, Any], old: str, new: str) -> None:
    weights = content["network_weights"]
    content["network_weights"] = {name.replace(old, new): tensor for name, tensor in weights.items()}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda content: rename(content, "stages.", "encoder.stages."),
        lambda content: rename(content, "stages.2", "stages.x"),
        lambda content: rename(content, "stages.2.", "stages"),
        lambda content: content["network"].update(feature_level=99),
    ],
)
def test_a_file_whose_stages_cannot_be_told_is_refused_by_its_name(data, tmp_path, spoil):
    file = encoder_file(tmp_path / "encoder.pt")
    content = torch.load(file, weights_only=True)
    spoil(content)
    torch.save(content, file)
    with pytest.raises(ValueError, match=r"encoder\.pt"):
        finetune(one_step(data, tmp_path / "run", file, fresh_stages=1))
    assert not (tmp_path / "run").exists()


def test_a_run_of_before_the_setting_goes_on_without_it_and_only_so(data, tmp_path):
    config = one_step(data, tmp_path / "run", "random", fresh_stages=0)
    finetune(config)
    last = tmp_path / "run/checkpoints/last.pt"
    state = torch.load(last, weights_only=True)
    del state["config"]["fresh_stages"]
    torch.save(state, last)
    with pytest.raises(ValueError, match="fresh_stages differ from the run"):
        finetune(replace(config, resume=True, fresh_stages=1))
    finetune(replace(config, resume=True))


def test_a_comparison_takes_no_run_of_another_number_for_its_own(tmp_path):
    config = FinetuneConfig(tmp_path / "cache", tmp_path / "run", "random")
    old = {name: value for name, value in to_plain(config).items() if name != "fresh_stages"}
    (tmp_path / "run").mkdir()
    (tmp_path / "run/config.yaml").write_text(yaml.safe_dump(old), "utf-8")
    (tmp_path / "run/metrics.jsonl").touch()
    refuse_other_settings(tmp_path / "run", config, NOT_COMPARED, "a comparison")
    with pytest.raises(ValueError, match=r"fresh_stages was 0, now 1"):
        refuse_other_settings(tmp_path / "run", replace(config, fresh_stages=1), NOT_COMPARED, "a comparison")


def test_a_comparison_says_what_was_left_behind(data, tmp_path):
    plain = comparison(data, tmp_path / "out")
    assert plain.fresh_stages == 0 and not [note for note in notes(plain, []) if "fresh_stages" in note]
    for fresh, words in ((1, "deepest pretrained stage ("), (2, "2 deepest pretrained stages (")):
        told = notes(with_fresh(plain, fresh), [])
        assert len([note for note in told if words in note]) == 1


def test_runs_from_random_weights_serve_comparisons_with_and_without(data, tmp_path):
    plain = comparison(data, tmp_path / "out")
    for tuning, other in zip(plain.tunings, with_fresh(plain, 1).tunings, strict=True):
        random = tuning.initialisation == "random"
        assert (to_plain(tuning.config) == to_plain(other.config)) == random
        assert other.config.fresh_stages == (0 if random else 1)
    # There is nothing to leave behind.
    alone = with_fresh(comparison(data, tmp_path / "out", initialisations=("random",)), 1)
    assert alone.fresh_stages == 0


def test_a_page_shows_the_number(data, tmp_path, monkeypatch):
    run_here(monkeypatch)
    settings = {"initialisations": ("random", "pgl"), "fractions": (0.4,), "seeds": (0,)}
    compare(with_fresh(comparison(data, tmp_path / "out", **settings), 1), silently)
    page = (tmp_path / "out/report.html").read_text("utf-8")
    assert re.search(r"fresh_stages</t[dh]>\s*<td[^>]*>1<", page)
    assert "deepest pretrained stage (fresh_stages 1)" in page


def with_method(run: PretrainConfig, **changes: Any) -> PretrainConfig:
    return replace(run, method=replace(run.method, **changes))


@pytest.mark.parametrize(
    ("changes", "fresh", "error"),
    [
        ({"features": "decoder", "feature_level": 0}, 1, "must be 0 with method.features decoder"),
        ({}, 4, "must be at most 3, the encoder's stages that are pretrained, got 4"),
        ({"feature_level": 1}, 1, "must be 0 where pretrainings train different stages of the encoder (2 of"),
    ],
)
def test_a_comparison_that_cannot_be_finished_is_not_begun(data, tmp_path, changes, fresh, error):
    plain = comparison(data, tmp_path / "out")
    pretraining = with_method(plain._pretrain, **changes)
    with pytest.raises(ValueError, match=f"fresh_stages {re.escape(error)}"):
        Comparison(plain.settings, pretraining, replace(plain._finetune, fresh_stages=fresh))


@pytest.mark.parametrize(
    ("changes", "fresh", "error"),
    [
        ({"features": "decoder", "feature_level": 0}, 1, "must be 0 with method.features decoder"),
        ({"feature_level": 1}, 3, "must be at most 2"),
        ({"feature_level": 0, "more_levels": [1]}, 3, "must be at most 2"),
    ],
)
def test_an_ablation_that_cannot_be_finished_is_not_begun(data, tmp_path, changes, fresh, error):
    run = with_method(small_config(data, tmp_path / "run", steps=2), **changes)
    tuning = AblationTuning(small_finetune(data, tmp_path / "out", fresh_stages=fresh), tmp_path)
    with pytest.raises(ValueError, match=f"fresh_stages {error}"):
        tuning.check([run])


def with_fresh(plain: Comparison, fresh: int) -> Comparison:
    return Comparison(plain.settings, plain._pretrain, replace(plain._finetune, fresh_stages=fresh))
