"""Argument checks shared by the ops and their reference twins.

Only what can be read without touching a tensor's data is checked here (a read would synchronise a GPU and
break ``torch.compile``); the kernels check the boxes' values.
"""

from __future__ import annotations

import contextlib
import math
import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

FLOAT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGER_DTYPES = (torch.uint8, torch.int16)
VOLUME_DTYPES = FLOAT_DTYPES + INTEGER_DTYPES
REDUCTIONS = ("none", "mean", "sum")
MAX_SAMPLING_RATIO = 2**20
# A list of a million boxes should not become a message of a million numbers.
_LONGEST_REPR = 120
# What fits the kernels' integers.
_LARGEST_INTEGER = 2**31 - 1
# What is accepted as a kind of number, and what messages call it.
_KINDS: dict[type, tuple[type, str]] = {
    int: (numbers.Integral, "an integer"),
    float: (numbers.Real, "a number"),
}
# Numbers of a traced graph, whose values are not known yet.
_SYMBOLIC = (torch.SymInt, torch.SymFloat)


def describe(value: object) -> str:
    """A short description of a wrong argument for an error message."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)} of {value.dtype} on {value.device}"
    kind = type(value).__name__
    if hasattr(value, "shape") and hasattr(value, "dtype") and value.shape:
        return f"{kind}{list(value.shape)} of {value.dtype}"
    text = repr(value)
    if len(text) > _LONGEST_REPR:
        text = text[: _LONGEST_REPR - 3] + "..."
    return f"{text} ({kind})"


def check_tensor(name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    """Raises TypeError unless ``value`` is a dense tensor of one of ``dtypes``."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {describe(value)}")
    if value.layout != torch.strided or value.is_nested:
        kind = "a nested tensor" if value.is_nested else f"layout {value.layout}"
        raise TypeError(f"{name} must be a dense (strided) tensor, got {kind}")
    if value.dtype not in dtypes:
        allowed = ", ".join(str(d).removeprefix("torch.") for d in dtypes)
        raise TypeError(f"{name} must have one of the dtypes {allowed}, got {describe(value)}")
    return value


