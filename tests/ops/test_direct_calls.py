"""torch.ops.pgl_ops.* called directly: the native code itself refuses wrong arguments."""

from __future__ import annotations

import pytest
import torch

import pgl_ops
from tests.ops.recording import OPS, recorded


def ones(*shape, **options):
    return lambda backend: torch.ones(*shape, device=backend.device, **options)


def just(value):
    return lambda backend: value


SHARED_WRONG = [
    ("boxes", ones(3, 6), "boxes"),
    ("boxes", ones(7), "boxes"),
    ("boxes", ones(3, 7, dtype=torch.int64), "boxes"),
    ("boxes", ones(3, 7, dtype=torch.float16), "boxes"),
    ("flips", ones(2, 3, dtype=torch.bool), "flips"),
    ("flips", ones(3, dtype=torch.bool), "flips"),
    ("flips", ones(3, 3), "flips"),
    ("spatial_scale", just([1.0, 0.0, 1.0]), "spatial_scale"),
    ("spatial_scale", just([1.0, 1.0, float("nan")]), "spatial_scale"),
    ("spatial_scale", just([1.0, 1.0, float("inf")]), "spatial_scale"),
    ("sampling_ratio", just([1, 2**20 + 1, 1]), "sampling_ratio"),
]
LOSS_WRONG = [
    ("weight", ones(3, 2, 1, 3), "weight"),
    ("weight", ones(3, 1, 2, 1, 2), "weight"),
    ("weight", ones(3, 2, 1, 2, dtype=torch.float64), "weight"),
    ("reduction", just(3), "reduction"),
    ("reduction", just(-1), "reduction"),
]
SAVED_WRONG = [
    ("saved", ones(3, 3, 2, 1, 1), "saved"),
    ("saved", ones(0), "saved"),
    ("saved", ones(3, 3, 2, 1, 2, dtype=torch.float64), "saved"),
    ("divisor", ones(2), "divisor"),
    ("divisor", ones(1, dtype=torch.float64), "divisor"),
    ("grad", ones(3), "grad"),
    ("grad", ones((), dtype=torch.float64), "grad"),
]
WRONG = {
    "roi_align3d": [
        *SHARED_WRONG,
        ("input", ones(3, 3, 4, 5), "input"),
        ("input", ones(2, 3, 3, 4, 5, dtype=torch.int64), "input"),
        ("input", ones(2, 3, 3, 0, 5), "input"),
        ("output_size", just([0, 1, 1]), "output_size"),
        ("output_size", just([1, -2, 1]), "output_size"),
    ],
    "roi_align3d_backward": [
        *SHARED_WRONG,
        ("grad", ones(3, 3, 2, 2), "grad"),
        ("grad", ones(2, 3, 2, 1, 2), "grad"),
        ("grad", ones(3, 4, 2, 1, 2), "grad"),
        ("grad", ones(3, 3, 2, 1, 2, dtype=torch.int64), "grad"),
        ("grad", ones(3, 3, 2, 1, 2, dtype=torch.int16), "grad"),
        ("input_size", just([2, 3, 4, 5]), "input_size"),
        ("input_size", just([2, 3, 4, 0, 5]), "input_size"),
        ("input_size", just([2, -3, 4, 3, 5]), "input_size"),
        ("input_size", just([-2, 3, 4, 3, 5]), "input_size"),
        ("grad", ones(3, 3, 2, 0, 2), "grad"),
    ],
    "voxel_cosine_loss": [
        *LOSS_WRONG,
        ("prediction", ones(3), "prediction"),
        ("prediction", ones(3, 3, 2, 1, 2, dtype=torch.int16), "prediction|target"),
        ("target", ones(3, 3, 2, 1, 1), "target"),
        ("target", ones(3, 3, 2, 1), "target"),
        ("target", ones(3, 3, 2, 1, 2, dtype=torch.float64), "target"),
    ],
    "voxel_cosine_loss_backward": [
        *LOSS_WRONG,
        *SAVED_WRONG,
        ("target", ones(3, 3, 2, 1, 1), "target"),
        ("target", ones(3, 3, 2, 1, 2, dtype=torch.float64), "target"),
    ],
    "aligned_cosine_loss3d": [
        *SHARED_WRONG,
        *LOSS_WRONG,
        ("prediction", ones(3, 3, 2, 1), "prediction"),
        ("prediction", ones(2, 3, 2, 1, 2), "prediction"),
        ("prediction", ones(3, 2, 2, 1, 2), "prediction"),
        ("features", ones(2, 3, 3, 4), "features"),
        ("features", ones(2, 3, 3, 0, 5), "features"),
        ("prediction", ones(3, 3, 2, 0, 2), "prediction"),
        ("features", ones(2, 3, 3, 4, 5, dtype=torch.float16), "features"),
    ],
    "aligned_cosine_loss3d_backward": [
        *SHARED_WRONG,
        *LOSS_WRONG,
        *SAVED_WRONG,
        ("prediction", ones(2, 3, 2, 1, 2), "prediction"),
        ("features", ones(2, 3, 3, 4), "features"),
        ("features", ones(2, 3, 3, 4, 5, dtype=torch.float16), "features"),
    ],
}


