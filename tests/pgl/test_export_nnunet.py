"""``--format nnunet``: whole, under nnU-Net's names, and refused where it would not mean the same.

The loading functions of nnU-Net itself are tried in tests/nnunet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from jsonargparse import ArgumentParser
from torch import nn

from pgl.cli import main
from pgl.config import PretrainConfig
from pgl.encoder_settings import EncoderSettings
from pgl.export import load_encoder
from pgl.export.from_plans import pretraining_settings
from pgl.export.nnunet import count_classes, export_nnunet
from pgl.export.plans import differences, read_configuration
from pgl.settings import instantiated
from tests.pgl.encoder_files import INTENSITY, encoder_file, small_plans, write_plans
from tests.pgl.training_data import small_encoder


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return encoder_file(tmp_path / "encoder.pt")


@pytest.fixture
def plans(tmp_path: Path) -> Path:
    return write_plans(tmp_path / "plans.json", small_plans())


def network_of(plans: dict[str, Any], classes: int, configuration: str = "3d_fullres") -> ResidualEncoderUNet:
    """The network of a configuration, built from the text of the plans alone."""
    arguments = dict(plans["configurations"][configuration]["architecture"]["arch_kwargs"])
    names = {"Conv3d": nn.Conv3d, "InstanceNorm3d": nn.InstanceNorm3d, "LeakyReLU": nn.LeakyReLU}
    for key in ("conv_op", "norm_op", "nonlin"):
        arguments[key] = names[arguments[key].split(".")[-1]]
    return ResidualEncoderUNet(input_channels=1, num_classes=classes, deep_supervision=True, **arguments)


def weights_of(path: Path) -> dict[str, torch.Tensor]:
    return torch.load(path, weights_only=True)["network_weights"]


def test_every_tensor_of_the_plans_network_is_there_with_its_shape(encoder, plans, tmp_path):
    export_nnunet(encoder, tmp_path / "out.pth", plans, classes=5)
    wanted = network_of(small_plans(), 5).state_dict()
    written = weights_of(tmp_path / "out.pth")
    assert {name: t.shape for name, t in written.items()} == {name: t.shape for name, t in wanted.items()}
    for alias in (".all_modules.", "decoder.encoder.", "decoder.seg_layers."):
        assert any(alias in name for name in written)


def test_the_networks_encoder_gives_the_pretrained_features_bitwise(encoder, plans, tmp_path):
    export_nnunet(encoder, tmp_path / "out.pth", plans)
    unet = network_of(small_plans(), 2)
    unet.load_state_dict(weights_of(tmp_path / "out.pth"), strict=True)
    images = torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(unet.encoder.eval()(images), load_encoder(encoder)(images), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


def test_a_tensor_with_many_names_is_stored_once(encoder, plans, tmp_path):
    export_nnunet(encoder, tmp_path / "out.pth", plans)
    written = weights_of(tmp_path / "out.pth")
    stored = {t.data_ptr(): t.numel() for t in written.values()}
    assert sum(stored.values()) == sum(p.numel() for p in network_of(small_plans(), 2).parameters())
    assert len(stored) < len(written) / 2


def test_the_tensors_are_counted_once_by_where_they_come_from(encoder, plans, tmp_path):
    written = export_nnunet(encoder, tmp_path / "out.pth", plans)
    names = dict(network_of(small_plans(), 2).named_parameters())
    encoder_names = [name for name in names if name.startswith("encoder.")]
    heads = [name for name in names if "seg_layers" in name]
    assert written.pretrained == len(encoder_names)
    assert written.segmentation == len(heads) == 4
    assert written.fresh == len(names) - len(encoder_names) - len(heads)
    assert written.untrained == 0
    assert written.trained_steps == 7


def test_stages_beyond_the_trained_one_do_not_count_as_pretrained(plans, tmp_path):
    whole = export_nnunet(encoder_file(tmp_path / "e.pt"), tmp_path / "out.pth", plans)
    part = export_nnunet(encoder_file(tmp_path / "e.pt", level=1), tmp_path / "out.pth", plans)
    names = [name for name, _ in network_of(small_plans(), 2).named_parameters()]
    assert part.untrained == sum(name.startswith("encoder.stages.2.") for name in names) > 0
    assert part.pretrained == whole.pretrained - part.untrained


def test_the_decoders_values_follow_the_seed_alone(encoder, plans, tmp_path):
    def decoder(seed: int) -> torch.Tensor:
        torch.manual_seed(seed + 100)
        before = torch.get_rng_state()
        export_nnunet(encoder, tmp_path / "out.pth", plans, seed=seed)
        assert torch.equal(before, torch.get_rng_state())
        return weights_of(tmp_path / "out.pth")["decoder.stages.0.convs.0.conv.weight"]

    first = decoder(0)
    assert torch.equal(first, decoder(0))
    assert not torch.equal(first, decoder(1))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2]]}, ["strides"]),
        ({"features_per_stage": [4, 8, 16]}, ["features_per_stage"]),
        ({"kernel_sizes": 3}, ["kernel_sizes"]),
        ({"n_blocks_per_stage": [1, 3, 1]}, ["n_blocks_per_stage"]),
        ({"conv_bias": False}, ["conv_bias"]),
        ({"norm_op": "torch.nn.BatchNorm3d"}, ["norm_op", "norm_op_kwargs"]),
        ({"norm_op_kwargs": {"eps": 1e-3, "affine": True}}, ["norm_op_kwargs"]),
        ({"norm_op_kwargs": None}, ["norm_op_kwargs"]),
        ({"nonlin": "torch.nn.ReLU"}, ["nonlin", "nonlin_kwargs"]),
        ({"nonlin_kwargs": {"negative_slope": 0.2}}, ["nonlin_kwargs"]),
        ({"dropout_op": "torch.nn.Dropout3d"}, ["dropout_op"]),
        ({"block": "dynamic_network_architectures.building_blocks.residual.BottleneckD"}, ["block"]),
        ({"stem_channels": 6}, ["stem_channels"]),
        ({"squeeze_excitation": True}, ["squeeze_excitation"]),
        ({"conv_op": "torch.nn.Conv2d", "n_stages": "three"}, ["n_stages", "conv_op"]),
        (
            {
                "n_stages": 4,
                "features_per_stage": [4, 8, 8, 8],
                "kernel_sizes": [[3, 3, 3]] * 4,
                "strides": [[1, 1, 1], [2, 2, 2], [2, 2, 2], [2, 2, 2]],
                "n_blocks_per_stage": [1, 3, 4, 6],
            },
            ["n_stages", "features_per_stage", "kernel_sizes", "strides", "n_blocks_per_stage"],
        ),
    ],
)
def test_plans_of_another_network_are_refused_with_every_difference(encoder, tmp_path, changes, named):
    plans = write_plans(tmp_path / "plans.json", small_plans(**changes))
    with pytest.raises(ValueError, match="does not fit '3d_fullres'") as refused:
        export_nnunet(encoder, tmp_path / "out.pth", plans)
    items = str(refused.value).split(f"{plans}: ")[1].split(". Pretrain")[0].split("; ")
    assert sorted(item.split(":")[0] for item in items) == sorted(named)
    assert all("the plans have" in item and "the encoder has" in item for item in items)
    assert "--write-plans" in str(refused.value)
    assert not (tmp_path / "out.pth").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"nonlin_kwargs": None, "stem_channels": 4, "bottleneck_channels": None},
        {"norm_op_kwargs": {"affine": True}},
        {
            "n_blocks_per_stage": 1,
            "block": "dynamic_network_architectures.building_blocks.residual.BasicBlockD",
        },
        {"conv_op": "torch.nn.Conv3d", "norm_op": "torch.nn.InstanceNorm3d"},
    ],
)
def test_the_same_network_in_other_words_fits(encoder, tmp_path, changes):
    export_nnunet(encoder, tmp_path / "out.pth", write_plans(tmp_path / "p.json", small_plans(**changes)))
    assert weights_of(tmp_path / "out.pth")


def test_a_plain_network_is_refused_by_its_class(encoder, tmp_path):
    plans = small_plans()
    name = "dynamic_network_architectures.architectures.unet.PlainConvUNet"
    plans["configurations"]["3d_fullres"]["architecture"]["network_class_name"] = name
    with pytest.raises(ValueError, match=f"network_class_name: the plans have {name}"):
        export_nnunet(encoder, tmp_path / "out.pth", write_plans(tmp_path / "p.json", plans))


def test_what_a_configuration_inherits_is_read(encoder, plans, tmp_path):
    assert export_nnunet(encoder, tmp_path / "out.pth", plans, configuration="3d_lowres").pretrained
    with pytest.raises(ValueError, match="previous_stage: the network of a cascade's second stage"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, configuration="cascade")


def _without_architecture(plans: dict[str, Any]) -> None:
    configuration = plans["configurations"]["3d_fullres"]
    del configuration["architecture"]
    configuration |= {"UNet_class_name": "ResidualEncoderUNet", "UNet_base_num_features": 32}


def _circle(plans: dict[str, Any]) -> None:
    plans["configurations"]["3d_fullres"]["inherits_from"] = "cascade"


def _set(plans: dict[str, Any], key: str, value: Any) -> None:
    plans["configurations"]["3d_fullres"][key] = value


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_without_architecture, "older nnU-Net: update nnunetv2 and plan anew with nnUNetv2_plan_experiment"),
        (_circle, "inherits from itself"),
        (lambda plans: plans.clear(), "no 'configurations'"),
        (lambda plans: plans["configurations"].clear(), "no configuration '3d_fullres'"),
        (lambda plans: _set(plans, "inherits_from", "nowhere"), "no configuration 'nowhere'"),
        (lambda plans: _set(plans, "inherits_from", ["3d_lowres"]), "no configuration"),
        (lambda plans: _set(plans, "architecture", "ResEnc"), "must hold network_class_name and arch_kwargs"),
        (lambda plans: _set(plans, "normalization_schemes", None), "normalization_schemes"),
        (lambda plans: _set(plans, "normalization_schemes", ["CTNormalization"] * 2), "input channels"),
    ],
)
def test_plans_that_cannot_be_used_say_why(encoder, tmp_path, change, message):
    plans = small_plans()
    change(plans)
    with pytest.raises(ValueError, match=message):
        export_nnunet(encoder, tmp_path / "out.pth", write_plans(tmp_path / "plans.json", plans))


@pytest.mark.parametrize("convolutions", [None, [1], [1, 1, 1], [0, 1], ["1", 1], 10**6])
def test_a_decoder_that_cannot_be_built_is_named(encoder, tmp_path, convolutions):
    plans = write_plans(tmp_path / "p.json", small_plans(n_conv_per_stage_decoder=convolutions))
    with pytest.raises(ValueError, match="n_conv_per_stage_decoder must be 2 positive numbers"):
        export_nnunet(encoder, tmp_path / "out.pth", plans)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "[" * 100_000, "\x00"])
def test_a_file_that_is_no_plans_is_refused(encoder, tmp_path, text):
    (tmp_path / "plans.json").write_text(text, encoding="utf-8")
    with pytest.raises(ValueError, match=r"plans\.json cannot be read as plans"):
        export_nnunet(encoder, tmp_path / "out.pth", tmp_path / "plans.json")


@pytest.mark.parametrize(
    ("labels", "classes"),
    [
        ({"background": 0, "liver": 1, "tumour": 2}, 3),
        ({"background": 0, "liver": 1, "ignore": 2}, 2),
        ({"background": 0, "whole": [1, 2], "tumour": [2]}, 2),
        ({"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tumour": 3, "ignore": 4}, 3),
    ],
)
def test_classes_are_counted_as_nnunet_does(labels, classes):
    assert count_classes({"labels": labels}, "dataset.json") == classes


def test_dataset_json_gives_channels_and_classes(encoder, plans, tmp_path):
    dataset = tmp_path / "dataset.json"
    dataset.write_text(
        json.dumps({"channel_names": {"0": "CT"}, "labels": {"background": 0, "a": 1, "b": 2}})
    )
    export_nnunet(encoder, tmp_path / "out.pth", plans, dataset_json=dataset)
    assert weights_of(tmp_path / "out.pth")["decoder.seg_layers.0.weight"].shape[0] == 3
    dataset.write_text(json.dumps({"channel_names": {"0": "CT", "1": "PET"}, "labels": {"background": 0}}))
    with pytest.raises(ValueError, match="input channels: the plans have 2, the encoder 1"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, dataset_json=dataset)
    dataset.write_text(json.dumps({"channel_names": {"0": "CT"}, "labels": {"a": "one"}}))
    with pytest.raises(ValueError, match="a label must be a number"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, dataset_json=dataset)
    with pytest.raises(ValueError, match="not both"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, dataset_json=dataset, classes=2)


def test_it_says_what_nnunet_would_feed_otherwise(encoder, plans, tmp_path):
    notes = export_nnunet(encoder, tmp_path / "out.pth", plans).notes
    assert len(notes) == 2
    assert "spacing is [4.0, 0.8, 0.8] mm, pretraining's was [3.0, 1.0, 1.0] mm" in notes[0]
    assert "channel 0" in notes[1] and "'mean': 80.0" in notes[1] and "[-1024.0, 325.0] HU" in notes[1]
    other = small_plans()
    other["transpose_forward"] = [1, 0, 2]
    other["configurations"]["3d_fullres"]["normalization_schemes"] = ["ZScoreNormalization"]
    notes = export_nnunet(encoder, tmp_path / "out.pth", write_plans(tmp_path / "p.json", other)).notes
    assert any("transpose" in note for note in notes)
    assert any("ZScoreNormalization" in note for note in notes)


def test_written_plans_have_the_encoders_network_and_input(encoder, tmp_path):
    other = small_plans(features_per_stage=[8, 16, 32], strides=[[1, 1, 1], [2, 2, 2], [2, 2, 2]])
    source = write_plans(tmp_path / "plans.json", other)
    made = tmp_path / "made" / "pglPlans.json"
    written = export_nnunet(encoder, tmp_path / "out.pth", source, write_plans=made, classes=3)
    plans = json.loads(made.read_text(encoding="utf-8"))
    configuration = plans["configurations"]["3d_fullres"]
    assert written.notes == [] and written.plans_name == plans["plans_name"] == "pglPlans"
    assert list(plans["configurations"]) == ["3d_fullres"]
    assert configuration["spacing"] == [3.0, 1.0, 1.0]
    assert configuration["data_identifier"] == "pglPlans_3d_fullres"
    # Total stride (2, 4, 4): the nearest multiples of 14, 60, 66.
    assert configuration["patch_size"] == [14, 60, 64]
    assert configuration["median_image_size_in_voxels"] == [40.0, 80.0, 96.0]
    assert configuration["batch_size"] == 2
    channel = plans["foreground_intensity_properties_per_channel"]["0"]
    assert [channel["percentile_00_5"], channel["percentile_99_5"]] == INTENSITY["clip_hu"]
    assert (channel["mean"], channel["std"], channel["max"]) == (-158.58, 324.70, 900.0)
    network_of(plans, 3).load_state_dict(weights_of(tmp_path / "out.pth"), strict=True)
    assert (
        differences(
            torch.load(encoder, weights_only=True)["network"], read_configuration(plans, "3d_fullres", "p"), 1
        )
        == []
    )
    assert json.loads(source.read_text(encoding="utf-8")) == other


def test_written_plans_keep_the_axes_of_pretraining(encoder, tmp_path):
    other = small_plans()
    # Entry i belongs to axis transpose_forward[i]: here the voxels' W, D, H.
    other |= {"transpose_forward": [2, 0, 1], "transpose_backward": [1, 2, 0]}
    other["original_median_spacing_after_transp"] = [5.0, 3.0, 1.0]
    other["original_median_shape_after_transp"] = [10, 20, 30]
    other["configurations"]["3d_fullres"]["patch_size"] = [8, 10, 24]
    made = tmp_path / "pglPlans.json"
    export_nnunet(encoder, tmp_path / "out.pth", write_plans(tmp_path / "p.json", other), write_plans=made)
    plans = json.loads(made.read_text(encoding="utf-8"))
    assert plans["transpose_forward"] == plans["transpose_backward"] == [0, 1, 2]
    assert plans["original_median_spacing_after_transp"] == [3.0, 1.0, 5.0]
    assert plans["original_median_shape_after_transp"] == [20, 30, 10]
    # The plans' own (10, 24, 8), but not below pretraining's (4, 16, 16).
    assert plans["configurations"]["3d_fullres"]["patch_size"] == [10, 24, 16]
    assert plans["configurations"]["3d_fullres"]["median_image_size_in_voxels"] == [20.0, 30.0, 50.0]


def test_the_patch_of_written_plans_can_be_chosen(encoder, plans, tmp_path):
    made = tmp_path / "pglPlans.json"
    export_nnunet(encoder, tmp_path / "o.pth", plans, write_plans=made, patch_size=(8, 32, 36))
    written = json.loads(made.read_text(encoding="utf-8"))
    assert written["configurations"]["3d_fullres"]["patch_size"] == [8, 32, 36]
    with pytest.raises(ValueError, match=r"multiple of the encoder's stride \[2, 4, 4\], got \[8, 32, 34\]"):
        export_nnunet(encoder, tmp_path / "o.pth", plans, write_plans=made, patch_size=(8, 32, 34))


def test_plans_of_others_are_never_replaced(encoder, plans, tmp_path):
    before = plans.read_bytes()
    for target in (plans, tmp_path / "garbage.json"):
        if target != plans:
            target.write_text("garbage", encoding="utf-8")
        with pytest.raises(FileExistsError, match="exists and was not written by pgl"):
            export_nnunet(encoder, tmp_path / "out.pth", plans, write_plans=target)
    assert plans.read_bytes() == before
    made = tmp_path / "made.json"
    for _ in range(2):
        export_nnunet(encoder, tmp_path / "out.pth", plans, write_plans=made)
    with pytest.raises(ValueError, match="same file"):
        export_nnunet(encoder, made, plans, write_plans=made)
    with pytest.raises(ValueError, match=r"NAME\.json"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, write_plans=tmp_path / "made.yaml")


def test_an_encoder_pretrained_with_the_plans_settings_fits_them(tmp_path):
    plans = write_plans(tmp_path / "plans.json", small_plans())
    settings = pretraining_settings(plans)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(settings), encoding="utf-8")
    parser = ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(PretrainConfig)
    words = [f"--config={tmp_path / 'config.yaml'}", "--data=cache", "--output=run"]
    config = instantiated(parser, parser.parse_args(words))
    assert settings["intensity"] == {"clip_hu": [-60.0, 210.0], "mean_hu": 80.0, "std_hu": 45.0}
    encoder = encoder_file(tmp_path / "e.pt", config.encoder, intensity=settings["intensity"])
    notes = export_nnunet(encoder, tmp_path / "out.pth", plans).notes
    assert len(notes) == 1 and "spacing" in notes[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block": "BottleneckD"}, "pgl does not build the encoder of '3d_fullres': block: the plans have"),
        ({"nonlin": "torch.nn.ReLU"}, "nonlin: the plans have ReLU"),
        ({"strides": 2}, "no residual encoder in 3D"),
        ({"strides": [[1, 1], [2, 2], [2, 2]]}, "no residual encoder in 3D"),
        ({"features_per_stage": None}, "no residual encoder in 3D"),
    ],
)
def test_plans_whose_encoder_cannot_be_pretrained_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        pretraining_settings(write_plans(tmp_path / "plans.json", small_plans(**changes)))


@pytest.mark.parametrize("first", [(1, 2, 2), None])
def test_an_encoder_that_nnunet_cannot_decode_is_refused(tmp_path, plans, first):
    settings = small_encoder()
    if first:
        settings.strides[0] = first
    else:
        settings = EncoderSettings([4], [(1, 1, 1)], [(3, 3, 3)], [1])
    encoder = encoder_file(tmp_path / "e.pt", settings)
    with pytest.raises(ValueError, match="two stages or more, the first of stride 1"):
        export_nnunet(encoder, tmp_path / "out.pth", plans, write_plans=tmp_path / "made.json")


def test_the_command_says_what_came_from_where_and_what_to_do_next(encoder, plans, tmp_path, capsys):
    words = ["export", str(encoder), "--format", "nnunet", "--output", str(tmp_path / "out.pth")]
    made = tmp_path / "pglPlans.json"
    assert main([*words, "--plans", str(plans), "--classes", "3", "--write-plans", str(made)]) == 0
    out = capsys.readouterr().out
    assert "from 7 steps of pretraining" in out and "fresh (decoder)" in out
    assert "nnUNetv2_preprocess -d DATASET -plans_name pglPlans -c 3d_fullres" in out
    assert f"-p pglPlans -pretrained_weights {tmp_path / 'out.pth'}" in out
    assert "note:" not in out
    assert main([*words, "--plans", str(plans)]) == 0
    assert capsys.readouterr().out.count("note: ") == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--format", "nnunet"], "--format nnunet needs --plans FILE"),
        (["--plans", "p.json"], "--plans is for --format nnunet, got encoder"),
        (["--format", "nnssl", "--write_plans", "p.json"], "--write_plans is for --format nnunet, got nnssl"),
        (["--patch_size", "8,8,8"], "--patch_size is for --format nnunet and nnssl, got encoder"),
        (["--format", "nnunet", "--plans", "p", "--patch_size", "8,8,8"], "--patch_size needs --write_plans"),
        (
            ["--format", "nnunet", "--plans", "p", "--classes", "2", "--dataset-json", "d"],
            "--dataset_json and --classes exclude each other",
        ),
    ],
)
def test_options_that_do_not_belong_together_are_wrong_usage(words, message, capsys):
    assert main(["export", "run", "--output", "out.pth", *words]) == 2
    assert message in capsys.readouterr().err
