"""The pictures: regions drawn where they are, colours that mean something, curves from the run's numbers."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest
import torch

from pgl.cache.volumes import VolumeCache
from pgl.pictures.colours import pca_colours
from pgl.pictures.curves import draw_curves
from pgl.pictures.features import FeaturePicture
from pgl.pictures.show import choose_pairs, picture_of_pair, show
from pgl.pictures.style import Sheet, window
from pgl.pictures.views import PairPicture, outline
from pgl.pretrain import pretrain
from pgl.runs.facts import read_metrics
from pgl.runs.folder import INITIAL, LAST, checkpoint_path
from pgl.views import ViewPairs, cut, sample_view_pairs, shared_region
from tests.pgl.training_data import make_cache, small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("show")
    return pretrain(small_config(make_cache(folder / "cache"), folder / "run", steps=3))


def test_a_region_is_outlined_where_it_was_placed_by_hand():
    # View 1 shows [0, 8) × [0, 16) × [0, 16) as it is. View 2 shows [2, 10) × [4, 36) × [6, 14), that is with
    # H halved and W doubled, mirrored in D and W. They share [2, 8) × [4, 16) × [6, 14).
    pairs = ViewPairs(
        boxes=torch.tensor([[[0, 0, 0, 8, 16, 16], [2, 4, 6, 10, 36, 14]]], dtype=torch.float64),
        flips=torch.tensor([[[False, False, False], [True, False, True]]]),
        patch_size=(8, 16, 16),
    )
    placed = pairs.placed(shared_region(pairs.boxes))
    first, second = (
        outline(box.tolist(), flips.tolist(), pairs.patch_size)
        for box, flips in zip(placed, pairs.flat_flips(), strict=True)
    )
    # imshow centres pixel i on i, so an edge between voxels lies half a pixel lower.
    assert (first.x, first.y, first.width, first.height) == (5.5, 3.5, 8, 12)
    assert first.slice == 5  # [2, 8) has its middle at 5
    assert first.mark == (5.5, 3.5)
    # In view 2 the region is D [0, 6) → mirrored [2, 8), H [0, 6), W all of it.
    assert (second.x, second.y, second.width, second.height) == (-0.5, -0.5, 16, 6)
    assert second.slice == 5
    assert second.mark == (15.5, -0.5)  # the low-W corner, on the right after the mirror


@pytest.mark.parametrize("axis", [1, 2])
def test_the_marked_corner_is_the_same_place_of_the_body_in_both_views(axis):
    # A volume whose value is its own coordinate tells, at any point of a view, where that point lies.
    context_size = (12, 40, 40)
    shape = [1, 1, 1]
    shape[axis] = context_size[axis]
    ramp = (torch.arange(context_size[axis]) + 0.5).double().view(shape).expand(context_size)
    pairs = sample_view_pairs(torch.Generator().manual_seed(3), 20, context_size, (8, 24, 24))
    views = cut(ramp.expand(20, 1, *context_size).contiguous(), pairs)[:, 0]
    regions = shared_region(pairs.boxes)
    placed, flips = pairs.placed(regions), pairs.flat_flips()
    for row in range(40):
        drawn = outline(placed[row].tolist(), flips[row].tolist(), pairs.patch_size)
        line = views[row, drawn.slice].select(2 - axis, 0)  # values along the axis
        # Far from the border the view is exactly linear; read the mark off that line.
        middle = len(line) // 2
        slope = line[middle + 1] - line[middle]
        at_mark = line[middle] + (drawn.mark[2 - axis] - middle) * slope
        assert at_mark == pytest.approx(float(regions[row % 20, axis]), abs=1e-9)


def test_the_drawn_slice_always_lies_in_the_view():
    assert outline((-0.2, 0, 0, 0.1, 4, 4), (False,) * 3, (8, 16, 16)).slice == 0
    assert outline((7.9, 0, 0, 8.2, 4, 4), (False,) * 3, (8, 16, 16)).slice == 7


def test_both_crops_of_a_linear_volume_are_equal(tmp_path):
    z, y, x = np.meshgrid(np.arange(14), np.arange(40), np.arange(44), indexing="ij")
    linear = (10 * z + 7 * y - 4 * x).astype(np.int16)
    cache = VolumeCache(make_cache(tmp_path, {"linear": linear}))
    config = small_config(tmp_path, tmp_path / "run")
    chosen = choose_pairs(cache, config, 6)
    for number in range(6):
        picture = picture_of_pair(chosen, number, cache.spacing_mm)
        inner = picture.crops[:, 2:-2, 2:-2]  # views repeat their border voxels
        assert np.abs(inner[0] - inner[1]).max() < 2e-3
        low, high = chosen.regions[number].view(2, 3).tolist()
        # In the body's own orientation, each pixel covers its share of the region.
        assert np.diff(inner[0], axis=0) == pytest.approx(7 * (high[1] - low[1]) / 16, abs=2e-3)
        assert np.diff(inner[0], axis=1) == pytest.approx(-4 * (high[2] - low[2]) / 16, abs=2e-3)
        assert picture.crop_mm == pytest.approx((high[1] - low[1], high[2] - low[2]))  # 1 mm pixels


def test_pairs_are_chosen_from_all_cases_before_one_comes_twice(run):
    config = small_config(run.parent / "cache", run)
    config.validation.fraction = 0.6  # three of five cases
    names = choose_pairs(VolumeCache(config.data), config, 9).names
    assert [len(set(names[first : first + 3])) for first in (0, 3, 6)] == [3, 3, 3]


def test_the_window_is_soft_tissue():
    assert window(np.array([-1000, -160, 40, 240, 3000])).tolist() == [0, 0, 0.5, 1, 1]


def features(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_colours_are_in_range_and_have_the_maps_shape():
    colours = pca_colours([features(2, 5, 3, 4, 6), features(1, 5, 7)])
    assert [list(c.shape) for c in colours] == [[2, 3, 4, 6, 3], [1, 7, 3]]
    assert all(float(c.min()) >= 0 and float(c.max()) <= 1 for c in colours)


def test_equal_features_have_equal_colours_in_both_views():
    first = features(1, 6, 4, 4)
    moved = first.flip(2)
    one, other = pca_colours([torch.cat([first, moved])])[0]
    assert torch.equal(one, other.flip(0))


def test_colours_do_not_depend_on_the_orientation_or_length_of_features():
    maps = features(2, 6, 5, 5, 5)
    for seed in range(1, 6):
        rotation, _ = torch.linalg.qr(features(6, 6, seed=seed).double())
        rotated = torch.einsum("nc...,cd->nd...", maps.double(), rotation)
        assert torch.allclose(pca_colours([maps])[0], pca_colours([rotated])[0], atol=1e-5)
    lengths = features(2, 1, 5, 5, 5, seed=2).exp()
    assert torch.allclose(pca_colours([maps])[0], pca_colours([maps * lengths])[0], atol=1e-5)


def test_one_pca_serves_all_maps():
    maps = features(2, 6, 5, 5)
    together = pca_colours([maps])[0]
    apart = pca_colours([maps[:1], maps[1:]])
    assert torch.equal(together, torch.cat(apart))


def test_different_tissues_get_different_colours():
    tissue = torch.eye(4)[torch.arange(40) % 4].T[None] + 0.01 * features(1, 4, 40)
    colours = pca_colours([tissue])[0][0]
    within = max(float(torch.pdist(colours[kind::4]).max()) for kind in range(4))
    between = float(torch.pdist(torch.stack([colours[kind::4].mean(0) for kind in range(4)])).min())
    assert between > 0.5
    assert within < 0.1


@pytest.mark.parametrize("channels", [1, 2, 8])
def test_collapsed_features_are_grey(channels):
    collapsed = torch.ones(2, channels, 4, 4) * torch.rand(2, 1, 4, 4).add(0.5)
    assert torch.allclose(pca_colours([collapsed])[0], torch.tensor(0.5))


def test_features_that_are_no_numbers_have_no_colours():
    maps = features(1, 3, 4, 4)
    maps[0, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        pca_colours([maps])
    with pytest.raises(ValueError, match="non-empty"):
        pca_colours([torch.zeros(1, 3)])


def line(kind: str, step: int, **numbers: float) -> str:
    return json.dumps({"kind": kind, "step": step, **numbers}) + "\n"


VALIDATION_LINES = [
    line("validation", 0, matching_accuracy=0.05, chance=0.004, feature_spread=0.7, projected_spread=0.6),
    line("validation", 10, matching_accuracy=0.15, chance=0.004, feature_spread=0.6, projected_spread=0.5),
]


def test_metrics_are_read_in_order_without_a_cut_off_last_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        line("train", 2, loss=1.5) + line("train", 1, loss=2.0) + line("train", 2, loss=1.0) + '{"kind": "tra'
    )
    assert [(e["step"], e["loss"]) for e in read_metrics(path)["train"]] == [(1, 2.0), (2, 1.0)]


def test_a_damaged_line_of_the_metrics_is_named(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text(line("train", 1, loss=2.0) + "{oops\n" + line("train", 2, loss=1.0))
    with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2"):
        read_metrics(path)


def drawn_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]) -> list[dict[str, list]]:
    """The values of each curve by its label, for the panels loss, matching and spread."""
    (tmp_path / "metrics.jsonl").write_text("".join(lines))
    sheets: list[Sheet] = []
    monkeypatch.setattr(Sheet, "save", lambda sheet, path: sheets.append(sheet))
    draw_curves(read_metrics(tmp_path / "metrics.jsonl"), 0.05, tmp_path / "curves.png")
    panels = sheets[0].figure.axes
    return [
        {curve.get_label(): np.asarray(curve.get_ydata()).tolist() for curve in ax.lines} for ax in panels
    ]


def test_the_curves_show_the_runs_numbers_chance_and_the_untrained_level(tmp_path, monkeypatch):
    losses = [line("train", step, loss=2.0 - 0.1 * step) for step in range(1, 11)]
    loss, matching, spread = drawn_curves(tmp_path, monkeypatch, VALIDATION_LINES + losses)
    assert matching["encoder's features"] == [0.05, 0.15]
    assert matching["untrained 0.050 (best: 3.0×)"] == [0.05, 0.05]
    assert matching["chance 0.0040"] == [0.004, 0.004]
    assert spread["encoder's features"] == [0.7, 0.6]
    assert spread["after the projector"] == [0.6, 0.5]
    assert loss["training, as measured"] == pytest.approx([2.0 - 0.1 * step for step in range(1, 11)])
    # The running mean of a straight line is that line, but for its ends.
    assert loss["training, smoothed"][1:-1] == pytest.approx(loss["training, as measured"][1:-1])


def test_a_loss_that_is_no_number_leaves_a_gap(tmp_path, monkeypatch):
    losses = [line("train", step, loss=float("nan") if step == 3 else 1.0) for step in range(1, 11)]
    curves, *_ = drawn_curves(tmp_path, monkeypatch, losses)
    assert np.isnan(curves["training, as measured"][2])
    assert curves["training, smoothed"] == [1.0] * 10


def test_nothing_measured_is_said(tmp_path):
    with pytest.raises(ValueError, match="no measurement yet"):
        draw_curves({"train": [], "validation": []}, 0.05, tmp_path / "curves.png")


def test_show_draws_the_three_pictures_of_a_run(run):
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*") if path.is_file()}
    files = show(run, pairs=2)
    assert [path.relative_to(run).as_posix() for path in files] == [
        "pictures/curves.png",
        "pictures/views.png",
        "pictures/features.png",
    ]
    for path in files:
        pixels = matplotlib.image.imread(path)[..., :3]
        assert pixels.shape[1] == 1650
        assert np.mean(pixels.min(-1) < 0.98) > 0.05  # something is drawn on the white
        assert np.mean(np.ptp(pixels, axis=-1) > 0.2) > 0.001  # and some of it in colour
    assert {path: path.stat().st_mtime_ns for path in before} == before


def test_the_rectangles_are_drawn_on_the_views_of_the_run(run, monkeypatch):
    drawn: list[PairPicture] = []
    monkeypatch.setattr("pgl.pictures.show.draw_views", lambda rows, path: drawn.extend(rows))
    show(run, pairs=2)
    chosen = choose_pairs(VolumeCache(run.parent / "cache"), small_config(run.parent / "cache", run), 2)
    for number, picture in enumerate(drawn):
        for view, region in enumerate(picture.outlines):
            box = chosen.placed[number + 2 * view].tolist()
            assert (region.width, region.height) == pytest.approx((box[5] - box[2], box[4] - box[1]))


def feature_rows(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[FeaturePicture]:
    drawn: list[FeaturePicture] = []
    monkeypatch.setattr("pgl.pictures.show.draw_features", lambda rows, *others: drawn.extend(rows))
    show(run, output=tmp_path / "pictures", pairs=2, data=run.parent / "cache")
    return drawn


def test_before_and_after_come_from_their_own_checkpoints(run, tmp_path, monkeypatch):
    for row in feature_rows(run, tmp_path, monkeypatch):
        assert np.abs(row.untrained - row.trained).max() > 0.01
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "cache").symlink_to(run.parent / "cache")
    last = torch.load(checkpoint_path(run, LAST))
    last["online"] = torch.load(checkpoint_path(run, INITIAL))["online"]
    torch.save(last, checkpoint_path(tmp_path / "run", LAST))
    for row in feature_rows(tmp_path / "run", tmp_path, monkeypatch):
        assert np.array_equal(row.untrained, row.trained)
        assert row.untrained_accuracy == row.trained_accuracy


def test_the_ct_beside_the_features_shows_the_shared_region_in_the_bodys_orientation(
    run, tmp_path, monkeypatch
):
    cache = VolumeCache(run.parent / "cache")
    chosen = choose_pairs(cache, small_config(run.parent / "cache", run), 2)
    for number, row in enumerate(feature_rows(run, tmp_path, monkeypatch)):
        picture = picture_of_pair(chosen, number, cache.spacing_mm)
        for view in (0, 1):
            one, other = row.crops[view], picture.crops[view]
            assert np.corrcoef(one.ravel(), other.ravel())[0, 1] > 0.8


def test_the_curves_are_drawn_without_the_cache_which_is_then_missed(run, tmp_path):
    shutil.copytree(run, tmp_path / "run", ignore=shutil.ignore_patterns("pictures"))
    with pytest.raises(FileNotFoundError, match=r"nowhere.*--data"):
        show(tmp_path / "run", output=tmp_path / "pictures", data=tmp_path / "nowhere")
    assert [path.name for path in (tmp_path / "pictures").iterdir()] == ["curves.png"]
    assert not (tmp_path / "run" / "pictures").exists()


def test_wrong_runs_are_named(run, tmp_path):
    with pytest.raises(ValueError, match="pairs must be at least 1, got 0"):
        show(run, pairs=0)
    with pytest.raises(FileNotFoundError, match="no run at"):
        show(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match=r"metrics\.jsonl"):
        show(tmp_path)
    shutil.copytree(run, tmp_path / "run")
    checkpoint_path(tmp_path / "run", LAST).write_bytes(b"damaged")
    with pytest.raises(ValueError, match="cannot be read as a checkpoint"):
        show(tmp_path / "run")
