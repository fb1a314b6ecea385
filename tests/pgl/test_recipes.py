"""The recipes in configs/, each on a made-up data set in exactly the layout that it is for."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import yaml

from pgl.cli import main
from pgl.downstream.labels import LabelledCache
from pgl.encoder_settings import default_encoder
from pgl.labels.store import read_label_volume
from tests.pgl import labelled_trees as trees

CONFIGS = Path(__file__).resolve().parents[2] / "configs"

RECIPES = {
    "liver": (lambda root: trees.msd(root, 3), ["liver", "tumour"]),
    "spleen": (lambda root: trees.msd(root, 3, "spleen", lesion=False), ["spleen"]),
    "kits": (lambda root: trees.kits(root, 3), ["kidney", "tumour"]),
    "bcv": (lambda root: trees.bcv(root, 3), None),
}


@pytest.fixture
def tiny(tmp_path) -> Path:
    """Overrides that make a recipe run in a second."""
    small = {
        "encoder": {
            "features_per_stage": [2, 4],
            "strides": [[1, 1, 1], [2, 2, 2]],
            "kernel_sizes": [[1, 3, 3], [3, 3, 3]],
            "n_blocks_per_stage": [1, 1],
        },
        "patches": {"patch_size": [8, 32, 32]},
        "train": {"steps": 1, "workers": 0, "accelerator": "cpu"},
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(small))
    return path


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_takes_its_data_set_from_files_to_scores_in_one_command(name, tiny, tmp_path):
    make, classes = RECIPES[name]
    words = ["finetune", "--config", CONFIGS / f"{name}.yaml", "--config", tiny, "--weights", "random"]
    words += ["--source", make(tmp_path / "data"), "--data", tmp_path / "cache", "--output", tmp_path / "run"]
    assert main([str(word) for word in words]) == 0
    results = json.loads((tmp_path / "run/results.json").read_text("utf-8"))
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))
    assert results["classes"] == (classes or list(recipe["classes"]))
    assert len(results["test"]) == 1 and len(results["training"]) == 2
    assert results["spacing_mm"] == recipe["spacing_mm"]
    # The classes of the recipe are those of the data set's numbers, in the data set's order.
    cache = LabelledCache(tmp_path / "cache", recipe["classes"])
    assert np.array_equal(cache.read_classes(0), read_label_volume(cache.path, cache.records[0]))
    assert set(np.unique(cache.read_classes(0))) == (
        {0, 1} if name == "spleen" else {0, 1, 2, *[13] * (name == "bcv")}
    )


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipes_patch_fits_the_default_encoder(name):
    recipe = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text("utf-8"))
    strides = np.prod(default_encoder().strides, axis=0)
    assert (np.array(recipe["patches"]["patch_size"]) % strides == 0).all()


def test_bcv_names_the_13_organs_in_the_challenges_order_and_mirrors_no_sides():
    recipe = yaml.safe_load((CONFIGS / "bcv.yaml").read_text("utf-8"))
    names = list(recipe["classes"])
    assert len(names) == 13
    assert (names[0], names[2], names[5], names[7], names[10]) == (
        "spleen", "left_kidney", "liver", "aorta", "pancreas",
    )  # fmt: skip
    assert recipe["patches"]["flip_probability"][2] == 0 and recipe["patches"]["patch_size"] == [48, 160, 160]


def test_a_cache_of_another_spacing_than_the_recipes_is_refused(tiny, tmp_path, capsys):
    root = trees.msd(tmp_path / "data", 3)
    assert main(["prepare", str(root), "--output", str(tmp_path / "cache"), "--spacing_mm", "3,2,2",
                 "--minimum_size", "8,16,16"]) == 0  # fmt: skip
    capsys.readouterr()
    words = ["finetune", "--config", CONFIGS / "liver.yaml", "--config", tiny, "--weights", "random"]
    words += ["--data", tmp_path / "cache", "--output", tmp_path / "run"]
    assert main([str(word) for word in words]) == 1
    assert "spacing_mm is (3.0, 1.0, 1.0) (D, H, W), but the cache" in capsys.readouterr().err
