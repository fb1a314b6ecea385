"""The exported encoder: the same numbers, nnU-Net's names, and nothing but data in the file."""

from __future__ import annotations

import os
import pickle
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import pytest
import torch
from dynamic_network_architectures.architectures.unet import ResidualEncoderUNet
from torch import nn

import pgl
from pgl.config import PretrainConfig
from pgl.export import export_encoder, load_encoder, read_export
from pgl.export.nnssl import export_nnssl
from pgl.export.nnunet import export_nnunet
from pgl.networks import build_encoder, describe
from pgl.pretrain import pretrain
from pgl.runs.folder import BEST, INITIAL, LAST, checkpoint_path
from pgl.training.checkpoint import load_checkpoint
from tests.pgl.encoder_files import small_plans, write_plans
from tests.pgl.training_data import make_cache, small_config, small_encoder


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    return pretrain(small_config(make_cache(folder / "cache"), folder / "run", steps=3))


@pytest.fixture(scope="module")
def exported(run: Path) -> Path:
    export_encoder(run, run.parent / "encoder.pt")
    return run.parent / "encoder.pt"


@pytest.fixture
def images() -> torch.Tensor:
    return torch.randn(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(0))


def trained_encoder(run: Path, name: str = LAST) -> nn.Module:
    encoder = build_encoder(describe(small_encoder()))
    encoder.load_state_dict(load_checkpoint(checkpoint_path(run, name))["online"]["encoder"])
    return encoder.eval()


@torch.no_grad()
def same_features(one: nn.Module, other: nn.Module, images: torch.Tensor) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one(images), other(images), strict=True))


def test_the_loaded_encoder_gives_the_trained_encoders_features_bitwise(run, exported, images):
    loaded = pgl.load_encoder(exported)
    assert same_features(loaded, trained_encoder(run), images)
    assert not same_features(loaded, trained_encoder(run, INITIAL), images)


def test_the_online_network_is_exported_not_the_target(run, exported):
    target = load_checkpoint(checkpoint_path(run, LAST))["target"]["encoder"]
    weights = read_export(exported)["network_weights"]
    assert weights.keys() == target.keys()
    assert any(not torch.equal(weights[name], target[name]) for name in weights)


@pytest.mark.parametrize("name", [INITIAL, BEST, LAST])
def test_every_checkpoint_can_be_exported(run, tmp_path, images, name):
    network = export_encoder(run, tmp_path / "encoder.pt", name.removesuffix(".pt"))
    assert network["trained_steps"] == load_checkpoint(checkpoint_path(run, name))["step"]
    assert same_features(load_encoder(tmp_path / "encoder.pt"), trained_encoder(run, name), images)


def test_the_file_holds_plain_tensors_and_plain_data_alone(exported):
    def assert_plain(value: Any) -> None:
        if type(value) is dict:
            for key, item in value.items():
                assert type(key) is str
                assert_plain(item)
        elif type(value) is list:
            for item in value:
                assert_plain(item)
        else:
            assert type(value) in (torch.Tensor, str, int, float, bool)

    assert_plain(torch.load(exported, weights_only=True))


def test_the_description_tells_how_to_feed_the_network(exported):
    network = torch.load(exported, weights_only=True)["network"]
    assert network["class"].endswith(".ResidualEncoder")
    assert network["input_channels"] == 1
    assert network["feature_strides"] == [[1, 1, 1], [1, 2, 2], [2, 4, 4]]
    assert network["feature_level"] == 2
    assert network["patch_size"] == [4, 16, 16]
    assert network["spacing_mm"] == [3.0, 1.0, 1.0]
    assert network["intensity"] == {"clip_hu": [-1024.0, 325.0], "mean_hu": -158.58, "std_hu": 324.70}
    assert network["pgl_ops_version"] == pgl.__version__
    assert network["format_version"] == 1


def test_the_weights_fit_nnunets_encoder_by_name(exported, images):
    file = read_export(exported)
    arguments = {
        **file["network"]["arguments"],
        "conv_op": nn.Conv3d,
        "norm_op": nn.InstanceNorm3d,
        "nonlin": nn.LeakyReLU,
    }
    del arguments["return_skips"]
    unet = ResidualEncoderUNet(**arguments, num_classes=3, n_conv_per_stage_decoder=1)
    names = {name.removeprefix("encoder.") for name in unet.state_dict() if name.startswith("encoder.")}
    assert names == set(file["network_weights"])
    unet.encoder.load_state_dict(file["network_weights"], strict=True)
    assert same_features(unet.encoder.eval(), load_encoder(exported), images)
    assert unet(images).shape == (2, 3, 4, 16, 16)


def test_loading_leaves_the_random_numbers_alone(exported):
    before = torch.get_rng_state()
    load_encoder(exported)
    assert torch.equal(before, torch.get_rng_state())


