"""The encoder: built from its description, named as nnU-Net names it, read at one stage."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from torch import nn

from pgl.encoder_settings import default_encoder, stride_at
from pgl.networks import build_encoder, describe

from .training_data import small_encoder


def test_a_description_survives_json_and_builds_the_same_names_and_shapes():
    description = describe(small_encoder())
    again = json.loads(json.dumps(description))
    assert again == description
    first, second = build_encoder(description).state_dict(), build_encoder(again).state_dict()
    assert {k: v.shape for k, v in first.items()} == {k: v.shape for k, v in second.items()}


def test_parameter_names_and_shapes_are_those_of_nnunets_residual_encoder_unet():
    unet_module = pytest.importorskip("dynamic_network_architectures.architectures.unet")
    settings = small_encoder()
    unet = unet_module.ResidualEncoderUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=settings.features_per_stage,
        conv_op=nn.Conv3d,
        kernel_sizes=settings.kernel_sizes,
        strides=settings.strides,
        n_blocks_per_stage=settings.n_blocks_per_stage,
        num_classes=2,
        n_conv_per_stage_decoder=[1, 1],
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
    )
    weights = build_encoder(describe(settings)).state_dict()
    unet.encoder.load_state_dict(weights, strict=True)


def test_strides_multiply_from_stage_to_stage():
    assert [stride_at(small_encoder(), i) for i in range(3)] == [(1, 1, 1), (1, 2, 2), (2, 4, 4)]
    assert stride_at(default_encoder(), -1) == (4, 16, 16)


def test_a_level_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match=r"feature_level must lie in \[-3, 2\] for the 3 stages of .* got 3"):
        stride_at(small_encoder(), 3)


def test_a_description_of_another_class_is_refused():
    description = describe(small_encoder())
    with pytest.raises(ValueError, match="network class must be"):
        build_encoder({**description, "class": "os.system"})
    with pytest.raises(ValueError, match="network argument nonlin must be one of"):
        build_encoder({**description, "arguments": {**description["arguments"], "nonlin": "os.system"}})


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"strides": [(1, 1, 1)]}, "one entry a stage"),
        ({"features_per_stage": [4, 0, 8]}, "features_per_stage must hold positive"),
        ({"strides": [(1, 1, 1), (1, 2, 2), (0, 2, 2)]}, "strides must hold three positive"),
        ({"kernel_sizes": [(1, 3, 3), (2, 3, 3), (3, 3, 3)]}, "kernel_sizes must be odd"),
        ({"norm": "layer"}, "norm must be one of"),
    ],
)
def test_wrong_settings_are_refused_by_name(change, words):
    with pytest.raises(ValueError, match=f"encoder.*{words}"):
        replace(small_encoder(), **change)
