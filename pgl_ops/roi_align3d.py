"""3D RoIAlign: the public function, its module, and the registrations of its custom op, top to bottom."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import _arguments as arguments
from . import _library
from ._autograd import register_autograd


def roi_align3d(
    input: Tensor,
    boxes: Tensor | Sequence[Tensor],
    output_size: int | Sequence[int],
    spatial_scale: float | Sequence[float] = 1.0,
    sampling_ratio: int | Sequence[int] = -1,
    aligned: bool = True,
    flips: Tensor | None = None,
) -> Tensor:
    """Cuts boxes out of a batch of volumes and resamples each to one size, by averaged linear interpolation.

    RoIAlign (He et al., Mask R-CNN, 2017) with torchvision's rule on three axes, and optional flips that undo
    a mirrored view (PGL, arXiv 2011.12640). All triples are in the order of the tensor's axes, (D, H, W).

    Per axis with S voxels and P bins, a box [lo, hi] has start s = scale·lo − ½ (without the ½ if not
    ``aligned``), length L = scale·(hi − lo) (at least 1 if not ``aligned``), bin size b = L / P, and
    g = ``sampling_ratio``, or ⌈b⌉ if that is not positive, samples a bin at s + p·b + (i + ½)·b/g. A sample
    within [−1, S] reads its two neighbours linearly, clamped into the volume; others add nothing but stay in
    the average.

    Args:
        input: Tensor[N, C, D, H, W]: float64/32/16 or bfloat16 (differentiable), uint8 or int16 (sampled to
            float32). Contiguous and channels_last_3d volumes are read in place, as is any other stride.
        boxes: Tensor[K, 7] as (batch index, d1, h1, w1, d2, h2, w2), or a list of N Tensor[k, 6], one a
            sample; float32 or float64, in continuous coordinates where voxel i covers [i, i + 1) before
            ``spatial_scale``. Receives no gradient. See :func:`pgl_ops.boxes_from_xyz` for x-first boxes.
        output_size: the bins (d, h, w), one number or three.
        spatial_scale: what box coordinates are multiplied by, e.g. 1 / stride of the feature map; one number
            or three.
        sampling_ratio: samples a bin and axis, one number or three; not positive means adaptive.
        aligned: whether the box is shifted by half a voxel, so that voxel centres lie at i + ½.
        flips: bool Tensor[K, 3]; a True reverses that axis of the RoI's output, like ``torch.flip``, at no
            cost.

    Returns:
        Tensor[K, C, d, h, w] in the input's dtype (float32 for integers) and memory format. Sums are held in
        float32 (float64 for float64). Forward, backward and double backward are bitwise repeatable.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, size or device; on the CPU also if a batch index is not
            in [0, N), or a box is not finite or reaches beyond ±2²⁴ voxels after scaling. CUDA kernels do not
            synchronise: there such a RoI's output is NaN, and it gets no gradient.
    """
    input = arguments.check_volume("input", input, arguments.VOLUME_DTYPES)
    boxes = arguments.check_boxes(arguments.boxes_in_float32(boxes), "input", input)
    flips = arguments.check_flips(flips, boxes)
    return _library.ops().roi_align3d(
        input,
        boxes,
        arguments.check_output_size(output_size),
        arguments.check_spatial_scale(spatial_scale),
        arguments.check_sampling_ratio(sampling_ratio),
        arguments.check_bool("aligned", aligned),
        flips,
    )


class RoIAlign3d(nn.Module):
    """:func:`roi_align3d` as a module; holds everything but the input, the boxes and the flips.

    Args:
        output_size, spatial_scale, sampling_ratio, aligned: see :func:`roi_align3d`.

    >>> import torch
    >>> align = RoIAlign3d(output_size=(1, 2, 2), spatial_scale=0.5)
    >>> align(torch.ones(1, 3, 4, 8, 8), torch.tensor([[0, 0.0, 0.0, 0.0, 8.0, 16.0, 16.0]])).shape
    torch.Size([1, 3, 1, 2, 2])
    """

    def __init__(
        self,
        output_size: int | Sequence[int],
        spatial_scale: float | Sequence[float] = 1.0,
        sampling_ratio: int | Sequence[int] = -1,
        aligned: bool = True,
    ) -> None:
        super().__init__()
        self.output_size = tuple(arguments.check_output_size(output_size))
        self.spatial_scale = tuple(arguments.check_spatial_scale(spatial_scale))
        self.sampling_ratio = tuple(arguments.check_sampling_ratio(sampling_ratio))
        self.aligned = arguments.check_bool("aligned", aligned)

    def forward(self, input: Tensor, boxes: Tensor | Sequence[Tensor], flips: Tensor | None = None) -> Tensor:
        """Aligns ``boxes`` of ``input``; see :func:`roi_align3d`."""
        return roi_align3d(
            input, boxes, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned, flips
        )

    def extra_repr(self) -> str:
        return (
            f"output_size={self.output_size}, spatial_scale={self.spatial_scale}, "
            f"sampling_ratio={self.sampling_ratio}, aligned={self.aligned}"
        )


# The custom op -------------------------------------------------------------------------------------------


def is_channels_last(tensor: Tensor) -> bool:
    """The kernels' rule for when results are laid out channels_last_3d (csrc/tensors.h)."""
    return tensor.shape[1] > 1 and tensor.stride(1) == 1 and tensor.stride(4) != 1


