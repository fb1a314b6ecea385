"""What the fuzzer feeds to the ops: any shape, dtype, layout, box and setting that is allowed; bad boxes."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from tests.ops.cases import FLOATS, INTEGERS
from tests.ops.guarded import GuardedMemory

CHANNELS = (0, 1, 1, 2, 3, 4, 7, 8, 9, 15, 16, 17, 31, 33, 40)
SIDES = (1, 1, 2, 3, 4, 5, 7, 8, 9, 15, 16, 17, 31, 33, 48, 65, 130)
WIDTHS = (*SIDES, 257, 513, 530, 1030)
BINS = (1, 1, 2, 3, 4, 5, 7, 8, 15, 16, 17, 31, 32, 33, 40, 65)
RATIOS = (-1, -1, 0, 1, 1, 2, 3, 7, 40)
SCALES = (1.0, 1.0, 0.5, 0.25, 2.0, 1 / 3, 0.7, 1e-3, 1e3, 1e-40)
# Elements of a volume, and of what is cut out of it: larger cases are cut down.
MOST_ELEMENTS = 40_000
BOX_KINDS = (
    "inside",
    "inside",
    "across",
    "grid",
    "point",
    "tiny",
    "negative",
    "large",
    "huge",
    "outside",
    "denormal",
)
BAD_BATCH_INDICES = (math.nan, math.inf, -math.inf, -1.0, 0.5, 1e18, -1e30)
BAD_COORDINATES = (math.nan, math.inf, -math.inf, 2.0**24 + 2, -(2.0**25), 1e30, -1e30)


@dataclass(frozen=True)
class Memory:
    """How a tensor lies in memory: the axes from the outermost in, the room behind each, axes of stride 0.

    ``before`` elements lie before it, so that it may begin anywhere in a cache line.
    """

    order: tuple[int, ...]
    step: tuple[int, ...]
    expanded: tuple[int, ...]
    at_end: bool
    before: int = 0

    def place(self, values: Tensor, guarded: GuardedMemory) -> Tensor:
        """The values laid out so (those of an expanded axis all become its first)."""
        for axis in self.expanded:
            values = values.narrow(axis, 0, min(1, values.shape[axis])).expand_as(values)
        strides, extent = [0] * values.dim(), 1
        for axis, step in zip(reversed(self.order), reversed(self.step), strict=True):
            if axis in self.expanded:
                continue
            strides[axis] = extent * step
            extent *= max(1, values.shape[axis]) * step
        reached = 1 + sum((n - 1) * s for n, s in zip(values.shape, strides, strict=True))
        if values.numel() == 0:
            return torch.empty_strided(values.shape, strides, dtype=values.dtype)
        memory = guarded.empty(self.before + reached, values.dtype, self.at_end)[self.before :]
        view = memory.as_strided(values.shape, strides)
        whole = view.as_strided([1 if a in self.expanded else n for a, n in enumerate(values.shape)], strides)
        for axis in self.expanded:
            values = values.narrow(axis, 0, 1)
        whole.copy_(values)
        return view


@st.composite
def memories(draw, dim: int = 5, may_expand: bool = True) -> Memory:
    """Contiguous and channels-last ones often, any other now and then."""
    kind = draw(st.sampled_from(["contiguous", "channels_last", "sliced", "sliced channels_last", "any"]))
    order, step = list(range(dim)), [1] * dim
    if "channels_last" in kind and dim > 2:
        order = [0, *range(2, dim), 1]
    if kind.startswith("sliced") and dim:
        step[draw(st.integers(0, dim - 1))] = draw(st.integers(2, 3))
    if kind == "any":
        order = list(draw(st.permutations(order)))
        step = draw(st.lists(st.sampled_from([1, 1, 1, 2]), min_size=dim, max_size=dim))
    expanded = ()
    if may_expand and dim and draw(st.integers(0, 7)) == 0:
        expanded = tuple(draw(st.sets(st.integers(0, dim - 1), min_size=1, max_size=dim)))
    before = draw(st.sampled_from([0, 0, 1, 4, 12]))
    return Memory(tuple(order), tuple(step), expanded, draw(st.booleans()), before)


def _cut(sizes: list[int], most: int) -> list[int]:
    """Sizes, the largest of them halved until their product is at most ``most``."""
    while math.prod(max(1, s) for s in sizes) > most:
        largest = max(range(len(sizes)), key=lambda i: sizes[i])
        sizes[largest] = (sizes[largest] + 1) // 2
    return sizes


def _interval(draw, kind: str, size: int) -> tuple[float, float]:
    """[lo, hi] on an axis of ``size`` voxels."""
    a, b = draw(st.integers(0, 64)) / 64, draw(st.integers(0, 64)) / 64
    lo, hi = min(a, b) * size, max(a, b) * size
    if kind == "across":
        return lo * 2 - 0.6 * size, hi * 2 - 0.3 * size
    if kind == "grid":
        return round(lo * 2) / 2 - 1, round(hi * 2) / 2 + 1
    if kind == "point":
        return lo, lo
    if kind == "tiny":
        return lo, lo + 1e-3 * (1 + hi)
    if kind == "negative":
        return hi + 0.5, lo
    if kind == "large":
        return lo - 40 * size, hi + 40 * size
    if kind == "huge":
        return -8e6 * a, 8e6 * b
    if kind == "outside":
        return lo - 3 * size, hi - 3 * size
    if kind == "denormal":
        return 1e-41 * a, 1e-40 * b
    return lo, hi


@st.composite
def geometries(draw) -> dict:
    """The arguments of ``roi_align3d`` but its input; ``bad`` is a row to be refused, or None."""
    samples, shape = draw(st.sampled_from([1, 1, 2, 3])), []
    for choice in (SIDES, SIDES, WIDTHS):
        shape.append(draw(st.sampled_from(choice)))
    if draw(st.booleans()):
        shape = [min(s, 9) for s in shape]
    channels = draw(st.sampled_from(CHANNELS))
    samples, channels, *shape = _cut([samples, channels, *shape], MOST_ELEMENTS)
    rois = draw(st.sampled_from([0, 1, 1, 2, 3, 5]))
    bins = [draw(st.sampled_from(BINS)) for _ in range(3)]
    if draw(st.booleans()):
        bins = [min(b, 5) for b in bins]
    bins = _cut([max(1, channels), *bins], MOST_ELEMENTS // max(1, rois))[1:]
    scales = [draw(st.sampled_from(SCALES)) for _ in range(3)] if draw(st.booleans()) else [1.0] * 3
    rows = []
    for _ in range(rois):
        kinds = [draw(st.sampled_from(BOX_KINDS))] * 3
        if draw(st.booleans()):
            kinds = [draw(st.sampled_from(BOX_KINDS)) for _ in range(3)]
        ends = [_interval(draw, kind, size) for kind, size in zip(kinds, shape, strict=True)]
        ends = [(lo / scale, hi / scale) for (lo, hi), scale in zip(ends, scales, strict=True)]
        batch = draw(st.integers(0, samples - 1))
        rows.append([batch, *(lo for lo, _ in ends), *(hi for _, hi in ends)])
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    if any(scale < 1e-30 for scale in scales):
        dtype = torch.float64
    boxes = torch.tensor(rows, dtype=dtype).reshape(rois, 7)
    flips = None
    if draw(st.booleans()):
        flips = torch.tensor([[draw(st.booleans()) for _ in range(3)] for _ in range(rois)], dtype=torch.bool)
        flips = flips.reshape(rois, 3)
    bad = None
    if rois and draw(st.integers(0, 11)) == 0:
        bad = draw(st.integers(0, rois - 1))
        column = draw(st.integers(0, 6))
        wrong = BAD_COORDINATES if column else (*BAD_BATCH_INDICES, float(samples))
        value = draw(st.sampled_from(wrong))
        boxes[bad, column] = value / scales[column % 3 - 1] if column else value
    return {
        "volume": (samples, channels, *shape),
        "boxes": boxes,
        "box_memory": draw(memories(2, may_expand=False)),
        "output_size": tuple(bins),
        "spatial_scale": tuple(scales),
        "sampling_ratio": tuple(draw(st.sampled_from(RATIOS)) for _ in range(3)),
        "aligned": draw(st.booleans()),
        "flips": flips,
        "bad": bad,
        "seed": draw(st.integers(0, 9)),
    }


@st.composite
def alignments(draw) -> dict:
    """One case of ``roi_align3d``, forward, backward and double backward."""
    case = draw(geometries())
    case["dtype"] = draw(st.sampled_from([*FLOATS, *FLOATS, *INTEGERS]))
    case["memory"], case["grad_memory"] = draw(memories()), draw(memories())
    case["poison"] = draw(st.sampled_from([None, None, None, math.nan, math.inf]))
    return case


@st.composite
def fused(draw) -> dict:
    """One case of ``aligned_cosine_loss3d``."""
    case = draw(geometries())
    case["dtype"] = draw(st.sampled_from(FLOATS))
    case["memory"], case["prediction_memory"] = draw(memories()), draw(memories())
    case["weighted"] = draw(st.booleans())
    case["reduction"] = draw(st.sampled_from(["none", "mean", "sum"]))
    return case


@st.composite
def losses(draw) -> dict:
    """One case of ``voxel_cosine_loss``."""
    spatial = draw(st.lists(st.sampled_from([0, 1, 2, 3, 5, 17, 33, 300, 1030]), max_size=4))
    shape = [draw(st.sampled_from([0, 1, 2, 3])), draw(st.sampled_from(CHANNELS)), *spatial]
    shape = tuple(_cut(shape, MOST_ELEMENTS))
    return {
        "shape": shape,
        "dtype": draw(st.sampled_from(FLOATS)),
        "memory": draw(memories(len(shape))),
        "target_memory": draw(memories(len(shape))),
        "weighted": draw(st.booleans()),
        "reduction": draw(st.sampled_from(["none", "mean", "sum"])),
        "zeros": draw(st.booleans()),
        "magnitude": draw(st.sampled_from([1.0, 1.0, 1e-2, 1e2])),
        "seed": draw(st.integers(0, 9)),
    }
