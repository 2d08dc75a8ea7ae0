"""Where a neuron's numbers lie: slots (one tensor's share), blocks (an MLP) and layouts (a model's MLPs).

A *slot* brings one tensor to ``[neuron, ...]`` with an einops pattern that only splits and permutes, so that on a
live tensor it is a view and writing rows is writing the model. Patterns read like this::

    n d -> n d               gate and up of most models: neuron n is row n
    d n -> n d               down, and GPT-2's Conv1D: neuron n is column n
    (g n) d -> n g d         gate and up fused in one tensor, gate first
    e (g n) d -> (e n) g d   the same for stacked experts
    e d (n g) -> (e n) g d   gate and up interleaved and transposed

``n`` counts neurons, ``e`` experts, ``g`` the parts that share a tensor; neuron i of expert e has the index e·I + i.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch
from einops import rearrange
from torch import Tensor


@dataclass(frozen=True)
class Slot:
    """The numbers of one part (gate, up, down, a bias) of a run of neurons, inside one tensor.

    Args:
        part: "gate", "up", "down", or "gate.bias" / "up.bias".
        tensor: the tensor's name in its mapping (a state dict, a checkpoint's index).
        pattern: einops pattern from the tensor to ``[neuron, ...]`` (see the module's docstring).
        shape: the shape that the tensor has to have.
        g: which of the ``g`` parts that share the tensor this slot is; None where the pattern has no ``g``.
        parts: how many parts share the tensor (the size of the axis ``g``).
        start: index in the block of this slot's first neuron (e·I for the tensors of expert e on disk).
    """

    part: str
    tensor: str
    pattern: str
    shape: tuple[int, ...]
    g: int | None = None
    parts: int = 1
    start: int = 0

    @cached_property
    def _split(self) -> tuple[str, list[str]]:
        """The pattern without its join, and the names of the axes it leads to."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        axes = right.replace("(", "").replace(")", "").split()
        return f"{left} -> {' '.join(axes)}", axes

    @property
    def stacked(self) -> bool:
        """Whether the tensor stacks experts: its rows are addressed by (expert, neuron)."""
        return self._split[1][0] == "e"

    def view(self, tensor: Tensor) -> Tensor:
        """The slot's rows as a view of ``tensor``: ``[neuron, ...]``, or ``[expert, neuron, ...]`` where stacked."""
        pattern, axes = self._split
        view = rearrange(tensor, pattern, g=self.parts) if self.g is not None else rearrange(tensor, pattern)
        return view.select(axes.index("g"), self.g) if self.g is not None else view

    @cached_property
    def _rows(self) -> torch.Size:
        return self.view(torch.empty(self.shape, device="meta")).shape

    @property
    def neurons(self) -> int:
        """How many neurons the slot holds."""
        return self._rows[:2].numel() if self.stacked else self._rows[0]

    @property
    def stop(self) -> int:
        """Index in the block just after the slot's last neuron."""
        return self.start + self.neurons

    @property
    def width(self) -> int:
        """Numbers per neuron."""
        return self._rows.numel() // max(self.neurons, 1)

    def _at(self, index: Tensor) -> tuple[Tensor, ...]:
        return (index // self._rows[1], index % self._rows[1]) if self.stacked else (index,)

    def take(self, tensor: Tensor, index: Tensor) -> Tensor:
        """A copy of the rows at ``index`` (int64, counted from the slot's own first neuron): ``[len(index), ...]``."""
        return self.view(tensor)[self._at(index.to(tensor.device))]

    def put(self, tensor: Tensor, index: Tensor, rows: Tensor) -> None:
        """Write ``rows`` (``[len(index), ...]``, the tensor's dtype and device) at ``index``, in place."""
        self.view(tensor)[self._at(index.to(tensor.device))] = rows


@dataclass(frozen=True)
class Block:
    """One MLP: its name (the module's path), how many neurons it has and where they lie.

    ``consumer`` is the path of the module whose input is the neurons' activations (down; the experts' module in a
    MoE); ``experts`` is 0 in a dense MLP; ``found`` says in words how the block was recognised.
    """

    name: str
    neurons: int
    slots: tuple[Slot, ...]
    consumer: str
    experts: int = 0
    found: str = "given"

    def of(self, part: str) -> tuple[Slot, ...]:
        """The slots of one part, in the order of their neurons."""
        return tuple(slot for slot in self.slots if slot.part == part)

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the block's parts, in the order in which they make up a neuron's vector."""
        return tuple(dict.fromkeys(slot.part for slot in self.slots))

    @property
    def width(self) -> int:
        """Parameters per neuron."""
        return sum(self.of(part)[0].width for part in self.parts)

    def rows(self, tensors: Mapping[str, Tensor], part: str, index: Tensor) -> Tensor:
        """A copy of one part of the neurons at ``index`` (sorted, int64, on the CPU): ``[len(index), ...]``."""
        pieces = []
        for slot in self.of(part):
            low, high = torch.searchsorted(index, torch.tensor([slot.start, slot.stop])).tolist()
            if low < high:
                pieces.append(slot.take(tensors[slot.tensor], index[low:high] - slot.start))
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)


@dataclass(frozen=True)
class Layout(Mapping[str, Block]):
    """The blocks of a model in the model's own layer order: a mapping from block name to ``Block``."""

    blocks: tuple[Block, ...]
    notes: tuple[str, ...] = field(default=())

    @cached_property
    def _by_name(self) -> dict[str, Block]:
        return {block.name: block for block in self.blocks}

    def __getitem__(self, name: str) -> Block:
        return self._by_name[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._by_name)

    def __len__(self) -> int:
        return len(self.blocks)

    def __hash__(self) -> int:
        return hash(self.blocks)

    @property
    def sizes(self) -> dict[str, int]:
        """Neurons per block."""
        return {block.name: block.neurons for block in self.blocks}

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether every tensor that the layout names is in ``tensors`` (names only; no tensor is read)."""
        return all(slot.tensor in tensors for block in self.blocks for slot in block.slots)
