"""The parts of fine-tuning: splits, patches, the network, inference and scores."""

from __future__ import annotations

import importlib.util
import itertools

import numpy as np
import pytest
import torch

from pgl.augment import normalise
from pgl.config import AugmentSettings, IntensitySettings
from pgl.downstream.config import InferenceSettings, PatchSettings, SplitSettings
from pgl.downstream.inference import probabilities
from pgl.downstream.labels import LabelledCache
from pgl.downstream.metrics import (
    dice,
    distances_by_pairs,
    hausdorff95,
    nearest_distances,
    score_case,
    surface,
)
from pgl.downstream.network import build_unet, load_pretrained
from pgl.downstream.results import summarise
from pgl.downstream.sampling import PatchDataset, collate, cut, cut_labels
from pgl.downstream.splits import split_cases
from pgl.networks import build_encoder, describe
from tests.pgl.labelled_data import labelled_cache, tissue
from tests.pgl.training_data import small_encoder

# --- splits ---

SUBJECTS = [f"patient{n}_{scan}" for n in range(20) for scan in ("a", "b")]
BY_PATIENT = SplitSettings(patient=r"(patient\d+)_")


def test_the_test_cases_are_the_same_for_every_fraction_and_seed():
    tests = {
        tuple(split_cases(SUBJECTS, BY_PATIENT, fraction, seed).test)
        for fraction, seed in itertools.product((0.1, 0.5, 1.0), range(4))
    }
    assert len(tests) == 1 and len(next(iter(tests))) == 10


def test_fractions_are_nested_and_nobody_is_on_two_sides():
    splits = [split_cases(SUBJECTS, BY_PATIENT, fraction, 7) for fraction in (0.07, 0.2, 0.5, 1.0)]
    for smaller, larger in itertools.pairwise(splits):
        assert set(smaller.training) < set(larger.training)
    for split in splits:
        sides = [{s.split("_")[0] for s in side} for side in (split.training, split.unused, split.test)]
        assert sum(map(len, sides)) == len(set.union(*sides)) == 20
        assert sorted(split.training + split.unused + split.test) == sorted(SUBJECTS)


def test_the_seed_changes_the_training_patients_and_the_order_of_names_does_not():
    one, other = (split_cases(SUBJECTS, BY_PATIENT, 0.3, seed) for seed in (0, 1))
    assert one.training != other.training
    assert split_cases(SUBJECTS[::-1], BY_PATIENT, 0.3, 0) == one


@pytest.mark.parametrize(
    ("settings", "fraction", "message"),
    [
        (SplitSettings(), 0.01, r"fraction 0.01 of 30 training patients leaves no case: give at least 0.017"),
        (SplitSettings(test_subjects=["nobody"]), 1.0, "no labelled case is called nobody"),
        (SplitSettings(test_subjects=SUBJECTS), 1.0, "none is left to train on"),
        (SplitSettings(patient="(x+)"), 1.0, "does not match the case 'patient0_a'"),
    ],
)
def test_a_split_that_leaves_no_case_is_refused(settings, fraction, message):
    with pytest.raises(ValueError, match=message):
        split_cases(SUBJECTS, settings, fraction, 0)


def test_the_least_fraction_that_is_advised_works():
    for count in (2, 3, 7, 30, 73):
        with pytest.raises(ValueError, match="at least") as error:
            split_cases([str(n) for n in range(count + 1)], SplitSettings(test_subjects=["0"]), 1e-4, 0)
        advised = float(str(error.value).rsplit(" ", 1)[1])
        split = split_cases(
            [str(n) for n in range(count + 1)], SplitSettings(test_subjects=["0"]), advised, 0
        )
        assert len(split.training) == 1


def test_an_image_under_two_names_is_not_trained_and_tested_on(tmp_path):
    image, label = tissue(0)
    data = labelled_cache(tmp_path / "c", a=(image, label), b=tissue(1), a_copy=(image, label))
    cache = LabelledCache(data)
    for tested in ("a", "a_copy"):
        settings = SplitSettings(test_subjects=[tested])
        with pytest.raises(ValueError, match=r"the cases a(_copy)? and a(_copy)? hold the same image"):
            cache.split(settings, 1.0, 0)
    # On one side both may be, whoever chooses: the settings, or the rule that makes them one patient.
    assert cache.split(SplitSettings(test_subjects=["b"]), 1.0, 0).training == ["a", "a_copy"]
    one_patient = SplitSettings(test_subjects=["a"], patient="^(.)")
    assert cache.split(one_patient, 1.0, 0).test == ["a", "a_copy"]


