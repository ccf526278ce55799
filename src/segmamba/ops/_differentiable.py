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

    An operator of `torch.library` costs more Python a call than small
    kernels take on a GPU. Plain tensors go to an autograd function that does
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
        # With a `setup_context` of its own, PyTorch would bind the arguments by name at
        # every call, which takes longer than all the rest.
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            outputs = implementation(*inputs)
            context(ctx, inputs, outputs)
            return outputs

        @staticmethod
        @torch.autograd.function.once_differentiable
        def backward(ctx: Any, *grads: Any) -> Any:
            return gradients(ctx, *grads)

    def call(*inputs: Any) -> Any:
        if is_traced(inputs):
            return operator(*inputs)
        return (Direct.apply if torch.is_grad_enabled() else implementation)(*inputs)

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
        return operator(*inputs) if is_traced(inputs) else implementation(*inputs)

    return call


def direct_without_gradients(
    operator: Any, implementation: Callable[..., Any]
) -> Callable[..., Any]:
    """Give the quick way to call an operator while autograd is off.

    The first call of an operator of `torch.library` imports all of PyTorch's compiler,
    which takes seconds; a program that only predicts has no use for it.

    Args:
        operator: From `torch.library.custom_op`, with its gradients registered.
        implementation: What it does.

    Returns:
        A function with its arguments and results.
    """
    direct = direct_or(operator, implementation)

    def call(*inputs: Any) -> Any:
        return (operator if torch.is_grad_enabled() else direct)(*inputs)

    return call


_PLAIN = (Tensor, torch.nn.Parameter)


def is_traced(inputs: tuple[Any, ...]) -> bool:
    """Say whether a compiler or a transform looks on, or an input is no plain tensor.

    Args:
        inputs: Of an operator.
    """
    if torch.compiler.is_compiling():
        return True
    for x in inputs:
        if type(x) not in _PLAIN and isinstance(x, Tensor):
            return True
    modes = torch._C._len_torch_dispatch_stack()
    return modes > 0 or torch._C._are_functorch_transforms_active()
