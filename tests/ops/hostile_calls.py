"""Calls that nobody should make: good calls of the ops, public and native, with arguments put wrong."""

from __future__ import annotations

import math
import warnings

import torch
from hypothesis import strategies as st
from torch import Tensor

import pgl_ops
from tests.ops.cases import laid_out, random_boxes, random_flips, random_volume
from tests.ops.recording import OPS, Call, recorded

HUGE = 2**63 - 1
# Names of tensors that are put in the place of an argument; made anew for each call.
TENSORS = {
    "scalar": lambda: torch.tensor(1.0),
    "vector": lambda: torch.ones(7),
    "empty": lambda: torch.empty(0),
    "matrix": lambda: torch.ones(3, 7),
    "six columns": lambda: torch.ones(3, 6),
    "no rows": lambda: torch.ones(0, 7),
    "no columns": lambda: torch.ones(3, 0),
    "four axes": lambda: torch.ones(3, 3, 2, 2),
    "five axes": lambda: torch.ones(3, 3, 2, 1, 2),
    "six axes": lambda: torch.ones(1, 3, 3, 2, 1, 2),
    "empty axis": lambda: torch.ones(2, 3, 3, 0, 5),
    "no samples": lambda: torch.ones(0, 3, 3, 4, 5),
    "no channels": lambda: torch.ones(2, 0, 3, 4, 5),
    "int64": lambda: torch.ones(3, 3, 2, 1, 2, dtype=torch.int64),
    "bool": lambda: torch.ones(3, 3, dtype=torch.bool),
    "complex": lambda: torch.ones(2, 3, 3, 4, 5, dtype=torch.complex64),
    "float8": lambda: torch.ones(2, 3, 3, 4, 5).to(torch.float8_e4m3fn),
    "float16 boxes": lambda: torch.ones(3, 7, dtype=torch.float16),
    "float64": lambda: torch.ones(3, 3, 2, 1, 2, dtype=torch.float64),
    "meta": lambda: torch.ones(2, 3, 3, 4, 5, device="meta"),
    "meta boxes": lambda: torch.ones(3, 7, device="meta"),
    "sparse": lambda: torch.ones(2, 3, 3, 4, 5).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(2, 3, 3, 4, 5), 0.1, 0, torch.quint8),
    "NaN boxes": lambda: torch.full((3, 7), math.nan),
    "infinite boxes": lambda: torch.full((3, 7), -math.inf),
    "huge boxes": lambda: torch.full((3, 7), 1e30),
    "expanded to 2^60 voxels": lambda: torch.ones(1).expand(1, 1, 2**20, 2**20, 2**20),
    "conjugate": lambda: torch.ones(2, 3, 3, 4, 5, dtype=torch.complex64).conj().imag,
    "a flip": lambda: torch.ones(3, 3, dtype=torch.bool)[:, :1].expand(3, 3),
}
VALUES = [
    None,
    True,
    False,
    0,
    1,
    -1,
    3,
    2**20,
    2**20 + 1,
    2**24 + 1,
    2**31 - 1,
    2**31,
    -(2**31),
    HUGE,
    -HUGE - 1,
    2**64,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e30,
    1e31,
    1e308,
    math.inf,
    -math.inf,
    math.nan,
    "mean",
    "",
    "none",
    b"x",
    1j,
    object,
    [],
    [1],
    [1, 1],
    [1, 1, 1],
    [1.0, 2.0, 3.0],
    [0, 1, 1],
    [1, -1, 1],
    [math.nan, 1.0, 1.0],
    [math.inf, 1.0, 1.0],
    [HUGE, 1, 1],
    [2**24, 2**24, 2**24],
    [2**31, 1, 1],
    [1, 1, 1, 1],
    [2, 3, 3, 4, 5],
    [2, 3, 3, 4],
    [2, 3, 0, 4, 5],
    [-1, 3, 3, 4, 5],
    [HUGE, HUGE, 1, 1, 1],
    [2, 3, 2**24, 2**24, 2**24],
    [[1], [1], [1]],
    (),
    {},
    set(),
    [None, 1, 1],
    ["1", 1, 1],
    [1j, 1, 1],
    range(3),
]
PUBLIC = ("roi_align3d", "voxel_cosine_loss", "aligned_cosine_loss3d")


def _good(op: str) -> dict:
    boxes, flips = random_boxes(3, 2, (3, 4, 5)), random_flips(3)
    features = laid_out(random_volume((2, 3, 3, 4, 5), torch.float32, seed=1), "channels_last")
    prediction = random_volume((3, 3, 2, 1, 2), torch.float32, seed=2)
    sampling = {"boxes": boxes, "spatial_scale": 0.9, "sampling_ratio": 2, "aligned": True, "flips": flips}
    weighting = {"weight": torch.rand(3, 2, 1, 2), "reduction": "mean", "eps": 1e-8}
    return {
        "roi_align3d": {"input": features, "output_size": (2, 1, 2), **sampling},
        "voxel_cosine_loss": {"prediction": prediction, "target": prediction + 1, **weighting},
        "aligned_cosine_loss3d": {"prediction": prediction, "features": features, **sampling, **weighting},
    }[op]


def _names(op: str) -> list[str]:
    if op.startswith("native "):
        return [
            a.name for a in getattr(torch.ops.pgl_ops, op.removeprefix("native ")).default._schema.arguments
        ]
    return list(_good(op))


@st.composite
def hostile_calls(draw) -> dict:
    """An op and what is put in the place of one to three of its arguments."""
    op = draw(st.sampled_from([*PUBLIC, *(f"native {name}" for name in OPS)]))
    wrong = st.one_of(st.sampled_from(list(TENSORS)).map(lambda name: ("tensor", name)),
                      st.sampled_from(range(len(VALUES))).map(lambda i: ("value", i)))  # fmt: skip
    changes = draw(st.dictionaries(st.sampled_from(_names(op)), wrong, min_size=1, max_size=3))
    return {"op": op, "changes": changes, "grad": draw(st.booleans())}


def _native(backend, name: str) -> Call:
    key = backend.namespace
    if key not in _RECORDED:
        _RECORDED[key] = recorded(backend)
    return _RECORDED[key][name]


_RECORDED: dict[str, dict[str, Call]] = {}


def check_hostile_call(backend, case: dict) -> str:
    """Returns "refused" or "taken"; raises where the call gives a wrong error, or one without a message."""
    changes = {
        name: TENSORS[wrong]() if kind == "tensor" else VALUES[wrong]
        for name, (kind, wrong) in case["changes"].items()
    }
    op = case["op"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            if op.startswith("native "):
                call = _native(backend, op.removeprefix("native "))
                result = call.run(**changes)
            else:
                arguments = {**_good(op), **changes}
                first = next(iter(arguments))
                if (
                    case["grad"]
                    and isinstance(arguments[first], Tensor)
                    and arguments[first].is_floating_point()
                ):
                    arguments[first] = arguments[first].detach().requires_grad_()
                result = getattr(pgl_ops, op)(**arguments)
                if isinstance(result, Tensor) and result.requires_grad:
                    result.sum().backward()
        except (ValueError, TypeError, RuntimeError) as error:
            assert str(error).strip(), f"{op} with {changes}: {type(error).__name__} without a message"
            return "refused"
    for part in result if isinstance(result, tuple) else (result,):
        assert isinstance(part, Tensor), f"{op} with {changes} gave {part!r}"
    return "taken"