# --- classes ---


def test_classes_are_merged_by_name_and_the_others_are_background(tmp_path):
    data = labelled_cache(tmp_path / "c", cases=1)
    raw = LabelledCache(data).read_classes(0)
    both = LabelledCache(data, {"any": ["bright", "2"]})
    assert both.task.names == ("any",) and np.array_equal(both.read_classes(0), (raw > 0).astype(np.uint8))
    dark = LabelledCache(data, {"dark": [2]})
    assert np.array_equal(dark.read_classes(0), (raw == 2).astype(np.uint8))
    with pytest.raises(
        ValueError, match=r"made of 'liver', but the labels in .* have only bright \(1\), dark"
    ):
        LabelledCache(data, {"x": ["liver"]})
    with pytest.raises(ValueError, match="'dark' is in two classes, 'a' and 'b'"):
        LabelledCache(data, {"a": ["dark"], "b": ["dark", "bright"]})


# --- patches ---


def test_image_and_label_of_a_patch_come_from_the_same_places():
    """The image is a ramp, so its values tell where they were sampled; the label is the ramp's voxel."""
    size, patch = 24, (6, 8, 10)
    rng = np.random.default_rng(0)
    for axis in range(3):
        shape = [1, 1, 1]
        shape[axis] = size
        ramp = np.broadcast_to(np.arange(size).reshape(shape), (size,) * 3)
        boxes = []
        for _ in range(12):
            extent = np.array(patch) * rng.uniform(0.7, 1.4, 3)
            low = rng.uniform(0, size - extent)
            boxes.append(np.concatenate([low, low + extent]))
        boxes_t, flips = torch.tensor(np.array(boxes)), torch.from_numpy(rng.random((12, 3)) < 0.5)
        images = torch.from_numpy(np.repeat((100 * ramp[None, None]).astype(np.int16), 12, 0))
        labels = torch.from_numpy(np.repeat(ramp[None].astype(np.uint8), 12, 0))
        import pgl_ops

        rows = torch.cat([torch.arange(12.0)[:, None].double(), boxes_t], 1)
        voxels = pgl_ops.roi_align3d(images, rows, patch, sampling_ratio=1, flips=flips)[:, 0] / 100
        found = cut_labels(labels, boxes_t, flips, patch)
        assert found.shape == (12, *patch)
        # A voxel's centre lies at its index, so a sample is at most half a voxel from the voxel it lies in.
        assert (voxels - found).abs().max() <= 0.5 + 1e-4
        along = [d for d in range(3) if d != axis]
        profile = found.float().mean([d + 1 for d in along])
        expected_sign = torch.where(flips[:, axis], -1.0, 1.0)
        assert ((profile[:, -1] - profile[:, 0]).sign() == expected_sign).all()


def test_patches_hold_foreground_as_often_as_asked(tmp_path):
    hu, label = np.full((20, 60, 60), 40, np.int16), np.zeros((20, 60, 60), np.uint8)
    label[3, 5, 5] = 1
    label[17, 50:53, 50:53] = 2
    cache = LabelledCache(labelled_cache(tmp_path / "c", p=(hu, label)))
    settings = PatchSettings((8, 16, 16), (0.8, 1.25), foreground=0.6)
    dataset = PatchDataset(cache, [0], settings, AugmentSettings(), seed=1)
    batch = collate([dataset[n] for n in range(400)])
    # The box itself, not only the block, must hold the voxel; scaled-down patches may step over one.
    held = []
    for row, box in enumerate(batch.boxes):
        low, high = box[:3].floor().long(), box[3:].ceil().long()
        held.append(
            set(
                batch.labels[row][tuple(slice(a, b) for a, b in zip(low, high, strict=True))]
                .unique()
                .tolist()
            )
        )
    with_one, with_two = (sum(n in h for h in held) / len(held) for n in (1, 2))
    assert 0.25 < with_one < 0.42 and 0.25 < with_two < 0.5
    assert (batch.boxes[:, :3] >= 0).all()
    assert (batch.boxes[:, 3:] <= torch.tensor(dataset.block)).all()


def test_a_patch_is_a_function_of_seed_and_index(tmp_path):
    cache = LabelledCache(labelled_cache(tmp_path / "c", cases=3))
    make = [
        PatchDataset(cache, [0, 1, 2], PatchSettings((8, 16, 16)), AugmentSettings(), s) for s in (5, 5, 6)
    ]
    first, again, other = (collate([dataset[11], dataset[12]]) for dataset in make)
    assert torch.equal(first.images, again.images) and torch.equal(first.boxes, again.boxes)
    assert torch.equal(first.augmentation.gamma, again.augmentation.gamma)
    assert not torch.equal(first.boxes, other.boxes)


