"""Building a network that a file describes: a bound on it, and no weights drawn."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode


class TooLargeError(Exception):
    """More was to be made than the bound allows."""


class AtMost(TorchFunctionMode):
    """Stops the code inside as soon as it has made too many or too large tensors.

    A tensor is counted when it is made, before anyone writes to it, and memory that is
    never written to is not taken from the system: passing the bound costs nothing.
    """

    def __init__(self, *, elements: int, tensors: int) -> None:
        """Set the bound.

        Args:
            elements: Most elements of all tensors made inside together.
            tensors: Most tensors made inside.

        Raises:
            TooLargeError: By the code inside.
        """
        super().__init__()
        self._elements, self._tensors, self._largest = elements, tensors, elements

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function and count what it made, changes in place aside."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            if not any(isinstance(item, Tensor) for item in args):
                self._elements -= made.numel()
                self._tensors -= 1
            if min(self._elements, self._tensors) < 0 or made.numel() > self._largest:
                raise TooLargeError
        return made


class Undrawn(TorchFunctionMode):
    """Leaves out the drawing of initial weights, where a file's replace them all.

    It takes as long as to read them. What is left holds any numbers.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call the function, unless it is one of `nn.init`'s."""
        options = kwargs or {}
        if getattr(func, "__module__", None) == nn.init.__name__:
            return args[0] if args else options["tensor"]
        return func(*args, **options)
