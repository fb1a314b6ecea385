"""Around a call: other threads, forked workers, functional transforms, tensors of other kinds."""

from __future__ import annotations

import copy
import pickle
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

import pgl_ops
from tests.ops.cases import laid_out, random_boxes, random_volume
from tests.ops.recording import example

THREADS = 8


def everything(case, seed: int = 0) -> list[torch.Tensor]:
    """The results and gradients of all three ops; of the case turned about ``seed`` times."""
    features = case["features"].roll(seed, 4).requires_grad_()
    prediction = case["prediction"].roll(seed, 4).requires_grad_()
    boxes, flips, weight = case["boxes"], case["flips"], case["weight"]
    out = pgl_ops.roi_align3d(features, boxes, (5, 4, 17), flips=flips)
    loss = pgl_ops.voxel_cosine_loss(prediction, case["target"], weight)
    fused = pgl_ops.aligned_cosine_loss3d(prediction, features, boxes, flips=flips, reduction="none")
    gradients = torch.autograd.grad(out.square().sum() + loss + fused.sum(), [features, prediction])
    return [x.detach() for x in (out, loss, fused, *gradients)]


def same(results, expected) -> bool:
    return all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_calls_from_eight_threads_at_once_give_what_each_gives_alone(backend):
    if backend.name == "host_cuda":
        pytest.skip("the fibers that stand in for a GPU's threads run in one thread")
    cases = [example(backend, layout) for layout in ("contiguous", "channels_last")]
    jobs = [(case, seed) for case in cases for seed in range(4)]
    alone = [everything(*job) for job in jobs]
    with ThreadPoolExecutor(THREADS) as pool:
        for _ in range(10):
            together = list(pool.map(lambda job: everything(*job), jobs))
            assert all(same(a, b) for a, b in zip(together, alone, strict=True))


def test_errors_of_other_threads_leave_good_calls_alone(backend):
    if not backend.raises_on_bad_boxes:
        pytest.skip("only the CPU kernels raise on bad boxes")
    case = example(backend)
    expected = everything(case)

    def call(i: int) -> bool:
        if i % 2:
            with pytest.raises(ValueError, match=r"row 1 of boxes"):
                boxes = case["boxes"].clone()
                boxes[1, 3] = float("nan")
                pgl_ops.roi_align3d(case["features"], boxes, 3)
            return True
        return same(everything(case), expected)

    with ThreadPoolExecutor(THREADS) as pool:
        assert all(pool.map(call, range(80)))


