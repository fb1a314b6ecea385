"""``pgl show``: pictures of a run: its view pairs, its features before and after training, its curves."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from torch import Tensor

from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig, from_plain
from pgl.pictures.curves import draw_curves
from pgl.pictures.examples import (
    ExamplePairs,
    backbone_of,
    choose_pairs,
    feature_maps,
    middle_slab,
    open_cache,
)
from pgl.pictures.features import FeaturePicture, SlicePicture, draw_features
from pgl.pictures.views import PairPicture, draw_views, outline
from pgl.runs.facts import read_metrics
from pgl.runs.folder import INITIAL, LAST, checkpoint_path, refuse_fine_tuning
from pgl.training.checkpoint import load_checkpoint
from pgl.training.metrics import chance
from pgl.views import Triple

PICTURES = "pictures"


def show(
    run: str | os.PathLike[str],
    output: str | os.PathLike[str] | None = None,
    pairs: int = 4,
    data: str | os.PathLike[str] | None = None,
) -> list[Path]:
    """Draw ``curves.png``, ``views.png`` and ``features.png`` of a run.

    Args:
        run: the folder of ``pgl pretrain``; the run may still be going on.
        output: folder for the pictures, RUN/pictures unless given.
        pairs: view pairs to draw, from the validation cases.
        data: the cache, if it was moved since the run.

    Returns:
        The files, in the order above.

    Raises:
        FileNotFoundError: the run, its checkpoints or its cache do not exist. The curves need no cache and
            are drawn before it is looked for.
        ValueError: ``pairs`` is below 1, the run is a fine-tuning, or a file of it is damaged.
    """
    run = Path(run)
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {run}: give the folder that `pgl pretrain --output` made")
    refuse_fine_tuning(run)
    folder = Path(output) if output is not None else run / PICTURES
    metrics = read_metrics(run / "metrics.jsonl")
    untrained = load_checkpoint(checkpoint_path(run, INITIAL))
    config = from_plain(untrained["config"])
    files = [folder / name for name in ("curves.png", "views.png", "features.png")]
    method = config.method
    draw_curves(
        metrics, config.validation.collapse_threshold, files[0], method.name, method.decorrelation > 0
    )

    trained = load_checkpoint(checkpoint_path(run, LAST))
    cache = open_cache(data if data is not None else config.data)
    chosen = choose_pairs(cache, config, pairs)
    draw_views([picture_of_pair(chosen, i, cache.spacing_mm) for i in range(len(chosen.batch))], files[1])
    _draw_features(chosen, cache, config, (untrained, trained), files[2])
    return files


def picture_of_pair(chosen: ExamplePairs, index: int, spacing_mm: tuple[float, float, float]) -> PairPicture:
    pairs, count = chosen.batch.pairs, len(chosen.batch)
    rows = [index, count + index]  # view 1, view 2
    flips, boxes = pairs.flat_flips()[rows], pairs.flat_boxes()[rows]
    placed = chosen.placed[rows]
    # An odd number of slices, so that one lies in the middle of the region.
    size = (2 * (pairs.patch_size[0] // 2) + 1, *pairs.patch_size[1:])
    crops = chosen.aligned(rows, size, sampling_ratio=1)
    return PairPicture(
        name=chosen.names[index],
        views=chosen.views_hu[rows, 0].numpy(),
        outlines=tuple(outline(placed[v].tolist(), flips[v].tolist(), pairs.patch_size) for v in (0, 1)),  # type: ignore[arg-type]
        notes=tuple(note_of_view(boxes[v], flips[v], pairs.patch_size) for v in (0, 1)),  # type: ignore[arg-type]
        crops=crops[:, size[0] // 2].numpy(),
        crop_mm=chosen.edges_mm(index, spacing_mm)[1:],
    )


def note_of_view(box: Tensor, flips: Tensor, patch_size: Triple) -> str:
    """What was done to a view, in two lines: the size of its crop in patches, and its mirrors."""
    scales = " × ".join(
        f"{edge / size:.2f}" for edge, size in zip(box[3:] - box[:3], patch_size, strict=True)
    )
    flipped = ", ".join(axis for axis, flip in zip("DHW", flips.tolist(), strict=True) if flip)
    return f"crop {scales}\nflipped in {flipped or 'no axis'}"


def _draw_features(
    chosen: ExamplePairs,
    cache: VolumeCache,
    config: PretrainConfig,
    checkpoints: tuple[dict[str, Any], dict[str, Any]],
    path: Path,
) -> None:
    count, size = len(chosen.batch), config.method.aligned_size
    middle = size[0] // 2
    # The CT in the same slabs as the aligned features, but fine within the slice.
    fine = (size[0], *config.views.patch_size[1:])
    crops = chosen.aligned(list(range(2 * count)), fine)[:, middle].numpy()
    stride = backbone_of(checkpoints[0], config).stride
    slab = middle_slab(cache, int(chosen.batch.case[0]), config, stride)
    untrained, trained = (feature_maps(chosen, slab, config, checkpoint) for checkpoint in checkpoints)
    rows = [
        FeaturePicture(
            name=chosen.names[i],
            crops=crops[[i, count + i]],
            untrained=untrained.colours[[i, count + i], middle].numpy(),
            trained=trained.colours[[i, count + i], middle].numpy(),
            untrained_accuracy=untrained.matched[i],
            trained_accuracy=trained.matched[i],
            crop_mm=chosen.edges_mm(i, cache.spacing_mm)[1:],
        )
        for i in range(count)
    ]
    shown = len(untrained.slab_colours) // 2
    whole = SlicePicture(
        slab.name,
        slab.slice_hu(shown).numpy(),
        untrained.slab_colours[shown].numpy(),
        trained.slab_colours[shown].numpy(),
        slab.size_mm,
    )
    names = ("untrained", f"after {trained.step:,} steps")
    draw_features(rows, whole, names, (untrained.overall, trained.overall), chance(size), path)
