"""Where the numbers of a mask lie in a model's tensors, as one table from which one launch moves them all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from surgery.devices import after_sending, real, sent_together
from surgery.masks.edits import Edit

_PAD = 16  # numbers: every edit begins at a multiple of it in packed, so that it is aligned to 16 bytes
# dtype → the integers of its width, and the bits of its exponent: where all are set, a number is NaN or infinite
_BITS = {
    torch.float16: (torch.int16, 0x7C00),
    torch.bfloat16: (torch.int16, 0x7F80),
    torch.float32: (torch.int32, 0x7F800000),
    torch.float64: (torch.int64, 0x7FF0000000000000),
}


@dataclass(frozen=True)
class Place:
    """Where an edit lies in packed: number f of row i at start + i · unit + f · inner.

    f counts the axes inside a row in an order of their own, the one with the longest way in the tensor first.
    """

    start: int
    unit: int
    inner: int
    order: tuple[int, ...]

    def rows(self, packed: Tensor, count: int, sizes: Sequence[int], start: int = 0) -> Tensor:
        """The edit's rows as a view of packed, or of a part of it that begins at ``start``: ``[row, ...]``."""
        ways, way = dict[int, int](), self.inner
        for axis in reversed(self.order):
            ways[axis], way = way, way * sizes[axis]
        return packed.as_strided(
            (count, *sizes), (self.unit, *(ways[axis] for axis in sorted(ways))), self.start - start
        )


