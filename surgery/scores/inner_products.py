"""Inner products of gradients with a change of weights, row by row; on a GPU every number is read once."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache

import torch
from torch import Tensor

from surgery.devices import succeeds, takes_kernel
from surgery.live.hooks import Unread, in_runs
from surgery.masks.edits import Rows
from surgery.scores.amc import dot
from surgery.scores.tiles import Tiles, on

_STEPS = 8  # tiles of a program, one after the other; of the matrices of a 4 B model a GPU has some 1,500 programs then


def inner(part: Rows, gradient: Tensor, now: Tensor, then: Tensor | Unread) -> Iterator[tuple[int, Tensor]]:
    """⟨gradient, now − then⟩ of a part's rows, run by run: how many come before, and float64 ``[neuron]``.

    Products and sums of a row are float32. The views are shaped as ``rows_in`` gives them.
    """
    views = [one for one in (gradient, now, then) if isinstance(one, Tensor) and one.device == gradient.device]
    if len(views) == 3 and gradient.numel() and gradient.ndim > part.axes and takes_kernel(gradient.device, _works):
        tiles = Tiles.of(views, part.axes)
        if tiles is not None:
            yield 0, _by_kernel(views, tiles)
            return
    for at, (g, weight, other) in in_runs(part, *(gradient, now, then)):  # type: ignore[arg-type]
        yield at, dot(g, weight - other)


def _by_kernel(views: Sequence[Tensor], tiles: Tiles) -> Tensor:
    from surgery.scores.kernel import products

    (count, width), (high, lanes) = tiles.shape, tiles.sides
    parts = -(-width // (lanes * _STEPS))
    found = torch.empty(parts, count, dtype=torch.float32, device=views[0].device)
    with on(found.device):
        products[(-(-count // high), parts)](
            *(view.detach() for view in views), found, *tiles.given, **tiles.fixed, STEPS=_STEPS
        )
    return found.sum(0, dtype=torch.float64)


@cache
def _works(device: torch.device) -> bool:
    return succeeds(_try, device, "D is summed by slower operations")


def _try(device: torch.device) -> None:
    """Raise ``RuntimeError`` unless the kernel gives the sums that it should."""
    views = [torch.arange(64.0, device=device).view(8, 8) * sign for sign in (1, 1, -1)]
    tiles = Tiles.of(views, 1)
    if tiles is None or not torch.equal(_by_kernel(views, tiles), 2 * (views[0].double() ** 2).sum(1)):
        raise RuntimeError("it does not give the sums that it should")
