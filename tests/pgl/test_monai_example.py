"""The MONAI example runs, and what it trains is the exported encoder."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import SimpleITK as sitk
import torch

from pgl.export import load_encoder, read_export
from tests.pgl.encoder_files import INTENSITY, encoder_file

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "monai_finetune.py"


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("monai_finetune", EXAMPLE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return encoder_file(tmp_path_factory.mktemp("encoder") / "encoder.pt")


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three cases with a bright block each, at the encoder's spacing."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for case in range(3):
        label = np.zeros((10, 32, 36), np.uint8)
        d, h, w = rng.integers(0, (5, 16, 20))
        label[d : d + 5, h : h + 16, w : w + 16] = 1
        hu = np.where(label, 150, -80) + rng.normal(0, 30, label.shape)
        for name, values in (("images", hu.astype(np.int16)), ("labels", label)):
            (folder / name).mkdir(exist_ok=True)
            image = sitk.GetImageFromArray(values)
            image.SetSpacing((1.0, 1.0, 3.0))
            sitk.WriteImage(image, str(folder / name / f"case{case}.nii.gz"))
    return folder


def test_it_learns_to_segment_a_bright_block(example, encoder, cohort, tmp_path, capsys):
    words = ["--encoder", encoder, "--images", cohort / "images", "--labels", cohort / "labels"]
    options = ["--steps", "40", "--rate", "1e-2", "--patch", "8", "32", "32"]
    options += ["--log_every", "10", "--device", "cpu"]
    dice = example.train(example.parse([*map(str, words), *options, "--output", str(tmp_path / "unet.pt")]))
    out = capsys.readouterr().out
    losses = [float(line.split("loss ")[1]) for line in out.splitlines() if "loss" in line]
    assert len(losses) == 4 and losses[-1] < losses[0]
    assert dice > 0.8
    assert f"validation Dice {dice:.4f} of 1 case(s)" in out
    net = example.SegmentationNet(encoder, classes=2)
    net.load_state_dict(torch.load(tmp_path / "unet.pt", weights_only=True)["state_dict"], strict=True)


def test_its_network_starts_from_the_pretrained_encoder_and_trains_all_of_it(example, encoder):
    net = example.SegmentationNet(encoder, classes=3)
    pretrained = load_encoder(encoder).state_dict()
    assert all(torch.equal(tensor, pretrained[name]) for name, tensor in net.encoder.state_dict().items())
    logits = net(torch.randn(1, 1, 4, 16, 16))
    assert logits.shape == (1, 3, 4, 16, 16)
    logits.square().mean().backward()
    assert all(parameter.grad is not None for parameter in net.parameters())


def test_its_images_are_as_in_pretraining(example, encoder, tmp_path):
    """Whatever the file's axes: toward superior, posterior, left, at 3 × 1 × 1 mm, clipped and scaled."""
    hu = np.random.default_rng(0).integers(-1500, 1500, (6, 8, 10)).astype(np.int16)
    image = sitk.GetImageFromArray(hu)
    image.SetSpacing((1.0, 1.0, 3.0))
    stored = sitk.DICOMOrient(image, "RAS")
    for name, values in (("image.nii.gz", stored), ("label.nii.gz", stored > 0)):
        sitk.WriteImage(values, str(tmp_path / name))
    network = read_export(encoder)["network"]
    case = example.read_case(tmp_path / "image.nii.gz", tmp_path / "label.nii.gz", network)
    expected = (np.clip(hu, -1024, 325) - INTENSITY["mean_hu"]) / INTENSITY["std_hu"]
    np.testing.assert_allclose(case["image"][0].numpy(), expected, rtol=1e-5)
    assert torch.equal(case["label"][0], torch.from_numpy(hu > 0).long())
