"""Tells torch how an op is differentiated: ``torch.library.register_autograd`` with less work at a call."""

from __future__ import annotations

from collections.abc import Callable

import torch

# Registrations last as long as these.
_libraries: list[torch.library.Library] = []


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> None:
    """Registers the gradient of an op that changes no argument and has no defaults, by position only.

    Stands for ``torch.library.register_autograd``, whose kernel goes through the op's schema in Python at
    every call to fill in defaults, which takes longer than a small problem does. Here nothing is filled in:
    below autograd if no argument needs a gradient, else through an ``autograd.Function``. Both are built from
    the same three functions of torch, which are not public: where one is missing, torch's own serves.

    Args:
        name: of the op, ``namespace::name``.
        backward: from the context and the outputs' gradients to one gradient an argument, as a tuple.
        setup_context: from the context, the op's arguments and its output, what ``backward`` needs.
    """
    namespace, op_name = name.split("::")
    op = getattr(getattr(torch.ops, namespace), op_name).default
    try:
        below_autograd = torch._C._AutoDispatchBelowAutograd
        keys_below = torch._C._after_autograd_keyset
        any_requires_grad = torch._C._any_requires_grad
    except AttributeError:
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        return

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
