"""The registration of gradients, on ops of the tests' own: by this library and, where it must, by torch."""

from __future__ import annotations

import importlib

import pytest
import torch

from pgl_ops import _autograd
from pgl_ops._autograd import register_autograd

NAMESPACE = "pgl_ops_test_autograd"
INNER = _autograd._INNER
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
    """The op of a · b^power, with its gradient; ``needed`` tells for which arguments it was asked.

    ``shortest`` is what calls it the shortest way.
    """
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
        shortest = register_autograd(f"{NAMESPACE}::{name}", backward, setup_context)
    op = getattr(getattr(torch.ops, NAMESPACE), name)
    op.needed, op.shortest = needed, shortest
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


@pytest.fixture(scope="module")
def plain():
    return registered("plain", SCHEMAS["plain"])


LEAVES = pytest.mark.parametrize("requires_grad", [False, True], ids=["without_gradients", "with_gradients"])


def leaf_and_factor(requires_grad: bool):
    return torch.tensor([2.0, 3.0], requires_grad=requires_grad), torch.tensor([5.0, 7.0])


def test_the_shortest_way_gives_the_same_gradients(plain):
    a, b = torch.tensor([2.0, 3.0], requires_grad=True), torch.tensor([5.0, 7.0], requires_grad=True)
    product, factor = plain.shortest(a, b, 2)
    assert product.grad_fn.name() == plain(a, b, 2)[0].grad_fn.name()
    assert not factor.requires_grad
    (got,) = torch.autograd.grad(product.sum(), b, create_graph=True)
    assert got.tolist() == [20, 42]
    assert plain.needed[-1] == (True, True)
    (again,) = torch.autograd.grad(got.sum(), a)
    assert again.tolist() == [10, 14]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            assert not plain.shortest(a, b, 2)[0].requires_grad


@LEAVES
def test_the_shortest_way_asks_autograd_without_the_dispatcher(plain, monkeypatch, requires_grad):
    a, b = leaf_and_factor(requires_grad)

    def redispatch(*_):
        raise AssertionError("the kernel of the Autograd key was called")

    monkeypatch.setattr(plain.default, "redispatch", redispatch)
    with pytest.raises(AssertionError, match="Autograd key"):
        plain(a, b, 2)
    assert plain.shortest(a, b, 2)[0].requires_grad == requires_grad


@LEAVES
def test_a_mode_of_either_kind_sees_the_call(plain, requires_grad):
    seen = []

    class Functions(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    class Operations(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return function(*args, **(kwargs or {}))

    for mode, name in ((Functions, "plain"), (Operations, "plain.default")):
        seen.clear()
        with mode():
            product, _ = plain.shortest(*leaf_and_factor(requires_grad), 2)
        assert f"{NAMESPACE}.{name}" in seen
        assert product.requires_grad == requires_grad


@LEAVES
def test_a_tensor_class_of_its_own_sees_the_call(plain, requires_grad):
    class Named(torch.Tensor):
        pass

    a, b = leaf_and_factor(requires_grad)
    product, _ = plain.shortest(a.as_subclass(Named), b, 2)
    assert type(product) is Named
    assert product.requires_grad == requires_grad


class Wrapped(torch.Tensor):
    """Holds a tensor; its dispatch asks whether autograd can be had from there."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, tensor):
        wrapped = torch.Tensor._make_wrapper_subclass(cls, tensor.shape, dtype=tensor.dtype)
        wrapped.tensor = tensor
        return wrapped

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        with torch.overrides.enable_reentrant_dispatch(), torch.enable_grad():
            cls.autograd_above = (torch.ones((), requires_grad=True) * 2).requires_grad
        return function(*(arg.tensor if isinstance(arg, cls) else arg for arg in args))


def test_a_class_with_a_dispatch_of_its_own_is_called_from_above_autograd(plain):
    product, _ = plain.shortest(Wrapped(torch.ones(2)), torch.ones(2), 2)
    assert product.tolist() == [1, 1]
    assert Wrapped.autograd_above


def test_below_autograd_nothing_is_recorded(plain):
    a, b = leaf_and_factor(True)

    @torch.library.custom_op(f"{NAMESPACE}::around", mutates_args=())
    def around(tensor: torch.Tensor) -> torch.Tensor:
        return plain.shortest(a, b, 2)[0]

    assert not around(torch.ones(2)).requires_grad


@LEAVES
def test_a_trace_holds_the_op_itself(plain, requires_grad):
    a, b = leaf_and_factor(requires_grad)
    with pytest.warns(DeprecationWarning, match="torch.jit.trace"):
        traced = torch.jit.trace(lambda a, b: plain.shortest(a, b, 2)[0], (a, b))
    assert f"{NAMESPACE}::plain" in str(traced.graph)
    assert traced(a.detach() * 2, b).tolist() == [100, 294]


def test_transforms_of_torch_func_are_refused_in_words(plain):
    with pytest.raises(NotImplementedError, match=r"torch\.func"):
        torch.func.grad(lambda a: plain.shortest(a, torch.ones(2), 2)[0].sum())(torch.ones(2))


def test_forward_mode_is_refused(plain):
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(torch.ones(2), torch.ones(2))
        with pytest.raises(NotImplementedError, match="no forward-mode derivative"):
            plain.shortest(dual, torch.ones(2), 2)


@LEAVES
def test_compiled_the_shortest_way_is_the_op(plain, requires_grad):
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    shortest = plain.shortest
    whole = torch.compile(lambda a, b: shortest(a, b, 2)[0], backend=backend, fullgraph=True)
    assert whole(*leaf_and_factor(requires_grad)).tolist() == [50, 147]
    assert "plain" in graphs[0].code


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
        call = register_autograd(f"{NAMESPACE}::asked_{name}", lambda *_: None, lambda *_: None)
        torchs = getattr(getattr(torch.ops, NAMESPACE), f"asked_{name}")
        assert (call is torchs) == (f"{NAMESPACE}::asked_{name}" in asked)
    plain = {"ours", "numbers"}
    assert asked == [f"{NAMESPACE}::asked_{name}" for name in schemas if name not in plain]


def test_gradients_outlast_a_reload_of_the_module():
    op = registered("reloaded", SCHEMAS["plain"])
    importlib.reload(_autograd)
    leaf = torch.ones(2, requires_grad=True)
    (got,) = torch.autograd.grad(op(leaf, torch.full((2,), 3.0), 2)[0].sum(), leaf)
    assert got.tolist() == [9, 9]
