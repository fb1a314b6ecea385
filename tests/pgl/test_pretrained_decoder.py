"""A decoder that ``method.features decoder`` pretrained goes where the encoder goes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

import pgl
from pgl.backbone import Backbone
from pgl.checkpoint import LAST, checkpoint_path, load_checkpoint
from pgl.cli import main
from pgl.comparison.config import Comparison
from pgl.comparison.runs import compare
from pgl.config import PretrainConfig
from pgl.downstream.train import finetune
from pgl.export import export_encoder, read_export, unet_weights
from pgl.export.nnunet import export_nnunet
from pgl.networks import constructor_arguments
from pgl.pretrain import pretrain

from .comparisons import comparison, run_here, silently
from .encoder_files import small_plans, write_plans
from .labelled_data import labelled_cache, small_finetune
from .test_export_nnunet import network_of, weights_of
from .training_data import make_cache, small_config, small_encoder

# Convolution and normalisation of a decoder stage, and the transposed convolution below it.
OF_A_STAGE = {"convs.0.conv.weight", "convs.0.conv.bias", "convs.0.norm.weight", "convs.0.norm.bias"}


def whole(config: PretrainConfig, level: int) -> PretrainConfig:
    return replace(config, method=replace(config.method, features="decoder", feature_level=level))


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """Runs that compared the decoder's finest stage, 0, and the only one beside it, 1."""
    folder = tmp_path_factory.mktemp("decoder")
    config = small_config(make_cache(folder / "cache"), folder, steps=2)
    return {level: pretrain(replace(whole(config, level), output=folder / f"run{level}")) for level in (0, 1)}


@pytest.fixture(scope="module")
def files(runs: dict[int, Path]) -> dict[int, Path]:
    for level, run in runs.items():
        export_encoder(run, run.parent / f"{level}.pt")
    return {level: run.parent / f"{level}.pt" for level, run in runs.items()}


def fresh_unet(file: Path, outputs: int = 3) -> ResidualEncoderUNet:
    arguments = constructor_arguments(read_export(file)["network"])
    del arguments["return_skips"]
    return ResidualEncoderUNet(
        **arguments, num_classes=outputs, n_conv_per_stage_decoder=[1, 1], deep_supervision=False
    )


def once(names: Any) -> set[str]:
    """Without the second names that modules have."""
    return {name for name in names if ".all_modules." not in name}


@pytest.mark.parametrize(("level", "stages"), [(0, (0, 1)), (1, (0,))])
def test_the_file_holds_what_was_trained_of_the_decoder_and_no_more(files, level, stages):
    content = read_export(files[level])
    expected = {f"stages.{stage}.{name}" for stage in stages for name in OF_A_STAGE}
    expected |= {f"transpconvs.{stage}.{name}" for stage in stages for name in ("weight", "bias")}
    assert once(content["decoder_weights"]) == expected
    assert content["network"]["decoder_level"] == level and content["network"]["feature_level"] == 2


@pytest.mark.parametrize("level", [0, 1])
def test_a_unet_with_the_files_weights_gives_the_pretrained_features_bitwise(runs, files, level):
    unet = fresh_unet(files[level])
    state = unet.state_dict()
    for name, tensor in unet_weights(read_export(files[level])).items():
        state[name if name.startswith("decoder.") else f"encoder.{name}"].copy_(tensor)
    saved = load_checkpoint(checkpoint_path(runs[level], LAST))["online"]
    trained = Backbone(small_encoder(), level, decoder=True)
    trained.encoder.load_state_dict(saved["encoder"])
    trained.decoder.load_state_dict(saved["decoder"])
    found: dict[int, torch.Tensor] = {}
    for stage, module in enumerate(unet.decoder.stages):
        module.register_forward_hook(lambda m, i, output, stage=stage: found.__setitem__(stage, output))
    images = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        unet.eval()(images)
        assert torch.equal(found[1 - level], trained.eval()(images))


def test_an_encoders_file_has_no_decoder(tmp_path):
    run = pretrain(small_config(make_cache(tmp_path / "cache"), tmp_path / "run", steps=2))
    network = export_encoder(run, tmp_path / "encoder.pt")
    assert "decoder_weights" not in read_export(tmp_path / "encoder.pt") and "decoder_level" not in network


def test_the_stage_may_be_counted_from_the_deepest(runs, files, tmp_path):
    saved = load_checkpoint(checkpoint_path(runs[1], LAST))
    config = saved["config"]
    assert config["method"]["feature_level"] == 1
    config["method"]["feature_level"] = -1
    counted = tmp_path / "counted"
    (counted / "checkpoints").mkdir(parents=True)
    torch.save(saved, counted / "checkpoints/last.pt")
    export_encoder(counted, tmp_path / "counted.pt")
    assert read_export(tmp_path / "counted.pt")["network"]["decoder_level"] == 1
    # A finer stage beside it.
    config["method"]["more_levels"] = [0]
    torch.save(saved, counted / "checkpoints/last.pt")
    export_encoder(counted, tmp_path / "counted.pt")
    assert read_export(tmp_path / "counted.pt")["network"]["decoder_level"] == 0


def test_fine_tuning_starts_from_the_decoder_too_and_names_it(files, tmp_path, capfd):
    data = labelled_cache(tmp_path / "cache")
    config = small_finetune(data, tmp_path / "run", steps=1, weights=str(files[1]), encoder=None)
    # So small a rate that weights stay what they were.
    finetune(replace(config, optimizer=replace(config.optimizer, learning_rate=1e-30, warmup_steps=0)))
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    content = read_export(files[1])
    of_decoder = {f"decoder.{name}" for name in once(content["decoder_weights"])}
    assert {name for name in named["loaded"] if name.startswith("decoder.")} == of_decoder
    assert named["unused"] == [] == named["reshaped"]
    assert all(name.startswith(("decoder.seg", "decoder.stages.1", "decoder.transpconvs.1")) for name in
               named["missing"])  # fmt: skip
    trained = torch.load(tmp_path / "run/model.pt", weights_only=True)["network_weights"]
    for name in once(content["decoder_weights"]):
        assert torch.allclose(
            trained[f"decoder.{name}"], content["decoder_weights"][name], rtol=0, atol=1e-20
        )
    assert "decoder.stages.0 (4)" in " ".join(capfd.readouterr().err.split())


