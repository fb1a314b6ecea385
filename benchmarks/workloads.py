"""The op benchmark's workloads: inputs, and the same result from this library and from each peer.

A case is a name and functions without arguments. Forward and backward are timed apart; for a backward the
graph is kept, so only the backward pass runs. All peers compute the same result (checked before timing).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

import pgl_ops
from pgl_ops import reference


@dataclass
class Case:
    """One row of the table.

    Args:
        workload, direction, dtype, layout: what the row is called.
        ours: computes it with this library.
        peers: the same by each peer's name.
        floor_bytes: least bytes to move: every voxel that a sample touches read once, every output written
            once.
        tolerance: how far peers may differ, relative to the largest value.
    """

    workload: str
    direction: str
    dtype: str
    layout: str
    ours: Callable[[], object]
    peers: dict[str, Callable[[], object]]
    floor_bytes: int
    tolerance: float = 1e-4
    keep: list[object] = field(default_factory=list)


@dataclass(frozen=True)
class RoiWorkload:
    """A RoIAlign problem: shapes, and boxes Tensor[K, 7] from a seed."""

    name: str
    samples: int
    channels: int
    size: tuple[int, int, int]
    output: tuple[int, int, int]
    ratio: int
    boxes: Callable[[RoiWorkload, torch.Generator], Tensor]
    flips: bool = False
    integer: bool = False


def one_box_a_sample(work: RoiWorkload, generator: torch.Generator) -> Tensor:
    """Boxes of 80 to 100 % of the volume, one a sample."""
    size = torch.tensor(work.size, dtype=torch.float32)
    edge = size * (0.8 + 0.2 * torch.rand(work.samples, 3, generator=generator))
    low = (size - edge) * torch.rand(work.samples, 3, generator=generator)
    index = torch.arange(work.samples, dtype=torch.float32)[:, None]
    return torch.cat([index, low, low + edge], 1)


def two_views_a_sample(work: RoiWorkload, generator: torch.Generator) -> Tensor:
    """Crops of 110 to 140 % of the output, two a sample."""
    size, out = (torch.tensor(x, dtype=torch.float32) for x in (work.size, work.output))
    count = 2 * work.samples
    edge = out * (1.1 + 0.3 * torch.rand(count, 3, generator=generator))
    edge = torch.minimum(edge, size)
    low = (size - edge) * torch.rand(count, 3, generator=generator)
    index = torch.arange(work.samples, dtype=torch.float32).repeat(2)[:, None]
    return torch.cat([index, low, low + edge], 1)


def detections(count: int, least: float, most: float) -> Callable[[RoiWorkload, torch.Generator], Tensor]:
    """``count`` boxes with edges between two shares of the volume, anywhere in it."""

    def draw(work: RoiWorkload, generator: torch.Generator) -> Tensor:
        size = torch.tensor(work.size, dtype=torch.float32)
        # Log-uniform edges: as many small boxes as large ones.
        share = torch.rand(count, 3, generator=generator)
        edge = size * least * (most / least) ** share
        low = (size - edge) * torch.rand(count, 3, generator=generator)
        index = torch.randint(work.samples, (count, 1), generator=generator).float()
        boxes = torch.cat([index, low, low + edge], 1)
        if work.size[0] == 1:
            boxes[:, 1], boxes[:, 4] = 0, 1
        return boxes

    return draw


def roi_workloads(gpu: bool) -> list[RoiWorkload]:
    """The RoIAlign workloads at the size of the device."""
    return [
        RoiWorkload("bottleneck", 128 if gpu else 8, 256, (4, 12, 12), (4, 8, 8), 2, one_box_a_sample),
        RoiWorkload("dense", 16 if gpu else 2, 32, (16, 96, 96), (16, 64, 64), 2, one_box_a_sample),
        RoiWorkload("detection", 2, 256, (32, 64, 64), (7, 7, 7), 2, detections(512, 0.1, 0.5)),
        RoiWorkload(
            "views", 64 if gpu else 4, 1, (24, 144, 144), (16, 96, 96), 1, two_views_a_sample, True, True
        ),
        RoiWorkload("torchvision-2d", 1, 256, (1, 200, 272), (1, 7, 7), 2, detections(1000, 0.05, 0.6)),
        RoiWorkload("adaptive", 2, 32, (32, 96, 96), (7, 7, 7), -1, detections(64, 0.05, 1.0)),
    ]


def normal(shape, dtype: torch.dtype, device: torch.device, seed: int = 0) -> Tensor:
    """Normal numbers, drawn on the device."""
    generator = torch.Generator(device).manual_seed(seed)
    return torch.randn(shape, generator=generator, device=device).to(dtype)


def roi_cases(work: RoiWorkload, dtype: torch.dtype, layout: str, device: torch.device, peers: set[str]):
    """Forward and backward of one workload."""
    generator = torch.Generator().manual_seed(0)
    shape = (work.samples, work.channels, *work.size)
    if work.integer:
        dtype = torch.int16
        volume = torch.randint(-1000, 1500, shape, generator=generator, dtype=torch.int16)
    else:
        volume = normal(shape, dtype, device)
    if layout == "channels_last":
        volume = volume.to(memory_format=torch.channels_last_3d)
    volume = volume.to(device)
    boxes = work.boxes(work, generator).to(device)
    flips = None
    if work.flips:
        flips = (torch.rand(len(boxes), 3, generator=generator) < 0.5).to(device)

    def ours(x: Tensor) -> Tensor:
        return pgl_ops.roi_align3d(x, boxes, work.output, 1.0, work.ratio, True, flips)

    functions: dict[str, Callable[[Tensor], Tensor]] = {}
    if "reference" in peers and _fits_reference(work):
        functions["reference"] = lambda x: reference.roi_align3d(
            x, boxes, work.output, 1.0, work.ratio, True, flips
        )
        if "compiled" in peers and work.ratio > 0:
            torch._dynamo.reset()
            # A backward pass is timed by itself, so its graph must be kept.
            torch._functorch.config.donated_buffer = False
            functions["compiled"] = torch.compile(functions["reference"])
    if "grid_sample" in peers and work.ratio > 0 and _fits_composition(work):
        functions["grid_sample"] = lambda x: grid_sample_composition(x, boxes, work, flips)
    if "torchvision" in peers and work.size[0] == 1:
        roi_align = torchvision_roi_align()
        if roi_align is not None:
            flat = torch.cat([boxes[:, :1], boxes[:, [3, 2, 6, 5]]], 1)
            functions["torchvision"] = lambda x: roi_align(
                x[:, :, 0].float(), flat, work.output[1:], 1.0, work.ratio, True
            )[:, :, None].to(x.dtype)

    name = str(volume.dtype).removeprefix("torch.")
    out = ours(volume)
    touched = touched_elements(work, boxes) * work.channels
    written = out.numel() * out.element_size()
    yield Case(
        work.name, "forward", name, layout, lambda: ours(volume),
        {peer: (lambda f=f: f(volume)) for peer, f in functions.items()},
        touched * volume.element_size() + written, _tolerance(dtype),
    )  # fmt: skip
    if work.integer:
        return
    # Laid out like the result, as a network hands it back.
    gradient = torch.empty_like(out).copy_(normal(out.shape, out.dtype, device, 1))

    def backward_of(f: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        kept: list[tuple[Tensor, Tensor, Tensor]] = []

        def run() -> Tensor:
            # Forward at the first call, which is not timed: a peer that cannot do it is left out there.
            if not kept:
                leaf = volume.detach().clone(memory_format=torch.preserve_format).requires_grad_()
                result = f(leaf)
                kept.append((leaf, result, gradient.to(result.dtype)))
            leaf, result, grad = kept[0]
            return torch.autograd.grad(result, leaf, grad, retain_graph=True)[0]

        return run

    yield Case(
        work.name, "backward", name, layout, backward_of(ours),
        {peer: backward_of(f) for peer, f in functions.items()},
        volume.numel() * volume.element_size() + written, 4 * _tolerance(dtype),
    )  # fmt: skip


def grid_sample_composition(x: Tensor, boxes: Tensor, work: RoiWorkload, flips: Tensor | None) -> Tensor:
    """What one writes without this library: sample all boxes with ``grid_sample``, average, flip.

    Positions and sums are float32: torch averages no bfloat16 volumes on a CPU, and positions beyond 256 are
    not exact in it. With one box a sample, the volumes are used as they are; else indexed.
    """
    kind = x.dtype
    x = x.float()
    samples = [p * work.ratio for p in work.output]
    rows = boxes.float()
    axes = []
    for axis, count in enumerate(samples):
        steps = (torch.arange(count, device=x.device) + 0.5) / count
        low, high = rows[:, 1 + axis, None], rows[:, 4 + axis, None]
        position = low + steps * (high - low)  # continuous coordinates [K, count]
        if flips is not None:
            position = torch.where(flips[:, axis, None], position.flip(1), position)
        axes.append(position / work.size[axis] * 2 - 1)
    d, h, w = axes
    shape = (len(rows), *samples)
    grid = torch.stack(
        [
            w[:, None, None].expand(shape),
            h[:, None, :, None].expand(shape),
            d[:, :, None, None].expand(shape),
        ],
        -1,
    )
    volumes = x if work.boxes is one_box_a_sample else x[rows[:, 0].long()]
    out = F.grid_sample(volumes, grid, padding_mode="border", align_corners=False)
    if work.ratio > 1:
        out = F.avg_pool3d(out, [s // p for s, p in zip(samples, work.output, strict=True)])
    return out.to(kind) if kind.is_floating_point else out


def touched_elements(work: RoiWorkload, boxes: Tensor) -> int:
    """Voxels of one channel that any sample reads."""
    touched = torch.zeros(work.samples, *work.size, dtype=torch.bool)
    for row in boxes.cpu().double():
        axes = [
            reference.axis_matrix(
                row[1 + a : 2 + a], row[4 + a : 5 + a], work.size[a], work.output[a], 1.0, work.ratio, True
            )[0].any(0)
            for a in range(3)
        ]
        touched[int(row[0])] |= axes[0][:, None, None] & axes[1][None, :, None] & axes[2][None, None, :]
    return int(touched.sum())


def loss_cases(device: torch.device, dtype: torch.dtype, layout: str, peers: set[str], gpu: bool):
    """The cosine loss, forward and backward together, and the aligned loss against its parts."""
    scale = 8 if gpu else 1
    for shape in ((8 * scale, 256, 4, 16, 16), (2 * scale, 32, 16, 96, 96)):
        tensors = [normal(shape, dtype, device, seed) for seed in range(2)]
        if layout == "channels_last":
            tensors = [x.to(memory_format=torch.channels_last_3d) for x in tensors]
        prediction, target = (x.to(device) for x in tensors)
        prediction.requires_grad_()

        def with_backward(f, prediction=prediction, target=target):
            return lambda: torch.autograd.grad(f(prediction, target), prediction)[0]

        functions = {}
        if "composition" in peers:
            functions["composition"] = lambda p, z: (2 - 2 * F.cosine_similarity(p.float(), z.float())).mean()
        if "reference" in peers:
            functions["reference"] = reference.voxel_cosine_loss
        yield Case(
            f"loss {'x'.join(map(str, shape))}", "both", str(dtype).removeprefix("torch."), layout,
            with_backward(pgl_ops.voxel_cosine_loss),
            {name: with_backward(f) for name, f in functions.items()},
            5 * prediction.numel() * prediction.element_size(), 4 * _tolerance(dtype), [prediction, target],
        )  # fmt: skip
    for work in roi_workloads(gpu)[:2]:
        generator = torch.Generator().manual_seed(0)
        features = normal((work.samples, work.channels, *work.size), dtype, device)
        prediction = normal((work.samples, work.channels, *work.output), dtype, device, 1)
        if layout == "channels_last":
            features = features.to(memory_format=torch.channels_last_3d)
            prediction = prediction.to(memory_format=torch.channels_last_3d)
        features, prediction = features.to(device), prediction.to(device).requires_grad_()
        boxes = work.boxes(work, generator).to(device)

        def fused(f=features, p=prediction, b=boxes, w=work):
            loss = pgl_ops.aligned_cosine_loss3d(p, f, b, 1.0, w.ratio)
            return torch.autograd.grad(loss, p)[0]

        def parts(f=features, p=prediction, b=boxes, w=work):
            target = pgl_ops.roi_align3d(f, b, w.output, 1.0, w.ratio)
            return torch.autograd.grad(pgl_ops.voxel_cosine_loss(p, target), p)[0]

        moved = 2 * touched_elements(work, boxes) * work.channels + 3 * prediction.numel()
        yield Case(
            f"aligned loss {work.name}", "both", str(dtype).removeprefix("torch."), layout, fused,
            {"its parts": parts}, moved * features.element_size(), 4 * _tolerance(dtype),
        )  # fmt: skip


def torchvision_roi_align():
    """torchvision's RoIAlign, or None where torchvision lacks its compiled ops."""
    try:
        import torchvision  # noqa: F401
        from torchvision.ops import roi_align

        torch.ops.torchvision.roi_align  # noqa: B018
    except (ImportError, AttributeError, RuntimeError):
        return None
    return roi_align


def _tolerance(dtype: torch.dtype) -> float:
    return {torch.float16: 4e-3, torch.bfloat16: 3e-2}.get(dtype, 1e-4)


def _fits_reference(work: RoiWorkload) -> bool:
    # It contracts a whole volume for every RoI: minutes for hundreds of RoIs on a CPU.
    return work.name not in ("detection", "torchvision-2d") or torch.cuda.is_available()


def _fits_composition(work: RoiWorkload) -> bool:
    return work.name not in ("detection", "torchvision-2d")
