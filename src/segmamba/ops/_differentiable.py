"""Operators without the dispatcher's detour, where nobody but autograd looks on."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor


def differentiable(
    operator: Any,
    implementation: Callable[..., Any],
    context: Callable[..., None],
    gradients: Callable[..., Any],
) -> Callable[..., Any]:
    """Register an operator's gradients, and give the fast way to call it.

    An operator of `torch.library` costs a fifth of a millisecond of Python a call,
    more than small kernels take. Plain tensors go to an autograd function that does
    the same; compilers, exporters and tensor subclasses get the operator.

    Args:
        operator: From `torch.library.custom_op`.
        implementation: What the operator does.
        context: `setup_context` of `register_autograd`.
        gradients: The backward of `register_autograd`.

    Returns:
        A function with the operator's arguments and results.
    """
    operator.register_autograd(gradients, setup_context=context)

    class Direct(torch.autograd.Function):
        forward = staticmethod(implementation)
        setup_context = staticmethod(context)
        backward = staticmethod(torch.autograd.function.once_differentiable(gradients))

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if _is_traced(inputs) else Direct.apply(*inputs)

    return call


def direct_or(operator: Any, implementation: Callable[..., Any]) -> Callable[..., Any]:
    """Give the fast way to call an operator that autograd doesn't record.

    Args:
        operator: From `torch.library.custom_op`.
        implementation: What it does.

    Returns:
        A function with its arguments and results.
    """

    def call(*inputs: Any) -> Any:
        return operator(*inputs) if _is_traced(inputs) else implementation(*inputs)

    return call


def _is_traced(inputs: tuple[Any, ...]) -> bool:
    """Whether a compiler looks on, or an input is no plain tensor."""
    return (
        torch.compiler.is_compiling()
        or bool(torch.utils._python_dispatch._get_current_dispatch_mode_stack())
        or any(
            isinstance(x, Tensor) and type(x) not in (Tensor, torch.nn.Parameter)
            for x in inputs
        )
    )
