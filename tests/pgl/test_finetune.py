"""``pgl finetune`` as a whole."""

from __future__ import annotations

import csv
import json
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.losses import DiceCELoss

from pgl.cli import main
from pgl.config import IntensitySettings
from pgl.downstream import train
from pgl.downstream.model_file import load_model
from pgl.downstream.train import finetune
from pgl.export import export_encoder, load_encoder
from pgl.pretrain import pretrain
from pgl.settings import to_plain
from tests.pgl.command_line import run_cli
from tests.pgl.labelled_data import labelled_cache, small_finetune
from tests.pgl.training_data import make_cache, small_config, small_encoder


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return labelled_cache(tmp_path_factory.mktemp("finetune") / "cache")


@pytest.fixture(scope="module")
def encoder(data: Path) -> Path:
    """An encoder that ``pgl pretrain`` trained and ``pgl export`` wrote."""
    run, file = data.parent / "pretrained", data.parent / "encoder.pt"
    pretrain(small_config(make_cache(data.parent / "unlabelled"), run, steps=2))
    export_encoder(run, file)
    return file


def test_a_network_learns_blocks_that_it_can_see_and_writes_what_is_promised(data, tmp_path):
    results = finetune(small_finetune(data, tmp_path / "run", steps=120))
    untrained = finetune(small_finetune(data, tmp_path / "untrained", steps=2))
    assert results["mean"]["dice"] > 0.8 > 0.4 > untrained["mean"]["dice"]
    run = tmp_path / "run"
    written = json.loads((run / "results.json").read_text("utf-8"))
    assert written == results and written["weights"] == "random" and written["classes"] == ["bright", "dark"]
    with (run / "results.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["subject"] for row in rows} == set(written["test"]) and len(rows) == 2 * len(written["test"])
    means = [np.mean([float(r["dice"]) for r in rows if r["class"] == name]) for name in ("bright", "dark")]
    assert written["mean"]["dice"] == pytest.approx(np.mean(means))
    assert len(written["training"]) == 6 and len(written["test"]) == 2
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text("utf-8").splitlines()]
    assert steps[-1]["step"] == 120 and steps[-1]["loss"] < steps[0]["loss"]
    torch.load(run / "model.pt", weights_only=True)
    torch.load(run / "checkpoints/last.pt", weights_only=True)
    assert load_model(run).classes == ["bright", "dark"]


def test_weights_of_pgl_export_become_the_encoder_and_are_named(data, encoder, tmp_path, capfd):
    config = small_finetune(data, tmp_path / "run", steps=1, weights=str(encoder), encoder=None)
    frozen = replace(config.optimizer, encoder_factor=0.0, warmup_steps=0)
    finetune(replace(config, optimizer=frozen))
    told = " ".join(capfd.readouterr().err.split())
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    expected = {f"encoder.{name}" for name, _ in load_encoder(encoder).named_parameters()}
    assert set(named["loaded"]) == expected and named["unused"] == []
    assert f"{len(expected)} tensors loaded: encoder.stem (4), encoder.stages.0" in told
    assert f"{len(named['missing'])} missing, so they start at random: decoder.stages.0" in told
    assert "0 unused: none" in told
    # With a rate of 0 the encoder that was tested is the one of the file.
    trained = load_model(tmp_path / "run").network.encoder.state_dict()
    assert all(torch.equal(trained[n], t) for n, t in load_encoder(encoder).state_dict().items())


def test_a_frozen_encoder_keeps_its_running_statistics_too(data, tmp_path):
    batch = small_encoder()
    batch.norm = "batch"
    config = small_finetune(data, tmp_path / "run", steps=2, encoder=batch)
    started = replace(config, output=tmp_path / "started", train=replace(config.train, steps=1))
    frozen = [
        replace(c, optimizer=replace(c.optimizer, encoder_factor=0.0, warmup_steps=0))
        for c in (started, config)
    ]
    for run in frozen:
        finetune(run)
    one, other = (load_model(tmp_path / name).network for name in ("started", "run"))
    names = [name for name in one.encoder.state_dict() if "running" in name]
    assert names
    for name, tensor in one.encoder.state_dict().items():
        assert torch.equal(tensor, other.encoder.state_dict()[name]), name
    assert not torch.equal(one.decoder.seg_layers[-1].weight, other.decoder.seg_layers[-1].weight)


