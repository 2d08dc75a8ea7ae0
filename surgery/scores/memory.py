"""What a selector measures is kept with its run, so that one that is asked for several budgets measures once."""

from __future__ import annotations

import copy
import inspect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from functools import wraps
from typing import Any, ParamSpec, TypeVar
from weakref import WeakKeyDictionary

from torch import nn

from surgery.checkpoints.checkpoint import Checkpoint, moment_of
from surgery.checkpoints.opening import sampled
from surgery.checkpoints.trajectory import Trajectory
from surgery.live.losses import Distillation
from surgery.live.prompts import batches_of, digest_of
from surgery.masks.neurons import Neurons

P = ParamSpec("P")
Found = TypeVar("Found")
_by_model: WeakKeyDictionary[nn.Module, dict[str, Any]] = WeakKeyDictionary()
_asked: ContextVar[bool] = ContextVar("asked", default=False)  # whether what was found before may be returned
_trusted: ContextVar[bool] = ContextVar("trusted", default=False)  # whether a loss of the user's own stays what it is


class _Unknown(Exception):
    """An argument of which nobody can say whether it is what it was."""


@contextmanager
def remembered(own: bool = False) -> Iterator[None]:
    """While the body runs, scores are returned as they were found before, where nothing changed; also a decorator.

    Every selector selects so. With ``own``, as in a sweep, that holds for scores by a loss of the user's own as well,
    as long as it is the same object. Elsewhere such a loss may read what changes from one call to the next.
    """
    tokens = _asked.set(True), _trusted.set(own or _trusted.get())
    try:
        yield
    finally:
        _asked.reset(tokens[0])
        _trusted.reset(tokens[1])


def remembering(
    last: int = 1, *, live: bool = True, of: tuple[str, ...] = ("earlier", "later")
) -> Callable[[Callable[P, Found]], Callable[P, Found]]:
    """A function of a run (or of a live model) and prompts that, where ``remembered``, returns what it found before.

    What it found is kept with its first argument and goes with that. It is returned where these are the same: the files
    of the run's checkpoints, or the numbers of live ones (``moment_of``); with ``live`` the numbers of the live later
    model; the tokens of ``data``; the other arguments.

    Args:
        last: how many results of the function are kept, those that were asked for last.
        live: whether it depends on the live later model, which it then loads.
        of: the checkpoints on which it depends.
    """

    def decorate(score: Callable[P, Found]) -> Callable[P, Found]:
        signature = inspect.signature(score)

        @wraps(score)
        def wrapper(*args: P.args, **kwargs: P.kwargs) -> Found:
            if not _asked.get():
                return score(*args, **kwargs)
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            if bound.arguments.get("data") is not None:  # a generator is gone through once
                bound.arguments["data"] = list(batches_of(bound.arguments["data"]))
            memory = _memory_of(args[0]).setdefault(f"{score.__module__}.{score.__qualname__}", OrderedDict())
            try:
                key = tuple(_what(name, value, live, of) for name, value in bound.arguments.items())
            except _Unknown:
                return score(*bound.args, **bound.kwargs)
            if key not in memory:
                # with the arguments themselves, so that no other object gets their identities
                memory[key] = (score(*bound.args, **bound.kwargs), dict(bound.arguments))
            memory.move_to_end(key)
            while len(memory) > last:
                memory.popitem(last=False)
            found: Found = memory[key][0]
            return _own(found)

        return wrapper

    return decorate


def remember(score: Callable[P, Found]) -> Callable[P, Found]:
    """``remembering``, with the last result alone."""
    return remembering()(score)


def _memory_of(owner: Any) -> dict[str, Any]:
    return owner.memory if isinstance(owner, Trajectory) else _by_model.setdefault(owner, {})


def _own(found: Found) -> Found:
    """Scores are handed out as copies, which may be written to."""
    if not isinstance(found, Neurons):
        return found
    values = {name: value.clone() for name, value in found.items()}
    return Neurons(values, missing=found.missing, made_by=copy.deepcopy(found.made_by))  # type: ignore[return-value]


def _what(name: str, value: Any, live: bool, of: tuple[str, ...]) -> Any:
    """What identifies an argument."""
    if isinstance(value, Trajectory):
        bare = value.later is None or (isinstance(value.later, Mapping) and not isinstance(value.later, Checkpoint))
        model = _source(value.load()) if live and not bare else None
        given = {one: getattr(value, one) for one in of}
        return (model, *(None if source is None else _source(value.tensors(one)) for one, source in given.items()))
    if isinstance(value, nn.Module):
        return _source(value)
    if name == "data":
        return None if value is None else digest_of(value)
    if isinstance(value, tuple):
        return tuple(_what("", one, live, of) for one in value)
    if isinstance(value, str | int | float | None):
        return value
    if callable(value) and not isinstance(value, Distillation) and not _trusted.get():
        raise _Unknown
    return id(value)


def _source(source: Any) -> Any:
    if isinstance(source, nn.Module):
        return moment_of(source), sampled(source.parameters())  # what is written through .data, torch does not count
    if isinstance(source, Checkpoint):
        if not source.is_current:
            raise _Unknown
        return str(source.folder), source.state
    return id(source)


def identity(value: Any) -> Any:
    """What identifies a value: the value itself where comparing it is cheap, else the object's identity."""
    if isinstance(value, tuple):
        return tuple(identity(one) for one in value)
    return value if isinstance(value, str | int | float | None) else id(value)
