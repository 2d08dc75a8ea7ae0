"""How many bytes of tensors are there at once while something runs: counted, so the same on every machine."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves


class Allocations(TorchDispatchMode):
    """The bytes of all tensors that operations made and that are still there, and the most of them at once."""

    def __init__(self) -> None:
        super().__init__()
        self.now, self.most = 0, 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for given in _memories((args, kwargs)):
            self._known.setdefault(given, 0)  # it was there before
        found = operation(*args, **(kwargs or {}))
        for made in _memories(found):
            if made not in self._known:
                self._known[made] = size = made.nbytes()
                self._count(size)
                weakref.finalize(made, self._count, -size)
        return found

    def _count(self, size: int) -> None:
        self.now += size
        self.most = max(self.most, self.now)


def _memories(values: Any) -> list[Any]:
    tensors = (one for one in tree_leaves(values) if isinstance(one, Tensor) and not one.is_meta)
    return [one.untyped_storage() for one in tensors]


def most(function: Callable[[], object]) -> int:
    """The most bytes that a function's tensors take at once."""
    with Allocations() as counted:
        function()
    return counted.most


@contextmanager
def uncounted() -> Iterator[None]:
    """While the body runs, nothing is counted."""
    with _disable_current_modes():
        yield
