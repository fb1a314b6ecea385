"""Settings: their shipped files, their round trip, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from pgl.config import PretrainConfig, from_plain
from pgl.config_check import check
from pgl.downstream.config import check as check_finetune
from pgl.settings import to_plain

from .labelled_data import small_finetune
from .training_data import small_config

# Those of `pgl pretrain`: other commands have theirs in the same folder.
CONFIGS = [
    file
    for file in sorted((Path(__file__).resolve().parents[2] / "configs").glob("*.yaml"))
    if "method" in yaml.safe_load(file.read_text("utf-8"))
]


def config() -> PretrainConfig:
    return small_config(Path("cache"), Path("run"))


def changed(section: str, **values) -> PretrainConfig:
    whole = config()
    return replace(whole, **{section: replace(getattr(whole, section), **values)})


@pytest.mark.parametrize("precision", ["bf16", "16", "32", "64-true", ""])
def test_both_trainings_take_the_same_four_precisions_by_their_full_names(precision):
    tuning = small_finetune(Path("cache"), Path("run"))
    told = rf"train\.precision must be one of auto, 32-true, bf16-mixed, 16-mixed, got '{precision}'"
    for which, check_it in ((config(), check), (tuning, check_finetune)):
        for name in ("auto", "32-true", "bf16-mixed", "16-mixed"):
            check_it(replace(which, train=replace(which.train, precision=name)))
        with pytest.raises(ValueError, match=told):
            check_it(replace(which, train=replace(which.train, precision=precision)))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_every_shipped_config_is_valid(file):
    settings = yaml.safe_load(file.read_text("utf-8"))
    assert "data" not in settings and "output" not in settings
    check(from_plain({"data": "cache", "output": "run", **settings}))


def test_the_shipped_configs_are_there():
    assert {"smoke", "demo", "paper"} <= {file.stem for file in CONFIGS}


def test_the_defaults_are_those_of_the_paper_config():
    file = next(file for file in CONFIGS if file.stem == "paper")
    from_file = from_plain({"data": "cache", "output": "run", **yaml.safe_load(file.read_text("utf-8"))})
    assert from_file == PretrainConfig(Path("cache"), Path("run"))


def test_settings_survive_yaml():
    before = changed("views", crop_scale=(1.05, 1.6))
    assert from_plain(yaml.safe_load(yaml.safe_dump(to_plain(before)))) == before


def test_an_unknown_key_is_refused_by_name():
    with pytest.raises(ValueError, match="patchsize"):
        from_plain({**to_plain(config()), "views": {"patchsize": [1, 2, 3]}})


@pytest.mark.parametrize(
    ("section", "values", "words"),
    [
        ("views", {"patch_size": (5, 16, 16)}, r"views\.patch_size is 5 on axis D.*stride 2"),
        ("views", {"patch_size": (4, 18, 16)}, r"views\.patch_size is 18 on axis H"),
        ("views", {"context_size": (8, 28, 20)}, r"views\.context_size is 20 on axis W"),
        (
            "views",
            {"patch_size": (2, 4, 4)},
            r"views\.patch_size \(2, 4, 4\) leaves a single voxel at stage 2",
        ),
        ("views", {"patch_size": (0, 16, 16)}, r"views\.patch_size must be three positive"),
        ("views", {"min_overlap": 0.0}, r"views\.min_overlap must lie in \(0, 1\]"),
        ("views", {"crop_scale": (1.4, 1.1)}, r"views\.crop_scale"),
        ("views", {"flip_probability": 1.5}, r"views\.flip_probability"),
        ("views", {"flip_probability": (0.5, 0.5)}, r"views\.flip_probability must be one number, or three"),
        ("views", {"flip_probability": (0.5, 0.5, 1.5)}, r"views\.flip_probability must lie in .* got 1\.5"),
        ("intensity", {"clip_hu": (300, -300)}, r"intensity\.clip_hu"),
        ("intensity", {"std_hu": 0.0}, r"intensity\.std_hu must be positive"),
        ("augment", {"blur_sigma": (1.0, 0.5)}, r"augment\.blur_sigma"),
        ("augment", {"noise_probability": -0.1}, r"augment\.noise_probability"),
        ("method", {"feature_level": 3}, r"method\.feature_level must lie in"),
        ("method", {"aligned_size": (2, 0, 2)}, r"method\.aligned_size must be three positive"),
        ("method", {"ema_start": 1.1}, r"method\.ema_start must lie in"),
        ("method", {"projector_channels": 0}, r"method\.projector_channels must be positive"),
        ("optimizer", {"learning_rate": 0.0}, r"optimizer\.learning_rate must be positive"),
        ("optimizer", {"warmup_steps": 4}, r"optimizer\.warmup_steps must lie in \[0, train\.steps=4\)"),
        ("train", {"steps": 0}, r"train\.steps must be at least 1"),
        ("train", {"workers": -1}, r"train\.workers must be at least 0, got -1"),
        ("train", {"threads": -2}, r"train\.threads must be at least 0"),
        ("train", {"accelerator": "abacus"}, r"train\.accelerator must be one of auto, cpu, cuda, gpu"),
        (
            "train",
            {"precision": "bf16-true"},
            r"train\.precision must be one of .*bf16-mixed.*got 'bf16-true'",
        ),
        ("train", {"devices": 0}, r"train\.devices must be auto"),
        ("train", {"devices": "all"}, r"train\.devices must be auto"),
        ("train", {"num_nodes": 0}, r"train\.num_nodes must be at least 1"),
        ("encoder", {"input_channels": 2}, r"encoder\.input_channels must be 1, got 2"),
        ("optimizer", {"momentum": 1.0}, r"optimizer\.momentum must lie in \[0, 1\)"),
        ("optimizer", {"warmup_steps": 9}, r"lower optimizer\.warmup_steps or raise train\.steps"),
        ("method", {"sampling_ratio": 0}, r"method\.sampling_ratio must be -1 .* or at least 1, got 0"),
        ("intensity", {"clip_hu": (50, 50)}, r"intensity\.clip_hu must be two different"),
        ("validation", {"pairs": 0}, r"validation\.pairs"),
        ("train", {"accumulate": 0}, r"train\.accumulate must be at least 1"),
        ("train", {"keep_every": -1}, r"train\.keep_every must be at least 0"),
        ("train", {"kept": 0}, r"train\.kept must be at least 1"),
        ("method", {"regions": -1}, r"method\.regions must be 0 .* or more, got -1"),
        ("method", {"regions": 2, "crop_prior": False}, r"set method\.regions to 0"),
        ("method", {"region_scale": (0.5, 1.5)}, r"method\.region_scale must lie in"),
        ("method", {"more_levels": [1, 2]}, r"must name other stages than method\.feature_level -1"),
        ("method", {"more_levels": [3]}, r"method\.more_levels must lie in \[-3, 2\]"),
        ("method", {"decorrelation": -0.1}, r"method\.decorrelation must be finite and at least 0, got -0"),
        ("method", {"decorrelation": float("inf")}, r"method\.decorrelation must be finite and .*, got inf"),
        ("method", {"features": "decoder", "feature_level": 2}, r"\[-2, 1\] for the 2 stages of the decoder"),
        ("validation", {"fraction": 1.0}, r"validation\.fraction must lie in"),
    ],
)
def test_settings_that_cannot_work_are_refused_by_name(section, values, words):
    with pytest.raises(ValueError, match=words):
        check(changed(section, **values))


def test_batch_statistics_are_not_both_compiled_and_computed_again():
    both = replace(config(), train=replace(config().train, compile=True, recompute=True))
    check(both)
    with pytest.raises(ValueError, match=r"train\.recompute together need encoder\.norm instance"):
        check(replace(both, encoder=replace(both.encoder, norm="batch")))


def test_seeds_that_are_none_are_refused():
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        check(replace(config(), seed=-1))
    with pytest.raises(ValueError, match=r"seed must be below 2\^63, got 9223372036854775808"):
        check(replace(config(), seed=2**63))


@pytest.mark.parametrize("devices", ["auto", -1, 1, 4, "2", "0,2", "1,"])
def test_ways_to_name_devices_are_accepted(devices):
    check(changed("train", devices=devices, precision="bf16-mixed", accelerator="gpu"))