def check_same_device(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raises ValueError unless both tensors live on one device."""
    if value.device != like.device:
        raise ValueError(
            f"{name} must be on the same device as {like_name} ({like.device}), got {describe(value)}"
        )


def check_one_device(like_name: str, like: Tensor, **others: Tensor | None) -> None:
    """Raises ValueError unless all tensors live on one device."""
    for name, value in others.items():
        if value is not None:
            check_same_device(name, value, like_name, like)


def check_same_dtype(name: str, value: Tensor, like_name: str, like: Tensor) -> None:
    """Raises TypeError unless both tensors have one dtype."""
    if value.dtype != like.dtype:
        raise TypeError(f"{name} must have {like_name}'s dtype {like.dtype}, got {describe(value)}")


def in_one_dtype(name: str, tensor: object, other_name: str, other: object) -> tuple[Tensor, Tensor]:
    """Both as floating-point tensors of one dtype; under autocast, mixed ones are brought to one.

    float32 beside a half precision goes to the half; float16 beside bfloat16 both go to float32, since
    neither holds the other's values.
    """
    tensor = check_tensor(name, tensor, FLOAT_DTYPES)
    other = check_tensor(other_name, other, FLOAT_DTYPES)
    pair = {tensor.dtype, other.dtype}
    if len(pair) == 2 and torch.float64 not in pair and under_autocast(tensor.device):
        halves = pair - {torch.float32}
        dtype = halves.pop() if len(halves) == 1 else torch.float32
        return tensor.to(dtype), other.to(dtype)
    check_same_dtype(other_name, other, name, tensor)
    return tensor, other


def under_autocast(device: torch.device) -> bool:
    """Whether autocast is on for a device's type."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """A region in which autocast leaves operations in the dtype of their arguments."""
    if not torch.amp.is_autocast_available(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def as_float(value: object) -> float:
    """A real number as float; infinite where it does not fit."""
    try:
        return float(value)  # type: ignore[arg-type]
    except OverflowError:
        return math.inf


def as_number(name: str, item: object, kind: type, value: object) -> object:
    """``item`` of an argument's ``value`` as ``kind`` (int or float); a traced graph's numbers stay so."""
    if type(item) is not kind:  # asked first: an abstract type's instances take microseconds to tell
        if isinstance(item, _SYMBOLIC):
            return item
        number, wanted = _KINDS[kind]
        if isinstance(item, bool) or not isinstance(item, number):
            raise TypeError(f"{name} must be {wanted} or three of them, got {describe(value)}")
    if kind is float:
        return as_float(item)
    if not -_LARGEST_INTEGER <= item <= _LARGEST_INTEGER:  # type: ignore[operator]
        raise ValueError(f"{name} must lie within ±(2^31 − 1), got {describe(value)}")
    return int(item)  # type: ignore[call-overload]


def as_triple(name: str, value: object, kind: type) -> list:
    """One number or three, as a list of three numbers of ``kind`` (int or float)."""
    if type(value) is kind or not isinstance(value, Sequence) or isinstance(value, str):
        return [as_number(name, value, kind, value)] * 3
    if len(value) != 3:
        wanted = _KINDS[kind][1]
        raise ValueError(f"{name} must be {wanted} or three of them (D, H, W), got {describe(value)}")
    return [as_number(name, item, kind, value) for item in value]


def check_output_size(output_size: object) -> list[int]:
    """Three positive sizes (d, h, w)."""
    d, h, w = sizes = as_triple("output_size", output_size, int)
    if d < 1 or h < 1 or w < 1:
        raise ValueError(f"output_size must be at least 1 on every axis, got {describe(output_size)}")
    return sizes


def check_spatial_scale(spatial_scale: object) -> list[float]:
    """Three positive, finite factors (d, h, w)."""
    d, h, w = scales = as_triple("spatial_scale", spatial_scale, float)
    if not (0 < d < math.inf and 0 < h < math.inf and 0 < w < math.inf):
        raise ValueError(f"spatial_scale must be positive and finite, got {describe(spatial_scale)}")
    return scales


def check_sampling_ratio(sampling_ratio: object) -> list[int]:
    """Three sampling ratios; 0 and below mean adaptive."""
    d, h, w = ratios = as_triple("sampling_ratio", sampling_ratio, int)
    if d > MAX_SAMPLING_RATIO or h > MAX_SAMPLING_RATIO or w > MAX_SAMPLING_RATIO:
        raise ValueError(
            f"sampling_ratio must be at most {MAX_SAMPLING_RATIO}, got {describe(sampling_ratio)}"
        )
    return ratios


def check_bool(name: str, value: object) -> bool:
    """Raises TypeError unless ``value`` is a bool."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {describe(value)}")
    return value


def check_eps(eps: object) -> float:
    """A finite, non-negative number."""
    if isinstance(eps, bool) or not isinstance(eps, numbers.Real):
        raise TypeError(f"eps must be a number, got {describe(eps)}")
    value = as_float(eps)
    if not 0 <= value < math.inf:
        raise ValueError(f"eps must be finite and not negative, got {describe(eps)}")
    return value


def check_reduction(reduction: object) -> str:
    """One of ``REDUCTIONS``."""
    if not isinstance(reduction, str) or reduction not in REDUCTIONS:
        raise ValueError(
            f"reduction must be one of {', '.join(map(repr, REDUCTIONS))}, got {describe(reduction)}"
        )
    return reduction


def check_volume(name: str, value: object, dtypes: Sequence[torch.dtype]) -> Tensor:
    """A Tensor[N, C, D, H, W] whose spatial axes are not empty."""
    volume = check_tensor(name, value, dtypes)
    if volume.dim() != 5:
        raise ValueError(f"{name} must be a Tensor[N, C, D, H, W], got {describe(volume)}")
    if 0 in volume.shape[2:]:
        raise ValueError(f"{name} must have spatial axes of at least one voxel, got {describe(volume)}")
    return volume


def boxes_in_float32(boxes: object) -> object:
    """Under autocast, boxes that were computed in half precision are accepted."""
    if not (torch.is_autocast_enabled("cuda") or torch.is_autocast_enabled("cpu")):
        return boxes
    half = (torch.float16, torch.bfloat16)
    if isinstance(boxes, Tensor):
        return boxes.float() if boxes.dtype in half else boxes
    if isinstance(boxes, Sequence) and not isinstance(boxes, str):
        return [boxes_in_float32(box) for box in boxes]
    return boxes


def check_boxes(boxes: object, input_name: str, input: Tensor) -> Tensor:
    """``boxes`` as one Tensor[K, 7], batch index first, cut off from autograd: they get no gradient."""
    box_dtypes = (torch.float32, torch.float64)
    if not isinstance(boxes, Tensor):
        if not isinstance(boxes, Sequence) or isinstance(boxes, str):
            raise TypeError(
                f"boxes must be a Tensor[K, 7] or a list of Tensor[k, 6], one a sample, got {describe(boxes)}"
            )
        if len(boxes) != input.shape[0]:
            raise ValueError(
                f"boxes must hold one Tensor[k, 6] for each of the {input.shape[0]} samples of {input_name}, "
                f"got a list of {len(boxes)}"
            )
        rows = []
        for i, box in enumerate(boxes):
            box = check_tensor(f"boxes[{i}]", box, box_dtypes)
            if box.dim() != 2 or box.shape[1] != 6:
                raise ValueError(f"boxes[{i}] must be a Tensor[k, 6], got {describe(box)}")
            check_same_device(f"boxes[{i}]", box, input_name, input)
            rows.append(torch.cat([torch.full_like(box[:, :1], i), box], dim=1))
        return torch.cat(rows).detach() if rows else input.new_zeros((0, 7), dtype=torch.float32)
    boxes = check_tensor("boxes", boxes, box_dtypes)
    if boxes.dim() != 2 or boxes.shape[1] != 7:
        hint = " (a Tensor[K, 6] lacks the batch index)" if boxes.dim() == 2 and boxes.shape[1] == 6 else ""
        raise ValueError(f"boxes must be a Tensor[K, 7], batch index first{hint}, got {describe(boxes)}")
    check_same_device("boxes", boxes, input_name, input)
    return boxes.detach()


def check_flips(flips: object, boxes: Tensor) -> Tensor | None:
    """None, or a bool Tensor[K, 3] with a row for every box."""
    if flips is None:
        return None
    flips = check_tensor("flips", flips, (torch.bool,))
    if flips.dim() != 2 or flips.shape[1] != 3 or flips.shape[0] != boxes.shape[0]:
        raise ValueError(f"flips must be a bool Tensor[{boxes.shape[0]}, 3], got {describe(flips)}")
    check_same_device("flips", flips, "boxes", boxes)
    return flips


def check_prediction(prediction: Tensor, boxes: Tensor, features: Tensor) -> None:
    """Raises ValueError unless ``prediction`` is one grid a box with the channels of ``features``."""
    if prediction.shape[:2] != (boxes.shape[0], features.shape[1]):
        raise ValueError(
            f"prediction must be a Tensor[{boxes.shape[0]}, {features.shape[1]}, d, h, w], one a box with "
            f"the features' channels, got {describe(prediction)}"
        )


def check_weight(weight: object, prediction: Tensor) -> Tensor | None:
    """None, or the voxels' weights Tensor[N, *spatial] in the dtype that the loss is summed in."""
    if weight is None:
        return None
    weight = check_tensor("weight", weight, FLOAT_DTYPES)
    expected = [prediction.shape[0], *prediction.shape[2:]]
    if list(weight.shape) != expected:
        raise ValueError(f"weight must be a Tensor{expected}, got {describe(weight)}")
    check_same_device("weight", weight, "prediction", prediction)
    return weight.detach().to(accumulation_dtype(prediction.dtype))


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype that sums and losses are held in: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32
