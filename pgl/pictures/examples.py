"""What the pictures of a run show: chosen view pairs, and their features before and after training."""

from __future__ import annotations

import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pgl.augment import normalise
from pgl.backbone import Backbone
from pgl.cache.volumes import VolumeCache
from pgl.config import PretrainConfig
from pgl.pictures.colours import pca_colours
from pgl.pictures.style import window
from pgl.training.contexts import VALIDATION, Batch, ContextDataset, collate, hold_out
from pgl.training.metrics import matching_accuracy
from pgl.views import Triple, align, cut, shared_region

# A shared region with less body than this is mostly air and shows little.
_LEAST_BODY, _BODY_HU = 0.6, -300
# So many pairs are looked at for each one that is drawn.
_CANDIDATES = 8
# The whole slice is cut to at most this many voxels an axis, so that a large network still fits into memory.
_WIDEST_SLICE = 384
# The same where features are nearly as fine as voxels (less than eight of these to one of those).
_WIDEST_FINE_SLICE = 192


@dataclass
class ExamplePairs:
    """B pairs as pictures need them; everything aligned is in the volume's orientation.

    Args:
        batch: the samples.
        views_hu: Tensor[2B, 1, *patch], first views then second ones, not augmented.
        regions: Tensor[B, 6], the shared regions in voxels of the context.
        placed: Tensor[2B, 6], the same in voxels of the views.
        names: the cases.
    """

    batch: Batch
    views_hu: Tensor
    regions: Tensor
    placed: Tensor
    names: list[str]

    def aligned(self, rows: list[int], size: Triple, sampling_ratio: int = -1) -> Tensor:
        """HU of the shared region as these views show it: Tensor[len(rows), *size]."""
        flips = self.batch.pairs.flat_flips()[rows]
        return align(self.views_hu[rows], self.placed[rows], flips, (1, 1, 1), size, sampling_ratio)[:, 0]

    def edges_mm(self, index: int, spacing_mm: tuple[float, float, float]) -> tuple[float, float, float]:
        """(D, H, W) of a pair's shared region in mm."""
        low, high = self.regions[index].view(2, 3).tolist()
        d, h, w = ((b - a) * mm for a, b, mm in zip(low, high, spacing_mm, strict=True))
        return d, h, w


@dataclass
class Slab:
    """The middle of a volume, as thick as a patch.

    Args:
        name: the case.
        hu: int16 Tensor[D, H, W].
        size_mm: (H, W) in mm.
        stride: feature stride (D, H, W) of the networks.
    """

    name: str
    hu: Tensor
    size_mm: tuple[float, float]
    stride: Triple

    def slice_hu(self, feature_slice: int) -> Tensor:
        """HU [H, W] in the middle of a slice of the features."""
        return self.hu[min(feature_slice * self.stride[0] + self.stride[0] // 2, len(self.hu) - 1)]


@dataclass
class FeatureMaps:
    """One network's features of the pairs and of the slab, as colours that are comparable among them.

    Args:
        step: steps of training.
        overall: its matching accuracy over all validation pairs of the run.
        matched: its matching accuracy on each pair, not augmented.
        colours: float32 Tensor[2B, d, h, w, 3] in [0, 1], aligned.
        slab_colours: Tensor[d', h', w', 3].
    """

    step: int
    overall: float
    matched: list[float]
    colours: Tensor
    slab_colours: Tensor


def open_cache(path: str | os.PathLike[str]) -> VolumeCache:
    """The cache of a run.

    Raises:
        FileNotFoundError: it is not there; the message says how to tell where it went.
    """
    try:
        return VolumeCache(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; if it was moved since the run, say where with --data") from error


def choose_pairs(cache: VolumeCache, config: PretrainConfig, count: int) -> ExamplePairs:
    """Validation pairs whose shared region shows most anatomy, from as many cases as there are.

    They are chosen by the CT alone, never by how well they match, and their intensities are not augmented.
    """
    _, cases = hold_out([case.case_id for case in cache.cases], config.validation.fraction, config.seed)
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
    return ExamplePairs(batch, cut(batch.contexts, batch.pairs), regions, batch.pairs.placed(regions), names)


def middle_slab(cache: VolumeCache, case: int, config: PretrainConfig, stride: Triple) -> Slab:
    """The middle of a case, padded to whole feature voxels."""
    shape, spacing_mm = cache.cases[case].shape, cache.spacing_mm
    widest = _WIDEST_SLICE if math.prod(stride) >= 8 else _WIDEST_FINE_SLICE
    in_plane = [-(-min(shape[axis], widest) // stride[axis]) * stride[axis] for axis in (1, 2)]
    size = (config.views.patch_size[0], *in_plane)
    start = tuple((extent - edge) // 2 for extent, edge in zip(shape, size, strict=True))
    hu = torch.from_numpy(cache.read_block(case, start, size))
    return Slab(cache.cases[case].case_id, hu, (size[1] * spacing_mm[1], size[2] * spacing_mm[2]), stride)


def backbone_of(checkpoint: dict[str, Any], config: PretrainConfig) -> Backbone:
    """The online network of a checkpoint, as far as its first chosen stage needs it."""
    method, online = config.method, checkpoint["online"]
    network = Backbone(config.encoder, method.feature_level, decoder=method.features == "decoder")
    network.encoder.load_state_dict(online["encoder"])
    if network.decoder is not None:
        network.decoder.load_state_dict(online["decoder"])
    return network.eval()


@torch.no_grad()
def feature_maps(
    chosen: ExamplePairs, slab: Slab, config: PretrainConfig, checkpoint: dict[str, Any]
) -> FeatureMaps:
    """What the network of a checkpoint makes of the pairs and of the slab."""
    network, method = backbone_of(checkpoint, config), config.method
    flips = chosen.batch.pairs.flat_flips()
    features = network(normalise(chosen.views_hu, config.intensity))
    aligned = align(
        features, chosen.placed, flips, network.stride, method.aligned_size, method.sampling_ratio
    )
    of_slab = network(normalise(slab.hu[None, None], config.intensity))
    colours, slab_colours = pca_colours([aligned, of_slab])
    return FeatureMaps(
        step=int(checkpoint["step"]),
        overall=float(checkpoint["metrics"]["matching_accuracy"]),
        matched=matching_accuracy(*aligned.chunk(2)).tolist(),
        colours=colours,
        slab_colours=slab_colours[0],
    )


def _worth(sample: Batch) -> tuple[bool, float]:
    """Whether the shared region is mostly body, and its contrast in the soft-tissue window."""
    low, high = shared_region(sample.pairs.boxes)[0].view(2, 3).round().int().tolist()
    block = sample.contexts[0, 0][tuple(slice(a, max(b, a + 1)) for a, b in zip(low, high, strict=True))]
    body = float((block > _BODY_HU).float().mean())
    return body >= _LEAST_BODY, float(window(block.numpy()).std())
