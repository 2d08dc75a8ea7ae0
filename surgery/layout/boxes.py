"""Tensors that lie in boxes, in several files: what is asked for is read, and written, where it lies."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Apart = Sequence[tuple[Tensor | None, Tensor | None]]  # dimension by dimension, coordinates of rows and inside a row


@dataclass(frozen=True, eq=False)
class Boxes:
    """A tensor that is not put together.

    Args:
        shape: of the whole tensor.
        boxes: where each begins in it, and its numbers; there may be copies of a box.
    """

    shape: tuple[int, ...]
    boxes: tuple[tuple[tuple[int, ...], Tensor], ...]

    device = torch.device("cpu")

    @property
    def dtype(self) -> torch.dtype:
        return self.boxes[0][1].dtype

    def view(self, dtype: torch.dtype) -> Boxes:
        """The same bits as another dtype of that width."""
        return Boxes(self.shape, tuple((start, box.view(dtype)) for start, box in self.boxes))

    def cut(self, box: Sequence[slice]) -> Tensor:
        """A copy of a box of the whole tensor, of which only the numbers in it are read."""
        edges = [one.indices(size)[:2] for one, size in zip(box, self.shape, strict=True)]
        found = torch.empty([stop - start for start, stop in edges], dtype=self.dtype)
        for begin, held in dict(self.boxes).items():
            ends = [first + size for first, size in zip(begin, held.shape, strict=True)]
            both = [(max(a, c), min(b, d)) for (a, b), c, d in zip(edges, begin, ends, strict=True)]
            if all(start < stop for start, stop in both):
                there = tuple(slice(a - start, b - start) for (a, b), (start, _) in zip(both, edges, strict=True))
                here = tuple(slice(a - start, b - start) for (a, b), start in zip(both, begin, strict=True))
                found[there] = held[here]
        return found

    def __getitem__(self, apart: Apart) -> Tensor:
        """A copy of some numbers of some rows: ``[row, number]``; ``[row]`` where a row is a single number."""
        found = torch.empty(*_sizes(apart), dtype=self.dtype)
        for box, here, at in _held(dict(self.boxes).items(), apart):
            found[here] = box[at]
        return found if any(across is not None for _, across in apart) else found[:, 0]

    def __setitem__(self, apart: Apart, rows: Tensor) -> None:
        """Write those numbers, in every copy."""
        rows = rows.reshape(*_sizes(apart))
        for box, here, at in _held(self.boxes, apart):
            box[at] = rows[here]


Lying = Tensor | Boxes  # a tensor where it lies


def at_flat(tensor: Lying, positions: Tensor) -> tuple[Any, ...]:
    """Where single numbers lie, counted through a whole tensor: an index of it, or of its boxes."""
    found = torch.unravel_index(positions, tensor.shape)
    return tuple((one, None) for one in found) if isinstance(tensor, Boxes) else found


def _held(boxes: Iterable[tuple[tuple[int, ...], Tensor]], apart: Apart) -> Iterator[tuple[Tensor, Any, Any]]:
    """Each box that holds some of the numbers, which ones of ``[row, number]``, and where they lie in the box."""
    rows, numbers = (torch.ones(size, dtype=torch.bool) for size in _sizes(apart))
    for start, box in boxes:
        row, number = rows.clone(), numbers.clone()
        for (along, across), first, size in zip(apart, start, box.shape, strict=True):
            if across is None and along is not None:
                row &= (along >= first) & (along < first + size)
            elif along is None and across is not None:
                number &= (across >= first) & (across < first + size)
        i, j = row.nonzero(), number.nonzero().T
        if not i.numel() or not j.numel():
            continue
        at: list[Tensor] = []
        inside: list[Tensor] = []
        for (along, across), first, size in zip(apart, start, box.shape, strict=True):
            at.append(
                sum((one[which] for one, which in ((along, i), (across, j)) if one is not None), -torch.tensor(first))
            )
            if along is not None and across is not None:  # the numbers of one row lie apart along it
                inside.append((at[-1] >= 0) & (at[-1] < size))
        if inside:
            ok = torch.stack(inside).all(0)
            i, j, *at = (one.expand(ok.shape)[ok] for one in (i, j, *at))
        yield box, (i, j), tuple(at)


def _sizes(apart: Apart) -> list[int]:
    """How many rows there are, and numbers of each."""
    return [next((len(one) for one in side if one is not None), 1) for side in zip(*apart, strict=True)]


def lying(tensors: Mapping[str, Tensor], name: str) -> Lying:
    """A tensor of a mapping, or its boxes where the mapping would have to put it together (``boxes``)."""
    found = boxes_in(tensors, name)
    return tensors[name] if found is None else found


def boxes_in(tensors: Mapping[str, Tensor], name: str) -> Boxes | None:
    """The boxes of a tensor; None where its mapping has it in one piece."""
    of = getattr(tensors, "boxes", None)
    found: Boxes | None = None if of is None else of(name)
    return found
