"""The registration of gradients, on an op of the tests' own, with torch's inner functions and without."""

from __future__ import annotations

import pytest
import torch

from pgl_ops._autograd import _INNER, register_autograd

NAMESPACE = "pgl_ops_test_autograd"
VARIANTS = ("all there", "with a default", *_INNER)

library = torch.library.Library(NAMESPACE, "DEF")


def product(a, b, power=1):
    return a * b**power


@pytest.fixture(scope="module", params=VARIANTS)
def op(request):
    """a · b^power with its gradient, also registered where one of torch's inner functions is missing."""
    name = f"product{VARIANTS.index(request.param)}"
    default = "=1" if request.param == "with a default" else ""
    library.define(f"{name}(Tensor a, Tensor? b, int power{default}) -> Tensor")
    library.impl(name, product, "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{name}", lambda a, b, power: torch.empty_like(a))
    seen = []

    def setup_context(ctx, inputs, output):
        a, b, ctx.power = inputs
        ctx.save_for_backward(a, b)

    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        seen.append(ctx.needs_input_grad[:2])
        n = ctx.power
        return grad * b**n, grad * a * n * b ** (n - 1), None

    with pytest.MonkeyPatch.context() as patch:
        if request.param in _INNER:
            patch.delattr(torch._C, request.param)
        register_autograd(f"{NAMESPACE}::{name}", backward, setup_context)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    op.needed = seen
    return op


def test_gradients_reach_the_arguments_that_need_them(op):
    a = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    b = torch.tensor([5.0, 7.0], dtype=torch.float64)
    (got,) = torch.autograd.grad(op(a, b, 2).sum(), a)
    assert got.tolist() == [25, 49]
    assert op.needed[-1] == (True, False)
    b.requires_grad_()
    got = torch.autograd.grad(op(a, b, 2).sum(), (a, b))
    assert [g.tolist() for g in got] == [[25, 49], [20, 42]]
    assert torch.autograd.gradgradcheck(lambda a, b: op(a, b, 3), (a, b))


def test_nothing_is_recorded_where_no_gradient_is_needed(op):
    a, b = torch.ones(2), torch.full((2,), 3.0)
    assert op(a, b, 1).grad_fn is None
    leaf = a.clone().requires_grad_()
    with torch.no_grad():
        assert not op(leaf, b, 1).requires_grad
    with torch.inference_mode():
        assert not op(leaf, b, 1).requires_grad
    assert op(leaf, b, 1).grad_fn is not None


def test_arguments_by_name(op):
    a, b = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    (got,) = torch.autograd.grad(op(power=2, b=b, a=a).sum(), a)
    assert got.tolist() == [9, 9]


def test_errors_of_the_op_come_through(op):
    with pytest.raises((TypeError, RuntimeError)):
        op(torch.ones(2, requires_grad=True), None, 1)
    leaf = torch.ones(2, requires_grad=True)
    assert op(leaf, torch.ones(2), 1).requires_grad  # and autograd is on again afterwards


def test_torch_s_own_registration_serves_only_where_it_must(op, request):
    made = type(op(torch.ones(1, requires_grad=True), torch.ones(1), 1).grad_fn).__name__
    ours = "all there" in request.node.name
    assert made.startswith("GeneratedBackwardFor") != ours, made


def test_compiled(op):
    a, b = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    torch._dynamo.reset()
    whole = torch.compile(lambda a, b: op(a * 1, b, 2).sum(), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(whole(a, b), a)
    assert got.tolist() == [4, 4, 4]
