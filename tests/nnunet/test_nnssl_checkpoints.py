"""nnU-Net's fine-tuning of nnssl checkpoints reads what ``pgl export --format nnssl`` wrote.

The route is in nnU-Net's repository; releases up to 2.8.1 lack it, and this file is skipped there. What it
reads is retraced in tests/pgl/test_export_nnssl.py meanwhile.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import torch

from pgl.export import load_encoder
from pgl.export.nnssl import export_nnssl

pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed here; run tests/nnunet.sh FOLDER")
# Not importorskip: a route that is there but cannot be imported is a failure to be seen.
if importlib.util.find_spec("nnunetv2.experiment_planning.like_nnssl") is None:
    pytest.skip("this release of nnunetv2 cannot fine-tune nnssl checkpoints", allow_module_level=True)


def trainer_for(dataset: Any, number: int, checkpoint: Path, name: str) -> tuple[Any, dict[str, Any]]:
    """nnU-Net's trainer, initialised after its own planning and preprocessing, and what was planned."""
    from nnunetv2.experiment_planning.like_nnssl import preprocess_like_nnssl
    from nnunetv2.run.run_training_from_pretrained import get_trainer_from_args

    preprocess_like_nnssl(
        dataset_id=number,
        pretrain_name=name,
        pt_ckpt=str(checkpoint),
        adaptation_mode="like_pretrained",
        override_spacing=None,
        num_processes=1,
        verbose=False,
    )
    (plans,) = dataset.preprocessed.glob(f"ptPlans__{name}____*.json")
    configuration = json.loads(plans.read_text(encoding="utf-8"))["configurations"]["3d_fullres"]
    trainer = get_trainer_from_args(
        str(number), "3d_fullres", 0, "PretrainedTrainer", plans.stem, device=torch.device("cpu")
    )
    trainer.initialize()
    return trainer, configuration


def one_step(trainer: Any, channels: int, patch_size: list[int]) -> None:
    """A step of nnU-Net's on noise, which must move the encoder."""
    rng = torch.Generator().manual_seed(0)
    before = trainer.network.encoder.stem.convs[0].conv.weight.detach().clone()
    trainer.network.train()
    loss = trainer.train_step(
        {
            "data": torch.randn(2, channels, *patch_size, generator=rng),
            "target": torch.randint(0, 3, (2, 1, *patch_size), generator=rng).float(),
        }
    )["loss"]
    assert torch.isfinite(torch.as_tensor(loss))
    assert not torch.equal(before, trainer.network.encoder.stem.convs[0].conv.weight)


@pytest.mark.parametrize(("patch_size", "name"), [((8, 32, 32), "chosen"), (None, "pretrainings")])
def test_the_planned_network_starts_from_the_pretrained_encoder(encoder, dataset, tmp_path, patch_size, name):
    network = export_nnssl(encoder, tmp_path / "pgl.pth", patch_size=patch_size)
    trainer, configuration = trainer_for(dataset, 1, tmp_path / "pgl.pth", name)
    assert configuration["spacing"] == [3.0, 1.0, 1.0]
    assert configuration["patch_size"] == list(patch_size or network["patch_size"])
    loaded, expected = trainer.network.encoder.state_dict(), load_encoder(encoder).state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[key], expected[key]) for key in loaded)
    one_step(trainer, 1, configuration["patch_size"])


def test_a_second_channel_shares_the_stem(encoder, two_channels, tmp_path):
    export_nnssl(encoder, tmp_path / "pgl.pth", patch_size=(8, 32, 32))
    trainer, configuration = trainer_for(two_channels, 2, tmp_path / "pgl.pth", "pair")
    loaded, expected = trainer.network.encoder.state_dict(), load_encoder(encoder).state_dict()
    assert loaded.keys() == expected.keys()
    for key, tensor in expected.items():
        if key in ("stem.convs.0.conv.weight", "stem.convs.0.all_modules.0.weight"):
            tensor = torch.cat([tensor, tensor], dim=1) / 2
        assert torch.equal(loaded[key], tensor), key
    one_step(trainer, 2, configuration["patch_size"])
