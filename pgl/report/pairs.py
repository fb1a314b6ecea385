"""The pictures of a report: view pairs to scroll through, and features before and after training."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pgl.config import from_plain
from pgl.pictures.examples import (
    ExamplePairs,
    FeatureMaps,
    Slab,
    backbone_of,
    choose_pairs,
    feature_maps,
    middle_slab,
    open_cache,
)
from pgl.pictures.show import note_of_view
from pgl.report.sprites import colour_sprite, difference_sprite, grey_sprite
from pgl.runs.folder import INITIAL, LAST, checkpoint_path
from pgl.training.checkpoint import load_checkpoint

# Voxels of all grey and difference sprites together, if they pack as CT does: half a byte a voxel as PNG, and
# a third more in the page. Pictures that pack worse are made again, smaller.
MOST_VOXELS = 7_000_000
# Of all pictures in the page, which so stays under 6 MB.
MOST_CHARACTERS = 5_000_000
_SPRITES_A_PAIR = 5
# Of one sprite of features; a colour takes three bytes, but features are coarse.
_FEATURE_VOXELS, _SLAB_VOXELS = 20_000, 60_000


@dataclass
class Pictures:
    """What ``page.js`` shows.

    Args:
        pairs: one entry a view pair.
        slab: the slab through a whole case, or None.
        networks: what the two networks are called.
    """

    pairs: list[dict[str, Any]]
    slab: dict[str, Any]
    networks: tuple[str, str]


def pictures_of(
    run: str | os.PathLike[str], pairs: int, data: str | os.PathLike[str] | None = None
) -> Pictures:
    """Make the pictures of a run.

    Args:
        run: its folder.
        pairs: view pairs to show.
        data: the cache, if it was moved.

    Raises:
        FileNotFoundError: a checkpoint or the cache is missing.
        ValueError: one of them is damaged.
    """
    run = Path(run)
    checkpoints = [load_checkpoint(checkpoint_path(run, name)) for name in (INITIAL, LAST)]
    config = from_plain(checkpoints[0]["config"])
    cache = open_cache(data if data is not None else config.data)
    chosen = choose_pairs(cache, config, pairs)
    stride = backbone_of(checkpoints[0], config).stride
    slab = middle_slab(cache, int(chosen.batch.case[0]), config, stride)
    maps = [feature_maps(chosen, slab, config, checkpoint) for checkpoint in checkpoints]
    slices = len(maps[0].slab_colours)
    most_voxels = MOST_VOXELS
    while True:
        # The slab counts as one sprite more.
        share = most_voxels // (_SPRITES_A_PAIR * len(chosen.batch) + 1)
        pictures = Pictures(
            [_pair(chosen, i, cache.spacing_mm, maps, share) for i in range(len(chosen.batch))],
            _slab(slab, slices, maps, share),
            ("untrained", f"after {maps[1].step:,} steps"),
        )
        size = characters(pictures.pairs) + characters(pictures.slab)
        if size <= MOST_CHARACTERS:
            return pictures
        most_voxels = int(0.9 * most_voxels * MOST_CHARACTERS / size)


def characters(content: Any) -> int:
    """How much text nested plain data holds."""
    if isinstance(content, dict):
        return sum(map(characters, content.values()))
    if isinstance(content, list):
        return sum(map(characters, content))
    return len(content) if isinstance(content, str) else 0


def _pair(
    chosen: ExamplePairs,
    index: int,
    spacing_mm: tuple[float, float, float],
    maps: list[FeatureMaps],
    most_voxels: int,
) -> dict[str, Any]:
    rows = [index, len(chosen.batch) + index]
    low, high = chosen.regions[index].view(2, 3).tolist()
    # As fine as the volume itself.
    d, h, w = (max(1, round(b - a)) for a, b in zip(low, high, strict=True))
    first, second = chosen.aligned(rows, (d, h, w), sampling_ratio=1)
    edges_mm = chosen.edges_mm(index, spacing_mm)
    return {
        "name": chosen.names[index],
        "size_mm": [round(edge) for edge in edges_mm],
        "views": [_view(chosen, row, spacing_mm, most_voxels) for row in rows],
        "aspect": edges_mm[2] / edges_mm[1],
        "shared": [grey_sprite(crop, most_voxels) for crop in (first, second)],
        "difference": difference_sprite(first, second, most_voxels),
        "difference_hu": float((first - second).abs().mean()),
        "features": [[colour_sprite(of.colours[row], _FEATURE_VOXELS) for row in rows] for of in maps],
        "matched": [of.matched[index] for of in maps],
    }


def _view(
    chosen: ExamplePairs, row: int, spacing_mm: tuple[float, float, float], most_voxels: int
) -> dict[str, Any]:
    """A view, and where the shared region lies in it.

    ``depth`` holds (start, change): the region's share t of depth, in the body's direction, lies at start +
    t · change, in the view's own slices; a mirror makes the change negative. ``region`` holds left, top,
    width and height as shares of the view, and ``mark`` the corner with the lowest W and H in the body.
    """
    pairs = chosen.batch.pairs
    flips, box = pairs.flat_flips()[row], pairs.flat_boxes()[row]
    d1, h1, w1, d2, h2, w2 = chosen.placed[row].tolist()
    depth, height, width = pairs.patch_size
    edges = ((box[3:] - box[:3]) * box.new_tensor(spacing_mm)).tolist()
    mirrored = flips.tolist()
    return {
        "sprite": grey_sprite(chosen.views_hu[row, 0], most_voxels),
        "slices": depth,
        "aspect": edges[2] / edges[1],
        "depth": [d2, d1 - d2] if mirrored[0] else [d1, d2 - d1],
        "region": [w1 / width, h1 / height, (w2 - w1) / width, (h2 - h1) / height],
        "mark": [int(mirrored[2]), int(mirrored[1])],
        "note": note_of_view(box, flips, pairs.patch_size).replace("\n", ", "),
    }


def _slab(slab: Slab, slices: int, maps: list[FeatureMaps], most_voxels: int) -> dict[str, Any]:
    hu = slab.hu.new_empty((slices, *slab.hu.shape[1:]))
    for i in range(slices):
        hu[i] = slab.slice_hu(i)
    return {
        "name": slab.name,
        "aspect": slab.size_mm[1] / slab.size_mm[0],
        "ct": grey_sprite(hu, most_voxels),
        "features": [colour_sprite(of.slab_colours, _SLAB_VOXELS) for of in maps],
    }
