"""nnU-Net's own functions read what ``pgl export`` wrote.

For an environment that has nnunetv2: ``tests/nnunet.sh FOLDER`` makes one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pgl.encoder_settings import EncoderSettings
from pgl.export import load_encoder, read_export
from pgl.export.from_plans import pretraining_settings
from pgl.export.nnunet import count_classes, export_nnunet
from tests.nnunet.conftest import Dataset, nnunet
from tests.pgl.encoder_files import INTENSITY, encoder_file

pytest.importorskip("nnunetv2", reason="nnunetv2 is not installed here; run tests/nnunet.sh FOLDER")

SEGMENTATION = ".seg_layers."


def trainer_of(plans: str) -> Any:
    """What ``nnUNetv2_train 1 3d_fullres 0 -p PLANS -device cpu`` makes."""
    from nnunetv2.run.run_training import get_trainer_from_args

    return get_trainer_from_args("1", "3d_fullres", 0, plans_identifier=plans, device=torch.device("cpu"))


def network_of(plans: Path, dataset: Dataset) -> Any:
    """nnU-Net's network for a plans file, with its initial values."""
    from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    manager = PlansManager(str(plans))
    labels = manager.get_label_manager(json.loads(dataset.dataset_json.read_text(encoding="utf-8")))
    return nnUNetTrainer.build_network_architecture(
        manager, manager.get_configuration("3d_fullres"), 1, labels.num_segmentation_heads, True
    )


def assert_loaded(network: Any, initial: dict[str, torch.Tensor], file: Path) -> None:
    """Every tensor but the segmentation layers' equals the file's; theirs are as they were."""
    written = torch.load(file, weights_only=True)["network_weights"]
    loaded = network.state_dict()
    assert set(loaded) == set(written)
    for name, tensor in loaded.items():
        expected = initial[name] if SEGMENTATION in name else written[name]
        assert torch.equal(tensor, expected), name


def copy_of(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in weights.items()}