@pytest.mark.parametrize("source", ["run", "file"])
def test_nnunet_gets_the_decoder_where_its_plans_have_the_same(runs, files, tmp_path, source):
    plans = write_plans(tmp_path / "plans.json", small_plans(n_conv_per_stage_decoder=[1, 1]))
    written = export_nnunet(runs[1] if source == "run" else files[1], tmp_path / "out.pth", plans)
    content = read_export(files[1])
    weights = weights_of(tmp_path / "out.pth")
    for name, tensor in content["decoder_weights"].items():
        assert torch.equal(weights[f"decoder.{name}"], tensor)
    names = dict(network_of(small_plans(n_conv_per_stage_decoder=[1, 1]), 2).named_parameters())
    of_encoder = sum(name.startswith("encoder.") for name in names)
    assert written.pretrained == of_encoder + len(OF_A_STAGE) + 2
    assert written.fresh == len(names) - written.pretrained - written.segmentation
    assert not any("decoder" in note for note in written.notes)


def test_nnunet_gets_a_fresh_decoder_where_its_plans_have_another(files, tmp_path):
    plans = write_plans(tmp_path / "plans.json", small_plans())  # two convolutions in the first stage
    written = export_nnunet(files[1], tmp_path / "out.pth", plans)
    assert any("n_conv_per_stage_decoder is [2, 1]" in note for note in written.notes)
    without = read_export(files[1])
    del without["decoder_weights"], without["network"]["decoder_level"]
    torch.save(without, tmp_path / "without.pt")
    assert written.pretrained == export_nnunet(tmp_path / "without.pt", tmp_path / "b.pth", plans).pretrained
    one, other = weights_of(tmp_path / "out.pth"), weights_of(tmp_path / "b.pth")
    assert all(torch.equal(one[name], other[name]) for name in other)


def test_the_command_says_that_the_decoder_is_in_the_file(runs, tmp_path, capfd):
    assert main(["export", str(runs[1]), "--output", str(tmp_path / "e.pt")]) == 0
    assert "the encoder, and the decoder up to its stage 1, after 2 steps" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["decoder_weights"].pop("transpconvs.0.bias"), r"transpconvs\.0\.bias is missing"),
        (lambda c: c["decoder_weights"].update(extra=torch.zeros(1)), "extra is not part of it"),
        (
            lambda c: c["decoder_weights"].update({"transpconvs.0.bias": torch.zeros(3)}),
            r"transpconvs\.0\.bias has shape \(3,\)",
        ),
        (lambda c: c.update(decoder_weights=[]), "'decoder_weights' must be a dict of tensors"),
        (
            lambda c: c["decoder_weights"].update({"transpconvs.0.bias": torch.zeros(1).expand(10**15)}),
            "does not hold its values",
        ),
        (lambda c: c["network"].pop("decoder_level"), r"network\.decoder_level .* got None"),
        (lambda c: c["network"].update(decoder_level=2), r"network\.decoder_level .* got 2 with 3 stages"),
        (lambda c: c["network"].update(decoder_level=0), "is missing"),
    ],
)
def test_a_decoder_that_was_tampered_with_is_refused(files, tmp_path, change, message):
    content = torch.load(files[1], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "e.pt")
    plans = write_plans(tmp_path / "plans.json", small_plans())
    with pytest.raises(ValueError, match=message) as refused:
        export_nnunet(tmp_path / "e.pt", tmp_path / "out.pth", plans)
    assert "e.pt" in str(refused.value)


def test_the_encoder_alone_can_be_had_from_such_a_file(runs, files):
    encoder = pgl.load_encoder(files[1])
    saved = load_checkpoint(checkpoint_path(runs[1], LAST))["online"]["encoder"]
    assert all(torch.equal(tensor, saved[name]) for name, tensor in encoder.state_dict().items())


def test_a_comparison_carries_pgls_decoder_over_and_says_so(tmp_path, monkeypatch):
    run_here(monkeypatch)
    data = labelled_cache(tmp_path / "cache")
    plain = comparison(data, tmp_path / "c", seeds=(0,), fractions=(1.0,), initialisations=("byol", "pgl"))
    runs = Comparison(plain.settings, whole(plain._pretrain, 1), plain._finetune)
    by_method = {method: run.method for (method, _), run in runs.pretrainings.items()}
    assert (by_method["pgl"].features, by_method["pgl"].feature_level) == ("decoder", 1)
    assert (by_method["byol"].features, by_method["byol"].feature_level) == ("encoder", -1)
    compare(runs, silently)
    for method, expected in (("byol", False), ("pgl", True)):
        folder = tmp_path / f"c/finetuned/{method}-fraction1-seed0"
        loaded = json.loads((folder / "weights.json").read_text("utf-8"))["loaded"]
        assert any(name.startswith("decoder.") for name in loaded) == expected
    assert "From pgl the decoder is carried over" in (tmp_path / "c/compare.md").read_text("utf-8")
    with pytest.raises(ValueError, match=r"finetune\.decoder_convs must be 1"):
        Comparison(plain.settings, whole(plain._pretrain, 1), replace(plain._finetune, decoder_convs=2))
