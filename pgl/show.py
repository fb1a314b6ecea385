"""``pgl show``: pictures of a run: its view pairs, its features before and after training, its curves."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from pgl.augment import normalise
from pgl.cache import VolumeCache
from pgl.checkpoint import INITIAL, LAST, checkpoint_path, load_checkpoint
from pgl.config import PretrainConfig, from_plain
from pgl.contexts import VALIDATION, Batch, ContextDataset, collate, split_cases
from pgl.metrics import chance, matching_accuracy
from pgl.networks import FeatureLevel
from pgl.pictures.colours import pca_colours
from pgl.pictures.curves import draw_curves, read_metrics
from pgl.pictures.features import FeaturePicture, SlicePicture, draw_features
from pgl.pictures.style import window
from pgl.pictures.views import PairPicture, draw_views, outline
from pgl.views import Triple, align, cut, shared_region

PICTURES = "pictures"
# A shared region with less body than this is mostly air and shows little.
_LEAST_BODY, _BODY_HU = 0.6, -300
# So many pairs are looked at for each one that is drawn.
_CANDIDATES = 8
# The whole slice is cut to at most this many voxels an axis, so that a large network still fits into memory.
_WIDEST_SLICE = 384


@dataclass
class _Pairs:
    """B pairs as pictures need them; everything aligned is in the volume's orientation."""

    batch: Batch
    views_hu: Tensor  # [2B, 1, *patch]
    regions: Tensor  # [B, 6] in voxels of the context
    placed: Tensor  # [2B, 6] in voxels of the views
    names: list[str]


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
        ValueError: ``pairs`` is below 1, or a file of the run is damaged.
    """
    run = Path(run)
    if pairs < 1:
        raise ValueError(f"pairs must be at least 1, got {pairs}")
    if not run.is_dir():
        raise FileNotFoundError(f"no run at {run}: give the folder that `pgl pretrain --output` made")
    folder = Path(output) if output is not None else run / PICTURES
    metrics = read_metrics(run / "metrics.jsonl")
    untrained = load_checkpoint(checkpoint_path(run, INITIAL))
    config = from_plain(untrained["config"])
    files = [folder / name for name in ("curves.png", "views.png", "features.png")]
    draw_curves(metrics, config.validation.collapse_threshold, files[0])

    trained = load_checkpoint(checkpoint_path(run, LAST))
    cache = _open_cache(data if data is not None else config.data)
    chosen = choose_pairs(cache, config, pairs)
    draw_views([picture_of_pair(chosen, i, cache.spacing_mm) for i in range(len(chosen.batch))], files[1])
    _draw_features(chosen, cache, config, (untrained, trained), files[2])
    return files


def _open_cache(path: str | os.PathLike[str]) -> VolumeCache:
    try:
        return VolumeCache(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if it was moved since the run, say where with --data") from error


def choose_pairs(cache: VolumeCache, config: PretrainConfig, count: int) -> _Pairs:
    """Validation pairs whose shared region shows most anatomy, from as many cases as there are.

    They are chosen by the CT alone, never by how well they match, and their intensities are not augmented.
    """
    _, cases = split_cases([case.case_id for case in cache.cases], config.validation.fraction, config.seed)
    dataset = ContextDataset(cache, cases, config.views, config.augment, config.seed, VALIDATION)
    # By worth first; then, keeping that order, the best pair of each case, the second of each, and so on.
    samples = sorted((dataset[i] for i in range(count * _CANDIDATES)), key=_worth, reverse=True)
    seen: Counter[int] = Counter()
    turns = []
    for sample in samples:
        turns.append(seen[int(sample.case)])
        seen[int(sample.case)] += 1
    chosen = sorted(range(len(samples)), key=lambda number: turns[number])[:count]
    batch = collate([samples[number] for number in chosen])
    regions = shared_region(batch.pairs.boxes)
    names = [cache.cases[int(case)].case_id for case in batch.case]
    return _Pairs(batch, cut(batch.contexts, batch.pairs), regions, batch.pairs.placed(regions), names)


def _worth(sample: Batch) -> tuple[bool, float]:
    """Whether the shared region is mostly body, and its contrast in the soft-tissue window."""
    low, high = shared_region(sample.pairs.boxes)[0].view(2, 3).round().int().tolist()
    block = sample.contexts[0, 0][tuple(slice(a, max(b, a + 1)) for a, b in zip(low, high, strict=True))]
    body = float((block > _BODY_HU).float().mean())
    return body >= _LEAST_BODY, float(window(block.numpy()).std())


def picture_of_pair(chosen: _Pairs, index: int, spacing_mm: tuple[float, float, float]) -> PairPicture:
    pairs, count = chosen.batch.pairs, len(chosen.batch)
    rows = [index, count + index]  # view 1, view 2
    flips, boxes = pairs.flat_flips()[rows], pairs.flat_boxes()[rows]
    placed = chosen.placed[rows]
    # An odd number of slices, so that one lies in the middle of the region.
    size = (2 * (pairs.patch_size[0] // 2) + 1, *pairs.patch_size[1:])
    crops = align(chosen.views_hu[rows], placed, flips, (1, 1, 1), size, sampling_ratio=1)
    return PairPicture(
        name=chosen.names[index],
        views=chosen.views_hu[rows, 0].numpy(),
        outlines=tuple(outline(placed[v].tolist(), flips[v].tolist(), pairs.patch_size) for v in (0, 1)),  # type: ignore[arg-type]
        notes=tuple(_note(boxes[v], flips[v], pairs.patch_size) for v in (0, 1)),  # type: ignore[arg-type]
        crops=crops[:, 0, size[0] // 2].numpy(),
        crop_mm=_in_plane_mm(chosen.regions[index], spacing_mm),
    )


def _note(box: Tensor, flips: Tensor, patch_size: Triple) -> str:
    scales = " × ".join(
        f"{edge / size:.2f}" for edge, size in zip(box[3:] - box[:3], patch_size, strict=True)
    )
    flipped = ", ".join(axis for axis, flip in zip("DHW", flips.tolist(), strict=True) if flip)
    return f"crop {scales}\nflipped in {flipped or 'no axis'}"


def _in_plane_mm(region: Tensor, spacing_mm: tuple[float, float, float]) -> tuple[float, float]:
    low, high = region.view(2, 3).tolist()
    return (high[1] - low[1]) * spacing_mm[1], (high[2] - low[2]) * spacing_mm[2]


def _feature_level(checkpoint: dict[str, Any], config: PretrainConfig) -> FeatureLevel:
    network = FeatureLevel(config.encoder, checkpoint["feature_level"])
    network.encoder.load_state_dict(checkpoint["online"]["encoder"])
    return network.eval()


@torch.no_grad()
def _draw_features(
    chosen: _Pairs,
    cache: VolumeCache,
    config: PretrainConfig,
    checkpoints: tuple[dict[str, Any], dict[str, Any]],
    path: Path,
) -> None:
    pairs, count = chosen.batch.pairs, len(chosen.batch)
    size, flips = config.method.aligned_size, pairs.flat_flips()
    middle = size[0] // 2
    # The CT in the same slabs as the aligned features, but fine within the slice.
    fine = (size[0], *pairs.patch_size[1:])
    crops = align(chosen.views_hu, chosen.placed, flips, (1, 1, 1), fine)[:, 0, middle].numpy()
    networks = [_feature_level(checkpoint, config) for checkpoint in checkpoints]
    slab, size_mm = _whole_slab(cache, int(chosen.batch.case[0]), config, networks[0].stride)

    matched, colours, slice_colours = [], [], []
    for network in networks:
        features = network(normalise(chosen.views_hu, config.intensity))
        aligned = align(features, chosen.placed, flips, network.stride, size, config.method.sampling_ratio)
        matched.append(matching_accuracy(*aligned.chunk(2)).tolist())
        of_slab = network(normalise(slab[None, None], config.intensity))
        in_middle = of_slab[:, :, of_slab.shape[2] // 2]
        of_pairs, of_slice = pca_colours([aligned, in_middle])
        colours.append(of_pairs[:, middle].numpy())
        slice_colours.append(of_slice[0].numpy())
    rows = [
        FeaturePicture(
            name=chosen.names[i],
            crops=crops[[i, count + i]],
            untrained=colours[0][[i, count + i]],
            trained=colours[1][[i, count + i]],
            untrained_accuracy=matched[0][i],
            trained_accuracy=matched[1][i],
            crop_mm=_in_plane_mm(chosen.regions[i], cache.spacing_mm),
        )
        for i in range(count)
    ]
    # The CT slice in the middle of the feature voxels shown.
    stride = networks[0].stride[0]
    shown = slab[(len(slab) // stride // 2) * stride + stride // 2].numpy()
    whole = SlicePicture(chosen.names[0], shown, slice_colours[0], slice_colours[1], size_mm)
    names = ("untrained", f"after {checkpoints[1]['step']:,} steps")
    over_all = tuple(float(checkpoint["metrics"]["matching_accuracy"]) for checkpoint in checkpoints)
    draw_features(rows, whole, names, over_all, chance(size), path)  # type: ignore[arg-type]


def _whole_slab(
    cache: VolumeCache, case: int, config: PretrainConfig, stride: Triple
) -> tuple[Tensor, tuple[float, float]]:
    """The middle of a volume, as thick as a patch: int16 [D, H, W], and its (H, W) in mm."""
    shape, spacing_mm = cache.cases[case].shape, cache.spacing_mm
    in_plane = [-(-min(shape[axis], _WIDEST_SLICE) // stride[axis]) * stride[axis] for axis in (1, 2)]
    size = (config.views.patch_size[0], *in_plane)
    start = tuple((extent - edge) // 2 for extent, edge in zip(shape, size, strict=True))
    slab = torch.from_numpy(cache.read_block(case, start, size))
    return slab, (size[1] * spacing_mm[1], size[2] * spacing_mm[2])
