"""The network read at other places: several stages, the decoder, outputs computed again to save memory."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

from pgl.backbone import Backbone
from pgl.encoder_settings import stride_at
from pgl.networks import seeded_module

from .training_data import small_encoder


def backbone(*arguments, **options) -> Backbone:
    return seeded_module(0, lambda: Backbone(small_encoder(), *arguments, **options))


def images() -> torch.Tensor:
    return torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(1))


def trained(module: nn.Module) -> set[str]:
    return {name for name, parameter in module.named_parameters() if parameter.requires_grad}


def test_several_stages_are_those_of_the_encoder_in_the_order_of_the_settings():
    network = backbone(1, [0, -1])
    assert network.levels == [1, 0, 2] and network.channels_of == [8, 4, 8]
    assert network.strides == [stride_at(small_encoder(), level) for level in (1, 0, 2)]
    every = network.encoder(images())
    maps = network.maps(images())
    assert all(torch.equal(found, every[level]) for found, level in zip(maps, (1, 0, 2), strict=True))
    assert torch.equal(network(images()), every[1])


def test_stages_that_no_chosen_map_needs_are_not_trained():
    names = trained(backbone(0, [1]))
    assert any(".stages.1." in name for name in names) and not any(".stages.2." in name for name in names)


def unet() -> ResidualEncoderUNet:
    settings = small_encoder()
    return ResidualEncoderUNet(
        input_channels=1,
        n_stages=3,
        features_per_stage=settings.features_per_stage,
        conv_op=nn.Conv3d,
        kernel_sizes=settings.kernel_sizes,
        strides=settings.strides,
        n_blocks_per_stage=settings.n_blocks_per_stage,
        num_classes=1,
        n_conv_per_stage_decoder=1,
        conv_bias=True,
        norm_op=nn.InstanceNorm3d,
        norm_op_kwargs={"eps": 1e-5, "affine": True},
        nonlin=nn.LeakyReLU,
        nonlin_kwargs={"inplace": True},
        deep_supervision=True,
    )


@pytest.mark.parametrize("level", [0, 1, -1])
def test_decoder_maps_are_what_nnunets_own_unet_computes_before_its_outputs(level):
    network = backbone(level, decoder=True)
    theirs = unet()
    theirs.encoder.load_state_dict(network.encoder.state_dict(), strict=True)
    # nnU-Net's decoder names its encoder a second time; all its other weights are ours.
    missing, unexpected = theirs.decoder.load_state_dict(network.decoder.state_dict(), strict=False)
    assert not unexpected and all(name.startswith("encoder.") for name in missing)
    place = level % 2
    kept = []
    theirs.decoder.stages[1 - place].register_forward_hook(lambda _, __, out: kept.append(out))
    theirs(images())
    assert torch.equal(network(images()), kept[0])
    assert network.stride == stride_at(small_encoder(), place)


def test_decoder_stages_finer_than_any_chosen_one_and_its_outputs_are_not_trained():
    names = {name for name in trained(backbone(1, decoder=True)) if name.startswith("decoder.")}
    assert names and all(".0." in name for name in names)
    whole = {name for name in trained(backbone(0, decoder=True)) if name.startswith("decoder.")}
    assert any(".stages.1." in name for name in whole) and not any("seg_layers" in name for name in whole)


@pytest.mark.parametrize("decoder", [False, True])
def test_computing_again_saves_activations_and_changes_no_gradient(decoder):
    kept = []
    results = []
    for recompute in (False, True):
        network = (
            backbone(0, decoder=decoder, recompute=recompute) if decoder else backbone(recompute=recompute)
        )
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, s=saved: s.append(t.numel()) or t, lambda t: t
        ):
            out = network(images())
        out.square().mean().backward()
        kept.append(sum(saved))
        results.append((out, [p.grad for p in network.parameters() if p.grad is not None]))
    assert torch.equal(results[0][0], results[1][0])
    assert all(torch.equal(a, b) for a, b in zip(results[0][1], results[1][1], strict=True))
    assert kept[1] < kept[0] / 2


@pytest.mark.parametrize("decoder", [False, True])
def test_running_statistics_count_a_batch_once_where_it_is_computed_again(decoder):
    settings, states = replace(small_encoder(), norm="batch"), []
    for recompute in (False, True):
        network = seeded_module(0, lambda r=recompute: Backbone(settings, 0, decoder=decoder, recompute=r))
        network(images()).square().mean().backward()
        states.append(dict(network.named_buffers()))
        assert {m.momentum for m in network.modules() if isinstance(m, nn.BatchNorm3d)} == {0.1}
    assert any("running_mean" in name for name in states[0])
    for name, value in states[0].items():
        assert torch.equal(states[1][name], value), name


def test_copies_of_a_stage_share_nothing():
    network = backbone(0, decoder=True)
    assert len(list(network.parameters())) == len({p.data_ptr() for p in network.parameters()})


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((3,), r"method\.feature_level must lie in \[-3, 2\] for the 3 stages of the encoder, got 3"),
        ((0, [0]), "each once"),
        ((0, [1, -2]), "each once"),
        (
            (2, [], True),
            r"method\.feature_level must lie in \[-2, 1\] for the 2 stages of the decoder, got 2",
        ),
    ],
)
def test_stages_that_there_are_not_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        backbone(*arguments)
