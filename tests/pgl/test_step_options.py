"""What may be chosen about a step: pieces, layout, translation, precision, and options beyond the paper."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from torch._dynamo.backends.debugging import aot_eager

from pgl.config import MethodSettings, from_plain
from pgl.config_check import check
from pgl.export import export_encoder, load_encoder
from pgl.methods.pgl import PGL
from pgl.networks import seeded_module
from pgl.pictures import curves
from pgl.pictures.show import show
from pgl.pretrain import pretrain
from pgl.report import write_report
from pgl.runs.folder import LAST, checkpoint_path
from pgl.training import step as module
from pgl.training.checkpoint import load_checkpoint
from pgl.training.devices import autocast_to, precision_of, slow_precision
from pgl.views import ViewPairs, place, sample_regions, sample_view_pairs, shared_region

from .test_pretrain import assert_same_weights, lines
from .training_data import make_cache, small_config, small_encoder

CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "beyond-the-paper").glob("*.yaml"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return make_cache(tmp_path_factory.mktemp("data") / "cache")


def run(
    cache: Path, output: Path, method=None, steps: int = 4, resume: bool = False, norm="instance", **train
) -> Path:
    config = small_config(cache, output, steps=steps)
    config.encoder = replace(config.encoder, norm=norm)
    config.method = replace(config.method, head_norm="group", output_norm="instance", **(method or {}))
    config.train = replace(config.train, batch_size=4, **train)
    return pretrain(replace(config, resume=resume))


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, "train")]


@pytest.fixture(scope="module")
def plain(cache, tmp_path_factory) -> Path:
    return run(cache, tmp_path_factory.mktemp("runs") / "plain")


@pytest.mark.parametrize(
    "option", [{"accumulate": 2}, {"accumulate": 4}, {"channels_last": True}, {"recompute": True}]
)
def test_an_option_that_saves_time_or_memory_leaves_the_losses(cache, plain, tmp_path, option):
    assert losses(run(cache, tmp_path / "run", **option)) == pytest.approx(losses(plain), abs=2e-5)


def test_channels_last_is_the_layout_of_the_networks_and_of_the_feature_maps(cache, tmp_path, monkeypatch):
    seen = []
    original = module.TrainingStep.__call__

    def step(self, number, pieces):
        features = self.method.backbone(self.inputs(pieces[0]))
        seen.append(features.is_contiguous(memory_format=torch.channels_last_3d))
        return original(self, number, pieces)

    monkeypatch.setattr(module.TrainingStep, "__call__", step)
    # torch's instance normalisation gives the other layout back, whatever it gets.
    run(cache, tmp_path / "run", steps=2, norm="batch", channels_last=True)
    assert seen == [True, True]


def test_compiled_networks_have_the_values_and_gradients_of_others(monkeypatch):
    """With torch.compile's capture of graphs and gradients, but without the minutes of its C++ compiler."""
    compile_, translated_parts = torch.compile, []

    def backend(graph, inputs):
        translated_parts.append(graph)
        return aot_eager(graph, inputs)

    monkeypatch.setattr(torch, "compile", lambda f, **_: compile_(f, backend=backend))
    settings = MethodSettings(aligned_size=(2, 4, 4), projector_hidden=8, projector_channels=8,
                              predictor_hidden=8, head_norm="group", output_norm="instance")  # fmt: skip
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), 2, (8, 28, 28), (4, 16, 16))
    views = torch.randn(4, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    results = []
    for translated in (False, True):
        method = seeded_module(0, lambda: PGL(small_encoder(), settings))
        names = list(method.state_dict())
        if translated:
            method.compile_networks()
        loss = method(views, pairs)
        loss.backward()
        assert list(method.state_dict()) == names
        results.append([loss.detach(), *(p.grad for p in method.parameters() if p.grad is not None)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)
    # Both networks, both projectors and the predictor.
    assert len(translated_parts) == 5


@pytest.mark.parametrize(
    ("gpu", "bf16", "accelerator", "asked", "expected"),
    [
        (True, True, "auto", "auto", "bf16-mixed"),
        (True, False, "cuda", "auto", "32-true"),
        (True, True, "cpu", "auto", "32-true"),
        (False, False, "auto", "auto", "32-true"),
        (True, True, "auto", "32-true", "32-true"),
    ],
)
def test_the_precision_is_bf16_on_gpus_that_have_it_unless_told_otherwise(
    monkeypatch, gpu, bf16, accelerator, asked, expected
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    # Where the GPU lacks it, torch emulates it, slowly.
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: bf16 or including_emulation
    )
    assert precision_of(asked, accelerator) == expected


@pytest.mark.parametrize(
    ("precision", "device", "dtype"),
    [
        ("bf16-mixed", "cuda", torch.bfloat16),
        ("16-mixed", "cuda", torch.float16),
        ("32-true", "cuda", None),
        ("bf16-mixed", "cpu", None),
    ],
)
def test_a_network_is_used_in_the_precision_it_was_trained_in_but_on_a_cpu(
    monkeypatch, precision, device, dtype
):
    asked = []
    monkeypatch.setattr(torch, "autocast", lambda *arguments: asked.append(arguments))
    autocast_to(precision, torch.device(device))
    assert asked == ([] if dtype is None else [(device, dtype)])


def test_regions_lie_inside_what_both_views_share_with_edges_of_the_given_share():
    pairs = sample_view_pairs(torch.Generator().manual_seed(0), 200, (8, 28, 28), (4, 16, 16))
    regions = sample_regions(torch.Generator().manual_seed(1), pairs.boxes, 5, (0.25, 0.5))
    shared = shared_region(pairs.boxes)[:, None]
    low, high = regions.chunk(2, -1)
    assert (low >= shared[..., :3]).all() and (high <= shared[..., 3:]).all()
    share = (high - low) / (shared[..., 3:] - shared[..., :3])
    assert 0.25 <= share.min() < 0.26 and 0.49 < share.max() <= 0.5 + 1e-9
    # Anywhere inside: the room before a region, of all the room there is, is uniform.
    before = (low - shared[..., :3]) / (shared[..., 3:] - shared[..., :3] - (high - low))
    assert float(before.mean()) == pytest.approx(0.5, abs=0.02)


def test_the_loss_of_several_regions_is_the_mean_of_the_losses_of_each():
    settings = MethodSettings(aligned_size=(2, 3, 3), projector_hidden=8, projector_channels=8,
                              predictor_hidden=8, head_norm="group", output_norm="none")  # fmt: skip
    method = seeded_module(0, lambda: PGL(small_encoder(), settings))
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), 3, (8, 28, 28), (4, 16, 16))
    views = torch.randn(6, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    regions = sample_regions(torch.Generator().manual_seed(3), pairs.boxes, 4, (0.3, 0.8))

    def loss(of: torch.Tensor) -> torch.Tensor:
        return method(views, ViewPairs(pairs.boxes, pairs.flips, pairs.patch_size, of))

    # GroupNorm in the predictor looks at one region at a time, so each may be computed alone.
    singly = torch.stack([loss(regions[:, [i]]) for i in range(4)])
    torch.testing.assert_close(loss(regions), singly.mean(), atol=1e-5, rtol=1e-5)
    assert singly.std() > 1e-4
    whole = shared_region(pairs.boxes)[:, None]
    torch.testing.assert_close(loss(whole), method(views, pairs), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match=r"regions must be a float64 Tensor\[3, R, 6\]"):
        loss(regions[:2])


def test_the_loss_of_several_stages_is_the_mean_over_them():
    settings = MethodSettings(aligned_size=(2, 3, 3), projector_hidden=8, projector_channels=8,
                              predictor_hidden=8, head_norm="group", output_norm="none")  # fmt: skip
    both = seeded_module(0, lambda: PGL(small_encoder(), replace(settings, more_levels=[1])))
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), 3, (8, 28, 28), (4, 16, 16))
    views = torch.randn(6, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    singly = []
    for level, heads in ((2, ("projector", "predictor")), (1, ("side_projectors.0", "side_predictors.0"))):
        one = PGL(small_encoder(), replace(settings, feature_level=level))
        for name, source in (("projector", heads[0]), ("target_projector", f"target_{heads[0]}"),
                             ("predictor", heads[1])):  # fmt: skip
            getattr(one, name).load_state_dict(both.get_submodule(source).state_dict())
        for name in ("backbone", "target_backbone"):
            getattr(one, name).load_state_dict(getattr(both, name).state_dict())
        singly.append(one(views, pairs))
    torch.testing.assert_close(both(views, pairs), torch.stack(singly).mean())
    both(views, pairs).backward()
    assert all(p.grad is not None for p in both.side_predictors.parameters())


@pytest.mark.parametrize(
    "method",
    [
        {"regions": 2},
        {"more_levels": [1]},
        {"decorrelation": 0.1},
        {"features": "decoder", "feature_level": 0, "more_levels": [1]},
    ],
)
def test_an_option_beyond_the_paper_trains_resumes_exactly_and_exports(cache, tmp_path, method):
    whole = run(cache, tmp_path / "whole", method)
    part = run(cache, tmp_path / "part", method)
    first = checkpoint_path(part, LAST)
    # Back to the state of step 2, as if the run had been killed after it.
    again = run(cache, tmp_path / "again", method, keep_every=2)
    first.unlink()
    (again / "checkpoints" / "step-00000002.pt").rename(first)
    run(cache, part, method, resume=True)
    assert_same_weights(part, whole)
    assert losses(part) == losses(whole)
    saved = load_checkpoint(first)
    before = load_checkpoint(checkpoint_path(whole, "initial.pt"))
    for side, expected in (
        ("online", {"side_predictors", "side_projectors"}),
        ("target", {"side_projectors"}),
    ):
        extra = set(saved[side]) - {"encoder", "projector", "predictor"}
        more = expected if method.get("more_levels") else set()
        assert extra == more | ({"decoder"} if method.get("features") == "decoder" else set())
        for name in extra:
            assert any(not torch.equal(v, before[side][name][k]) for k, v in saved[side][name].items()), name
    export_encoder(whole, tmp_path / "encoder.pt")
    exported = load_encoder(tmp_path / "encoder.pt").state_dict()
    assert all(torch.equal(value, saved["online"]["encoder"][key]) for key, value in exported.items())


def test_pictures_and_report_say_what_a_penalty_adds_to_the_loss(cache, plain, tmp_path, monkeypatch):
    with_penalty = run(cache, tmp_path / "run", {"decorrelation": 0.1})
    units = []
    monkeypatch.setattr(curves, "_loss", lambda *arguments: units.append(arguments[-1]))
    words = "and 0.1 times the correlations of the projection"
    for folder, unit, said in ((plain, "2 − 2·cos", False), (with_penalty, "2 − 2·cos, and penalty", True)):
        show(folder, tmp_path / "pictures", pairs=1)
        assert units.pop() == unit
        page, lacking = write_report(folder, tmp_path / "report.html", pairs=1)
        assert lacking == [] and (words in page.read_text("utf-8")) == said


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_each_option_beyond_the_paper_has_a_config_that_works(file):
    config = from_plain({"data": "cache", "output": "run", **yaml.safe_load(file.read_text("utf-8"))})
    check(config)
    default = MethodSettings()
    chosen = {name for name in ("regions", "more_levels", "features", "decorrelation") if
              getattr(config.method, name) != getattr(default, name)}  # fmt: skip
    names = {"levels": "more_levels", "unet": "features", "decorrelated": "decorrelation"}
    assert chosen == {names.get(file.stem, file.stem)}


@pytest.mark.parametrize(
    ("supported", "precision", "device", "told"),
    [
        (False, "bf16-mixed", "cpu", True),
        (True, "bf16-mixed", "cpu", False),
        (False, "32-true", "cpu", False),
        (False, "bf16-mixed", "cuda", False),
    ],
)
def test_a_precision_that_the_processor_emulates_is_told(monkeypatch, supported, precision, device, told):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: supported)
    note = slow_precision(precision, torch.device(device))
    assert (note is not None and "32-true" in note) == told


def test_the_environment_tells_which_precision_was_chosen(plain):
    told = json.loads((plain / "environment.json").read_text("utf-8"))
    assert told["starts"][0]["precision"] == "32-true"


def test_views_and_regions_are_placed_by_the_same_rule():
    """A region that is the whole first view lies on all of its grid, whatever its mirrors."""
    pairs = sample_view_pairs(torch.Generator().manual_seed(1), 3, (8, 28, 28), (4, 16, 16))
    grid = torch.tensor([[0, 0, 0, 4, 16, 16.0]], dtype=torch.float64).expand(3, 6)
    placed = place(pairs.boxes[:, 0], pairs.boxes[:, 0], pairs.flips[:, 0], pairs.patch_size)
    torch.testing.assert_close(placed, grid, atol=1e-9, rtol=0)
