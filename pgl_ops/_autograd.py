"""Tells torch how an op is differentiated, and calls the op by the shortest way.

Torch's own ways take tens of microseconds of a call: its ``register_autograd`` fills in the schema's defaults
in a loop, and where a gradient's kernel is written in Python, the dispatcher makes Python objects of all
arguments once more to reach it.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch.autograd import forward_ad
from torch.overrides import has_torch_function

# What torch's own registration is made of, too; not public.
_INNER = (
    "_AutoDispatchBelowAutograd",
    "_after_autograd_keyset",
    "_any_requires_grad",
    "_are_functorch_transforms_active",
    "_dispatch_tls_is_dispatch_key_included",
    "_dispatch_tls_is_dispatch_key_excluded",
    "_dispatch_key_parse",
)
# The classes of all arguments of a call among which there is no other class of tensor and no traced number.
_ORDINARY = {torch.Tensor, torch.nn.Parameter, type(None), bool, int, float, list}


def register_autograd(name: str, backward: Callable, setup_context: Callable) -> Callable:
    """Registers an op's gradient, as ``torch.library.register_autograd`` does.

    Here nothing is filled in: the op runs below autograd if no argument needs a gradient, else in an
    ``autograd.Function``. Torch's own serves where one of its inner names is missing, and for schemas that
    are not plain (:func:`is_plain`).

    Args:
        name: of the op, ``namespace::name``.
        backward: from the context and the outputs' gradients to a tuple, one gradient an argument.
            ``ctx.needs_input_grad`` begins with the op's arguments.
        setup_context: from the context, the op's arguments and its output, what ``backward`` needs.

    Returns:
        What calls the op with all its arguments by position, as ``torch.ops`` does: to autograd without the
        dispatcher, where nothing of torch's own waits for the call there. Kernels that others register for
        the op at the key Autograd or above are passed by.
    """
    namespace, op_name = name.split("::")
    packet = getattr(getattr(torch.ops, namespace), op_name)
    op = packet.default
    if not is_plain(op._schema) or not all(hasattr(torch._C, inner) for inner in _INNER):
        torch.library.register_autograd(name, backward, setup_context=setup_context)
        return packet
    below_autograd, keys_below, any_requires_grad, transforms_active, included, excluded, key_of = (
        getattr(torch._C, inner) for inner in _INNER
    )
    autograd, batched_gradients = key_of("AutogradFunctionality"), key_of("VmapMode")

    def run_below(keys, args):
        with below_autograd():
            return op(*args) if keys is None else op.redispatch(keys & keys_below, *args)

    # The keys come last, so that the gradients and ``ctx.needs_input_grad`` begin with the op's arguments.
    def forward(ctx, *args_and_keys):
        *args, keys = args_and_keys
        output = run_below(keys, args)
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

    def run(keys, args):
        if torch.is_grad_enabled() and any_requires_grad(*args):
            return function.apply(*args, keys)
        return run_below(keys, args)

    def kernel(keys, *args):
        if forward_ad._current_level >= 0 and any(map(_has_tangent, args)):
            raise NotImplementedError(f"{name} has no forward-mode derivative; pgl_ops.reference has")
        try:
            return run(keys, args)
        except RuntimeError as error:
            if "with functorch transforms" not in str(error):
                raise
            raise NotImplementedError(
                f"{name} cannot be differentiated by the transforms of torch.func; torch.autograd can, "
                "and pgl_ops.reference takes both"
            ) from error

    def call(*args):
        awaited = (
            torch.compiler.is_compiling()
            or torch.jit.is_tracing()
            or transforms_active()
            or included(batched_gradients)
            or forward_ad._current_level >= 0
            or has_torch_function(args)
            or not _ORDINARY.issuperset(map(type, args))
            # Below autograd already, where inference mode alone has no gradients either.
            or (torch.is_grad_enabled() and excluded(autograd))
        )
        return packet(*args) if awaited else run(None, args)

    library = torch.library.Library(namespace, "FRAGMENT")
    library.impl(op_name, kernel, "Autograd", with_keyset=True)
    kernel.__dict__["library"] = library  # when it goes, so does what it registered
    return call


def _has_tangent(value: object) -> bool:
    return isinstance(value, torch.Tensor) and forward_ad.unpack_dual(value).tangent is not None


def is_plain(schema: torch._C.FunctionSchema) -> bool:
    """Whether an op changes nothing, takes all by position without defaults, and has no lists of tensors."""
    types = [str(value.type) for value in (*schema.arguments, *schema.returns)]
    return not (
        schema.is_mutable
        or any("List" in kind and "Tensor" in kind for kind in types)
        or any(argument.has_default_value() or argument.kwarg_only for argument in schema.arguments)
    )
