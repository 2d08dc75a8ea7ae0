"""Where the score of each single weight lies in a flat file: of a sharded model this process keeps only its own."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cached_property

import torch
from torch import Tensor

from surgery.checkpoints.checkpoint import State
from surgery.checkpoints.opening import Weights
from surgery.layout.sharding import Ranks, local
from surgery.layout.slots import Block, Slot
from surgery.live.hooks import parts_of
from surgery.masks.edits import Rows
from surgery.masks.entries import shapes_of


def starts_of(shapes: dict[str, tuple[int, int]]) -> dict[str, int]:
    """Where the numbers of each part begin, part after part."""
    sizes = [neurons * width for neurons, width in shapes.values()]
    return dict(zip(shapes, torch.tensor([0, *sizes]).cumsum(0).tolist(), strict=False))


class Places:
    """Where in a flat file the numbers lie that this process holds, and which of all numbers they are.

    A *position* counts the numbers of all parts, one part after the other. In one process it is the place in the file.

    Args:
        live: the live model, opened.
    """

    def __init__(self, live: Weights) -> None:
        assert isinstance(live.tensors, State)
        self.live, self.shapes = live, shapes_of(live.layout)
        self.ranks: Ranks = live.ranks
        self._starts = starts_of(self.shapes)

    @property
    def shared(self) -> bool:
        """Whether several processes hold the numbers."""
        return self.ranks.mesh is not None

    @property
    def total(self) -> int:
        """How many numbers there are."""
        return sum(neurons * width for neurons, width in self.shapes.values())

    @property
    def here(self) -> int:
        """How many of them this process holds."""
        return sum(part.numbers for parts in self._parts.values() for part, _ in parts)

    @property
    def tensors(self) -> list[str]:
        """The tensors that hold them."""
        return list(dict.fromkeys(slot.tensor for block in self.live.layout.blocks for slot in block.slots))

    @property
    def device(self) -> torch.device:
        """Where they lie; of several devices the first."""
        found = [local(self.live.tensors[name]).device for name in self.tensors[:1]]
        return found[0] if found else torch.device("cpu")

    def parts(self) -> Iterator[tuple[tuple[str, Slot], Rows, int]]:
        """All rows that are here: whose they are, and the place of the first number of each run."""
        return ((key, part, start) for key, parts in self._parts.items() for part, start in parts)

    def check_finite(self, wrong: list[str]) -> None:
        """Raise ``ValueError`` on every process where on one of them the gradient of some tensor is not finite."""
        if int(self.ranks.sum(torch.tensor(len(wrong)))):
            which = repr(wrong[0]) if wrong else "a weight that another process holds"
            raise ValueError(f"the gradient of {which} is NaN or infinite on these prompts")

    def of(self, block: Block, slot: Slot) -> list[tuple[Rows, int]]:
        """The rows of a slot that are here, each with the place of its first number."""
        return self._parts[block.name, slot]

    @cached_property
    def _parts(self) -> dict[tuple[str, Slot], list[tuple[Rows, int]]]:
        found: dict[tuple[str, Slot], list[tuple[Rows, int]]] = {}
        at = 0
        for block in self.live.layout.blocks:
            for slot in block.slots:
                home = found[block.name, slot] = []
                for part in parts_of(block, slot, self.live.tensors[slot.tensor], self.ranks):
                    home.append((part, at if self.shared else self._start(part) + slot.span[0]))
                    at += part.numbers
        return found

    def _start(self, part: Rows) -> int:
        return self._starts[f"{part.block.name}/{part.slot.part}"]

    def positions(self, places: Tensor) -> Tensor:
        """Which of all numbers lie at some places, which ascend: int64 ``[len(places)]``."""
        if not self.shared:
            return places
        found = [torch.zeros(0, dtype=torch.int64)]
        for part, start in (one for parts in self._parts.values() for one in parts):
            width = part.slot.width if part.offsets is None else len(part.offsets)
            low, high = torch.searchsorted(places, torch.tensor([start, start + part.numbers])).tolist()
            row, inside = (places[low:high] - start) // width, (places[low:high] - start) % width
            inside = inside if part.offsets is None else part.offsets[inside]
            found.append(self._start(part) + part.index[row] * part.slot.width + inside)
        return torch.cat(found)

    def places(self, positions: Tensor) -> Tensor:
        """Where those of some numbers lie that are here."""
        if not self.shared:
            return positions
        found, positions = [torch.zeros(0, dtype=torch.int64)], positions.sort().values
        for part, start in (one for parts in self._parts.values() for one in parts):
            first, last = (self._start(part) + edge for edge in part.slot.span)
            low, high = torch.searchsorted(positions, torch.tensor([first, last])).tolist()
            inside = positions[low:high] - self._start(part)
            row, row_is_here = found_in(part.index, inside // part.slot.width)
            if part.offsets is None:
                width, at, here = part.slot.width, inside % part.slot.width, row_is_here
            else:
                width, (at, at_is_here) = len(part.offsets), found_in(part.offsets, inside % part.slot.width)
                here = row_is_here & at_is_here
            found.append((start + row * width + at)[here])
        return torch.cat(found)


def found_in(held: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Where numbers stand among ascending ones, and whether they are there."""
    at = torch.searchsorted(held, wanted).clamp(max=max(0, len(held) - 1))
    return at, held[at] == wanted if len(held) else torch.zeros_like(at, dtype=torch.bool)
