"""Tells torch how an op is differentiated: ``torch.library.register_autograd`` with less work at a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

_INNER = ("_AutoDispatchBelowAutograd", "_after_autograd_keyset", "_any_requires_grad")
# Registrations last as long as these.
_libraries: list[torch.library.Library] = []


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the gradient of an op that changes none of its arguments.

    Stands for ``torch.library.register_autograd``, whose kernel goes through the op's schema in Python at
    every call to fill in defaults, which takes longer than a small problem does. Here nothing is filled in:
    below autograd if no argument needs a gradient, else through an ``autograd.Function``. Both are built from
    the same three functions of torch, which are not public: where one is missing, or the op has defaults,
    torch's own serves.

    Args:
        name: of the op, ``namespace::name``.
        backward: from the context and the outputs' gradients to one gradient an argument, as a tuple.
        setup_context: from the context, the op's arguments and its output, what ``backward`` needs.
    """
    namespace, op_name = name.split("::")
    op = getattr(getattr(torch.ops, namespace), op_name).default
    there = all(hasattr(torch._C, function) for function in _INNER)
    if not there or any(argument.has_default_value() for argument in op._schema.arguments):
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        return
    below_autograd, keys_below, any_requires_grad = (getattr(torch._C, function) for function in _INNER)

    # The keys come last, so that ``ctx.needs_input_grad`` counts the op's arguments.
    def forward(ctx, *args_and_keys):
        *args, keys = args_and_keys
        with below_autograd():
            output = op.redispatch(keys & keys_below, *args)
            setup_context(ctx, args, output)
        return output

    def all_gradients(ctx, *grads):
        return *backward(ctx, *grads), None

    # What ``grad_fn`` shows is named after it.
    function = type(
        op_name,
        (torch.autograd.Function,),
        {"forward": staticmethod(forward), "backward": staticmethod(all_gradients)},
    )

    def kernel(keys, *args):
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return function.apply(*args, keys)
        with below_autograd():
            return op.redispatch(keys & keys_below, *args)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl(op_name, kernel, "Autograd", with_keyset=True)
    _libraries.append(library)
