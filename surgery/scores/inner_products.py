"""Inner products of gradients with a change of weights, row by row; on a GPU every number is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from functools import cache
from math import prod

import torch
from torch import Tensor

from surgery.devices import real, succeeds, takes_kernel
from surgery.live.hooks import Unread, in_runs
from surgery.masks.edits import Rows
from surgery.scores.amc import dot

_ALONG, _ACROSS = 128, 16  # of a program's tile: numbers that follow each other in memory, and of the other axis
_STEPS = 8  # tiles of a program, one after the other; of the matrices of a 4 B model a GPU has some 1,500 programs then
Axes = tuple[tuple[int, int], list[tuple[int, int]]]  # two sizes, and of each view two strides


def inner(part: Rows, gradient: Tensor, now: Tensor, then: Tensor | Unread) -> Iterator[tuple[int, Tensor]]:
    """⟨gradient, now − then⟩ of a part's rows, run by run: how many come before, and float64 ``[neuron]``.

    Products and sums of a row are float32. The views are shaped as ``rows_in`` gives them.
    """
    views = [one for one in (gradient, now, then) if isinstance(one, Tensor) and one.device == gradient.device]
    cut = 1 + (part.slot.stacked if part.offsets is None else 0)
    if len(views) == 3 and takes_kernel(gradient.device, _works):
        rows, numbers = (_two(views, *side) for side in ((0, cut), (cut, gradient.ndim)))
        if rows is not None and numbers is not None and gradient.numel():
            yield 0, _by_kernel(views, rows, numbers)
            return
    for at, (g, weight, other) in in_runs(part, *(gradient, now, then)):  # type: ignore[arg-type]
        yield at, dot(g, weight - other)


def _two(views: Sequence[Tensor], low: int, high: int) -> Axes | None:
    """Some axes of views as two, the first of size 1 where one will do for all views; None where they are more."""
    sizes, ways = tuple(views[0].shape[low:high]), [view.stride()[low:high] for view in views]
    if not 1 <= len(sizes) <= 2:
        return None
    if len(sizes) == 2 and not (sizes[0] == 1 or all(first == sizes[1] * second for first, second in ways)):
        return (sizes[0], sizes[1]), [(first, second) for first, second in ways]
    return (1, prod(sizes)), [(0, way[-1]) for way in ways]


def _by_kernel(views: Sequence[Tensor], rows: Axes, numbers: Axes) -> Tensor:
    from surgery.scores.kernel import products

    (blocks, inside), (folds, across) = rows[0], numbers[0]
    count, width = blocks * inside, folds * across
    beside = rows[1][0][1] < numbers[1][0][1]  # columns: rows lie closer than a row's numbers
    high, lanes = (_ALONG, _ACROSS) if beside else (_ACROSS, _ALONG)
    tiles, parts = -(-count // high), -(-width // (lanes * _STEPS))
    found = torch.empty(parts, count, dtype=torch.float32, device=views[0].device)
    strides = [way for pair in zip(rows[1], numbers[1], strict=True) for side in pair for way in side]
    with torch.cuda.device(found.device) if real(found.device) else nullcontext():
        products[(tiles, parts)](
            *(view.detach() for view in views), found, count, inside, width, across, *strides,
            STACKED=blocks > 1, FOLDED=folds > 1, ROWS=high, LANES=lanes, STEPS=_STEPS,
        )  # fmt: skip
    return found.double().sum(0)


@cache
def _works(device: torch.device) -> bool:
    return succeeds(_try, device, "D is summed by slower operations")


def _try(device: torch.device) -> None:
    """Raise ``RuntimeError`` unless the kernel gives the sums that it should."""
    views = [torch.arange(64.0, device=device).view(8, 8) * sign for sign in (1, 1, -1)]
    axes = [_two(views, low, low + 1) for low in (0, 1)]
    found = _by_kernel(views, axes[0], axes[1]) if axes[0] and axes[1] else None
    if found is None or not torch.equal(found, 2 * (views[0].double() ** 2).sum(1)):
        raise RuntimeError("it does not give the sums that it should")
