"""How many operators a call dispatches, which is what a GPU pays for where tensors are small."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode

FREE = ("aten::_unsafe_view",)
"""Views that are not called so."""


class Operators(TorchDispatchMode):
    """Counts operators, but for views, in `counts`; one of them may launch several kernels, or, on many tensors, more.

    >>> import torch
    >>> with Operators() as seen:
    ...     _ = torch.ones(2, 3).mT @ torch.ones(2, 3)
    >>> dict(seen.counts)
    {'aten::ones': 2, 'aten::mm': 1}
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        name = func.name().split(".")[0]
        if not func.is_view and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def operators(call: Callable[[], object]) -> int:
    """How many operators a call dispatches."""
    with Operators() as seen:
        call()
    return sum(seen.counts.values())