class Plan:
    """Where edits lie in tensors of one device and dtype, and in a packed buffer; made once, launched often.

    An edit is the sum of two lists of offsets: of its rows' first numbers, and of the numbers inside a row. The one
    whose neighbours lie closer in the tensor comes last in packed, and its neighbours are moved by neighbouring lanes.
    What is held on the device does not depend on where the tensors lie, and goes there in one piece.

    Args:
        edits: what is moved; no two of them share a number.
        tensors: the tensors by name, all of them ``plain`` and alike.
        places: where each edit lies in packed (default: one after the other).
    """

    def __init__(self, edits: Sequence[Edit], tensors: Mapping[str, Tensor], places: Sequence[Place] = ()) -> None:
        from surgery.reverting.kernel import TILE

        first = tensors[edits[0].slot.tensor]
        self.edits, self.device, self.dtype, self.form = list(edits), first.device, first.dtype, form(edits, tensors)
        self.vector = 16 // first.element_size()
        self.shapes: list[tuple[int, list[int]]] = []
        self.places: list[Place] = []
        self.size = self.tiles = at = 0
        table, counts, lists = [], [], []
        for number, edit in enumerate(edits):
            rows, way, axes = edit.spread(tensors[edit.slot.tensor])
            order = places[number].order if places else tuple(sorted(range(len(axes)), key=lambda one: -axes[one][1]))
            ways = [axes[axis] for axis in order]
            inside = torch.zeros(1, dtype=torch.int64)
            for size, stride in ways:
                inside = (inside[:, None] + torch.arange(size) * stride).flatten()
            count, width = len(rows), len(inside)
            beside = all(way < stride for size, stride in axes if size > 1)  # rows lie closer than a row's numbers
            place = places[number] if places else Place(self.size, *((1, count) if beside else (width, 1)), order)
            self.places.append(place)
            self.shapes.append((count, [size for size, _ in axes]))
            self.size = -(-(self.size + count * width) // _PAD) * _PAD
            whole = not beside and place.inner == 1 and self._in_vectors(rows, ways, place.start, place.unit)
            if beside:  # the last are the lanes
                sizes, steps = (width, count), (place.inner, place.unit)
            else:
                sizes, steps = (count, width), (place.unit, place.inner)
            lists += [inside, rows] if beside else [rows, inside]
            tiles, shift = _tiles(*sizes, TILE)
            table.append([at, at + sizes[0], *sizes, place.start, *steps, self.tiles, shift, int(whole)])
            counts.append(tiles)
            self.tiles += tiles
            at += count + width
        offsets = torch.cat(lists)
        if int(offsets.max()) < 2**30:  # so their sums fit, too
            offsets = offsets.to(torch.int32)
        which = torch.arange(len(table), dtype=torch.int32).repeat_interleave(torch.tensor(counts))
        self._table, self._which, self._offsets = sent_together([torch.tensor(table), which, offsets], self.device)
        self._addresses: tuple[list[list[int]], Tensor] | None = None  # of the last launch
        self._sent = after_sending(self.device)

    def _in_vectors(self, rows: Tensor, ways: Sequence[tuple[int, int]], start: int, step: int) -> bool:
        """Whether every run of numbers that 16 bytes hold is one in the tensor and in packed, and begins at one."""
        *outer, (size, stride) = ways
        rests = [start, step, size, *(stride for _, stride in outer)]
        return stride == 1 and not any(one % self.vector for one in rests) and not bool((rows % self.vector).any())

    def empty(self, dtype: torch.dtype | None = None) -> Tensor:
        """A packed buffer."""
        return torch.empty(self.size, dtype=dtype or self.dtype, device=self.device)

    def rows(self, packed: Tensor) -> list[Tensor]:
        """Each edit's rows as a view of packed, shaped as ``Edit.take`` gives them."""
        return [place.rows(packed, *shape) for place, shape in zip(self.places, self.shapes, strict=True)]

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether tensors still lie as they did, wherever in memory."""
        return all(edit.slot.tensor in tensors for edit in self.edits) and form(self.edits, tensors) == self.form

    def gather(self, tensors: Mapping[str, Tensor], packed: Tensor) -> None:
        """Copy the tensors' numbers into packed."""
        self._launch(2, tensors, packed)

    def swap(self, tensors: Mapping[str, Tensor], packed: Tensor, *, count: bool = False) -> Tensor | None:
        """Exchange the tensors' numbers and packed; with ``count`` as ``fetch`` does."""
        return self._launch(0, tensors, packed, count=count)

    def fetch(self, tensors: Mapping[str, Tensor], packed: Tensor, sources: Sequence[Tensor]) -> Tensor:
        """Copy from a tensor that lies alike for each edit; packed gets what was there.

        Returns:
            int32 ``[2, tile]`` on the device: how many numbers changed, and how many new ones are NaN or infinite.
        """
        found = self._launch(1, tensors, packed, sources, count=True)
        assert found is not None
        return found

    def edit_of(self, tile: int) -> Edit:
        """The edit that a tile belongs to."""
        return self.edits[int(self._which[tile])]

    def _launch(
        self,
        how: int,
        tensors: Mapping[str, Tensor],
        packed: Tensor,
        sources: Sequence[Tensor] | None = None,
        count: bool = False,
    ) -> Tensor | None:
        from surgery.reverting.kernel import FIELDS, TILE, WARPS, walk

        ours = [tensors[edit.slot.tensor] for edit in self.edits]
        pairs = [(one.data_ptr(), other.data_ptr()) for one, other in zip(ours, sources or ours, strict=True)]
        where = [[one, other, int(one % 16 == 0 and other % 16 == 0)] for one, other in pairs]
        if self._addresses is None or self._addresses[0] != where:
            self._sent()  # so that who waits for the addresses waits for the tables
            self._addresses = where, sent_together([torch.tensor(where)], self.device)[0]
            self._sent = after_sending(self.device)
        integers, exponent = _BITS[self.dtype]
        found = torch.empty(2, self.tiles, dtype=torch.int32, device=self.device) if count else None
        if how != 2:
            for tensor in {id(one): one for one in ours}.values():
                increment_version(tensor)  # what torch itself does when it writes
        with torch.cuda.device(self.device) if real(self.device) else nullcontext():
            if real(self.device):
                for held in (packed, self._which, self._addresses[1]):  # not given away before the launch is done
                    held.record_stream(torch.cuda.current_stream())
            self._sent()
            walk[(self.tiles,)](
                self._which, self._table, self._offsets, self._addresses[1], packed.view(integers),
                self._which if found is None else found, self.tiles,
                HOW=how, COUNT=count, EXPONENT=exponent, VECTOR=self.vector, TILE=TILE, FIELDS=FIELDS,
                num_warps=WARPS, enable_fp_fusion=False,
            )  # fmt: skip
        return found


def form(edits: Sequence[Edit], tensors: Mapping[str, Tensor]) -> list[Any] | None:
    """How the tensors of edits lie, device last; None unless all are ``plain``, on one device, and of one dtype."""
    held = {name: tensors[name] for name in dict.fromkeys(edit.slot.tensor for edit in edits)}
    if not all(map(plain, held.values())) or len({(one.device, one.dtype) for one in held.values()}) != 1:
        return None
    return [(name, *looks(tensor)) for name, tensor in held.items()]


def looks(tensor: Tensor) -> tuple[Any, ...]:
    return tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device


def plain(tensor: Tensor) -> bool:
    """Whether its numbers lie in memory of its own at a stride along each axis, no two at one place."""
    if type(tensor) is not Tensor or tensor.layout != torch.strided or tensor.dtype not in _BITS:
        return False
    reach = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= reach:
            return False
        reach += (size - 1) * stride
    return bool(tensor.numel()) and not tensor.is_meta and not tensor.is_inference()


def _tiles(height: int, width: int, tile: int) -> tuple[int, int]:
    """How many tiles cover a box, and log2 of their width: the widest of those that leave few lanes idle."""
    counts = {one: -(-width // (1 << one)) * -(-height // (tile >> one)) for one in range(4, tile.bit_length())}
    shift = max(one for one, count in counts.items() if 8 * count <= 9 * min(counts.values()))
    return counts[shift], shift
