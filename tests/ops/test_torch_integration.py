"""The ops inside PyTorch: opcheck, torch.compile, fake tensors, autocast, inference mode, modules."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import pgl_ops
from tests.ops.cases import FLOATS, INTEGERS, LAYOUTS, laid_out, name, random_boxes, random_volume
from tests.ops.checks import moved_keeping_strides, on
from tests.ops.recording import OPS, RecordedCalls, example, recorded

DIFFERENTIABLE = ("input", "features", "prediction", "target", "grad")


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_the_public_functions_reach_every_op(backend):
    assert sorted(recorded(backend)) == sorted(OPS)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_opcheck_passes_with_and_without_gradients(backend, layout, op):
    call = recorded(backend, layout)[op]
    for requires_grad in (False, True):
        arguments = [
            value.detach().clone().requires_grad_(requires_grad and key in DIFFERENTIABLE)
            if isinstance(value, torch.Tensor)
            else value
            for key, value in call.arguments.items()
        ]
        torch.library.opcheck(call.op, tuple(arguments))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float16], ids=name)
def test_opcheck_of_other_input_dtypes(backend, dtype):
    call = recorded(backend)["roi_align3d"]
    arguments = {**call.arguments, "input": call.arguments["input"].abs().to(dtype), "flips": None}
    torch.library.opcheck(call.op, tuple(arguments.values()))


def losses(features, prediction, target, boxes, flips, weight):
    """All three ops, and something for the compiler to fuse around them."""
    aligned = pgl_ops.roi_align3d(features.relu(), boxes, (2, 1, 2), (0.9, 1.0, 0.8), -1, True, flips)
    return (
        pgl_ops.voxel_cosine_loss(prediction * 2, aligned, weight)
        + pgl_ops.voxel_cosine_loss(prediction, target, reduction="none").sum()
        + pgl_ops.aligned_cosine_loss3d(prediction, features.detach(), boxes, flips=flips, weight=weight)
        + pgl_ops.aligned_cosine_loss3d(prediction, features.sin(), boxes, aligned=False, reduction="sum")
    )


def loss_and_gradients(function, case):
    case = {key: value.detach() for key, value in case.items()}
    leaves = [case[key].requires_grad_() for key in ("features", "prediction")]
    loss = function(**case)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile_fullgraph_gives_the_same_loss_and_gradients(backend, dynamic, layout):
    compiled = torch.compile(losses, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    case = example(backend, layout)
    expected, got = loss_and_gradients(losses, case), loss_and_gradients(compiled, case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)
        assert a.stride() == b.stride()


def test_compile_fullgraph_with_the_default_compiler(backend):
    if backend.name == "host_cuda":
        pytest.skip("what the compiler makes around the op does not depend on the kernels")

    def loss(features, prediction, boxes, **_):
        return pgl_ops.aligned_cosine_loss3d(prediction * 2, features.relu(), boxes)

    compiled = torch.compile(loss, fullgraph=True)
    case = example(backend)
    expected, got = loss_and_gradients(loss, case), loss_and_gradients(compiled, case)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_one_dynamic_graph_serves_every_number_and_size_of_boxes(backend):
    graphs = 0

    def count(module, inputs):
        nonlocal graphs
        graphs += 1
        return module

    def align(features, boxes, flips):
        return pgl_ops.roi_align3d(features, boxes, (2, 3, 2), sampling_ratio=2, flips=flips)

    compiled = torch.compile(align, fullgraph=True, dynamic=True, backend=count)
    # The first call's sizes all differ: equal ones would be taken for one and the same.
    for samples, boxes_count, shape in [(2, 11, (5, 6, 13)), (3, 5, (4, 6, 7)), (4, 8, (5, 3, 9))]:
        features = on(backend.device, random_volume((samples, 4, *shape), torch.float32))
        boxes = on(backend.device, random_boxes(boxes_count, samples, shape))
        flips = torch.ones(boxes_count, 3, dtype=torch.bool, device=backend.device)
        assert torch.equal(compiled(features, boxes, flips), align(features, boxes, flips))
    assert graphs == 1


def test_a_compiled_function_takes_lists_of_boxes_and_the_module(backend):
    features = on(backend.device, random_volume((2, 3, 4, 5, 6), torch.float32))
    boxes = [on(backend.device, random_boxes(k, 1, (4, 5, 6))[:, 1:]) for k in (2, 3)]
    module = pgl_ops.RoIAlign3d((2, 3, 2), sampling_ratio=2)
    compiled = torch.compile(module, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, boxes), module(features, boxes))


def assert_same_metadata(fake, real):
    assert (fake.shape, fake.dtype, fake.stride()) == (real.shape, real.dtype, real.stride())


@pytest.mark.parametrize("dtype", FLOATS + INTEGERS, ids=name)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_fake_tensors_have_the_shape_dtype_and_strides_of_the_real_result(backend, layout, dtype):
    volume = moved_keeping_strides(laid_out(random_volume((2, 3, 4, 5, 6), dtype), layout), backend.device)
    boxes = on(backend.device, random_boxes(3, 2, (4, 5, 6)))
    volume.requires_grad_(dtype.is_floating_point)
    real = pgl_ops.roi_align3d(volume, boxes, (2, 3, 4))
    with FakeTensorMode() as mode:
        fake_volume = mode.from_tensor(volume)
        fake = pgl_ops.roi_align3d(fake_volume, mode.from_tensor(boxes), (2, 3, 4))
        assert_same_metadata(fake, real)
        assert fake.device.type == backend.device.type
        if dtype.is_floating_point:
            (fake_gradient,) = torch.autograd.grad(fake.sum(), fake_volume)
    if dtype.is_floating_point:
        assert_same_metadata(fake_gradient, torch.autograd.grad(real.sum(), volume)[0])


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_fake_outputs_of_every_op_match_the_real_ones(backend, layout, op):
    call = recorded(backend, layout)[op]
    real = call.run()
    with FakeTensorMode() as mode:
        fake = call.run(
            **{k: mode.from_tensor(v) for k, v in call.arguments.items() if isinstance(v, torch.Tensor)}
        )
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (fake, real)), strict=True):
        assert_same_metadata(a, b)


def test_meta_tensors(backend):
    case = {key: value.to("meta") for key, value in example(backend).items()}
    features, prediction = case["features"].requires_grad_(), case["prediction"].requires_grad_()
    out = pgl_ops.roi_align3d(features, case["boxes"], (2, 3, 4), flips=case["flips"])
    assert out.is_meta and out.shape == (3, 3, 2, 3, 4)
    assert torch.autograd.grad(out.sum(), features)[0].shape == features.shape
    loss = pgl_ops.voxel_cosine_loss(prediction, case["target"], case["weight"])
    assert loss.is_meta and loss.shape == ()
    loss = pgl_ops.aligned_cosine_loss3d(prediction, features, case["boxes"], reduction="none")
    assert loss.is_meta and loss.shape == (3, 2, 1, 2)


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16], ids=name)
def test_autocast_keeps_features_low_and_boxes_and_loss_in_float32(backend, low):
    case = example(backend)
    features, prediction = case["features"].to(low), case["prediction"].to(low)
    boxes = case["boxes"]
    with torch.autocast(backend.device.type, dtype=low):
        out = pgl_ops.roi_align3d(features, boxes, 2)
        loss = pgl_ops.voxel_cosine_loss(prediction, case["target"].to(low))
        fused = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes)
    assert out.dtype == low and torch.equal(out, pgl_ops.roi_align3d(features, boxes, 2))
    assert loss.dtype == torch.float32
    assert torch.equal(loss, pgl_ops.voxel_cosine_loss(prediction, case["target"].to(low)))
    assert fused.dtype == torch.float32
    assert torch.equal(fused, pgl_ops.aligned_cosine_loss3d(prediction, features, boxes))


def test_autocast_brings_mixed_features_to_the_lower_precision(backend):
    case = example(backend)
    prediction, target, features = case["prediction"].requires_grad_(), case["target"], case["features"]
    low = torch.bfloat16
    with torch.autocast(backend.device.type, dtype=low):
        loss = pgl_ops.voxel_cosine_loss(prediction, target.to(low))
        fused = pgl_ops.aligned_cosine_loss3d(prediction, features.to(low), case["boxes"])
    assert loss.dtype == fused.dtype == torch.float32
    assert torch.equal(loss, pgl_ops.voxel_cosine_loss(prediction.to(low), target.to(low)))
    expected = pgl_ops.aligned_cosine_loss3d(prediction.to(low), features.to(low), case["boxes"])
    assert torch.equal(fused, expected)
    (gradient,) = torch.autograd.grad(loss + fused, prediction)
    assert gradient.dtype == torch.float32 and gradient.abs().max() > 0


def test_autocast_accepts_boxes_that_were_computed_in_half_precision(backend):
    features = example(backend)["features"].bfloat16()
    boxes = torch.tensor([[1, 0.5, 0.25, 1.0, 2.5, 3.0, 4.5]], device=backend.device)
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        out = pgl_ops.roi_align3d(features, boxes.bfloat16(), 2)
    assert torch.equal(out, pgl_ops.roi_align3d(features, boxes, 2))
    with pytest.raises(TypeError, match="boxes"):
        pgl_ops.roi_align3d(features, boxes.bfloat16(), 2)


def test_a_network_under_autocast_trains_through_the_ops(backend):
    torch.manual_seed(0)
    network = torch.nn.Conv3d(1, 4, 3, padding=1).to(backend.device)
    head = torch.nn.Conv3d(4, 4, 1).to(backend.device)
    volume = on(backend.device, random_volume((2, 1, 4, 5, 6), torch.float32))
    boxes = on(backend.device, random_boxes(3, 2, (4, 5, 6)))
    with torch.autocast(backend.device.type, dtype=torch.bfloat16):
        features = network(volume)
        prediction = head(pgl_ops.roi_align3d(features, boxes, (2, 2, 2)))
        loss = pgl_ops.aligned_cosine_loss3d(prediction, features.detach(), boxes)
    assert features.dtype == prediction.dtype == torch.bfloat16 and loss.dtype == torch.float32
    loss.backward()
    for parameter in (*network.parameters(), *head.parameters()):
        assert parameter.grad.dtype == torch.float32 and parameter.grad.isfinite().all()
    assert network.weight.grad.abs().max() > 0


@pytest.mark.parametrize("mode", [torch.inference_mode, torch.no_grad])
def test_without_gradients_the_results_are_the_same_and_nothing_is_kept(backend, mode):
    case = example(backend)
    expected = losses(**case)
    case["prediction"].requires_grad_()
    case["features"].requires_grad_()
    with mode():
        assert torch.equal(losses(**case), expected)
        assert not losses(**case).requires_grad
        with RecordedCalls(backend.namespace) as log:
            pgl_ops.voxel_cosine_loss(case["prediction"], case["target"])
    assert log.calls[0].arguments["save"] is False
    with torch.inference_mode():
        made_inside = {key: value.detach().clone() for key, value in case.items()}
        assert torch.equal(losses(**made_inside), expected)


def test_changing_what_the_loss_saved_is_noticed(backend):
    case = example(backend)
    prediction = case["prediction"].clone().requires_grad_()
    doubled = prediction * 2
    loss = pgl_ops.voxel_cosine_loss(doubled, case["target"])
    doubled.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_roi_align3d_keeps_no_copy_of_its_input_for_the_backward(backend):
    # The op is linear: its gradient does not need the volume, which may be changed or freed.
    features = example(backend)["features"].clone().requires_grad_()
    doubled = features * 2
    out = pgl_ops.roi_align3d(doubled, example(backend)["boxes"], 2)
    doubled.zero_()
    (gradient,) = torch.autograd.grad(out.sum(), features)
    assert gradient.abs().max() > 0


def test_module_equals_the_function(backend):
    case = example(backend)
    module = pgl_ops.RoIAlign3d((2, 3, 2), (0.9, 1.0, 0.8), (2, -1, 1), aligned=False)
    expected = pgl_ops.roi_align3d(
        case["features"], case["boxes"], (2, 3, 2), (0.9, 1.0, 0.8), (2, -1, 1), False, case["flips"]
    )
    assert torch.equal(module(case["features"], case["boxes"], case["flips"]), expected)
    module = pgl_ops.RoIAlign3d(2)
    expected = pgl_ops.roi_align3d(case["features"], case["boxes"], 2)
    assert torch.equal(module(case["features"], case["boxes"]), expected)


def test_module_has_no_state_and_survives_copying_pickling_and_saving():
    module = pgl_ops.RoIAlign3d(output_size=(2, 3, 4), spatial_scale=0.5, sampling_ratio=2, aligned=False)
    assert not list(module.parameters()) and not module.state_dict()
    saved = io.BytesIO()
    torch.save(module, saved)
    saved.seek(0)
    copies = [
        copy.deepcopy(module),
        pickle.loads(pickle.dumps(module)),
        torch.load(saved, weights_only=False),
    ]
    volume, boxes = random_volume((1, 2, 4, 5, 6)), random_boxes(2, 1, (4, 5, 6))
    for other in copies:
        assert repr(other) == repr(module)
        assert torch.equal(other(volume, boxes), module(volume, boxes))


def test_module_repr_shows_its_settings():
    module = pgl_ops.RoIAlign3d(output_size=(2, 3, 4), spatial_scale=0.5, sampling_ratio=2, aligned=False)
    assert repr(module) == (
        "RoIAlign3d(output_size=(2, 3, 4), spatial_scale=(0.5, 0.5, 0.5), "
        "sampling_ratio=(2, 2, 2), aligned=False)"
    )
