"""Progress: how far a long computation has come, told to whoever listens, and to nobody else."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str], None]
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)
_outer: ContextVar[str] = ContextVar("outer", default="")


@contextmanager
def reporting(to: Listener) -> Iterator[None]:
    """While the body runs, ``to(text)`` is called before each step of whatever takes long.

    >>> with reporting(print):
    ...     found = [x * x for x in steps("squares", [1, 2])]
    squares: 0 of 2
    squares: 1 of 2, 0 s left
    """
    token = _listener.set(to)
    try:
        yield
    finally:
        _listener.reset(token)


def steps(what: str, items: Iterable[T], size: Callable[[T], float] = lambda _: 1.0) -> Iterator[T]:
    """The items one by one; before each, who listens is told how many are done, and how long the others may take.

    The estimate is the time so far, divided by the size of what is done, times the size of what is left.
    """
    tell = _listener.get()
    if tell is None:
        yield from items
        return
    todo, outer = list(items), _outer.get()
    start, done, whole = time.monotonic(), 0.0, sum(map(size, todo))
    try:
        for at, item in enumerate(todo):
            left = f", {spoken((time.monotonic() - start) * (whole / done - 1))} left" if done else ""
            _outer.set(f"{outer}{what}: {at} of {len(todo)}{left} · ")
            tell(_outer.get().removesuffix(" · "))
            yield item
            done += size(item)
    finally:
        _outer.set(outer)


def spoken(seconds: float) -> str:
    """A duration in words, as exact as an estimate is.

    >>> spoken(7.4), spoken(200), spoken(9000)
    ('7 s', '3 min', '2.5 h')
    """
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"
