"""Every wrong argument is a TypeError or ValueError that names it, what came and what was expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pgl_ops
from tests.ops.cases import random_boxes

IMPLEMENTATIONS = pytest.mark.parametrize("ops", [pgl_ops, pgl_ops.reference], ids=["kernels", "reference"])
NAN, INF = float("nan"), float("inf")


def roi_align3d_arguments() -> dict:
    return {
        "input": torch.zeros(2, 3, 4, 5, 6),
        "boxes": random_boxes(4, 2, (4, 5, 6)),
        "output_size": (2, 3, 2),
        "spatial_scale": 1.0,
        "sampling_ratio": -1,
        "aligned": True,
        "flips": torch.zeros(4, 3, dtype=torch.bool),
    }


def voxel_cosine_loss_arguments() -> dict:
    return {
        "prediction": torch.ones(2, 3, 4, 5),
        "target": torch.ones(2, 3, 4, 5),
        "weight": torch.ones(2, 4, 5),
        "reduction": "mean",
        "eps": 1e-8,
    }


def aligned_cosine_loss3d_arguments() -> dict:
    alignment = roi_align3d_arguments()
    del alignment["input"], alignment["output_size"]
    return {
        "prediction": torch.ones(4, 3, 2, 3, 2),
        "features": torch.ones(2, 3, 4, 5, 6),
        **alignment,
        "weight": torch.ones(4, 2, 3, 2),
        "reduction": "mean",
        "eps": 1e-8,
    }


# (argument, wrong value, exception, pattern of the message)
TRIPLES = [
    ("spatial_scale", 0, ValueError, r"spatial_scale must be positive and finite, got 0 \(int\)"),
    (
        "spatial_scale",
        (1.0, -0.5, 1.0),
        ValueError,
        r"spatial_scale must be positive.*got \(1.0, -0.5, 1.0\)",
    ),
    ("spatial_scale", NAN, ValueError, r"spatial_scale must be positive and finite, got nan"),
    ("spatial_scale", INF, ValueError, r"spatial_scale must be positive and finite, got inf"),
    ("spatial_scale", (1.0, 2.0), ValueError, r"spatial_scale must be a number or three.*got \(1.0, 2.0\)"),
    ("spatial_scale", "1", TypeError, r"spatial_scale must be a number or three of them, got '1' \(str\)"),
    ("spatial_scale", None, TypeError, r"spatial_scale must be a number or three of them, got None"),
    ("spatial_scale", True, TypeError, r"spatial_scale must be a number or three of them, got True"),
    ("spatial_scale", (1.0, None, 1.0), TypeError, r"spatial_scale must be a number.*got \(1.0, None, 1.0\)"),
    (
        "sampling_ratio",
        2.0,
        TypeError,
        r"sampling_ratio must be an integer or three of them, got 2.0 \(float\)",
    ),
    ("sampling_ratio", (1, 2), ValueError, r"sampling_ratio must be an integer or three.*got \(1, 2\)"),
    (
        "sampling_ratio",
        (1, 2, 3, 4),
        ValueError,
        r"sampling_ratio must be an integer or three.*\(1, 2, 3, 4\)",
    ),
    ("sampling_ratio", None, TypeError, r"sampling_ratio must be an integer or three of them, got None"),
    ("sampling_ratio", False, TypeError, r"sampling_ratio must be an integer or three of them, got False"),
    ("sampling_ratio", 2**20 + 1, ValueError, r"sampling_ratio must be at most 1048576, got 1048577 \(int\)"),
]
ALIGNMENT = [
    *TRIPLES,
    ("boxes", None, TypeError, r"boxes must be a Tensor\[K, 7\] or a list of Tensor\[k, 6\].*got None"),
    ("boxes", "boxes", TypeError, r"boxes must be a Tensor\[K, 7\] or a list of Tensor\[k, 6\].*got 'boxes'"),
    ("boxes", np.zeros((4, 7)), TypeError, r"boxes must be a Tensor\[K, 7\].*got ndarray\[4, 7\] of float64"),
    (
        "boxes",
        torch.zeros(4, 7, dtype=torch.int64),
        TypeError,
        r"boxes must have one of.*float32, float64, got.*int64",
    ),
    ("boxes", torch.zeros(4, 7, dtype=torch.float16), TypeError, r"boxes must have one of.*got.*float16"),
    (
        "boxes",
        torch.zeros(4, 7).to_sparse(),
        TypeError,
        r"boxes must be a dense .* got layout torch.sparse_coo",
    ),
    (
        "boxes",
        torch.zeros(4, 6),
        ValueError,
        r"boxes must be a Tensor\[K, 7\], batch index first .*batch index\), got Tensor\[4, 6\]",
    ),
    (
        "boxes",
        torch.zeros(4, 8),
        ValueError,
        r"boxes must be a Tensor\[K, 7\], batch index first, got Tensor\[4, 8\]",
    ),
    (
        "boxes",
        torch.zeros(7),
        ValueError,
        r"boxes must be a Tensor\[K, 7\], batch index first, got Tensor\[7\]",
    ),
    (
        "boxes",
        torch.zeros(4, 7, device="meta"),
        ValueError,
        r"boxes must be on the same device as (input|features) \(cpu\), got.*meta",
    ),
    (
        "boxes",
        [torch.zeros(4, 6)],
        ValueError,
        r"boxes must hold one Tensor\[k, 6\] for each of the 2 samples.*list of 1",
    ),
    (
        "boxes",
        [torch.zeros(2, 6), torch.zeros(2, 7)],
        ValueError,
        r"boxes\[1\] must be a Tensor\[k, 6\], got Tensor\[2, 7\]",
    ),
    (
        "boxes",
        [torch.zeros(2, 6), torch.zeros(6)],
        ValueError,
        r"boxes\[1\] must be a Tensor\[k, 6\], got Tensor\[6\]",
    ),
    ("boxes", [torch.zeros(2, 6), None], TypeError, r"boxes\[1\] must be a torch.Tensor, got None"),
    (
        "boxes",
        [torch.zeros(2, 6), torch.zeros(2, 6).long()],
        TypeError,
        r"boxes\[1\] must have one of.*got.*int64",
    ),
    (
        "boxes",
        [torch.zeros(2, 6), torch.zeros(2, 6, device="meta")],
        ValueError,
        r"boxes\[1\] must be on the same device",
    ),
    ("aligned", 1, TypeError, r"aligned must be True or False, got 1 \(int\)"),
    ("aligned", None, TypeError, r"aligned must be True or False, got None"),
    ("flips", [[False] * 3] * 4, TypeError, r"flips must be a torch.Tensor, got \[\[False"),
    (
        "flips",
        torch.zeros(4, 3, dtype=torch.uint8),
        TypeError,
        r"flips must have one of the dtypes bool, got.*uint8",
    ),
    (
        "flips",
        torch.zeros(3, 3, dtype=torch.bool),
        ValueError,
        r"flips must be a bool Tensor\[4, 3\], got Tensor\[3, 3\]",
    ),
    (
        "flips",
        torch.zeros(4, 2, dtype=torch.bool),
        ValueError,
        r"flips must be a bool Tensor\[4, 3\], got Tensor\[4, 2\]",
    ),
    (
        "flips",
        torch.zeros(3, dtype=torch.bool),
        ValueError,
        r"flips must be a bool Tensor\[4, 3\], got Tensor\[3\]",
    ),
    (
        "flips",
        torch.zeros(4, 3, dtype=torch.bool, device="meta"),
        ValueError,
        r"flips must be on the same device as boxes",
    ),
]
ROI_ALIGN3D = [
    *ALIGNMENT,
    ("input", None, TypeError, r"input must be a torch.Tensor, got None"),
    (
        "input",
        np.zeros((2, 3, 4, 5, 6)),
        TypeError,
        r"input must be a torch.Tensor, got ndarray\[2, 3, 4, 5, 6\] of float64",
    ),
    *(
        (
            "input",
            torch.zeros(2, 3, 4, 5, 6, dtype=dtype),
            TypeError,
            r"input must have one of the dtypes float64, .*, uint8, int16, got Tensor\[2, 3, 4, 5, 6\] of "
            + str(dtype),
        )
        for dtype in (torch.int64, torch.int32, torch.int8, torch.bool, torch.complex64)
    ),
    (
        "input",
        torch.zeros(2, 3, 4, 5, 6).to_sparse(),
        TypeError,
        r"input must be a dense .* got layout torch.sparse_coo",
    ),
    (
        "input",
        torch.zeros(3, 4, 5, 6),
        ValueError,
        r"input must be a Tensor\[N, C, D, H, W\], got Tensor\[3, 4, 5, 6\]",
    ),
    (
        "input",
        torch.zeros(1, 2, 3, 4, 5, 6),
        ValueError,
        r"input must be a Tensor\[N, C, D, H, W\], got Tensor\[1, 2, 3, 4, 5, 6\]",
    ),
    (
        "input",
        torch.zeros(2, 3, 4, 0, 6),
        ValueError,
        r"input must have spatial axes of at least one voxel, got Tensor\[2, 3, 4, 0, 6\]",
    ),
    ("output_size", 0, ValueError, r"output_size must be at least 1 on every axis, got 0 \(int\)"),
    (
        "output_size",
        (2, -1, 2),
        ValueError,
        r"output_size must be at least 1 on every axis, got \(2, -1, 2\)",
    ),
    (
        "output_size",
        (2, 2),
        ValueError,
        r"output_size must be an integer or three of them \(D, H, W\), got \(2, 2\)",
    ),
    ("output_size", 2.0, TypeError, r"output_size must be an integer or three of them, got 2.0 \(float\)"),
    ("output_size", (2, 2.5, 2), TypeError, r"output_size must be an integer or three.*got \(2, 2.5, 2\)"),
    ("output_size", None, TypeError, r"output_size must be an integer or three of them, got None"),
    ("output_size", True, TypeError, r"output_size must be an integer or three of them, got True"),
    ("output_size", "222", TypeError, r"output_size must be an integer or three of them, got '222'"),
]
REDUCTION_AND_EPS = [
    (
        "reduction",
        "average",
        ValueError,
        r"reduction must be one of 'none', 'mean', 'sum', got 'average' \(str\)",
    ),
    ("reduction", None, ValueError, r"reduction must be one of 'none', 'mean', 'sum', got None"),
    ("reduction", 1, ValueError, r"reduction must be one of 'none', 'mean', 'sum', got 1 \(int\)"),
    ("eps", -1e-8, ValueError, r"eps must be finite and not negative, got -1e-08"),
    ("eps", NAN, ValueError, r"eps must be finite and not negative, got nan"),
    ("eps", INF, ValueError, r"eps must be finite and not negative, got inf"),
    ("eps", "1e-8", TypeError, r"eps must be a number, got '1e-8' \(str\)"),
    ("eps", None, TypeError, r"eps must be a number, got None"),
    ("eps", True, TypeError, r"eps must be a number, got True"),
]
VOXEL_COSINE_LOSS = [
    *REDUCTION_AND_EPS,
    ("prediction", None, TypeError, r"prediction must be a torch.Tensor, got None"),
    (
        "prediction",
        torch.zeros(2, 3, 4, 5).int(),
        TypeError,
        r"prediction must have one of the dtypes float64, float32, float16, bfloat16, got.*int32",
    ),
    (
        "prediction",
        torch.zeros(2, 3, 4, 5).to_sparse(),
        TypeError,
        r"prediction must be a dense .* torch.sparse_coo",
    ),
    (
        "prediction",
        torch.zeros(3),
        ValueError,
        r"prediction must be a Tensor\[N, C, \*spatial\], got Tensor\[3\]",
    ),
    ("target", 1.0, TypeError, r"target must be a torch.Tensor, got 1.0 \(float\)"),
    ("target", torch.zeros(2, 3, 4, 5).byte(), TypeError, r"target must have one of the dtypes.*got.*uint8"),
    (
        "target",
        torch.zeros(2, 3, 4, 5).double(),
        TypeError,
        r"target must have prediction's dtype torch.float32, got.*float64",
    ),
    (
        "target",
        torch.zeros(2, 3, 4, 5).half(),
        TypeError,
        r"target must have prediction's dtype torch.float32, got.*float16",
    ),
    (
        "target",
        torch.zeros(2, 3, 5, 4),
        ValueError,
        r"target must have prediction's shape \[2, 3, 4, 5\], got Tensor\[2, 3, 5, 4\]",
    ),
    (
        "target",
        torch.zeros(2, 3, 4),
        ValueError,
        r"target must have prediction's shape \[2, 3, 4, 5\], got Tensor\[2, 3, 4\]",
    ),
    (
        "target",
        torch.zeros(1, 3, 4, 5),
        ValueError,
        r"target must have prediction's shape \[2, 3, 4, 5\], got Tensor\[1, 3, 4, 5\]",
    ),
    (
        "target",
        torch.zeros(2, 3, 4, 5, device="meta"),
        ValueError,
        r"target must be on the same device as prediction \(cpu\), got.*meta",
    ),
    ("weight", 1.0, TypeError, r"weight must be a torch.Tensor, got 1.0 \(float\)"),
    ("weight", torch.ones(2, 4, 5).bool(), TypeError, r"weight must have one of the dtypes.*got.*bool"),
    (
        "weight",
        torch.ones(2, 1, 4, 5),
        ValueError,
        r"weight must be a Tensor\[2, 4, 5\], got Tensor\[2, 1, 4, 5\]",
    ),
    ("weight", torch.ones(4, 5), ValueError, r"weight must be a Tensor\[2, 4, 5\], got Tensor\[4, 5\]"),
    ("weight", torch.ones(()), ValueError, r"weight must be a Tensor\[2, 4, 5\], got Tensor\[\]"),
    (
        "weight",
        torch.ones(2, 4, 5, device="meta"),
        ValueError,
        r"weight must be on the same device as prediction",
    ),
]
ALIGNED_COSINE_LOSS3D = [
    *ALIGNMENT,
    *REDUCTION_AND_EPS,
    ("prediction", None, TypeError, r"prediction must be a torch.Tensor, got None"),
    (
        "prediction",
        torch.zeros(4, 3, 2, 3, 2).short(),
        TypeError,
        r"prediction must have one of the dtypes float64, float32, float16, bfloat16, got.*int16",
    ),
    (
        "prediction",
        torch.zeros(4, 3, 2, 3),
        ValueError,
        r"prediction must be a Tensor\[N, C, D, H, W\], got Tensor\[4, 3, 2, 3\]",
    ),
    (
        "prediction",
        torch.zeros(4, 3, 2, 0, 2),
        ValueError,
        r"prediction must have spatial axes of at least one voxel, got Tensor\[4, 3, 2, 0, 2\]",
    ),
    (
        "prediction",
        torch.zeros(3, 3, 2, 3, 2),
        ValueError,
        r"prediction must be a Tensor\[4, 3, d, h, w\].*got Tensor\[3, 3, 2, 3, 2\]",
    ),
    (
        "prediction",
        torch.zeros(4, 2, 2, 3, 2),
        ValueError,
        r"prediction must be a Tensor\[4, 3, d, h, w\].*got Tensor\[4, 2, 2, 3, 2\]",
    ),
    ("features", [1], TypeError, r"features must be a torch.Tensor, got \[1\] \(list\)"),
    (
        "features",
        torch.zeros(2, 3, 4, 5, 6).short(),
        TypeError,
        r"features must have one of the dtypes.*got.*int16",
    ),
    (
        "features",
        torch.zeros(2, 3, 4, 5, 6).half(),
        TypeError,
        r"features must have prediction's dtype torch.float32, got.*float16",
    ),
    (
        "features",
        torch.zeros(2, 3, 4, 5),
        ValueError,
        r"features must be a Tensor\[N, C, D, H, W\], got Tensor\[2, 3, 4, 5\]",
    ),
    (
        "features",
        torch.zeros(2, 3, 0, 5, 6),
        ValueError,
        r"features must have spatial axes of at least one voxel",
    ),
    (
        "features",
        torch.zeros(2, 3, 4, 5, 6, device="meta"),
        ValueError,
        r"features must be on the same device as prediction \(cpu\), got.*meta",
    ),
    (
        "weight",
        torch.ones(4, 3, 2, 3, 2),
        ValueError,
        r"weight must be a Tensor\[4, 2, 3, 2\], got Tensor\[4, 3, 2, 3, 2\]",
    ),
    ("weight", torch.ones(4, 2, 3, 2).int(), TypeError, r"weight must have one of the dtypes.*got.*int32"),
]
CASES = [
    *(("roi_align3d", *case) for case in ROI_ALIGN3D),
    *(("voxel_cosine_loss", *case) for case in VOXEL_COSINE_LOSS),
    *(("aligned_cosine_loss3d", *case) for case in ALIGNED_COSINE_LOSS3D),
]
GOOD_ARGUMENTS = {
    "roi_align3d": roi_align3d_arguments,
    "voxel_cosine_loss": voxel_cosine_loss_arguments,
    "aligned_cosine_loss3d": aligned_cosine_loss3d_arguments,
}


@IMPLEMENTATIONS
@pytest.mark.parametrize("op", GOOD_ARGUMENTS)
def test_the_arguments_that_the_cases_change_are_good(ops, op):
    assert getattr(ops, op)(**GOOD_ARGUMENTS[op]()).isfinite().all()


@IMPLEMENTATIONS
@pytest.mark.parametrize(
    "op, argument, wrong, exception, message",
    CASES,
    ids=[f"{case[0]}-{case[1]}-{i}" for i, case in enumerate(CASES)],
)
def test_a_wrong_argument_is_named_with_what_came_and_what_was_expected(
    ops, op, argument, wrong, exception, message
):
    arguments = GOOD_ARGUMENTS[op]()
    arguments[argument] = wrong
    with pytest.raises(exception, match="^" + message):
        getattr(ops, op)(**arguments)


def test_a_long_wrong_argument_makes_a_short_message():
    arguments = roi_align3d_arguments()
    arguments["flips"] = [[False, False, False]] * 10_000
    with pytest.raises(TypeError) as raised:
        pgl_ops.roi_align3d(**arguments)
    assert len(str(raised.value)) < 200 and "(list)" in str(raised.value)


@IMPLEMENTATIONS
def test_a_bad_box_row_is_named_with_its_values_and_what_was_expected(ops):
    arguments = roi_align3d_arguments()
    arguments["boxes"][2, 0] = 7
    with pytest.raises(ValueError, match=r"row 2 of boxes.* 7.*\[0, 2\)"):
        ops.roi_align3d(**arguments)
    arguments["boxes"][2, 0] = 1
    arguments["boxes"][3, 4] = 2.0**25
    with pytest.raises(ValueError, match=r"row 3 of boxes.*2\^24"):
        ops.roi_align3d(**arguments)


@pytest.mark.parametrize(
    "argument, wrong, exception, message",
    [
        case
        for case in ROI_ALIGN3D
        if case[0] in ("output_size", "spatial_scale", "sampling_ratio", "aligned")
    ],
)
def test_the_module_checks_its_arguments_when_it_is_made(argument, wrong, exception, message):
    arguments = roi_align3d_arguments()
    settings = {key: arguments[key] for key in ("output_size", "spatial_scale", "sampling_ratio", "aligned")}
    pgl_ops.RoIAlign3d(**settings)
    settings[argument] = wrong
    with pytest.raises(exception, match="^" + message):
        pgl_ops.RoIAlign3d(**settings)


def test_numbers_of_other_libraries_are_numbers():
    arguments = roi_align3d_arguments()
    expected = pgl_ops.roi_align3d(**arguments)
    arguments["output_size"] = tuple(np.array([2, 3, 2]))
    arguments["spatial_scale"] = np.float32(1.0)
    arguments["sampling_ratio"] = np.int64(-1)
    assert torch.equal(pgl_ops.roi_align3d(**arguments), expected)


@IMPLEMENTATIONS
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_a_nested_tensor_is_refused_as_one(ops):
    for dtype in (torch.float32, torch.int32):
        nested = torch.nested.nested_tensor([torch.zeros(2, 3, 4, 5, dtype=dtype)] * 2)
        with pytest.raises(TypeError, match=r"input must be a dense .* got a nested tensor"):
            ops.roi_align3d(**{**roi_align3d_arguments(), "input": nested})
