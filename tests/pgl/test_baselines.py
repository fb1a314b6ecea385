"""BYOL and Models Genesis as methods of the same trainer."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from lightning_fabric import Fabric
from torch import Tensor, nn
from torch.nn.functional import normalize

from pgl.cache.volumes import VolumeCache
from pgl.cli import main
from pgl.config import (
    GENESIS_INTENSITY,
    IntensitySettings,
    MethodSettings,
    PretrainConfig,
    settled,
)
from pgl.config_check import check
from pgl.export import export_encoder, load_encoder, read_export
from pgl.methods.byol import BYOL, GlobalHead
from pgl.methods.genesis import Genesis
from pgl.methods.pgl import PGL, ema_decay
from pgl.methods.registry import METHODS, build_method
from pgl.networks import seeded_module
from pgl.pictures.show import show
from pgl.pretrain import pretrain
from pgl.report import write_report
from pgl.runs.facts import read_run
from pgl.runs.folder import LAST, checkpoint_path
from pgl.settings import to_plain
from pgl.training.checkpoint import load_checkpoint
from pgl.training.contexts import ContextDataset, collate
from pgl.training.validation import Validation
from pgl.views import sample_view_pairs

from .test_many_processes import torchrun, written
from .test_pretrain import assert_same_weights, lines
from .training_data import make_cache, small_config, small_encoder

SETTINGS = MethodSettings(
    aligned_size=(2, 4, 4), projector_hidden=16, projector_channels=8, predictor_hidden=16
)
BASELINES = ("byol", "genesis")


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


@pytest.fixture(scope="module")
def runs(cache) -> dict[str, Path]:
    return {name: pretrain(config_of(name, cache, cache.parent / name)) for name in METHODS}


def config_of(name: str, data: Path, output: Path, steps: int = 4, **train) -> PretrainConfig:
    config = small_config(data, output, steps=steps)
    config.method = replace(config.method, name=name)
    config.train = replace(config.train, **train)
    return config


def batch_of(config: PretrainConfig, count: int = 3):
    data = ContextDataset(VolumeCache(config.data), [0, 1, 2], config.views, config.augment, config.seed)
    return collate([data[i] for i in range(count)])


def views_and_pairs(count: int = 3) -> tuple[Tensor, object]:
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), count, (8, 28, 28), (4, 16, 16))
    return torch.randn(2 * count, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2)), pairs


# --- BYOL ---


def linear_head(head: GlobalHead) -> nn.Sequential:
    """The same head of torch's linear layers and one-dimensional batch normalisation."""
    first, norm, _, last = head
    hidden = len(norm.weight)
    plain = nn.Sequential(
        nn.Linear(first.in_channels, hidden),
        nn.BatchNorm1d(hidden, track_running_stats=False),
        nn.ReLU(),
        nn.Linear(hidden, last.out_channels, bias=False),
    )
    plain[0].weight.data, plain[0].bias.data = first.weight.data.flatten(1), first.bias.data
    plain[1].load_state_dict(norm.state_dict())
    plain[3].weight.data = last.weight.data.flatten(1)
    return plain


def test_the_loss_of_byol_is_the_formula():
    """Σ over both directions of 2 − 2·cos between a view's prediction and the other view's target."""
    method = seeded_module(0, lambda: BYOL(small_encoder(), SETTINGS))
    for target in (method.target_backbone, method.target_projector):
        for p in target.parameters():
            p.data.mul_(0.7).add_(0.01)
    views, pairs = views_and_pairs()
    online = linear_head(method.predictor)(linear_head(method.projector)(pooled(method.backbone, views)))
    targets = linear_head(method.target_projector)(pooled(method.target_backbone, views))
    p1, p2 = normalize(online, dim=1).chunk(2)
    z1, z2 = normalize(targets, dim=1).chunk(2)
    expected = ((p1 - z2).square().sum(1) + (p2 - z1).square().sum(1)).mean()
    loss = method(views, pairs)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(expected, (4 - 2 * (p1 * z2).sum(1) - 2 * (p2 * z1).sum(1)).mean())
    loss.backward()
    trained = {n.split(".")[0] for n, p in method.named_parameters() if p.grad is not None and p.grad.any()}
    assert trained == {"backbone", "projector", "predictor"}


def pooled(backbone, views: Tensor) -> Tensor:
    return backbone(views).flatten(2).mean(-1)


