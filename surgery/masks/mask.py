"""The protocol of a mask, whether it selects neurons (``Neurons``) or single weights (``Entries``)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from torch import Tensor

from surgery.layout.slots import Layout
from surgery.masks.edits import Edit
from surgery.masks.entries import Entries
from surgery.masks.files import kind_of_file
from surgery.masks.neurons import Neurons


class Mask(Protocol):
    """What is to be reverted. A mask of whole units and a mask of all their weights make the same edits."""

    made_by: dict[str, Any]  # what made it, as JSON

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of unit that it selects from, or whose weights it selects from, "mlp" first."""

    @property
    def noun(self) -> str:
        """What it counts, in words: "neurons", "KV groups", "weights"."""

    @property
    def candidates(self) -> str:
        """What it selects from, in words: "MLP neurons", "weights of neurons"."""

    @property
    def total(self) -> int:
        """How many there are to select from."""

    @property
    def fraction(self) -> float:
        """The selected fraction of them, in [0, 1]."""

    def count(self) -> dict[str, int]:
        """How many are selected, by block or part."""

    def tally(self) -> dict[str, Any]:
        """How many are selected of how many, and where, for the record of a saved folder."""

    def edits(self, layout: Layout, whose: str) -> Iterator[Edit]:
        """What it changes, slot by slot in layer order; an error names ``whose`` layout it is."""

    def strengths(self, each: Neurons) -> Tensor:
        """The strength of every selected neuron or weight, where each neuron has one: float32 ``[selected]``."""

    def signed(self, made_by: Mapping[str, Any]) -> Self:
        """The same mask with entries added to ``made_by``."""

    def __and__(self, other: Self, /) -> Self: ...

    def __or__(self, other: Self, /) -> Self: ...

    def __sub__(self, other: Self, /) -> Self: ...

    def equal(self, other: Self, /) -> bool:
        """Whether both select the same neurons or weights of the same blocks."""

    def save(self, path: str | Path) -> None:
        """Write a file for ``load_mask``."""


def inside(smaller: Mask, larger: Mask) -> bool:
    """Whether a mask of the same kind selects all that the smaller one does; of masks of other kinds it isn't told."""
    alike = type(smaller) is type(larger) and isinstance(smaller, Neurons | Entries)
    return alike and smaller.units == larger.units and (smaller & larger).equal(smaller)


def checked(mask: Mask) -> Mask:
    """The mask itself.

    Raises:
        ValueError: it is none.
    """
    if not hasattr(mask, "edits"):
        raise ValueError(
            f"mask= is a {type(mask).__name__}: expected Neurons or Entries, as a selector returns them (for a file, "
            f"surgery.masks.load_mask(path))"
        )
    return mask


def load_mask(path: str | Path) -> Neurons | Entries:
    """A mask file of either kind.

    Raises:
        ValueError: the file is neither.
    """
    return Entries.load(path) if kind_of_file(path) == "Entries" else Neurons.load(path)