class _Cuts(Dataset):
    """Boxes cut out of a volume, by whoever asks."""

    def __init__(self) -> None:
        self.volume = random_volume((1, 4, 12, 16, 20), torch.int16)
        self.boxes = random_boxes(16, 1, (12, 16, 20))

    def __len__(self) -> int:
        return len(self.boxes)

    def __getitem__(self, i: int) -> torch.Tensor:
        return pgl_ops.roi_align3d(self.volume, self.boxes[i : i + 1], 8)[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_workers_of_a_loader_give_the_same_after_the_parent_used_many_threads(start):
    if start not in torch.multiprocessing.get_all_start_methods():
        pytest.skip(f"no {start} here")
    cuts, threads = _Cuts(), torch.get_num_threads()
    torch.set_num_threads(4)
    try:
        big = random_volume((2, 8, 24, 32, 32), torch.float32).requires_grad_()
        pgl_ops.roi_align3d(big, random_boxes(32, 2, (24, 32, 32)), 12).sum().backward()
        expected = torch.stack([cuts[i] for i in range(len(cuts))])
        loader = DataLoader(cuts, batch_size=4, num_workers=2, multiprocessing_context=start, timeout=240)
        assert torch.equal(torch.cat(list(loader)), expected)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.filterwarnings("ignore:.*batching rule:UserWarning")
def test_vmap_is_right_or_says_that_it_cannot(backend):
    case = example(backend)
    volumes = torch.stack([case["features"], case["features"].flip(4)])
    sides = torch.stack([case["prediction"], case["prediction"].flip(4)]), torch.stack([case["target"]] * 2)
    calls = {
        "roi_align3d": (partial(pgl_ops.roi_align3d, boxes=case["boxes"], output_size=2), (volumes,)),
        "voxel_cosine_loss": (pgl_ops.voxel_cosine_loss, sides),
        "aligned_cosine_loss3d": (
            partial(pgl_ops.aligned_cosine_loss3d, boxes=case["boxes"]), (sides[0], volumes),
        ),
    }  # fmt: skip
    for name, (function, arguments) in calls.items():
        expected = torch.stack([function(*row) for row in zip(*arguments, strict=True)])
        try:
            got = torch.func.vmap(function)(*arguments)
        except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
            assert len(str(error)) > 20, name
            continue
        assert torch.equal(got, expected), name


def test_functional_gradients_are_right_or_refused_with_a_reason(backend):
    case = example(backend)
    features = case["features"].clone().requires_grad_()

    def total(features):
        return pgl_ops.roi_align3d(features, case["boxes"], (5, 4, 17), flips=case["flips"]).square().sum()

    (expected,) = torch.autograd.grad(total(features), features)
    try:
        got = torch.func.grad(total)(features.detach())
    except RuntimeError as error:
        assert "torch.func" in str(error)
        return
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


class Named(torch.Tensor):
    """A subclass without methods of its own, as many libraries have."""


class Wrapped(torch.Tensor):
    """A subclass that holds its values elsewhere and runs every op on them."""

    @staticmethod
    def __new__(cls, values):
        return torch.Tensor._make_wrapper_subclass(
            cls, values.shape, strides=values.stride(), dtype=values.dtype
        )

    def __init__(self, values) -> None:
        self.values = values

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        inside = torch.utils._pytree.tree_map(
            lambda x: x.values if isinstance(x, cls) else x, (args, kwargs or {})
        )
        result = func(*inside[0], **inside[1])
        return torch.utils._pytree.tree_map(lambda x: cls(x) if isinstance(x, torch.Tensor) else x, result)


def test_tensors_of_a_subclass_give_the_same_values_and_stay_of_it(backend):
    case = example(backend)
    features, prediction, target = case["features"], case["prediction"], case["target"]
    expected = pgl_ops.roi_align3d(features, case["boxes"], 3)
    out = pgl_ops.roi_align3d(features.as_subclass(Named), case["boxes"], 3)
    assert torch.equal(out.as_subclass(torch.Tensor), expected)
    assert torch.equal(pgl_ops.roi_align3d(torch.nn.Parameter(features), case["boxes"], 3).detach(), expected)
    if backend.device.type != "cpu":
        return
    out = pgl_ops.roi_align3d(Wrapped(features), case["boxes"], 3)
    assert isinstance(out, Wrapped) and torch.equal(out.values, expected)
    loss = pgl_ops.voxel_cosine_loss(Wrapped(prediction), Wrapped(target))
    assert torch.equal(loss.values, pgl_ops.voxel_cosine_loss(prediction, target))
    loss = pgl_ops.aligned_cosine_loss3d(Wrapped(prediction), features, case["boxes"])
    assert torch.equal(loss.values, pgl_ops.aligned_cosine_loss3d(prediction, features, case["boxes"]))


def test_copies_of_a_network_that_aligns_work_alone(backend):
    network = torch.nn.Sequential(pgl_ops.RoIAlign3d(2, sampling_ratio=2), torch.nn.Flatten(1))
    case = example(backend)
    expected = network[0](case["features"], case["boxes"])
    for other in (copy.deepcopy(network), copy.copy(network), pickle.loads(pickle.dumps(network))):
        assert torch.equal(other[0](case["features"], case["boxes"]), expected)
        assert repr(other) == repr(network)


@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_meta_tensors_take_the_backward_and_the_layout(backend, layout):
    features = laid_out(random_volume((2, 3, 3, 4, 5), torch.float32), layout).to("meta").requires_grad_()
    boxes = random_boxes(3, 2, (3, 4, 5)).to("meta")
    out = pgl_ops.roi_align3d(features, boxes, (2, 3, 4))
    (gradient,) = torch.autograd.grad(out, features, torch.ones_like(out), create_graph=True)
    for tensor in (out, gradient):
        last = torch.channels_last_3d if layout == "channels_last" else torch.contiguous_format
        assert tensor.is_meta and tensor.is_contiguous(memory_format=last)