def test_a_volume_smaller_than_a_patch_is_surrounded_by_air(tmp_path):
    hu, label = tissue(0, (6, 14, 14))
    cache = LabelledCache(labelled_cache(tmp_path / "c", p=(hu, label)))
    settings = PatchSettings((8, 32, 32), (1.0, 1.0), (0, 0, 0))
    none = AugmentSettings(0, (0, 0), 0, (0, 0), 0, (1, 1), 0, (1, 1))
    dataset = PatchDataset(cache, [0], settings, none, 0)
    inputs, classes = cut(collate([dataset[0]]), (8, 32, 32), IntensitySettings())
    where = (slice(1, 7), slice(9, 23), slice(9, 23))
    assert np.array_equal(classes[0, 0][where].numpy(), label)
    assert torch.allclose(
        inputs[0, 0][where], normalise(torch.from_numpy(hu), IntensitySettings()), atol=1e-5
    )
    outside = torch.ones(8, 32, 32, dtype=torch.bool)
    outside[where] = False
    assert (classes[0, 0][outside] == 0).all()
    assert torch.allclose(inputs[0, 0][outside], torch.tensor((-1024 + 158.58) / 324.7))


# --- network ---


def test_the_encoder_of_the_file_is_the_encoder_of_the_network():
    description = describe(small_encoder())
    encoder, unet = build_encoder(description), build_unet(description, 3)
    report = load_pretrained(unet, encoder.state_dict(), "encoder.pt")
    images = torch.randn(1, 1, 8, 16, 16)
    with torch.no_grad():
        for ours, theirs in zip(unet.encoder(images), encoder(images), strict=True):
            assert torch.equal(ours, theirs)
        assert unet(images).shape == (1, 3, 8, 16, 16)
    named = {name for name, _ in unet.named_parameters()}
    assert set(report.loaded) == {name for name in named if name.startswith("encoder.")}
    assert set(report.missing) == {name for name in named if name.startswith("decoder.")}
    assert report.unused == [] and report.reshaped == []


def test_tensors_that_do_not_fit_are_named():
    other = small_encoder()
    other.features_per_stage = [4, 8, 12]
    weights = build_encoder(describe(other)).state_dict()
    weights["head.weight"] = torch.zeros(3)
    report = load_pretrained(build_unet(describe(small_encoder()), 2), weights, "encoder.pt")
    # Its third stage is wider than its second, so it has a projection in its skip.
    skip = "stages.2.blocks.0.skip.1"
    reshaped = [entry.partition(":")[0] for entry in report.reshaped]
    assert reshaped and all(name.startswith("encoder.stages.2.") for name in reshaped)
    assert [name for name in report.unused if f"encoder.{name}" not in reshaped] == [
        f"{skip}.conv.weight", f"{skip}.norm.weight", f"{skip}.norm.bias", "head.weight",
    ]  # fmt: skip
    assert {f"encoder.{name}" for name in report.unused} > set(reshaped)
    assert not any(".all_modules." in name for name in report.unused)
    assert any(name.startswith("encoder.stages.2.") for name in report.missing)


def test_weights_of_which_none_fits_are_refused():
    weights = {"head": torch.zeros(1), "head.all_modules.0": torch.zeros(1)}
    with pytest.raises(ValueError, match=r"none of the 1 tensors of x.pt fits the network \(head is not in"):
        load_pretrained(build_unet(describe(small_encoder()), 2), weights, "x.pt")


# --- inference ---


class Threshold(torch.nn.Module):
    """A network that looks at one voxel: class 1 above ``hu``."""

    def __init__(self, hu: float, intensity: IntensitySettings) -> None:
        super().__init__()
        self.at = (hu - intensity.mean_hu) / intensity.std_hu

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.at - x, x - self.at], 1)


