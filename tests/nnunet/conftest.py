"""Datasets in nnU-Net's layout, planned by nnU-Net itself, and a pretrained encoder."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from pgl.encoder_settings import EncoderSettings
from tests.pgl.encoder_files import encoder_file

DATASET = "Dataset001_Blobs"
TWO_CHANNELS = "Dataset002_Pairs"
PLANNED = "nnUNetResEncUNetMPlans"
SPACING_MM = (3.0, 1.0, 1.0)


@dataclass(frozen=True)
class Dataset:
    """The folder of ``dataset.json`` and images, and that of plans and preprocessed cases."""

    raw: Path
    preprocessed: Path

    @property
    def plans(self) -> Path:
        return self.preprocessed / f"{PLANNED}.json"

    @property
    def dataset_json(self) -> Path:
        return self.raw / "dataset.json"


@pytest.fixture(scope="session")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder that nnU-Net's variables name while the tests run."""
    home = tmp_path_factory.mktemp("nnunet")
    variables = {f"nnUNet_{name}": str(home / name) for name in ("raw", "preprocessed", "results")}
    variables |= {"nnUNet_n_proc_DA": "1", "nnUNet_def_n_proc": "1", "nnUNet_compile": "f"}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        for name in ("raw", "preprocessed", "results"):
            (home / name).mkdir()
        yield home


@pytest.fixture(scope="session")
def dataset(home: Path) -> Dataset:
    """Five cases at ``SPACING_MM``, planned by nnU-Net's ``nnUNetPlannerResEncM``."""
    return _planned(home, DATASET, channels=1)


@pytest.fixture(scope="session")
def two_channels(home: Path) -> Dataset:
    """Like ``dataset``, with two images a case."""
    return _planned(home, TWO_CHANNELS, channels=2)


@pytest.fixture(scope="session")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An encoder that no planner would plan."""
    settings = EncoderSettings(
        features_per_stage=[6, 8, 10],
        strides=[(1, 1, 1), (1, 2, 2), (2, 2, 2)],
        kernel_sizes=[(1, 3, 3), (3, 3, 3), (3, 3, 3)],
        n_blocks_per_stage=[1, 2, 1],
    )
    return encoder_file(tmp_path_factory.mktemp("encoder") / "encoder.pt", settings)


def nnunet(command: str, *words: str) -> str:
    """Run ``nnUNetv2_<command>`` of this environment; its output."""
    program = Path(sys.executable).parent / f"nnUNetv2_{command}"
    done = subprocess.run([program, *words], capture_output=True, text=True, env=os.environ, timeout=250)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    return done.stdout


def _planned(home: Path, name: str, channels: int) -> Dataset:
    folder = home / "raw" / name
    _write_cases(folder, channels)
    number = str(int(name[len("Dataset") :][:3]))
    nnunet("plan_and_preprocess", "-d", number, "-pl", "nnUNetPlannerResEncM", "--no_pp", "-npfp", "1")
    return Dataset(folder, home / "preprocessed" / name)


def _write_cases(folder: Path, channels: int) -> None:
    import SimpleITK

    (folder / "imagesTr").mkdir(parents=True)
    (folder / "labelsTr").mkdir()
    rng = np.random.default_rng(0)

    def write(values: np.ndarray, path: Path) -> None:
        image = SimpleITK.GetImageFromArray(values)
        image.SetSpacing(SPACING_MM[::-1])
        SimpleITK.WriteImage(image, str(path))

    for case in range(5):
        label = np.zeros((20, 40, 44), np.uint8)
        label[5:12, 10:25, 12:30] = 1
        label[8:10, 14:20, 18:24] = 2
        write(label, folder / "labelsTr" / f"case{case}.nii.gz")
        for channel in range(channels):
            hu = rng.normal(40, 200, label.shape) + 900 * rng.integers(-1, 2, (20, 1, 1))
            write(hu.astype(np.int16), folder / "imagesTr" / f"case{case}_{channel:04}.nii.gz")
    description = {
        "channel_names": {str(channel): "CT" for channel in range(channels)},
        "labels": {"background": 0, "organ": 1, "tumour": 2},
        "numTraining": 5,
        "file_ending": ".nii.gz",
    }
    (folder / "dataset.json").write_text(json.dumps(description), encoding="utf-8")