def test_weights_for_nnunets_own_plans_load(dataset, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    settings = EncoderSettings(**pretraining_settings(dataset.plans)["encoder"])
    strides = np.prod([list(stride) for stride in settings.strides], axis=0)
    encoder = encoder_file(tmp_path / "encoder.pt", settings, patch_size=tuple(map(int, strides * 2)))
    out = tmp_path / "out.pth"
    export_nnunet(encoder, out, dataset.plans, dataset_json=dataset.dataset_json)
    network = network_of(dataset.plans, dataset)
    initial = copy_of(network.state_dict())
    load_pretrained_weights(network, str(out))
    assert_loaded(network, initial, out)
    images = torch.randn(1, 1, *(int(s) * 2 for s in strides), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pairs = zip(network.encoder.eval()(images), load_encoder(encoder)(images), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("level", [0, 2])
def test_a_pretrained_decoder_loads_too(dataset, tmp_path, level):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    settings = EncoderSettings(**pretraining_settings(dataset.plans)["encoder"])
    encoder = encoder_file(tmp_path / "encoder.pt", settings, decoder_level=level)
    out = tmp_path / "out.pth"
    written = export_nnunet(encoder, out, dataset.plans, dataset_json=dataset.dataset_json)
    assert not [note for note in written.notes if "decoder" in note]
    network = network_of(dataset.plans, dataset)
    initial = copy_of(network.state_dict())
    load_pretrained_weights(network, str(out))
    assert_loaded(network, initial, out)
    pretrained = read_export(encoder)["decoder_weights"]
    stages = {int(name.split(".")[1]) for name in pretrained}
    assert stages == set(range(len(settings.strides) - 1 - level))
    loaded = network.decoder.state_dict()
    for name, tensor in pretrained.items():
        assert torch.equal(loaded[name], tensor), name


def test_plans_of_another_network_are_refused_with_the_list(encoder, dataset, tmp_path):
    from nnunetv2.run.load_pretrained_weights import load_pretrained_weights

    with pytest.raises(ValueError, match="does not fit '3d_fullres'") as refused:
        export_nnunet(encoder, tmp_path / "out.pth", dataset.plans, dataset_json=dataset.dataset_json)
    for name in ("n_stages", "features_per_stage", "n_blocks_per_stage"):
        assert f"{name}: the plans have" in str(refused.value)
    # nnU-Net refuses too, at the first tensor: weights made for other plans.
    made = tmp_path / "pglPlans.json"
    export_nnunet(encoder, tmp_path / "out.pth", dataset.plans, write_plans=made)
    with pytest.raises(AssertionError, match=r"not the same|missing in the pretrained"):
        load_pretrained_weights(network_of(dataset.plans, dataset), str(tmp_path / "out.pth"))


def test_a_plain_networks_plans_are_refused(encoder, dataset, tmp_path):
    nnunet("plan_experiment", "-d", "1")
    with pytest.raises(ValueError, match=r"network_class_name: the plans have .*PlainConvUNet"):
        export_nnunet(encoder, tmp_path / "out.pth", dataset.preprocessed / "nnUNetPlans.json")


def test_an_epoch_runs_on_written_plans_from_the_pretrained_weights(encoder, dataset, tmp_path, monkeypatch):
    from nnunetv2.run.run_training import maybe_load_checkpoint

    out, plans = tmp_path / "out.pth", dataset.preprocessed / "pglPlans.json"
    written = export_nnunet(
        encoder,
        out,
        dataset.plans,
        dataset_json=dataset.dataset_json,
        write_plans=plans,
        patch_size=(8, 16, 16),
    )
    assert written.notes == []
    nnunet("preprocess", "-d", "1", "-plans_name", "pglPlans", "-c", "3d_fullres", "-np", "1")
    monkeypatch.setenv("nnUNet_n_proc_DA", "0")  # augmentation in this process
    trainer = trainer_of("pglPlans")
    trainer.initialize()
    initial = copy_of(trainer.network.state_dict())
    # What nnUNetv2_train does with -pretrained_weights.
    maybe_load_checkpoint(trainer, False, False, str(out))
    assert_loaded(trainer.network, initial, out)
    trainer.num_epochs, trainer.num_iterations_per_epoch, trainer.num_val_iterations_per_epoch = 1, 2, 1
    trainer.run_training()
    assert (Path(trainer.output_folder) / "checkpoint_final.pth").is_file()
    changed = trainer.network.state_dict()["encoder.stem.convs.0.conv.weight"]
    assert torch.isfinite(changed).all()
    assert not torch.equal(changed, torch.load(out)["network_weights"]["encoder.stem.convs.0.conv.weight"])


def test_written_plans_make_nnunet_feed_what_pretraining_saw(encoder, dataset, tmp_path):
    import SimpleITK
    from nnunetv2.preprocessing.preprocessors.default_preprocessor import DefaultPreprocessor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    plans = tmp_path / "pglPlans.json"
    export_nnunet(encoder, tmp_path / "out.pth", dataset.plans, write_plans=plans)
    manager = PlansManager(str(plans))
    image = dataset.raw / "imagesTr" / "case0_0000.nii.gz"
    case = DefaultPreprocessor(verbose=False).run_case(
        [str(image)], None, manager, manager.get_configuration("3d_fullres"), str(dataset.dataset_json)
    )
    hu = SimpleITK.GetArrayFromImage(SimpleITK.ReadImage(str(image))).astype(np.float64)
    low, high = INTENSITY["clip_hu"]
    expected = (np.clip(hu, low, high) - INTENSITY["mean_hu"]) / INTENSITY["std_hu"]
    assert case[0].shape == (1, *hu.shape)  # the spacing is the same: nothing is resampled
    np.testing.assert_allclose(case[0][0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "labels",
    [
        {"background": 0, "liver": 1, "tumour": 2},
        {"background": 0, "liver": 1, "ignore": 2},
        {"background": 0, "whole": [1, 2], "tumour": [2]},
        {"background": 0, "whole": [1, 2, 3], "core": [2, 3], "tumour": 3, "ignore": 4},
        {"background": 0, "single": [1]},
    ],
)
def test_classes_are_counted_as_nnunet_does(labels):
    from nnunetv2.utilities.label_handling.label_handling import LabelManager

    regions = sum(name not in ("background", "ignore") for name in labels)
    expected = LabelManager(labels, list(range(regions))).num_segmentation_heads
    assert count_classes({"labels": labels}, "dataset.json") == expected


def test_the_file_holds_nothing_but_data(encoder, dataset, tmp_path):
    out = tmp_path / "out.pth"
    export_nnunet(encoder, out, dataset.plans, write_plans=tmp_path / "pglPlans.json")
    # nnU-Net loads with weights_only=False; this file needs no such trust.
    assert torch.load(out, weights_only=True).keys() == {"network_weights", "pgl"}
