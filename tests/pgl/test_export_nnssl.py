"""``--format nnssl``: what nnU-Net's ``nnUNetv2_train_pretrained`` reads, in the form in which it reads it.

The steps of that route are retraced here on the network library; tests/nnunet calls nnU-Net's own functions
where the installed release has them.
"""

from __future__ import annotations

import json
import pydoc
from pathlib import Path
from typing import Any

import pytest
import torch
from dynamic_network_architectures.architectures.abstract_arch import test_submodules_loadable

from pgl.cli import main
from pgl.export import load_encoder
from pgl.export.nnssl import export_nnssl
from tests.pgl.encoder_files import encoder_file
from tests.pgl.training_data import small_encoder

# It is a check of the library, not a test of this file.
test_submodules_loadable.__test__ = False


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return encoder_file(tmp_path / "encoder.pt")


@pytest.fixture
def checkpoint(encoder: Path, tmp_path: Path) -> dict[str, Any]:
    export_nnssl(encoder, tmp_path / "out.pth", patch_size=(8, 32, 32))
    return torch.load(tmp_path / "out.pth", weights_only=True)


def planned_network(plan: dict[str, Any], channels: int = 1) -> Any:
    """The network that the route builds, which finds classes by their dotted names."""
    architecture = plan["architecture_plans"]
    arguments = dict(architecture["arch_kwargs"])
    for key in architecture["arch_kwargs_requiring_import"]:
        arguments[key] = pydoc.locate(arguments[key]) if arguments[key] is not None else None
    network_class = pydoc.locate(architecture["arch_class_name"])
    return network_class(input_channels=channels, num_classes=3, deep_supervision=False, **arguments)


def load_part(network: Any, target: str, weights: dict[str, torch.Tensor], prefix: str) -> None:
    part = {name.replace(prefix, "").lstrip("."): t for name, t in weights.items() if name.startswith(prefix)}
    network.get_submodule(target).load_state_dict(part, strict=True)


@pytest.mark.parametrize("channels", [1, 2])
def test_encoder_and_stem_load_strictly_into_the_planned_network(checkpoint, encoder, channels):
    plan, weights = checkpoint["nnssl_adaptation_plan"], dict(checkpoint["network_weights"])
    network = planned_network(plan, channels)
    assert plan["key_to_stem"] not in weights  # it is a module's name: the route then loads it by itself
    if channels > plan["pretrain_num_input_channels"]:
        first = weights[plan["keys_to_in_proj"][0] + ".weight"]
        for key in plan["keys_to_in_proj"]:
            weights[key + ".weight"] = first.repeat(1, channels, 1, 1, 1) / channels
    load_part(network, network.key_to_encoder, weights, plan["key_to_encoder"])
    load_part(network, network.key_to_stem, weights, plan["key_to_stem"])
    images = torch.randn(1, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        features = network.encoder.eval()(images.expand(-1, channels, -1, -1, -1))
        expected = load_encoder(encoder)(images)
    for one, other in zip(features, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_the_keys_are_those_that_the_network_class_names(checkpoint):
    plan = checkpoint["nnssl_adaptation_plan"]
    network = planned_network(plan)
    test_submodules_loadable(network)
    assert plan["key_to_encoder"] == network.key_to_encoder
    assert plan["key_to_stem"] == network.key_to_stem
    assert plan["keys_to_in_proj"] == list(network.keys_to_in_proj)
    assert plan["key_to_lpe"] is network.key_to_lpe is None


def test_the_plan_is_json_and_tells_pretrainings_input(checkpoint):
    plan = checkpoint["nnssl_adaptation_plan"]
    assert json.loads(json.dumps(plan)) == plan
    assert plan["pretrain_num_input_channels"] == 1
    assert plan["recommended_downstream_patchsize"] == [8, 32, 32]
    (configuration,) = plan["pretrain_plan"]["configurations"].values()
    assert configuration["spacing"] == [3.0, 1.0, 1.0]
    assert configuration["patch_size"] == [4, 16, 16]
    assert plan["architecture_kwargs"]["kernel_sizes"] == [[1, 3, 3], [3, 3, 3], [3, 3, 3]]
    assert plan["architecture_kwargs"]["n_stages"] == 3


def test_the_citations_have_the_form_that_is_printed(checkpoint):
    (citation,) = checkpoint["citations"]
    assert set(citation) == {"type", "name", "apa_citations"}
    assert "2011.12640" in citation["apa_citations"][0]


def test_the_patch_is_pretrainings_unless_chosen(encoder, tmp_path):
    export_nnssl(encoder, tmp_path / "out.pth")
    plan = torch.load(tmp_path / "out.pth", weights_only=True)["nnssl_adaptation_plan"]
    assert plan["recommended_downstream_patchsize"] == [4, 16, 16]
    with pytest.raises(ValueError, match=r"multiple of the encoder's stride \[2, 4, 4\], got \[3, 16, 16\]"):
        export_nnssl(encoder, tmp_path / "out.pth", patch_size=(3, 16, 16))


def test_an_encoder_that_nnunet_cannot_decode_is_refused(tmp_path):
    settings = small_encoder()
    settings.strides[0] = (1, 2, 2)
    with pytest.raises(ValueError, match="two stages or more, the first of stride 1"):
        export_nnssl(encoder_file(tmp_path / "e.pt", settings), tmp_path / "out.pth")


def test_the_command_names_the_next_steps(encoder, tmp_path, capsys):
    output = str(tmp_path / "out.pth")
    words = ["export", str(encoder), "--format", "nnssl", "--output", output, "--patch_size", "8,32,32"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert f"{output}: the encoder after 7 steps" in out
    assert f"nnUNetv2_preprocess_like_nnssl -d DATASET -n NAME -pc {output}" in out
    assert main([*words[:-1], "8,32"]) == 2
    assert "--patch_size: expected D,H,W" in capsys.readouterr().err