def test_byol_does_not_look_at_where_views_were_cut():
    method = seeded_module(0, lambda: BYOL(small_encoder(), SETTINGS))
    views, pairs = views_and_pairs()
    others = sample_view_pairs(torch.Generator().manual_seed(7), 3, (8, 28, 28), (4, 16, 16))
    assert torch.equal(method(views, pairs), method(views, others))


def test_heads_of_byol_have_its_layers_and_widths():
    head = BYOL(small_encoder(), MethodSettings()).projector
    assert [type(m) for m in head] == [nn.Conv3d, nn.BatchNorm3d, nn.ReLU, nn.Conv3d]
    assert head[0].bias is not None and head[3].bias is None
    assert (head[0].out_channels, head[3].out_channels) == (4096, 256)
    assert head[0].kernel_size == head[3].kernel_size == (1, 1, 1)


def test_the_targets_decay_is_byols_schedule():
    for k in (0, 1, 17, 50, 99, 100):
        tau = 1 - (1 - 0.996) * (1 + math.cos(math.pi * k / 100)) / 2
        assert ema_decay(k, 100, 0.996, 1.0) == pytest.approx(tau, abs=1e-12)


def test_the_target_of_byol_is_the_average_that_the_schedule_asks_for(cache, tmp_path):
    config = config_of("byol", cache, tmp_path / "run", steps=3, checkpoint_every=1, keep_every=1, kept=3)
    run = pretrain(config)
    online = [load_checkpoint(checkpoint_path(run, "initial.pt"))]
    online += [load_checkpoint(checkpoint_path(run, f"step-0000000{n}.pt")) for n in (1, 2, 3)]
    for part, key in (("encoder", "stages.2.blocks.0.conv1.conv.weight"), ("projector", "0.weight")):
        expected = online[0]["online"][part][key].double()
        for k in range(3):
            tau = 1 - (1 - config.method.ema_start) * (1 + math.cos(math.pi * k / 3)) / 2
            expected = tau * expected + (1 - tau) * online[k + 1]["online"][part][key].double()
            torch.testing.assert_close(
                online[k + 1]["target"][part][key].double(), expected, atol=1e-6, rtol=0
            )
        assert not torch.equal(online[3]["target"][part][key], online[3]["online"][part][key])


# --- Models Genesis ---


