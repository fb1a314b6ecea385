"""Small made-up data sets, each in exactly the layout of a public one."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from tests.pgl.ct_files import body, write

SHAPE = (16, 40, 48)


def organ(shape: tuple[int, int, int] = SHAPE, lesion: bool = True) -> np.ndarray:
    """uint8 labels: a block of 1 off the middle, inside it a smaller one of 2."""
    label = np.zeros(shape, np.uint8)
    d, h, w = shape
    label[d // 4 : d // 2 + 2, h // 4 : h // 2, w // 5 : w // 2] = 1
    if lesion:
        label[d // 4 + 1 : d // 2, h // 4 + 2 : h // 2 - 2, w // 4 : w // 3] = 2
    return label


def overlap(mask: np.ndarray, truth: np.ndarray) -> float:
    """Dice of two sets of voxels, from its definition."""
    return 2 * (mask & truth).sum() / (mask.sum() + truth.sum())


def msd(root: Path, cases: int = 2, organ_name: str = "liver", lesion: bool = True) -> Path:
    """Medical Segmentation Decathlon: dataset.json lists pairs; macOS litter lies about."""
    training = []
    for n in range(cases):
        write(root / f"imagesTr/{organ_name}_{n}.nii.gz", body(seed=n))
        write(root / f"labelsTr/{organ_name}_{n}.nii.gz", organ(lesion=lesion))
        training.append(
            {"image": f"./imagesTr/{organ_name}_{n}.nii.gz", "label": f"./labelsTr/{organ_name}_{n}.nii.gz"}
        )
    write(root / f"imagesTs/{organ_name}_9.nii.gz", body(seed=9))
    (root / f"imagesTr/._{organ_name}_0.nii.gz").write_bytes(b"litter")
    dataset = {
        "name": organ_name,
        "modality": {"0": "CT"},
        "labels": {"0": "background", "1": organ_name, **({"2": "cancer"} if lesion else {})},
        "numTraining": cases,
        "numTest": 1,
        "training": training,
        "test": [f"./imagesTs/{organ_name}_9.nii.gz"],
    }
    (root / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return root


def kits(root: Path, cases: int = 2) -> Path:
    """KiTS19: one folder a case; the last one is of the challenge's test set, without segmentation."""
    for n in range(cases):
        write(root / f"case_{n:05d}/imaging.nii.gz", body(seed=n))
        write(root / f"case_{n:05d}/segmentation.nii.gz", organ())
    write(root / f"case_{210 + cases:05d}/imaging.nii.gz", body(seed=9))
    (root / "kits.json").write_text("[]", encoding="utf-8")
    return root


def bcv(root: Path, cases: int = 2) -> Path:
    """BTCV "Beyond the Cranial Vault": RawData/Training/img and label, RawData/Testing/img."""
    for n in range(1, cases + 1):
        write(root / f"RawData/Training/img/img{n:04d}.nii.gz", body(seed=n))
        label = organ()
        label[-2:, -4:, -6:] = 13
        write(root / f"RawData/Training/label/label{n:04d}.nii.gz", label)
    write(root / "RawData/Testing/img/img0061.nii.gz", body(seed=61))
    return root


def nnunet(root: Path, cases: int = 2, ending: str = ".nii.gz") -> Path:
    """nnU-Net v2's raw format: channel suffix on images, names → numbers in dataset.json."""
    for n in range(cases):
        write(root / f"imagesTr/spleen_{n:03d}_0000{ending}", body(seed=n))
        write(root / f"labelsTr/spleen_{n:03d}{ending}", organ(lesion=False))
    write(root / f"imagesTs/spleen_900_0000{ending}", body(seed=9))
    dataset = {
        "channel_names": {"0": "CT"},
        "labels": {"background": 0, "spleen": 1},
        "numTraining": cases,
        "file_ending": ending,
    }
    (root / "dataset.json").write_text(json.dumps(dataset), encoding="utf-8")
    return root


def pairs(root: Path, cases: int = 2) -> Path:
    """Two folders of the same names, as ``pgl phantom`` writes them."""
    for n in range(cases):
        write(root / f"images/case_{n}.nii.gz", body(seed=n))
        write(root / f"labels/case_{n}.nii.gz", organ())
    (root / "labels.json").write_text(json.dumps({"organ": 1, "lesion": 2}), encoding="utf-8")
    return root
