"""Entries: which single weights of a model to revert, stored as sorted positions and not as a boolean per weight."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.layout.slots import Layout
from surgery.masks.edits import Numbers
from surgery.masks.files import MADE_BY, read_vectors, write_vectors
from surgery.masks.neurons import Neurons
from surgery.units import noun_of_weights, units_in

_RUN = 1 << 20  # single numbers that one edit may hold: their coordinates take several times the numbers' own room
_Shapes = Mapping[str, tuple[int, int]]


class Entries(Mapping[str, Tensor]):
    """A mask over single weights: a mapping from part, "BLOCK/PART", to the sorted positions that it selects.

    position = neuron · width + offset in the neuron's row. A part (gate, up, down, a bias, q, k, v, o) counts as
    ``[neuron, width]``, whatever tensor holds it. So a position means the same in a live model and on disk, even where
    names and shapes differ between the two (MoE). A position takes 8 bytes, so use Entries for small parts of a model.

    Args:
        positions: part → int64 ``[selected]``, ascending; nothing is selected in a part that is left out.
        shapes: part → (neurons, width) of every part with candidate weights, in layer order.
        made_by: what made it (plain JSON values); saved with the file.

    Raises:
        ValueError: positions of an unknown part, that are not ascending integers, or lie outside the part; a shape
            that is none.

    Source: ours.

    >>> found = Entries({"layers.0.mlp/up": torch.tensor([1, 4])}, shapes={"layers.0.mlp/up": (2, 3)})
    >>> found.count(), round(found.fraction, 2), found["layers.0.mlp/up"] // 3  # the neurons they are of
    ({'layers.0.mlp/up': 2}, 0.33, tensor([0, 1]))
    """

    def __init__(
        self, positions: Mapping[str, Tensor], *, shapes: _Shapes, made_by: Mapping[str, Any] | None = None
    ) -> None:
        for part, shape in shapes.items():
            if "/" not in part or len(shape) != 2 or not all(type(size) is int and size > 0 for size in shape):
                raise ValueError(
                    f'shapes= of {part!r} is {str(tuple(shape))[:50]}: expected (neurons, width) of "BLOCK/PART"'
                )
        self.shapes = {part: (shape[0], shape[1]) for part, shape in shapes.items()}
        if unknown := [part for part in positions if part not in self.shapes]:
            raise ValueError(f"positions of {unknown[0]!r}, and shapes= has no such part; it has {list(shapes)[:3]}")
        nothing = torch.zeros(0, dtype=torch.int64)
        self._values = {
            part: _checked(part, positions[part], size) if part in positions else nothing
            for part, size in self.sizes.items()
        }
        self.made_by = dict(made_by or {})

    def __getitem__(self, part: str) -> Tensor:
        return self._values[part]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    @property
    def sizes(self) -> dict[str, int]:
        """Weights per part."""
        return {part: neurons * width for part, (neurons, width) in self.shapes.items()}

    @property
    def total(self) -> int:
        """How many weights there are to select from."""
        return sum(self.sizes.values())

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of unit whose weights these are, "mlp" first."""
        return units_in(part.rpartition("/")[0] for part in self)

    @property
    def noun(self) -> str:
        """What it counts."""
        return "weights"

    @property
    def candidates(self) -> str:
        """What it selects from, in words."""
        return noun_of_weights(self.units)

    def count(self) -> dict[str, int]:
        """How many weights of each part are selected."""
        return {part: len(value) for part, value in self.items()}

    @property
    def fraction(self) -> float:
        """The fraction of all those weights that is selected, in [0, 1]."""
        return sum(self.count().values()) / max(self.total, 1)

    def tally(self) -> dict[str, Any]:
        """How many weights are selected of how many, and where, for the record of a saved folder."""
        return {"weights": {"reverted": sum(self.count().values()), "of": self.total, "per_part": self.count()}}

    def edits(self, layout: Layout, whose: str) -> Iterator[Numbers]:
        """What it changes, slot by slot in layer order, in runs of bounded length.

        Raises:
            ValueError: it is of another model than ``whose`` layout.
        """
        self.require(shapes_of(layout), whose)
        for name, block in layout.items():
            for slot in block.slots:
                positions = self[f"{name}/{slot.part}"]
                low, high = torch.searchsorted(positions, torch.tensor(slot.span)).tolist()
                for run in positions[low:high].split(_RUN) if low < high else ():
                    yield Numbers(block, slot, run)

    def strengths(self, each: Neurons) -> Tensor:
        """The strength of every selected weight, that of its neuron: float32 ``[selected]``."""
        found = (each[part.rpartition("/")[0]][at // self.shapes[part][1]] for part, at in self.items())
        return torch.cat([torch.zeros(0), *found])

    def signed(self, made_by: Mapping[str, Any]) -> Entries:
        """The same with entries added to ``made_by``."""
        return Entries(self, shapes=self.shapes, made_by={**self.made_by, **made_by})

    def __and__(self, other: Entries) -> Entries:
        return self._combine(other, lambda a, b: a[torch.isin(a, b, assume_unique=True)])

    def __sub__(self, other: Entries) -> Entries:
        return self._combine(other, lambda a, b: a[torch.isin(a, b, assume_unique=True, invert=True)])

    def __or__(self, other: Entries) -> Entries:
        return self._combine(other, lambda a, b: torch.cat([a, b]).unique())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Entries) and self.equal(other)  # a Mapping's own asks a tensor whether it is true

    def equal(self, other: Entries) -> bool:
        """Whether both select the same weights of the same parts in the same order."""
        same = list(self.shapes.items()) == list(other.shapes.items())
        return same and all(torch.equal(value, other[part]) for part, value in self.items())

    def require(self, shapes: _Shapes, whose: str) -> None:
        """Raise ``ValueError`` unless the parts are named, ordered and shaped like ``shapes``."""
        if list(self.shapes.items()) == list(shapes.items()):
            return
        for part in dict.fromkeys([*self.shapes, *shapes]):
            ours, theirs = self.shapes.get(part), shapes.get(part)
            if ours != theirs:
                raise ValueError(
                    f"part {part!r} is {ours or 'not there'} here and {theirs or 'not there'} in {whose}: they are for "
                    f"different models. Make the mask again from the checkpoints it is used with"
                )
        raise ValueError(f"the parts come in another order than in {whose}")

    def save(self, path: str | Path) -> None:
        """Write a safetensors file; its metadata says what made it, and which parts there are."""
        held = {part: value for part, value in self.items() if len(value)}
        write_vectors(path, "Entries", held, made_by=self.made_by, shapes=self.shapes)

    @classmethod
    def load(cls, path: str | Path) -> Entries:
        """Read what ``save`` wrote.

        Raises:
            LookupError: there is no such file. ValueError: it is not a file of entries, or damaged.
        """
        tensors, told = read_vectors(path, "Entries", ("I64",), made_by=MADE_BY, shapes={str: [int]})
        try:
            return cls(tensors, shapes=told["shapes"], made_by=told["made_by"])
        except ValueError as error:
            raise ValueError(f"{path} is damaged: {error}") from error

    def __repr__(self) -> str:
        if not self:
            return "Entries(empty)"
        blocks: dict[str, dict[str, int]] = {}
        for part, count in self.count().items():
            block, _, name = part.rpartition("/")
            blocks.setdefault(block, {})[name] = count
        width = max(map(len, blocks))
        of = f"{sum(self.count().values())} of {self.total} {self.candidates}"
        lines = [
            f"  {block:<{width}}  " + "  ".join(f"{name} {count}" for name, count in parts.items())
            for block, parts in blocks.items()
        ]
        return "\n".join([f"Entries: mask of {of} ({self.fraction:.3%})", *lines])

    def _combine(self, other: Entries, function: Any) -> Entries:
        if not isinstance(other, Entries):
            raise ValueError(f"this operation is between two Entries, and the other one is a {type(other).__name__}")
        self.require(other.shapes, "the other Entries")
        values = {part: function(value, other[part]) for part, value in self.items()}
        return Entries(values, shapes=self.shapes, made_by={**self.made_by, **other.made_by})


def shapes_of(layout: Layout) -> dict[str, tuple[int, int]]:
    """Part → (neurons, width) of every part of a layout's blocks, as ``Entries`` counts them."""
    blocks = layout.blocks
    return {f"{one.name}/{part}": (one.neurons, one.of(part)[0].width) for one in blocks for part in one.parts}


def _checked(part: str, positions: Tensor, size: int) -> Tensor:
    if not isinstance(positions, Tensor):
        raise ValueError(f"part {part!r} holds a {type(positions).__name__}: expected a tensor, torch.as_tensor(...)")
    if positions.ndim != 1 or positions.is_floating_point() or positions.dtype == torch.bool:
        raise ValueError(
            f"part {part!r}: expected positions as integers in one dimension, got {positions.dtype} of the shape "
            f"{tuple(positions.shape)}"
        )
    positions = positions.detach().to("cpu", torch.int64)
    if len(positions) and not (
        int(positions[0]) >= 0 and int(positions[-1]) < size and bool((positions.diff() > 0).all())
    ):
        raise ValueError(f"part {part!r}: expected positions from 0 to {size - 1}, ascending, each once")
    return positions
