"""Adds up how far numbers moved: histograms by the bits of a float, counts and norms, a chunk at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

CHUNK = 1 << 18  # numbers per checkpoint that are in memory at a time
BINS = 256  # the exponents of float32
Group = tuple[str | None, str]  # a layer's path, and a kind of module


@dataclass
class Sums:
    """What adds up over the chunks of a group, for one comparison."""

    parameters: int = 0
    unchanged: int = 0
    from_zero: int = 0
    square: float = 0.0
    reference_square: float = 0.0
    bins: Tensor = field(default_factory=lambda: torch.zeros(2, BINS, dtype=torch.int64))

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


class Meter:
    """Reads tensors of all checkpoints side by side, in float32 rooms that every chunk uses again."""

    def __init__(self, units: tuple[int, int], pairs: list[tuple[int, int]], names: list[str]) -> None:
        self.units, self.pairs, self.names = units, pairs, names
        self.sums: dict[tuple[int, int], dict[Group, Sums]] = {pair: {} for pair in pairs}
        self.wide, self.size = torch.empty(len(names), CHUNK), torch.empty(CHUNK)
        self.delta, self.ratio = torch.empty(CHUNK), torch.empty(CHUNK)

    def read(self, name: str, group: Group, opened: list[Mapping[str, Tensor]]) -> None:
        """Add one tensor to its group."""
        held = {pair: self.sums[pair].setdefault(group, Sums()) for pair in self.pairs}
        for chunk in _chunks([tensors[name].detach() for tensors in opened]):
            wide = [room[: len(one)].copy_(one) for room, one in zip(self.wide, chunk, strict=True)]
            for reference in dict.fromkeys(first for first, _ in self.pairs):
                before = torch.abs(wide[reference], out=self.size[: len(wide[reference])])
                square, zeros = float(torch.dot(before, before)), not bool(before.min())
                for pair in (pair for pair in self.pairs if pair[0] == reference):
                    sums = held[pair]
                    self._compare(sums, wide[reference], before, wide[pair[1]], zeros)
                    sums.reference_square += square
                    if not math.isfinite(sums.square + square):
                        self._refuse(name, chunk)

    def _compare(self, sums: Sums, old: Tensor, size: Tensor, new: Tensor, zeros: bool) -> None:
        """Add one chunk of one comparison: ``old`` with its absolute values ``size``, and ``new``."""
        count = len(old)
        sums.parameters += count
        delta, ratio = torch.sub(new, old, out=self.delta[:count]).abs_(), self.ratio[:count]
        square = float(torch.dot(delta, delta))
        sums.square += square
        if square == 0 and not bool(delta.max()):  # frozen; a square alone may be 0 by underflow
            sums.unchanged += count
            return
        if not math.isfinite(square):
            return
        torch.div(delta, size, out=ratio)
        from_zero = 0
        if zeros:
            zero = size == 0
            from_zero = int(torch.count_nonzero(delta[zero]))
            ratio.masked_fill_(zero, 0)
        unchanged = count - int(torch.count_nonzero(delta.view(torch.int32)))
        both = self._bins(delta, ratio.clamp_max_(1e38))
        bins = both.sum(1), both.sum(0)
        bins[0][0] -= unchanged
        bins[1][0] -= unchanged + from_zero
        sums.unchanged += unchanged
        sums.from_zero += from_zero
        for at in (0, 1):
            sums.bins[at] += bins[at]

    def _bins(self, *values: Tensor) -> Tensor:
        """How many pairs of float32 numbers ≥ 0 lie in each octave of the one and the other: ``[octave, octave]``.

        The bits of a positive float are a number whose upper part is the exponent: shifted so that the unit falls on
        an edge, it is the bin, exactly, at a tenth of what a logarithm and a search would take. Counting is the larger
        part of the work, so both are counted at once. The numbers are gone afterwards: their room is used.
        """
        one, other = (
            value.view(torch.int32).add_((1 << 23) - (unit & 0x7FFFFF)).bitwise_right_shift_(23)
            for value, unit in zip(values, self.units, strict=True)
        )
        return torch.bincount(other.add_(one, alpha=BINS), minlength=BINS * BINS).view(BINS, BINS)

    def _refuse(self, name: str, chunk: list[Tensor]) -> None:
        for whose, one in zip(self.names, chunk, strict=True):
            if bad := int((~one.isfinite()).sum()):
                raise ValueError(f"{name!r} of {whose!r} holds {bad} or more NaN or infinite numbers")
        raise ValueError(f"{name!r} holds numbers whose squares are no float32: they can't be weights")


def _chunks(tensors: list[Tensor]) -> Iterator[list[Tensor]]:
    """The same run of numbers of each tensor, at most ``CHUNK`` of them, one after the other."""
    first = tensors[0]
    if all(one.is_contiguous() for one in tensors):
        flat = [one.reshape(-1) for one in tensors]
        for at in range(0, first.numel(), CHUNK):
            yield [one[at : at + CHUNK] for one in flat]
    elif first.numel() <= CHUNK:
        yield [one.reshape(-1) for one in tensors]
    else:  # a transposed view: making it contiguous would copy all of it
        rows = CHUNK // first[0].numel()
        for low, high in pairwise([*range(0, len(first), max(rows, 1)), len(first)]):
            yield from _chunks([one[low:high] if rows else one[low] for one in tensors])