def test_the_loaded_encoder_is_in_evaluation_mode_and_trainable(exported):
    encoder = load_encoder(exported)
    assert not encoder.training
    assert all(parameter.requires_grad for parameter in encoder.parameters())


def test_a_crash_while_writing_leaves_the_old_file(run, tmp_path, monkeypatch):
    output = tmp_path / "encoder.pt"
    output.write_bytes(b"old")

    def half_written(content: object, stream: BinaryIO) -> None:
        stream.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(torch, "save", half_written)
    with pytest.raises(OSError, match="disk full"):
        export_encoder(run, output)
    assert [(path.name, path.read_bytes()) for path in tmp_path.iterdir()] == [("encoder.pt", b"old")]


class Malicious:
    """Unpickling it makes a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
        return os.mkdir, (str(self.folder),)


def raw_pickle(content: object, path: Path) -> None:
    path.write_bytes(pickle.dumps(content, protocol=2))


@pytest.mark.parametrize("write", [torch.save, raw_pickle])
def test_code_in_a_file_is_refused_and_not_run(tmp_path, write):
    write({"format": "pgl-encoder", "network": Malicious(tmp_path / "made")}, tmp_path / "encoder.pt")
    with pytest.raises(
        ValueError, match=r"encoder\.pt cannot be read as an exported encoder: it calls \w+\.mkdir"
    ):
        load_encoder(tmp_path / "encoder.pt")
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "cannot be read"),
        (b"just some text", "another kind of file"),
        (None, "cannot be read"),
    ],
    ids=["empty", "text", "truncated"],
)
def test_a_damaged_file_is_refused(exported, tmp_path, content, message):
    path = tmp_path / "encoder.pt"
    path.write_bytes(exported.read_bytes()[:-2000] if content is None else content)
    with pytest.raises(ValueError, match=message):
        load_encoder(path)


def test_a_run_without_its_first_last_checkpoint_says_when_it_comes(run, tmp_path):
    shutil.copytree(run, tmp_path / "run")
    checkpoint_path(tmp_path / "run", LAST).unlink()
    with pytest.raises(FileNotFoundError, match=r"not written last\.pt yet \(train\.checkpoint_every = 2\)"):
        export_encoder(tmp_path / "run", tmp_path / "e.pt")


def test_a_checkpoint_is_no_exported_encoder(run):
    with pytest.raises(ValueError, match="no exported encoder"):
        load_encoder(checkpoint_path(run, LAST))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pt"):
        load_encoder(tmp_path / "nothing.pt")


def _set(*keys: str, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(file: dict[str, Any]) -> None:
        for key in keys[:-1]:
            file = file[key]
        file[keys[-1]] = to

    return change


def _drop(*keys: str) -> Callable[[dict[str, Any]], None]:
    def change(file: dict[str, Any]) -> None:
        for key in keys[:-1]:
            file = file[key]
        del file[keys[-1]]

    return change


FIRST_WEIGHT = "stem.convs.0.conv.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("format_version", to=2), "reads up to 1: update"),
        (_set("format_version", to="1"), "format_version"),
        (_drop("network"), "'network'"),
        (_drop("network", "spacing_mm"), "spacing_mm"),
        (_drop("network", "arguments"), "'network'"),
        (_drop("network_weights"), "'network_weights'"),
        (_set("network_weights", FIRST_WEIGHT, to=[1.0]), "'network_weights'"),
        (_set("network", "class", to="os.system"), "'os.system' is not allowed"),
        (_set("network", "class", to="torch.nn.Conv3d"), "is not allowed"),
        (_set("network", "arguments", "norm_op", to="os.system"), "norm_op"),
        (_set("network", "arguments", "nonlin", to=["os.system"]), "cannot be built"),
        (_set("network", "arguments", "block", to="os.system"), "not allowed: block"),
        (_drop("network", "arguments", "strides"), "missing or not allowed: strides"),
        (_set("network", "arguments", "strides", to=[[1, 1, 1]]), "cannot be built"),
        (_set("network", "arguments", "features_per_stage", to=[4, 8, 16]), "do not fit"),
        (_set("network_weights", FIRST_WEIGHT, to=torch.zeros(1)), "do not fit"),
        (_set("network_weights", "extra", to=torch.zeros(1)), "extra"),
        (_drop("network_weights", FIRST_WEIGHT), r"stem\.convs\.0\.conv\.weight"),
    ],
)
def test_a_file_that_was_tampered_with_is_refused(exported, tmp_path, change, message):
    file = torch.load(exported, weights_only=True)
    change(file)
    torch.save(file, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=message) as refused:
        load_encoder(tmp_path / "encoder.pt")
    assert "encoder.pt" in str(refused.value)


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("spacing_mm", [3.0, 1.0], "three numbers of mm"),
        ("spacing_mm", [3.0, 0.0, 1.0], "three numbers of mm"),
        ("patch_size", [4, 16, 16.5], "three whole numbers"),
        ("feature_level", "deepest", "a stage's number"),
        ("trained_steps", -1, "a number of steps"),
        ("intensity", {"clip_hu": [0, 1], "mean_hu": 0.0, "std_hu": 0.0}, "std_hu above 0"),
        ("intensity", {"clip_hu": [0, float("nan")], "mean_hu": 0.0, "std_hu": 1.0}, "clip_hu"),
    ],
)
def test_a_description_of_another_type_is_refused_by_its_name(exported, tmp_path, key, value, expected):
    file = torch.load(exported, weights_only=True)
    file["network"][key] = value
    torch.save(file, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=rf"network\.{key} must be .*{expected}"):
        read_export(tmp_path / "encoder.pt")


@pytest.mark.parametrize("claim", ["widths", "blocks", "tensor"])
def test_a_file_that_claims_more_than_it_holds_is_refused_before_memory_is_taken(exported, tmp_path, claim):
    file = torch.load(exported, weights_only=True)
    if claim == "widths":  # 27 · 10¹² weights a layer
        file["network"]["arguments"]["features_per_stage"] = [10**6] * 3
    elif claim == "blocks":
        file["network"]["arguments"]["n_blocks_per_stage"] = [10**9] * 3
    else:
        file["network_weights"][FIRST_WEIGHT] = torch.zeros(1).expand(10**15)
    torch.save(file, tmp_path / "encoder.pt")
    assert (tmp_path / "encoder.pt").stat().st_size < 10**6
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match=r"do not fit|more blocks|does not hold its values"):
        load_encoder(tmp_path / "encoder.pt")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200 * 1024  # KiB


@pytest.mark.parametrize(
    ("key", "value"),
    [("feature_strides", [[1, 1, 1]] * 3), ("input_channels", 2), ("feature_level", 3)],
)
def test_a_description_that_contradicts_itself_is_refused(exported, tmp_path, key, value):
    file = torch.load(exported, weights_only=True)
    file["network"][key] = value
    torch.save(file, tmp_path / "encoder.pt")
    with pytest.raises(ValueError, match=r"feature_strides, input_channels or feature_level contradict"):
        load_encoder(tmp_path / "encoder.pt")


def test_a_checkpoint_whose_settings_are_gone_is_called_damaged(run, tmp_path):
    content = torch.load(checkpoint_path(run, LAST), weights_only=True)
    del content["config"]["views"]
    checkpoint_path(tmp_path, LAST).parent.mkdir()
    torch.save(content, checkpoint_path(tmp_path, LAST))
    with pytest.raises(ValueError, match=r"last\.pt is damaged: .*'views'"):
        export_encoder(tmp_path, tmp_path / "e.pt")


def test_a_run_goes_to_nnunet_without_the_file_between(run, exported, tmp_path):
    plans = write_plans(tmp_path / "plans.json", small_plans())
    for source in (run, exported):
        export_nnunet(source, tmp_path / source.name, plans)
        export_nnssl(source, tmp_path / f"{source.name}.pth")
    for one, other in ((run.name, exported.name), (f"{run.name}.pth", f"{exported.name}.pth")):
        files = [torch.load(tmp_path / name, weights_only=True)["network_weights"] for name in (one, other)]
        assert files[0].keys() == files[1].keys()
        assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])


def test_wrong_arguments_of_export_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="last, best, initial"):
        export_encoder(run, tmp_path / "e.pt", "newest")
    with pytest.raises(ValueError, match="folder"):
        export_encoder(run, tmp_path)
    with pytest.raises(FileNotFoundError, match="no run at"):
        export_encoder(tmp_path / "nothing", tmp_path / "e.pt")
    with pytest.raises(FileNotFoundError, match="no checkpoint"):
        export_encoder(tmp_path, tmp_path / "e.pt")
    assert list(tmp_path.iterdir()) == []


def test_a_runs_own_files_are_not_replaced_by_an_export(run, exported, tmp_path):
    last = run / "checkpoints/last.pt"
    before = last.read_bytes()
    for target in (last, run / "checkpoints/new.pt"):
        with pytest.raises(ValueError, match=r"output must be a file of its own, got .*give another name"):
            export_encoder(run, target)
    assert last.read_bytes() == before and not (run / "checkpoints/new.pt").exists()
    with pytest.raises(ValueError, match="output must be a file of its own"):
        export_nnssl(exported, exported)


def test_later_stages_than_the_trained_one_are_exported_too(tmp_path):
    config: PretrainConfig = small_config(make_cache(tmp_path / "cache"), tmp_path / "run", steps=2)
    config.method.feature_level = 1
    pretrain(config)
    network = export_encoder(tmp_path / "run", tmp_path / "encoder.pt")
    assert network["feature_level"] == 1
    assert len(load_encoder(tmp_path / "encoder.pt")(torch.zeros(1, 1, 4, 16, 16))) == 3