def test_the_loss_of_genesis_is_the_mean_square_over_all_voxels_and_trains_every_stage():
    method = seeded_module(0, lambda: Genesis(small_encoder(), replace(SETTINGS, feature_level=1)))
    pairs = views_and_pairs()[1]
    both = torch.rand(6, 2, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    restored = method.restore(both[:, :1]).detach()
    assert restored.shape == (6, 1, 4, 16, 16)
    loss = method(both.view(torch.int32), pairs)
    expected = sum(float((a - b).square().sum()) for a, b in zip(restored, both[:, 1:], strict=True))
    assert float(loss.detach()) == pytest.approx(expected / (6 * 4 * 16 * 16), rel=1e-5)
    loss.backward()
    idle = [n for n, p in method.named_parameters() if p.requires_grad and p.grad is None]
    assert idle == []
    assert all(p.requires_grad for p in method.backbone.encoder.parameters())


def test_genesis_sees_hu_from_minus_to_plus_1000_as_0_to_1(cache, tmp_path):
    config = settled(config_of("genesis", cache, tmp_path / "run"))
    method, batch = build_method(config), batch_of(config)
    clean = method.inputs(batch, config).view(torch.float32)[:, 1:]
    hu = replace(config, intensity=IntensitySettings((-1e4, 1e4), 0.0, 1.0))
    raw = PGL.views(method, replace_augmentation(batch), hu)
    torch.testing.assert_close(clean, (raw.clamp(-1000, 1000) + 1000) / 2000)
    assert config.intensity == GENESIS_INTENSITY and clean.min() >= 0 and clean.max() <= 1


def replace_augmentation(batch):
    neutral = {"noise_std": 0.0, "blur_sigma": 0.0, "brightness": 1.0, "gamma": 1.0}
    augmentation = replace(
        batch.augmentation,
        **{k: torch.full_like(getattr(batch.augmentation, k), v) for k, v in neutral.items()},
    )
    return replace(batch, augmentation=augmentation)


def test_both_views_of_a_sample_are_distorted_each_in_its_own_way(cache, tmp_path):
    config = settled(config_of("genesis", cache, tmp_path / "run"))
    method, batch = build_method(config), batch_of(config, 8)
    inputs = method.inputs(batch, config)
    distorted, clean = inputs.view(torch.float32).chunk(2, 1)
    assert (distorted != clean).flatten(1).any(1).float().mean() > 0.8
    assert len(set(batch.augmentation.noise_seed.tolist())) == 16
    assert torch.equal(method.inputs(batch, config), inputs)


def test_what_genesis_restores_is_not_rounded_to_the_networks_precision(cache, tmp_path):
    config = settled(config_of("genesis", cache, tmp_path / "run"))
    method, batch = build_method(config), batch_of(config)
    seen = []
    method.forward = lambda inputs, pairs: seen.append(inputs) or inputs.float().mean()
    fabric = Fabric(accelerator="cpu", devices=1, precision="bf16-mixed")
    inputs = method.inputs(batch, config)
    fabric.setup_module(method)(inputs, batch.pairs)
    assert torch.equal(seen[0], inputs)


def test_genesis_is_measured_on_the_augmented_views_of_the_other_methods(cache, tmp_path):
    """Where no voxel is clipped, they are the same in HU."""
    config = settled(config_of("genesis", cache, tmp_path / "run"))
    wide = replace(config, intensity=IntensitySettings((-1024.0, 1000.0), -158.58, 324.70))
    batch, genesis = batch_of(config), build_method(config)
    batch.contexts.clamp_(-900, 900)
    own, usual = genesis.views(batch, config), PGL.views(genesis, batch, wide)
    torch.testing.assert_close(own * 2000 - 1000, usual * 324.70 - 158.58, atol=0.05, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "changes", "message"),
    [
        (
            "genesis",
            {"intensity": IntensitySettings((-500.0, 500.0), 0.0, 1.0)},
            r"inputs in \[0, 1\].*mean_hu -500",
        ),
        ("byol", {"more_levels": [0]}, "method.more_levels is an option of method.name pgl"),
        ("byol", {"decorrelation": 0.1}, "method.decorrelation is an option of method.name pgl, got 0.1"),
        ("genesis", {"features": "decoder"}, "method.features is an option of method.name pgl"),
        ("simclr", {}, "method.name must be pgl, byol or genesis, got 'simclr'"),
    ],
)  # fmt: skip
def test_settings_that_a_method_cannot_have_are_refused(cache, tmp_path, method, changes, message):
    config = config_of(method, cache, tmp_path / "run")
    if "intensity" in changes:
        config.intensity = changes["intensity"]
    else:
        config.method = replace(config.method, **changes)
    with pytest.raises(ValueError, match=message):
        check(config)


# --- every method, in the trainer ---


def test_methods_share_initial_encoder_samples_and_measured_views(cache, runs):
    initial = {n: load_checkpoint(checkpoint_path(run, "initial.pt")) for n, run in runs.items()}
    reference = initial["pgl"]["online"]["encoder"]
    for saved in initial.values():
        assert all(torch.equal(value, reference[key]) for key, value in saved["online"]["encoder"].items())
    # Same network, same pictures: what differs is the scaling of the input, for Genesis alone.
    first = {name: lines(run, "validation")[0] for name, run in runs.items()}
    assert first["byol"]["matching_accuracy"] == first["pgl"]["matching_accuracy"]
    cases = [json.loads((run / "environment.json").read_text("utf-8"))["cases"] for run in runs.values()]
    assert cases[0] == cases[1] == cases[2]


@pytest.mark.parametrize("name", METHODS)
def test_every_method_trains_its_encoder_and_measures_it_with_the_true_geometry(cache, runs, name):
    first = load_checkpoint(checkpoint_path(runs[name], "initial.pt"))["online"]["encoder"]
    last = load_checkpoint(checkpoint_path(runs[name], LAST))["online"]["encoder"]
    changed = {
        key.split(".")[0] + key.split(".")[1] for key in first if not torch.equal(first[key], last[key])
    }
    assert {"stages0", "stages1", "stages2"} <= changed
    losses = [line["loss"] for line in lines(runs[name], "train")]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    line = lines(runs[name], "validation")[-1]
    lacking = {"pgl": set(), "byol": {"projected_matching_accuracy"},
               "genesis": {"projected_matching_accuracy", "projected_spread"}}[name]  # fmt: skip
    full = set(lines(runs["pgl"], "validation")[-1])
    assert full - set(line) == lacking
    # Again from the checkpoint, by the same rule for all: the encoder's aligned features.
    config = settled(config_of(name, cache, runs[name]))
    method = build_method(config)
    method.backbone.encoder.load_state_dict(last)
    validation = yaml.safe_load((runs[name] / "config.yaml").read_text("utf-8"))["validation"]
    assert validation["pairs"] == config.validation.pairs
    cases = json.loads((runs[name] / "environment.json").read_text("utf-8"))["cases"]["validation"]
    volumes = VolumeCache(cache)
    held_out = [i for i, case in enumerate(volumes.cases) if case.case_id in cases]
    assert Validation(volumes, held_out, config).measure(method)["matching_accuracy"] == pytest.approx(
        line["matching_accuracy"]
    )


