"""On a GPU: no synchronisation, CUDA graphs, side streams, and devices other than the first."""

from __future__ import annotations

import pytest
import torch

import pgl_ops
from tests.ops.cases import random_boxes, random_flips, random_volume

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def case(device="cuda"):
    return {
        "features": random_volume((2, 8, 6, 7, 8), torch.float32, seed=1).to(device).requires_grad_(),
        "prediction": random_volume((5, 8, 2, 3, 2), torch.float32, seed=2).to(device).requires_grad_(),
        "boxes": random_boxes(5, 2, (6, 7, 8)).to(device),
        "flips": random_flips(5).to(device),
    }


def run(features, prediction, boxes, flips):
    """Losses and gradients of all three ops."""
    target = pgl_ops.roi_align3d(features, boxes, (2, 3, 2), flips=flips)
    loss = pgl_ops.voxel_cosine_loss(prediction, target) + pgl_ops.aligned_cosine_loss3d(
        prediction, features.detach(), boxes, flips=flips
    )
    return [loss, *torch.autograd.grad(loss, (features, prediction))]


def test_nothing_synchronises_with_the_host():
    arguments = case()
    run(**arguments)
    torch.cuda.set_sync_debug_mode("error")
    try:
        run(**arguments)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_cuda_graph_replays_with_new_values():
    arguments = case()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run(**arguments)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = run(**arguments)
    with torch.no_grad():
        arguments["features"].copy_(random_volume((2, 8, 6, 7, 8), torch.float32, seed=5))
        arguments["boxes"].copy_(random_boxes(5, 2, (6, 7, 8), seed=6))
    graph.replay()
    replayed = [result.clone() for result in results]
    assert all(torch.equal(a, b) for a, b in zip(replayed, run(**arguments), strict=True))


def test_work_runs_on_the_current_side_stream():
    arguments = case()
    expected = run(**arguments)
    features = arguments["features"].detach()
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        # What the side stream still has to do must be seen by the ops: they are queued behind it.
        torch.cuda._sleep(50_000_000)
        late = torch.zeros_like(features).copy_(features).requires_grad_()
        got = run(**{**arguments, "features": late})
    side.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


def test_a_device_other_than_the_current_one():
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two CUDA devices")
    expected = run(**case("cuda:0"))
    got = run(**case("cuda:1"))
    assert all(value.device == torch.device("cuda:1") for value in got)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b.cpu())
    assert torch.cuda.current_device() == 0


def test_tensors_on_the_cpu_and_on_the_gpu_are_refused():
    arguments = case()
    with pytest.raises(ValueError, match="boxes must be on the same device as input"):
        pgl_ops.roi_align3d(arguments["features"], arguments["boxes"].cpu(), 2)
    with pytest.raises(ValueError, match="target must be on the same device as prediction"):
        pgl_ops.voxel_cosine_loss(arguments["prediction"], arguments["prediction"].cpu())
