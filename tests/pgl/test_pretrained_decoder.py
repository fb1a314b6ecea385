"""A decoder that ``method.features decoder`` pretrained goes where the encoder goes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet

from pgl.backbone import Backbone
from pgl.cli import main
from pgl.comparison.config import Comparison
from pgl.comparison.page import _of_pretrainings
from pgl.comparison.runs import compare
from pgl.comparison.tables import notes
from pgl.config import PretrainConfig
from pgl.downstream.config import FinetuneConfig
from pgl.downstream.train import finetune
from pgl.export import export_encoder, load_encoder, read_export
from pgl.export.nnssl import export_nnssl
from pgl.export.nnunet import export_nnunet
from pgl.networks import constructor_arguments
from pgl.pretrain import pretrain
from pgl.runs.folder import LAST, checkpoint_path
from pgl.training.checkpoint import load_checkpoint

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


def with_checkpoint(run: Path, saved: dict[str, Any]) -> Path:
    (run / "checkpoints").mkdir(parents=True)
    torch.save(saved, run / "checkpoints/last.pt")
    return run


def one_step(folder: Path, weights: Path, **changes: Any) -> FinetuneConfig:
    """A fine-tuning of one step, at a rate so small that weights stay what they were."""
    data = folder / "cache"
    if not data.is_dir():
        labelled_cache(data)
    config = small_finetune(data, folder / "run", steps=1, weights=str(weights), encoder=None)
    rate = replace(config.optimizer, learning_rate=1e-30, warmup_steps=0)
    return replace(config, optimizer=rate, **changes)


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
    content = read_export(files[level])
    unet.encoder.load_state_dict(content["network_weights"])
    assert not unet.decoder.load_state_dict(content["decoder_weights"], strict=False).unexpected_keys
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


@pytest.mark.parametrize(("level", "more", "finest"), [(-1, [], 1), (-2, [], 0), (-1, [-2], 0), (0, [-1], 0)])
def test_stages_may_be_counted_from_the_deepest(runs, tmp_path, level, more, finest):
    saved = load_checkpoint(checkpoint_path(runs[0], LAST))
    saved["config"]["method"].update(feature_level=level, more_levels=more)
    network = export_encoder(with_checkpoint(tmp_path / "run", saved), tmp_path / "e.pt")
    assert network["decoder_level"] == finest
    stages = {name.split(".")[1] for name in read_export(tmp_path / "e.pt")["decoder_weights"]}
    assert stages == {str(stage) for stage in range(2 - finest)}


def test_fine_tuning_starts_from_the_decoder_too_and_names_it(files, tmp_path, capfd):
    finetune(one_step(tmp_path, files[1]))
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


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"decoder_convs": 2}, "decoder_convs is 2, and was 1 in pretraining"),
        (
            {"encoder": replace(small_encoder(), n_blocks_per_stage=[1, 1, 2])},
            "the network has another encoder than the file",
        ),
    ],
)
def test_a_decoder_of_other_stages_is_left_out_and_that_is_said(files, tmp_path, capfd, changes, why):
    finetune(one_step(tmp_path, files[0], **changes))
    named = json.loads((tmp_path / "run/weights.json").read_text("utf-8"))
    assert not any(name.startswith("decoder.") for name in named["loaded"])
    assert {f"decoder.{name}" for name in once(read_export(files[0])["decoder_weights"])} <= set(
        named["unused"]
    )
    assert f"the pretrained decoder is left out: {why}" in " ".join(capfd.readouterr().err.split())


def test_a_run_is_not_resumed_with_other_weights(files, tmp_path):
    file = tmp_path / "weights.pt"
    content = read_export(files[1])
    torch.save(content, file)
    config = one_step(tmp_path, file)
    finetune(config)
    del content["decoder_weights"], content["network"]["decoder_level"]
    torch.save(content, file)
    with pytest.raises(ValueError, match="holds other weights than those that the run in"):
        finetune(replace(config, resume=True))


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


@pytest.mark.parametrize(
    ("level", "plans", "taken"),
    [(1, [2, 1], 0), (0, [2, 1], 0), (0, [1, 2], 1), (1, [1, 2], 1), (0, [1, 1], 2)],
)
def test_nnunet_gets_the_stages_that_its_plans_have_too_and_is_told_of_the_others(
    files, tmp_path, level, plans, taken
):
    file = write_plans(tmp_path / "plans.json", small_plans(n_conv_per_stage_decoder=plans))
    written = export_nnunet(files[level], tmp_path / "out.pth", file)
    without = read_export(files[level])
    pretrained = without.pop("decoder_weights")
    del without["network"]["decoder_level"]
    torch.save(without, tmp_path / "without.pt")
    fresh = export_nnunet(tmp_path / "without.pt", tmp_path / "fresh.pth", file)
    assert written.pretrained == fresh.pretrained + taken * (len(OF_A_STAGE) + 2)
    weights, other = weights_of(tmp_path / "out.pth"), weights_of(tmp_path / "fresh.pth")
    for name in other:
        stage = name.split(".")[2]
        theirs = name.startswith(("decoder.stages", "decoder.transpconvs")) and int(stage) < taken
        expected = pretrained[name.removeprefix("decoder.")] if theirs else other[name]
        assert torch.equal(weights[name], expected), name
    left_out = (2 - level) - taken
    told = [note for note in written.notes if "n_conv_per_stage_decoder" in note]
    assert len(told) == (left_out > 0)
    if told:
        assert told[0].startswith(f"{left_out} of the decoder's pretrained stages") and str(plans) in told[0]


def test_nnssl_has_a_place_for_the_encoder_alone(files, tmp_path):
    export_nnssl(files[1], tmp_path / "e.pth")
    written = torch.load(tmp_path / "e.pth", weights_only=True)
    assert all(name.startswith("encoder.") for name in written["network_weights"])
    assert "decoder_level" not in written["pgl"]["network"]


def test_the_command_says_that_the_decoder_is_in_the_file(runs, tmp_path, capfd):
    assert main(["export", str(runs[1]), "--output", str(tmp_path / "e.pt")]) == 0
    assert "encoder and decoder (its stage 1 and coarser ones) after 2 steps" in capfd.readouterr().out


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
        (
            lambda c: c["decoder_weights"].update({"encoder.stem": torch.zeros(1)}),
            r"encoder\.stem is not part",
        ),
        (lambda c: c["decoder_weights"].update({7: torch.zeros(1)}), "named by text, got 7"),
        (
            lambda c: c["decoder_weights"].update({"transpconvs.0.bias": torch.zeros(8, dtype=torch.cfloat)}),
            "dense real numbers, got torch.complex64",
        ),
        (
            lambda c: c["decoder_weights"].update({"transpconvs.0.bias": torch.zeros(8, device="meta")}),
            "dense real numbers, got .* on meta",
        ),
        (lambda c: c["network"].pop("decoder_level"), r"network\.decoder_level .* got None"),
        (lambda c: c["network"].update(decoder_level=2), r"network\.decoder_level .* got 2 with 3 stages"),
        (lambda c: c["network"].update(decoder_level=0), "is missing"),
    ],
)
@pytest.mark.parametrize("reader", ["nnunet", "finetune"])
def test_a_decoder_that_was_tampered_with_is_refused(files, tmp_path, change, message, reader):
    content = torch.load(files[1], weights_only=True)
    change(content)
    torch.save(content, tmp_path / "e.pt")
    with pytest.raises(ValueError, match=message) as refused:
        if reader == "nnunet":
            plans = write_plans(tmp_path / "plans.json", small_plans())
            export_nnunet(tmp_path / "e.pt", tmp_path / "out.pth", plans)
        else:
            finetune(one_step(tmp_path, tmp_path / "e.pt"))
    assert "e.pt" in str(refused.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["online"]["decoder"].update({"stages": torch.zeros(1)}), None),
        (lambda c: c["online"]["decoder"].pop("transpconvs.0.bias"), r"transpconvs\.0\.bias is missing"),
        (
            lambda c: c["online"]["decoder"].update({"transpconvs.0.bias": torch.zeros(1).expand(10**15)}),
            "does not hold its values",
        ),
        (lambda c: c["online"].pop("decoder"), "damaged"),
        (lambda c: c["config"]["method"].update(feature_level=99), "damaged"),
        (lambda c: c["network"]["arguments"].update(n_stages=1), "damaged"),
        (lambda c: c["network"]["arguments"].update(n_stages=10**12), "blocks"),
    ],
)
def test_a_checkpoint_that_was_tampered_with_is_refused_before_memory_is_taken(
    runs, tmp_path, change, message
):
    saved = load_checkpoint(checkpoint_path(runs[1], LAST))
    change(saved)
    run = with_checkpoint(tmp_path / "run", saved)
    if message is None:  # of no stage, so nobody's
        export_encoder(run, tmp_path / "e.pt")
        assert "stages" not in read_export(tmp_path / "e.pt")["decoder_weights"]
        return
    with pytest.raises(ValueError, match=message) as refused:
        export_encoder(run, tmp_path / "e.pt")
    assert "last.pt" in str(refused.value)


def test_a_tensor_that_shares_a_larger_storage_does_not_drag_it_into_the_file(runs, tmp_path):
    saved = load_checkpoint(checkpoint_path(runs[1], LAST))
    for part, name in (("encoder", "stem.convs.0.conv.weight"), ("decoder", "transpconvs.0.bias")):
        tensor = saved["online"][part][name]
        saved["online"][part][name] = torch.zeros(10**6)[: tensor.numel()].view(tensor.shape)
    export_encoder(with_checkpoint(tmp_path / "run", saved), tmp_path / "e.pt")
    assert (tmp_path / "e.pt").stat().st_size < 10**6


def test_the_encoder_alone_can_be_had_from_such_a_file(runs, files):
    encoder = load_encoder(files[1])
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
    told = "From pgl the decoder is carried over"
    assert told in (tmp_path / "c/compare.md").read_text("utf-8")
    page = " ".join((tmp_path / "c/report.html").read_text("utf-8").split())
    for words in (told, "first weights differ, and from pgl the decoder's.", "method.features (pgl alone)",
                  "method.feature_level (pgl alone)"):  # fmt: skip
        assert words in page, words
    assert not any(told in note for note in notes(plain, []))
    assert "method.features" in _of_pretrainings(plain)
    with pytest.raises(ValueError, match=r"finetune\.decoder_convs must be 1"):
        Comparison(plain.settings, whole(plain._pretrain, 1), replace(plain._finetune, decoder_convs=2))
    for starts in (("byol",), ("random",)):
        with pytest.raises(ValueError, match="an option of pgl, which is not among"):
            Comparison(
                replace(plain.settings, initialisations=starts), whole(plain._pretrain, 1), plain._finetune
            )
