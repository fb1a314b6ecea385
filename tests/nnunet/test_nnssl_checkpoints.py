"""nnU-Net's fine-tuning of nnssl checkpoints reads what ``pgl export --format nnssl`` wrote.

The route is in nnU-Net's repository; releases up to 2.8.1 lack it, and this file is skipped there. What it
reads is retraced in tests/pgl/test_export_nnssl.py meanwhile.
"""

from __future__ import annotations

import json

import pytest
import torch

from pgl.export import load_encoder
from pgl.export.nnssl import export_nnssl

pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed here; run tests/nnunet.sh FOLDER")
pytest.importorskip(
    "nnunetv2.experiment_planning.like_nnssl",
    reason="this release of nnunetv2 cannot fine-tune nnssl checkpoints",
)


def test_the_planned_network_starts_from_the_pretrained_encoder(encoder, dataset, tmp_path):
    from nnunetv2.experiment_planning.like_nnssl import preprocess_like_nnssl
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args

    checkpoint = tmp_path / "pgl.pth"
    export_nnssl(encoder, checkpoint, patch_size=(8, 32, 32))
    before = set(dataset.preprocessed.glob("ptPlans__*.json"))
    preprocess_like_nnssl(1, "pgl", str(checkpoint), "like_pretrained", None, 1, False)
    (plans,) = set(dataset.preprocessed.glob("ptPlans__*.json")) - before
    configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    assert configuration["spacing"] == [3.0, 1.0, 1.0]
    assert configuration["patch_size"] == [8, 32, 32]
    trainer = get_trainer_from_args(
        "1", "3d_fullres", 0, "PretrainedTrainer", plans.stem, device=torch.device("cpu")
    )
    trainer.initialize()
    loaded, expected = trainer.network.encoder.state_dict(), load_encoder(encoder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in loaded)
