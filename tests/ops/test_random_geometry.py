"""Any geometry at all: boxes, sizes, ratios and scales that nobody thought of, against the float64 oracle."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import pgl_ops
from tests.ops.cases import LAYOUTS, laid_out, random_volume
from tests.ops.checks import assert_forward_exact, assert_gradient_exact

# Halves and quarters put samples exactly on voxel centres and on the borders that decide what counts.
COORDINATES = st.one_of(
    st.integers(-48, 64).map(lambda quarters: quarters / 4),
    st.floats(-12, 16, width=32),
    st.sampled_from([-8e6, -1e4, -300.0, 250.5, 1e5, 7e6]),
)
SCALES = st.sampled_from([1.0, 0.5, 0.25, 2.0, 1 / 3, 0.7])


def triples(values):
    return st.tuples(values, values, values)


@st.composite
def geometries(draw):
    samples = draw(st.integers(1, 3))
    rows = draw(st.lists(st.tuples(st.integers(0, samples - 1), *[COORDINATES] * 6), min_size=1, max_size=5))
    return {
        "shape": (samples, draw(st.integers(1, 9)), *draw(triples(st.integers(1, 9)))),
        "boxes": torch.tensor(rows, dtype=draw(st.sampled_from([torch.float32, torch.float64]))),
        "output_size": draw(triples(st.integers(1, 5))),
        "spatial_scale": draw(triples(SCALES)),
        "sampling_ratio": draw(triples(st.sampled_from([-1, 0, 1, 2, 3, 7]))),
        "aligned": draw(st.booleans()),
        "flips": torch.tensor(draw(st.lists(triples(st.booleans()), min_size=len(rows), max_size=len(rows)))),
        "layouts": draw(st.tuples(st.sampled_from(LAYOUTS), st.sampled_from(LAYOUTS))),
        "dtype": draw(st.sampled_from([torch.float64, torch.float32, torch.float16])),
    }


@settings(
    max_examples=60,
    derandomize=True,
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(geometry=geometries())
def test_any_geometry(backend, geometry):
    layouts, dtype = geometry.pop("layouts"), geometry.pop("dtype")
    volume = laid_out(random_volume(geometry.pop("shape"), dtype), layouts[0])
    args = pgl_ops.roi_align3d, backend.device, volume, geometry.pop("boxes"), geometry.pop("output_size")
    out = assert_forward_exact(*args, **geometry)
    gradient = laid_out(random_volume(out.shape, dtype, seed=5), layouts[1])
    assert_gradient_exact(*args, gradient, **geometry)
