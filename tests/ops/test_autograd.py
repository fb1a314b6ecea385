"""The registration of gradients, on ops of the tests' own: by this library and, where it must, by torch."""

from __future__ import annotations

import importlib

import pytest
import torch

from pgl_ops import _autograd
from pgl_ops._autograd import register_autograd

NAMESPACE = "pgl_ops_test_autograd"
INNER = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")
SCHEMAS = {
    "plain": "(Tensor a, Tensor? b, int power) -> (Tensor, Tensor)",
    "with a default": "(Tensor a, Tensor? b, int power=1) -> (Tensor, Tensor)",
    "by keyword only": "(Tensor a, Tensor? b, *, int power) -> (Tensor, Tensor)",
}

library = torch.library.Library(NAMESPACE, "DEF")


def product(a, b, power=1):
    """The product, and b^power: an output that is not to be differentiated."""
    return a * b**power, b**power


def registered(name: str, schema: str, missing: str | None = None):
    """The op of a · b^power, with its gradient; ``needed`` tells for which arguments it was asked."""
    library.define(f"{name}{schema}")
    library.impl(name, product, "CPU")
    torch.library.register_fake(
        f"{NAMESPACE}::{name}", lambda a, b, power=1: (torch.empty_like(a), torch.empty_like(b))
    )
    needed = []

    def setup_context(ctx, inputs, output, keyword_only_inputs=None):
        a, b, *power = inputs
        ctx.power = power[0] if power else keyword_only_inputs["power"]
        ctx.save_for_backward(a, b, output[1])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx, grad, _):
        a, b, factor = ctx.saved_tensors
        needed.append(tuple(ctx.needs_input_grad[:2]))
        gradients = grad * factor, grad * a * ctx.power * b ** (ctx.power - 1)
        return (*gradients, None) if "*" not in schema else gradients

    with pytest.MonkeyPatch.context() as patch:
        if missing is not None:
            patch.delattr(torch._C, missing)
        register_autograd(f"{NAMESPACE}::{name}", backward, setup_context)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    op.needed = needed
    return op


VARIANTS = [(schema, None) for schema in SCHEMAS] + [("plain", missing) for missing in INNER]


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: variant[1] or variant[0])
def op(request):
    schema, missing = request.param
    return registered(f"product{VARIANTS.index(request.param)}", SCHEMAS[schema], missing)


def test_gradients_reach_the_arguments_that_need_them(op):
    a = torch.tensor([2.0, 3.0], dtype=torch.float64)
    b = torch.tensor([5.0, 7.0], dtype=torch.float64)
    expected = {(True, False): [[25, 49]], (False, True): [[20, 42]], (True, True): [[25, 49], [20, 42]]}
    for needs, gradients in expected.items():
        leaves = [x.clone().requires_grad_(need) for x, need in zip((a, b), needs, strict=True)]
        product, factor = op(*leaves, power=2)
        assert product.requires_grad
        assert not factor.requires_grad
        got = torch.autograd.grad(product.sum(), [leaf for leaf in leaves if leaf.requires_grad])
        assert [gradient.tolist() for gradient in got] == gradients
        assert op.needed[-1] == needs


def test_gradients_of_gradients(op):
    a = torch.tensor([2.0, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(a, a.detach(), power=3)[0].sum(), a, create_graph=True)
    # What is differentiated again is the backward function; a itself is a factor of b's gradient only.
    assert not gradient.requires_grad
    b = torch.tensor([5.0, 7.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(op(a, b, power=3)[0].sum(), b, create_graph=True)
    (again,) = torch.autograd.grad(gradient.sum(), b)
    assert again.tolist() == [2 * 6 * 5, 3 * 6 * 7]


def test_nothing_is_recorded_where_no_gradient_is_needed(op):
    a, b = torch.ones(2), torch.full((2,), 3.0)
    assert op(a, b, power=1)[0].grad_fn is None
    leaf = a.clone().requires_grad_()
    with torch.no_grad():
        assert not op(leaf, b, power=1)[0].requires_grad
    with torch.inference_mode():
        assert not op(leaf, b, power=1)[0].requires_grad
    assert op(leaf, b, power=1)[0].grad_fn is not None


def test_arguments_by_name(op):
    a, b = torch.ones(2, requires_grad=True), torch.full((2,), 3.0)
    (got,) = torch.autograd.grad(op(power=2, b=b, a=a)[0].sum(), a)
    assert got.tolist() == [9, 9]


def test_errors_of_the_op_come_through(op):
    leaf = torch.ones(2, requires_grad=True)
    with pytest.raises(TypeError, match="NoneType"):
        op(leaf, None, power=1)
    assert op(leaf, torch.ones(2), power=1)[0].requires_grad  # autograd is on again


def test_on_every_device(op):
    leaf = torch.ones(2, device="meta", requires_grad=True)
    assert op(leaf, torch.ones(2, device="meta"), power=1)[0].requires_grad


def test_compiled(op):
    a, b = torch.ones(3, requires_grad=True), torch.full((3,), 2.0)
    torch._dynamo.reset()
    whole = torch.compile(lambda a, b: op(a * 1, b, power=2)[0].sum(), backend="aot_eager", fullgraph=True)
    (got,) = torch.autograd.grad(whole(a, b), a)
    assert got.tolist() == [4, 4, 4]


def test_torch_s_own_registration_serves_only_where_it_must(monkeypatch):
    asked = []
    monkeypatch.setattr(torch.library, "register_autograd", lambda name, *_, **__: asked.append(name))
    schemas = {
        "ours": SCHEMAS["plain"],
        "default": SCHEMAS["with a default"],
        "keyword": SCHEMAS["by keyword only"],
        "tensors": "(Tensor[] all, int power) -> Tensor",
        "tensors_out": "(Tensor a) -> Tensor[]",
        "changes": "(Tensor(a!) a) -> ()",
        "numbers": "(Tensor a, SymInt[3] size, float[3] scale) -> Tensor",
    }
    for name, schema in schemas.items():
        library.define(f"asked_{name}{schema}")
        register_autograd(f"{NAMESPACE}::asked_{name}", lambda *_: None, lambda *_: None)
    plain = {"ours", "numbers"}
    assert asked == [f"{NAMESPACE}::asked_{name}" for name in schemas if name not in plain]


def test_gradients_outlast_a_reload_of_the_module():
    op = registered("reloaded", SCHEMAS["plain"])
    importlib.reload(_autograd)
    leaf = torch.ones(2, requires_grad=True)
    (got,) = torch.autograd.grad(op(leaf, torch.full((2,), 3.0), 2)[0].sum(), leaf)
    assert got.tolist() == [9, 9]
