"""A folder's tensors as pieces of its files: what every way of storing them comes down to."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from surgery.layout.boxes import Boxes, Lying

SAFETENSORS, RANKS, DISTRIBUTED = "safetensors", "FSDP rank files", "a distributed checkpoint"
CUT, ADAPTED = "distributed safetensors", "an adapter"


@dataclass(frozen=True)
class Piece:
    """A box of one tensor, contiguous in the tensor's coordinates, under some key of one file.

    Args:
        file: the file, relative to the checkpoint's folder.
        key: its name among the file's views.
        start: where the box begins in the whole tensor, an index per axis.
        shape: its size along each axis.
    """

    file: str
    key: str
    start: tuple[int, ...]
    shape: tuple[int, ...]

    def of(self, whole: Tensor) -> Tensor:
        """The box as a view of the whole tensor."""
        return whole[tuple(slice(at, at + size) for at, size in zip(self.start, self.shape, strict=True))]


Views = Callable[
    [Path, str, bool], Mapping[str, Tensor]
]  # (path, the file's name in the folder, writable) → its pieces


@dataclass(frozen=True, eq=False)
class Stored:
    """How the tensors of a folder lie in its files.

    Args:
        kind: the way of storing them: ``SAFETENSORS``, ``CUT``, ``RANKS``, ``DISTRIBUTED`` or ``ADAPTED``.
        shapes: tensor name → shape of the whole tensor.
        dtypes: tensor name → dtype; a word for one that torch does not have.
        pieces: tensor name → its pieces, copies of one box among them (replicas) included.
        views: from a path (the file or a copy of it), the file's name and whether it is to be written, to views of the
            mapped file by key; writes reach the file only if writable.
        beside: other files that the pieces depend on.
    """

    kind: str
    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, torch.dtype | str]
    pieces: Mapping[str, tuple[Piece, ...]]
    views: Views
    beside: tuple[str, ...] = ()

    @property
    def training(self) -> bool:
        """Whether it is what a trainer saves to go on from: its optimizer's state belongs to it."""
        return self.kind in (RANKS, DISTRIBUTED)

    @cached_property
    def files(self) -> dict[str, list[str]]:
        """File → the tensors that have a piece in it."""
        found: dict[str, list[str]] = {}
        for name, pieces in self.pieces.items():
            for file in dict.fromkeys(piece.file for piece in pieces):
                found.setdefault(file, []).append(name)
        return found

    def boxes(self, name: str, views: Callable[[str], Mapping[str, Tensor]]) -> Boxes | None:
        """The tensor's pieces with their copies; None where it lies in one piece."""
        pieces = self.pieces[name]
        if len(pieces) == 1:
            return None
        return Boxes(self.shapes[name], tuple((piece.start, views(piece.file)[piece.key]) for piece in pieces))

    def lying(self, name: str, views: Callable[[str], Mapping[str, Tensor]]) -> Lying:
        """The tensor where it lies: what is written into it reaches writable views."""
        return self.boxes(name, views) or self.read(name, views)

    def read(self, name: str, views: Callable[[str], Mapping[str, Tensor]]) -> Tensor:
        """The tensor: a view where it lies in one piece, else put together anew.

        Args:
            name: the tensor.
            views: from a file to its pieces by key.
        """
        boxes = {piece.start: piece for piece in self.pieces[name]}.values()
        found = [(piece, views(piece.file)[piece.key]) for piece in boxes]
        if len(found) == 1:
            return found[0][1]
        made = torch.empty(self.shapes[name], dtype=found[0][1].dtype)
        for piece, view in found:
            piece.of(made).copy_(view)
        return made

    def check_tiled(self, folder: Path) -> None:
        """Raise ``ValueError`` unless the pieces of every tensor cover it once."""
        for name, pieces in self.pieces.items():
            shape, boxes = self.shapes[name], {piece.start: piece.shape for piece in pieces}
            inside = all(
                len(start) == len(shape) and all(a + b <= c for a, b, c in zip(start, boxes[start], shape, strict=True))
                for start in boxes
            )
            alike = all(boxes[piece.start] == piece.shape for piece in pieces)
            held = sum(torch.Size(box).numel() for box in boxes.values())
            if not (inside and alike and held == torch.Size(shape).numel() and _apart(boxes)):
                raise ValueError(
                    f"{folder} does not hold all of {name!r}: its pieces have {held} of {torch.Size(shape).numel()} "
                    f"numbers, or overlap. Copy the files of every rank, of one step, into the folder"
                )


def _apart(boxes: dict[tuple[int, ...], tuple[int, ...]]) -> bool:
    """Whether no two boxes overlap."""
    found = [one for one in boxes.items() if torch.Size(one[1]).numel()]
    if not found or not found[0][0]:
        return True
    cut = next((axis for axis in range(len(found[0][0])) if len({start[axis] for start, _ in found}) > 1), 0)
    found.sort(key=lambda one: one[0][cut])
    for at, (start, shape) in enumerate(found):
        for other, size in found[at + 1 :]:
            if other[cut] >= start[cut] + shape[cut]:
                break  # so do all that follow
            if all(a < c + d and c < a + b for a, b, c, d in zip(start, shape, other, size, strict=True)):
                return False
    return True