@pytest.mark.parametrize("op", OPS)
def test_a_direct_call_with_a_wrong_argument_gets_a_clear_error(backend, op):
    call = recorded(backend)[op]
    call.run()
    for argument, wrong, message in WRONG[op]:
        value = wrong(backend)
        with pytest.raises((ValueError, TypeError, RuntimeError)) as raised:
            call.run(**{argument: value})
            pytest.fail(f"{op} took {argument} = {value}")
        told = str(raised.value)
        assert any(part in told for part in message.split("|")), f"{argument} = {value}: {told}"


@pytest.mark.parametrize(
    "op", ["roi_align3d_backward", "aligned_cosine_loss3d", "aligned_cosine_loss3d_backward"]
)
def test_a_direct_call_with_a_bad_box_row_touches_nothing_out_of_bounds(backend, op):
    call = recorded(backend)[op]
    for column, value in [(0, 2.0), (0, -1.0), (0, float("nan")), (0, 1e18), (2, float("inf")), (6, 1e9)]:
        boxes = call.arguments["boxes"].clone()
        boxes[1, column] = value
        if backend.raises_on_bad_boxes:
            with pytest.raises(ValueError, match=r"row 1 of boxes"):
                call.run(boxes=boxes)
        else:
            result = call.run(boxes=boxes)
            result = result[0] if isinstance(result, tuple) else result
            if op == "roi_align3d_backward":
                assert result.isfinite().all(), (column, value)


@pytest.mark.parametrize("op", ["voxel_cosine_loss", "aligned_cosine_loss3d"])
def test_a_direct_call_that_saved_nothing_says_so_in_the_backward(backend, op):
    call = recorded(backend)[op]
    loss = call.run(prediction=call.arguments["prediction"].clone().requires_grad_(), save=False)[0]
    with pytest.raises(RuntimeError, match="save"):
        loss.backward()


@pytest.mark.parametrize("op", OPS)
def test_a_direct_call_with_a_meta_tensor_among_others_does_not_return_what_was_never_written(backend, op):
    """The key of meta tensors sends such a call to the fake implementation."""
    call = recorded(backend)[op]
    tensors = [key for key, value in call.arguments.items() if isinstance(value, torch.Tensor)]
    assert len(tensors) > 1
    for key in tensors:
        with pytest.raises(ValueError, match="must be on the same device as"):
            call.run(**{key: call.arguments[key].to("meta")})


def test_a_result_for_which_there_is_no_memory_is_named(backend):
    if backend.device.type != "cpu":
        pytest.skip("a GPU's allocator words it otherwise")
    boxes = torch.tensor([[0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0]])
    wanted = r"no memory for a result of float32\[1, 4000, 10000, 10000, 1000\] on cpu"
    if tuple(map(int, torch.__version__.split(".")[:2])) >= (2, 13):  # earlier ones tell no words of theirs
        wanted += ": .*can't allocate memory"
    with pytest.raises(RuntimeError, match=wanted):
        pgl_ops.roi_align3d(torch.zeros(1, 4000, 1, 1, 1), boxes, (10000, 10000, 1000))