@pytest.mark.parametrize("name", BASELINES)
def test_a_baseline_resumes_exactly(cache, runs, tmp_path, name):
    part = pretrain(config_of(name, cache, tmp_path / "part", keep_every=2))
    last = checkpoint_path(part, LAST)
    last.unlink()
    # Back to the state of step 2, as if the run had been killed after it.
    (part / "checkpoints" / "step-00000002.pt").rename(last)
    pretrain(replace(config_of(name, cache, part, keep_every=2), resume=True))
    assert_same_weights(part, runs[name])


@pytest.mark.parametrize("name", BASELINES)
def test_runs_of_a_baseline_are_exported_shown_and_reported(runs, tmp_path, name):
    file = tmp_path / "encoder.pt"
    network = export_encoder(runs[name], file)
    exported = load_encoder(file).state_dict()
    saved = load_checkpoint(checkpoint_path(runs[name], LAST))
    assert all(torch.equal(value, saved["online"]["encoder"][key]) for key, value in exported.items())
    expected = GENESIS_INTENSITY if name == "genesis" else IntensitySettings()
    assert read_export(file)["network"]["intensity"] == {**vars(expected), "clip_hu": list(expected.clip_hu)}
    assert network["feature_level"] == 2 and network["trained_steps"] == 4
    assert all(path.stat().st_size > 1000 for path in show(runs[name], tmp_path / "pictures", pairs=1))
    page, lacking = write_report(runs[name], tmp_path / "report.html", pairs=1)
    assert lacking == [] and "2 − 2·cos between prediction and target, on a log" not in page.read_text(
        "utf-8"
    )
    compared, _ = write_report(list(runs.values()), tmp_path / "compared.html")
    assert "method.name" in compared.read_text("utf-8")


def test_what_lies_beyond_the_measured_stage_is_trained_by_genesis_and_told_so(cache, tmp_path):
    for name, deepest in (("byol", 1), ("genesis", 2)):
        config = config_of(name, cache, tmp_path / name, steps=2)
        config.method.feature_level = 1
        run = pretrain(config)
        assert export_encoder(run, tmp_path / f"{name}.pt")["feature_level"] == deepest
        weights = [
            load_checkpoint(checkpoint_path(run, n))["online"]["encoder"] for n in ("initial.pt", LAST)
        ]
        key = "stages.2.blocks.0.conv1.conv.weight"
        assert torch.equal(weights[0][key], weights[1][key]) == (name == "byol")


def test_the_command_line_takes_the_method(cache, tmp_path, capfd):
    plain = to_plain(config_of("pgl", Path("unused"), Path("unused"), steps=2))
    for name in ("data", "output", "resume"):
        del plain[name]
    file, run = tmp_path / "c.yaml", tmp_path / "run"
    file.write_text(yaml.safe_dump(plain), encoding="utf-8")
    words = ["pretrain", "--data", str(cache), "--output", str(run), "--config", str(file)]
    assert main([*words, "--method.name", "genesis"]) == 0
    assert read_run(run).settings["method.name"] == "genesis"
    assert read_run(run).settings["intensity.std_hu"] == 2000
    assert "method genesis" in (run / "log.txt").read_text("utf-8")


@pytest.mark.parametrize("name", BASELINES)
def test_two_processes_train_a_baseline_as_one_does(cache, tmp_path, name):
    config = config_of(name, cache, tmp_path / "one", batch_size=4, devices="auto")
    one = pretrain(config)
    two = replace(config, output=tmp_path / "two")
    done = torchrun("-m", "pgl", "pretrain", f"--config={written(two, tmp_path / 'config.yaml')}")
    assert done.returncode == 0, done.stderr
    both = [[line["loss"] for line in lines(run, "train")] for run in (one, two.output)]
    assert len(both[0]) == 4 and both[1] == pytest.approx(both[0], abs=1e-4)