def test_weights_that_would_mean_something_else_here_are_told(data, encoder, tmp_path, capfd):
    other = small_encoder()
    other.strides = [(1, 1, 1), (2, 2, 2), (1, 2, 2)]
    config = small_finetune(data, tmp_path / "run", steps=2, weights=str(encoder), encoder=other)
    finetune(replace(config, intensity=IntensitySettings((-160.0, 240.0), 40.0, 100.0)))
    told = " ".join(capfd.readouterr().err.split())
    assert (
        "WARNING: the network is not the one that the weights were trained in: strides [[1, 1, 1], "
        "[1, 2, 2], [2, 2, 2]], now [[1, 1, 1], [2, 2, 2], [1, 2, 2]]"
    ) in told
    assert "trained on HU clipped to [-1024.0, 325.0], less -158.58, divided by 324.7; now [-160.0, 2" in told
    finetune(replace(config, encoder=None, output=tmp_path / "alike"))
    assert "WARNING" not in capfd.readouterr().err


def test_the_same_decoder_starts_beside_any_encoder(data, encoder, tmp_path):
    for weights in ("random", str(encoder)):
        config = small_finetune(data, tmp_path / Path(weights).stem, steps=1, weights=weights)
        still = replace(config.optimizer, learning_rate=1e-30, warmup_steps=0)
        finetune(replace(config, optimizer=still))
    one, other = (load_model(tmp_path / name).network for name in ("random", "encoder"))
    for name, tensor in one.decoder.named_parameters():
        if not name.startswith("encoder."):
            # Even a rate of 1e-30 moves a bias off its 0.
            assert torch.allclose(tensor, dict(other.decoder.named_parameters())[name], rtol=0, atol=1e-20)
    assert not torch.equal(one.encoder.stem.convs[0].conv.weight, other.encoder.stem.convs[0].conv.weight)


def test_a_resumed_run_ends_in_the_same_weights_and_scores(data, tmp_path, monkeypatch):
    whole = finetune(small_finetune(data, tmp_path / "whole", steps=6))
    import pgl.downstream.train as train

    real, calls = train._Run._training_step, []

    def break_down(self, patches):
        if len(calls) == 5:
            raise RuntimeError("power cut")
        calls.append(1)
        return real(self, patches)

    monkeypatch.setattr(train._Run, "_training_step", break_down)
    with pytest.raises(RuntimeError, match="power cut"):
        finetune(small_finetune(data, tmp_path / "cut", steps=6))
    monkeypatch.undo()
    assert not (tmp_path / "cut/results.json").exists()
    with pytest.raises(ValueError, match="seed differ from the run"):
        finetune(small_finetune(data, tmp_path / "cut", steps=6, resume=True, seed=1))
    resumed = finetune(small_finetune(data, tmp_path / "cut", steps=6, resume=True))
    assert resumed["cases"] == whole["cases"]
    starts = [
        json.loads((tmp_path / name / "environment.json").read_text("utf-8"))["starts"]
        for name in ("whole", "cut")
    ]
    assert [[start["precision"] for start in of_run] for of_run in starts] == [["32-true"], ["32-true"] * 2]
    first, second = (load_model(tmp_path / name).network.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    lines = [json.loads(line)["step"] for line in (tmp_path / "cut/metrics.jsonl").read_text().splitlines()]
    assert lines == [2, 4, 6]


def test_weights_that_a_bad_gradient_has_spoilt_do_not_replace_the_last_state(data, tmp_path, monkeypatch):
    class Loss(DiceCELoss):
        calls = 0

        def forward(self, logits, classes):
            Loss.calls += 1
            if Loss.calls == 3:
                logits.register_hook(lambda gradient: gradient * torch.inf)
            return super().forward(logits, classes)

    monkeypatch.setattr(train, "DiceCELoss", Loss)
    config = small_finetune(data, tmp_path / "run", steps=3)
    config = replace(config, train=replace(config.train, checkpoint_every=1))
    with pytest.raises(FloatingPointError, match=r"not finite after step 3.*optimizer\.learning_rate"):
        finetune(config)
    state = torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)
    assert state["step"] == 2
    assert all(weight.isfinite().all() for weight in state["network"].values())


def test_ctrl_c_finishes_the_step_and_the_run_goes_on_from_there(data, tmp_path, monkeypatch):
    import pgl.downstream.train as train

    real, done = train._Run._training_step, []

    def interrupted(self, patches):
        done.append(1)
        if len(done) == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return real(self, patches)

    monkeypatch.setattr(train._Run, "_training_step", interrupted)
    config = small_finetune(data, tmp_path / "run", steps=5)
    rarely = replace(config, train=replace(config.train, checkpoint_every=100))
    with pytest.raises(KeyboardInterrupt):
        finetune(rarely)
    assert torch.load(tmp_path / "run/checkpoints/last.pt", weights_only=True)["step"] == 3
    assert finetune(replace(rarely, resume=True))["steps"] == 5 and len(done) == 5