@pytest.mark.parametrize("shape", [(10, 32, 36), (5, 9, 40)])
@pytest.mark.parametrize("mirror", [False, True])
def test_windows_of_a_pointwise_network_give_its_values_everywhere(shape, mirror):
    hu, intensity = (
        tissue(1, (10, 32, 36))[0][tuple(slice(0, n) for n in shape)][:, :, :36],
        IntensitySettings(),
    )
    hu = np.pad(hu, [(0, n - m) for n, m in zip(shape, hu.shape, strict=True)], mode="edge")
    network = Threshold(100, intensity)
    found = probabilities(
        network, hu, (8, 16, 16), intensity, InferenceSettings(0.5, 3, mirror), torch.device("cpu")
    )
    expected = network(normalise(torch.from_numpy(hu)[None, None], intensity)).softmax(1)[0].numpy()
    assert found.shape == (2, *shape)
    assert np.allclose(found, expected, atol=1e-5)


# --- scores ---


def ball(radius: float, centre=(15, 20, 20), shape=(30, 40, 40)) -> np.ndarray:
    grid = np.meshgrid(*(np.arange(n) for n in shape), indexing="ij")
    return sum((g - c) ** 2 for g, c in zip(grid, centre, strict=True)) <= radius**2


def test_dice_and_distance_of_shifted_blocks_are_those_of_the_formulas():
    first, second = np.zeros((12, 20, 20), bool), np.zeros((12, 20, 20), bool)
    first[2:8, 4:12, 4:12] = True
    second[4:10, 4:12, 4:12] = True
    assert dice(first, second) == pytest.approx(2 * 4 * 64 / (2 * 6 * 64))
    # The end faces (64 of 280 surface voxels each) are two slices of 3 mm apart.
    assert hausdorff95(first, second, (3.0, 1.0, 1.0)) == pytest.approx(6.0)
    assert hausdorff95(first, first, (3.0, 1.0, 1.0)) == 0.0


def test_surface_is_where_a_face_is_free():
    mask = np.zeros((5, 5, 5), bool)
    mask[1:4, 1:4, 1:4] = True
    expected = mask.copy()
    expected[2, 2, 2] = False
    assert np.array_equal(surface(mask), expected)
    # The volume's border is free, too.
    assert surface(np.ones((3, 3, 3), bool)).sum() == 26


@pytest.mark.parametrize("spacing", [(1.0, 1.0, 1.0), (3.0, 0.7, 1.3)])
def test_the_95_percent_distance_equals_brute_force(spacing):
    rng = np.random.default_rng(3)
    first, second = ball(8), ball(9, (14, 22, 19)) | (rng.random((30, 40, 40)) < 0.001)
    points = [np.argwhere(surface(mask)) * np.array(spacing) for mask in (first, second)]
    apart = np.linalg.norm(points[0][:, None] - points[1][None], axis=-1)
    expected = max(np.percentile(apart.min(1), 95), np.percentile(apart.min(0), 95))
    assert hausdorff95(first, second, spacing) == pytest.approx(expected, rel=1e-5)


@pytest.mark.skipif(importlib.util.find_spec("scipy") is None, reason="MONAI's distance needs scipy")
def test_the_95_percent_distance_is_monais():
    from monai.metrics import compute_hausdorff_distance

    first, second = ball(8), ball(9, (14, 22, 19))
    pair = [torch.from_numpy(np.stack([~m, m]))[None] for m in (first, second)]
    theirs = compute_hausdorff_distance(*pair, percentile=95, spacing=[3.0, 0.7, 1.3])
    assert hausdorff95(first, second, (3.0, 0.7, 1.3)) == pytest.approx(float(theirs), rel=1e-4)


def test_distances_without_simpleitk_are_those_with_it():
    rng = np.random.default_rng(5)
    for shape in ((9, 14, 11), (30, 31, 12)):
        of, to = (rng.random(shape) < share for share in (0.4, 0.01))
        ours = distances_by_pairs(of, to, (5.0, 4.0, 3.5))
        assert ours == pytest.approx(nearest_distances(of, to, (5.0, 4.0, 3.5)), abs=1e-4)
        assert len(ours) == of.sum() and ours.max() > 5


def test_absent_classes_count_as_the_documentation_says():
    truth, prediction = np.zeros((4, 8, 8), np.uint8), np.zeros((4, 8, 8), np.uint8)
    truth[0, 0, 0] = 1  # missed
    prediction[1, 1, 1] = 2  # invented
    scores = score_case("p", prediction, truth, ["a", "b", "c"], (1.0, 1.0, 1.0))
    assert [s.dice for s in scores] == [0.0, 0.0, None]
    assert [s.hd95_mm for s in scores] == [None, None, None]
    summary = summarise(scores)
    assert summary["dice"] == 0.0 and summary["classes"]["a"]["missed"] == 1
    assert summary["classes"]["c"] == {"dice": None, "hd95_mm": None, "cases": 0, "missed": 0}