def empty_volume(tensor: Tensor, shape: Sequence[int], dtype: torch.dtype, channels_last: bool) -> Tensor:
    """What the kernels allocate, for fake tensors."""
    memory_format = torch.channels_last_3d if channels_last else torch.contiguous_format
    return torch.empty(shape, dtype=dtype, device=tensor.device, memory_format=memory_format)


def _fake(input, boxes, output_size, spatial_scale, sampling_ratio, aligned, flips):
    arguments.check_one_device("input", input, boxes=boxes, flips=flips)
    dtype = input.dtype if input.dtype.is_floating_point else torch.float32
    return empty_volume(input, [boxes.shape[0], input.shape[1], *output_size], dtype, is_channels_last(input))


def _fake_backward(grad, boxes, input_size, spatial_scale, sampling_ratio, aligned, flips, channels_last):
    arguments.check_one_device("grad", grad, boxes=boxes, flips=flips)
    return empty_volume(grad, input_size, grad.dtype, channels_last)


def _setup_context(ctx, inputs, output):
    input, boxes, _, *settings, flips = inputs
    ctx.save_for_backward(boxes, flips)
    ctx.input_size = input.shape
    ctx.channels_last = is_channels_last(input)
    ctx.settings = settings
    ctx.differentiable = input.dtype.is_floating_point


def _setup_context_backward(ctx, inputs, output):
    grad, boxes, _, *settings, flips, _ = inputs
    ctx.save_for_backward(boxes, flips)
    ctx.output_size = list(grad.shape[2:])
    ctx.settings = settings


def register(namespace: str) -> None:
    """Registers fake tensors and autograd for the kernels in ``torch.ops.<namespace>``.

    Nothing to register for autocast: the kernels take every dtype, and boxes are widened by the public
    function.
    """
    ops = _library.ops(namespace)

    def backward(ctx, grad):
        boxes, flips = ctx.saved_tensors
        grad_input = None
        if ctx.differentiable:
            grad_input = ops.roi_align3d_backward(
                grad, boxes, list(ctx.input_size), *ctx.settings, flips, ctx.channels_last
            )
        return grad_input, None, None, None, None, None, None

    def double_backward(ctx, grad_grad):
        # The op is linear: the gradient of its transpose is the op itself.
        boxes, flips = ctx.saved_tensors
        grad = ops.roi_align3d(grad_grad, boxes, ctx.output_size, *ctx.settings, flips)
        return grad, None, None, None, None, None, None, None

    name, backward_name = f"{namespace}::roi_align3d", f"{namespace}::roi_align3d_backward"
    torch.library.register_fake(name, _fake)
    torch.library.register_fake(backward_name, _fake_backward)
    ops.roi_align3d = register_autograd(name, backward, _setup_context)
    ops.roi_align3d_backward = register_autograd(backward_name, double_backward, _setup_context_backward)


register("pgl_ops")
