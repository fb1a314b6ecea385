"""What the op tests feed to the ops: memory layouts, random boxes, random features."""

from __future__ import annotations

import torch
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INTEGERS = (torch.uint8, torch.int16)
LAYOUTS = ("contiguous", "channels_last", "strided")
RATIOS = (-1, 1, 2, 3, (2, -1, 3))
SCALES = (1.0, (0.5, 1.25, 0.3))


def name(dtype: torch.dtype) -> str:
    """The dtype's short name, for test ids."""
    return str(dtype).removeprefix("torch.")


def laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "strided" is neither contiguous nor channels-last."""
    if layout == "contiguous":
        return values.contiguous()
    if layout == "channels_last":
        return torch.empty_like(values).movedim(1, -1).contiguous().movedim(-1, 1).copy_(values)
    if layout == "strided":
        shape = list(values.shape)
        shape[0], shape[-1] = shape[0] + 1, 2 * shape[-1] + 1
        roomy = values.new_zeros(shape).transpose(0, 1).contiguous().transpose(0, 1)
        view = roomy[1:, ..., 1::2]
        view.copy_(values)
        return view
    raise ValueError(f"unknown layout {layout!r}")


def random_volume(shape, dtype=torch.float64, seed: int = 0) -> Tensor:
    """Values that ``dtype`` holds exactly, of either sign where it has one."""
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.uint8:
        return torch.randint(0, 256, tuple(shape), generator=generator).to(dtype)
    if dtype == torch.int16:
        return torch.randint(-(2**15), 2**15, tuple(shape), generator=generator).to(dtype)
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float64).to(dtype)


def random_boxes(
    count: int, samples: int, shape, spatial_scale=1.0, dtype=torch.float32, seed: int = 1
) -> Tensor:
    """Tensor[count, 7] in the coordinates before ``spatial_scale``: inside, across the border or outside.

    The samples come in no order, and with more than one some may have no box.
    """
    generator = torch.Generator().manual_seed(seed)
    scales = spatial_scale if isinstance(spatial_scale, tuple | list) else (spatial_scale,) * 3
    sizes = torch.tensor([float(s) for s in shape], dtype=torch.float64)
    middle = (torch.rand(count, 3, generator=generator, dtype=torch.float64) * 1.4 - 0.2) * sizes
    half = (torch.rand(count, 3, generator=generator, dtype=torch.float64) * 0.6 + 0.02) * sizes
    batch = torch.randint(0, samples, (count, 1), generator=generator).double()
    factor = torch.tensor(scales, dtype=torch.float64)
    return torch.cat([batch, (middle - half) / factor, (middle + half) / factor], dim=1).to(dtype)


def random_flips(count: int, seed: int = 2) -> Tensor:
    """bool Tensor[count, 3]."""
    return torch.rand(count, 3, generator=torch.Generator().manual_seed(seed)) < 0.5


def vectors(dtype=torch.float64, **voxels) -> tuple[Tensor, Tensor]:
    """One pair of vectors a voxel, as prediction and target Tensor[1, C, voxels]."""
    p, z = zip(*voxels.values(), strict=True)
    return tuple(torch.tensor(side, dtype=torch.float64).t()[None].to(dtype) for side in (p, z))