def test_a_state_without_its_checksums_is_refused(data, tmp_path):
    """Whether weights and labels are still the same could not be told then."""
    config = small_finetune(data, tmp_path / "run", steps=2)
    finetune(config)
    file = tmp_path / "run/checkpoints/last.pt"
    state = torch.load(file, weights_only=True)
    for key in ("weights_sha256", "data_sha256"):
        torch.save({name: value for name, value in state.items() if name != key}, file)
        with pytest.raises(ValueError, match=rf"last\.pt lacks {key}: it is damaged"):
            finetune(replace(config, resume=True))


def test_patches_read_by_other_processes_are_the_same(data, tmp_path):
    for workers in (0, 2):
        config = small_finetune(data, tmp_path / str(workers), steps=3)
        finetune(replace(config, train=replace(config.train, workers=workers)))
    first, second = (load_model(tmp_path / name).network.state_dict() for name in "02")
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_settings_written_by_a_run_start_the_same_run_from_the_command_line(data, tmp_path):
    config = small_finetune(data, tmp_path / "first", steps=2, classes={"any": ["bright", "dark"]})
    first = finetune(config)
    code = main(
        ["finetune", "--config", str(tmp_path / "first/config.yaml"), "--output", str(tmp_path / "b")]
    )
    assert code == 0
    second = json.loads((tmp_path / "b/results.json").read_text("utf-8"))
    assert second["cases"] == first["cases"] and second["classes"] == ["any"]
    assert main(["finetune", "--output", str(tmp_path / "b"), "--resume"]) == 0


# --- wrong inputs ---


@pytest.fixture
def settings(tmp_path) -> Path:
    plain = to_plain(small_finetune(Path("x"), Path("x")))
    for name in ("data", "output", "weights", "resume"):
        del plain[name]
    path = tmp_path / "small.yaml"
    path.write_text(yaml.safe_dump(plain))
    return path


def test_wrong_inputs_are_told_in_one_line(data, encoder, settings, tmp_path, capsys):
    common = ["finetune", "--config", settings, "--output", tmp_path / "run"]
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", "--fraction", "0.05")
    assert code == 1 and "fraction 0.05 of 6 training patients leaves no case: give at least 0.084" in said
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", "--fraction", "1.5")
    assert code == 2 and "fraction must lie in (0, 1], got 1.5" in said
    code, said = run_cli(capsys, *common, "--data", data, "--weights", tmp_path / "none.pt")
    assert code == 1 and "no file at" in said
    unlabelled = data.parent / "unlabelled"
    code, said = run_cli(capsys, *common, "--data", unlabelled, "--weights", "random")
    assert code == 1 and "holds no labels: run pgl prepare with --labels" in said
    odd = ["--patches.patch_size", "9,16,16"]
    code, said = run_cli(capsys, *common, "--data", data, "--weights", "random", *odd)
    assert code == 1 and "must be a multiple, at least twice, of the encoder's total stride (2, 4, 4)" in said
    code, said = run_cli(capsys, "finetune", "--output", tmp_path / "run", "--resume")
    assert code == 1 and "no run of `pgl finetune` at" in said
    assert not (tmp_path / "run").exists()


def test_weights_of_another_network_are_refused_before_anything_is_written(data, encoder, tmp_path):
    wider = small_encoder()
    wider.features_per_stage = [5, 6, 7]
    config = small_finetune(data, tmp_path / "run", weights=str(encoder), encoder=wider)
    with pytest.raises(ValueError, match=r"none of the .* fits the network .*in the file"):
        finetune(config)
    assert not (tmp_path / "run").exists()
    (tmp_path / "text.pt").write_text("no weights")
    with pytest.raises(ValueError, match="cannot be read as an exported encoder"):
        finetune(replace(config, weights=str(tmp_path / "text.pt")))


@pytest.mark.parametrize("chances", [(0.5, 0.5), (0.5, 0.5, 0.5, 0.5), (0.5, 0.5, 1.5)])
def test_mirrors_that_are_not_three_chances_are_refused(data, tmp_path, chances):
    wrong = small_finetune(data, tmp_path / "run")
    wrong = replace(wrong, patches=replace(wrong.patches, flip_probability=chances))
    with pytest.raises(ValueError, match=r"patches\.flip_probability must "):
        finetune(wrong)
    assert not (tmp_path / "run").exists()


def test_an_output_that_holds_something_is_left_alone(data, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run/thesis.txt").write_text("dear")
    for resume in (False, True):
        with pytest.raises(FileExistsError):
            finetune(small_finetune(data, tmp_path / "run", resume=resume))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("command", ["status", "report", "show"])
def test_commands_for_pretrainings_say_that_a_folder_is_of_a_fine_tuning(tmp_path, capsys, command):
    (tmp_path / "config.yaml").write_text("weights: random\n", encoding="utf-8")
    (tmp_path / "split.json").write_text("{}", encoding="utf-8")
    assert main([command, str(tmp_path)]) == 1
    assert "is a run of `pgl finetune`: give one of `pgl pretrain`" in capsys.readouterr().err
