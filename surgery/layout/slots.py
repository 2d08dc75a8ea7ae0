"""Where a neuron's numbers lie: slots (one tensor's share), blocks (an MLP, an attention) and layouts (a model's).

A *slot* brings one tensor to ``[neuron, ...]`` with an einops pattern that only splits and permutes, so that on a
live tensor it is a view and writing rows is writing the model. Patterns read like this::

    n d -> n d               gate and up of most models: neuron n is row n
    d n -> n d               down, and GPT-2's Conv1D: neuron n is column n
    (g n) d -> n g d         gate and up fused in one tensor, gate first
    e (g n) d -> (e n) g d   the same for stacked experts
    e d (n g) -> (e n) g d   gate and up interleaved and transposed
    (k r d) m -> k r d m     q of a KV group: the d rows of each of its r query heads
    m (k r d) -> (k d) r m   o of a value channel: channel d of group k, in all of the group's heads

What comes first on the right counts neurons, or the units that stand in their place; the rest is what each is made
of. ``g`` counts the parts that share a tensor. Neuron i of expert e has the index e·I + i, and so on.
"""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from surgery.devices import joined
from surgery.layout.boxes import Boxes, Lying, lying
from surgery.layout.sharding import is_sharded, local, places_in
from surgery.units import kind_of, units_in


@dataclass(frozen=True)
class Slot:
    """The numbers of one part (gate, up, down, a bias) of a run of neurons, inside one tensor.

    Args:
        part: "gate", "up", "down", "gate.bias", "up.bias"; in attention "q", "k", "v", "o", "q.bias" and the like.
        tensor: the tensor's name in its mapping (a state dict, a checkpoint's index).
        pattern: einops pattern from the tensor to ``[neuron, ...]`` (see the module's docstring).
        shape: the shape that the tensor has to have.
        g: which of the ``g`` parts that share the tensor this slot is, or a run (start, stop) of them that stays an
            axis; None where the pattern has no ``g``.
        parts: how many parts share the tensor (the size of the axis ``g``).
        start: index in the block of this slot's first neuron (e·I for the tensors of expert e on disk).
        sizes: (axis, size) of axes that the pattern splits.
        rows: (start, stop) of the only rows of the tensor that the pattern is about (along the axis of the neurons).
    """

    part: str
    tensor: str
    pattern: str
    shape: tuple[int, ...]
    g: int | tuple[int, int] | None = None
    parts: int = 1
    start: int = 0
    sizes: tuple[tuple[str, int], ...] = ()
    rows: tuple[int, int] | None = None

    @cached_property
    def _split(self) -> tuple[str, list[str], int]:
        """The pattern without its join, the names of the axes it leads to, and how many of them count neurons."""
        left, right = (side.strip() for side in self.pattern.split("->"))
        first = right[1 : right.index(")")] if right.startswith("(") else right.split()[0]
        axes = right.replace("(", "").replace(")", "").split()
        return f"{left} -> {' '.join(axes)}", axes, len(first.split())

    @property
    def stacked(self) -> int:
        """How many axes beyond the first address a neuron: 1 where experts are stacked, for (expert, neuron)."""
        return self._split[2] - 1

    @property
    def dimension(self) -> int:
        """The dimension of the tensor along which its neurons lie (those of one expert)."""
        left = re.findall(r"\([^)]*\)|\w+", self.pattern.split("->")[0])
        neuron = self._split[1][self.stacked]
        return next(at for at, axis in enumerate(left) if neuron in axis.strip("()").split())

    def view(self, tensor: Tensor) -> Tensor:
        """The slot's rows as a view of ``tensor``: ``[neuron, ...]``, or ``[expert, neuron, ...]`` where stacked."""
        if is_sharded(tensor):
            raise ValueError(
                f"{self.tensor!r} is sharded over several processes, and all of it is needed here: pass the model's "
                f"folder, or load the model in one process"
            )
        pattern, axes, _ = self._split
        if self.rows is not None:
            tensor = tensor.narrow(self.dimension, self.rows[0], self.rows[1] - self.rows[0])
        view = rearrange(tensor, pattern, **dict(self.sizes), **({} if self.g is None else {"g": self.parts}))
        if self.g is None:
            return view
        if isinstance(self.g, int):
            return view.select(axes.index("g"), self.g)
        return view.narrow(axes.index("g"), self.g[0], self.g[1] - self.g[0])

    @cached_property
    def _rows(self) -> torch.Size:
        return self.view(torch.empty(self.shape, device="meta")).shape

    @property
    def neurons(self) -> int:
        """How many neurons the slot holds."""
        return self._rows[: 1 + self.stacked].numel()

    @property
    def stop(self) -> int:
        """Index in the block just after the slot's last neuron."""
        return self.start + self.neurons

    @property
    def width(self) -> int:
        """Numbers per neuron."""
        return self._rows.numel() // max(self.neurons, 1)

    @property
    def span(self) -> tuple[int, int]:
        """The positions of the slot's numbers in the part, neuron · width + offset: the first, and the one after."""
        return self.start * self.width, self.stop * self.width

    def _at(self, index: Tensor) -> tuple[Tensor, ...]:
        found: list[Tensor] = []
        for size in reversed(self._rows[1 : 1 + self.stacked]):
            found, index = [index % size, *found], index // size
        return (index, *found)

    def take(self, tensor: Lying, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        """A copy of the rows at ``index`` (int64, counted from the slot's own first neuron): ``[len(index), ...]``.

        With ``offsets`` only those numbers of each row: ``[len(index), len(offsets)]``. Of a sharded tensor this
        process holds those of ``held``.
        """
        found: Tensor = self._home(tensor)[self._places(tensor, index, offsets)]
        shape = self._rows[1 + self.stacked :] if offsets is None else offsets.shape
        return found.reshape(len(index), *shape) if isinstance(tensor, Boxes) else found

    def put(self, tensor: Lying, index: Tensor, rows: Tensor, offsets: Tensor | None = None) -> None:
        """Write ``rows`` (shaped as ``take`` gives them, the tensor's dtype and device) at ``index``, in place."""
        self._home(tensor)[self._places(tensor, index, offsets)] = rows

    def marked(self, index: Tensor, values: Tensor) -> Tensor:
        """Values of the rows at ``index``, where they lie in the tensor, and 0 elsewhere: float32.

        In the tensor's shape, but for the axes that every row takes whole: those have the size 1.
        """
        left, (axes, stacked) = re.findall(r"\([^)]*\)|\w+", self._split[0].split("->")[0]), self._split[1:]
        counted = {"g", *axes[:stacked]}
        whole = [not counted & set(axis.strip("()").split()) for axis in left]
        found = torch.zeros([1 if one else size for one, size in zip(whole, self.shape, strict=True)])
        view = self.view(found)
        view[self._at(index)] = values.float().reshape(-1, *[1] * (view.ndim - stacked))
        return found

    def take_entries(self, tensor: Lying, positions: Tensor) -> Tensor:
        """A copy of single numbers: ``[len(positions)]``; position = neuron · width + offset in the neuron's row."""
        found: Tensor = self._home(tensor)[self._entries(tensor, positions)]
        return found

    def put_entries(self, tensor: Lying, positions: Tensor, values: Tensor) -> None:
        """Write single numbers (the tensor's dtype and device) at those positions, in place."""
        self._home(tensor)[self._entries(tensor, positions)] = values

    def held(self, tensor: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Which neurons of a sharded tensor this process holds, and which numbers of each: pairs (index, offsets).

        One pair, unless the cut between two processes goes through a neuron's own rows (a head of an attention).
        """
        rows, offsets = torch.arange(self.neurons), torch.arange(self.width)
        whole, inside = torch.ones(self.neurons, dtype=torch.bool), torch.ones(self.width, dtype=torch.bool)
        both: list[Tensor] = []  # a dimension along which the numbers of one neuron lie apart
        for at, (along, across) in zip(places_in(tensor), self._apart(rows, offsets), strict=True):
            here = at >= 0
            if across is None and along is not None:
                whole &= here[along]
            elif along is None and across is not None:
                inside &= here[across]
            elif along is not None and across is not None:
                values, back = across.unique(return_inverse=True)
                both.append(here[along[:, None] + values][:, back])
        if not both:
            found = [(rows[whole], offsets[inside])]
        else:
            sorts, which = torch.stack(both).all(0).logical_and(inside).unique(dim=0, return_inverse=True)
            found = [(rows[whole & (which == at)], offsets[one]) for at, one in enumerate(sorts)]
        return [(index, some) for index, some in found if len(index) and len(some)]

    def here(self, tensor: Tensor, positions: Tensor) -> Tensor:
        """Which of some positions of a sharded tensor this process holds: bool ``[len(positions)]``."""
        return torch.stack([at >= 0 for at in self._sharded(tensor, positions)]).all(0)

    def _home(self, tensor: Any) -> Any:
        return tensor if isinstance(tensor, Boxes) else local(tensor) if is_sharded(tensor) else self.view(tensor)

    def _places(self, tensor: Any, index: Tensor, offsets: Tensor | None) -> tuple[Any, ...]:
        """Where rows lie: in the view, in this process's part of a sharded tensor, or in the whole that boxes make."""
        if isinstance(tensor, Boxes):
            return tuple(self._apart(index, torch.arange(self.width) if offsets is None else offsets))
        if not is_sharded(tensor):
            index = index.to(tensor.device)
            if offsets is None:
                return self._at(index)
            return (*self._at(index[:, None]), *self._in_row(offsets.to(tensor.device)))
        offsets = torch.arange(self.width) if offsets is None else offsets
        found = []
        for at, (along, across) in zip(places_in(tensor), self._apart(index, offsets), strict=True):
            if across is None:
                found.append(at[along][:, None])
            else:
                found.append(at[across if along is None else along[:, None] + across])
        return self._checked(tensor, found)

    def _checked(self, tensor: Tensor, places: list[Tensor]) -> tuple[Tensor, ...]:
        if any(bool((one < 0).any()) for one in places):
            raise ValueError(
                f"{self.tensor!r} is sharded over several processes, and this one does not hold what it was asked "
                f"for: pass the model's folder"
            )
        return tuple(one.to(tensor.device) for one in places)

    def _entries(self, tensor: Any, positions: Tensor) -> tuple[Any, ...]:
        """Where single numbers lie (see ``_places``)."""
        if isinstance(tensor, Boxes):
            return tuple((one[torch.unravel_index(positions, self._rows)], None) for one in self._coordinates)
        if is_sharded(tensor):
            return self._checked(tensor, self._sharded(tensor, positions))
        return torch.unravel_index(positions.to(tensor.device), self._rows)

    def _sharded(self, tensor: Tensor, positions: Tensor) -> list[Tensor]:
        at = torch.unravel_index(positions, self._rows)
        return [here[one[at]] for here, one in zip(places_in(tensor), self._coordinates, strict=True)]

    def _in_row(self, offsets: Tensor) -> tuple[Tensor, ...]:
        axes = self._rows[1 + self.stacked :]
        return torch.unravel_index(offsets, axes) if axes else ()

    @cached_property
    def _coordinates(self) -> tuple[Tensor, ...]:
        """For each dimension of the tensor, where in it the view's numbers lie: shaped as the view, and expanded."""
        ranges = torch.meshgrid([torch.arange(size) for size in self.shape], indexing="ij")
        return tuple(self.view(one) for one in ranges)

    def _apart(self, index: Tensor, offsets: Tensor) -> Iterator[tuple[Tensor | None, Tensor | None]]:
        """For each dimension, rows' coordinates as what depends on the row plus the rest; None where it does not."""
        units = 1 + self.stacked
        for one in self._coordinates:
            varies = [step > 0 and size > 1 for step, size in zip(one.stride(), one.shape, strict=True)]
            row: Any = (*self._at(index), *[0] * (one.ndim - units))
            inside: Any = (*[0] * units, *self._in_row(offsets))
            if not any(varies[units:]):
                yield one[row], None
            elif not any(varies[:units]):
                yield None, one[inside]
            else:
                yield one[row], one[inside] - one[(0,) * one.ndim]


@dataclass(frozen=True)
class Block:
    """One MLP or one attention: its name, how many neurons (or other units) it has and where they lie.

    The name is the module's path, with the kind of unit after an attention's: ``model.layers.0.self_attn[kv_group]``.
    ``consumer`` is the path of the module whose input is the neurons' activations (down; the experts' module in a
    MoE; o in attention). ``experts`` is 0 in a dense MLP. ``found`` says in words how the block was recognised.
    ``heard`` is the slot in the consumer's input vector if a unit has several channels of it; if None, channel i is
    neuron i.
    """

    name: str
    neurons: int
    slots: tuple[Slot, ...]
    consumer: str
    experts: int = 0
    found: str = "given"
    heard: Slot | None = None

    @property
    def kind(self) -> str:
        """Which kind of unit it holds: "mlp", "kv_group" or "value_channel"."""
        return kind_of(self.name)

    @property
    def channels(self) -> int:
        """How many channels of the consumer's input belong to it: one per neuron, or several per unit of attention."""
        return self.neurons if self.heard is None else self.heard.shape[0]

    def pooled(self, channels: Tensor) -> Tensor:
        """The mean of ``[channel]`` over the channels of each unit: ``[neuron]`` (a neuron has one channel)."""
        if self.heard is None:
            return channels
        return self.heard.view(channels).flatten(0, self.heard.stacked).reshape(self.neurons, -1).mean(1)

    @cached_property
    def _slots(self) -> dict[str, tuple[Slot, ...]]:
        found: dict[str, list[Slot]] = {}
        for slot in self.slots:
            found.setdefault(slot.part, []).append(slot)
        return {part: tuple(slots) for part, slots in found.items()}

    @cached_property
    def _starts(self) -> dict[str, list[int]]:
        return {part: [slot.start for slot in slots] for part, slots in self._slots.items()}

    def of(self, part: str) -> tuple[Slot, ...]:
        """The slots of one part, in the order of their neurons."""
        return self._slots.get(part, ())

    def _holding(self, part: str, first: int, last: int) -> tuple[Slot, ...]:
        """The slots of one part from that of neuron ``first`` to that of neuron ``last``; the others are not looked at.

        A layer has as many slots as experts.
        """
        starts = self._starts[part]
        return self._slots[part][bisect_right(starts, first) - 1 : bisect_right(starts, last)]

    @property
    def parts(self) -> tuple[str, ...]:
        """The names of the block's parts, in the order in which they make up a neuron's vector."""
        return tuple(self._slots)

    @property
    def width(self) -> int:
        """Parameters per neuron."""
        return sum(self.of(part)[0].width for part in self.parts)

    def cut(self, part: str, index: Tensor) -> Iterator[tuple[Slot, int, int]]:
        """The slots that hold some neurons of one part, each with the run of ``index`` that it holds.

        ``index`` is int64, sorted, on the CPU and not empty.
        """
        for slot in self._holding(part, int(index[0]), int(index[-1])):
            low, high = torch.searchsorted(index, torch.tensor([slot.start, slot.stop])).tolist()
            if low < high:
                yield slot, low, high

    def cut_entries(self, part: str, positions: Tensor) -> Iterator[tuple[Slot, int, int]]:
        """The same for single numbers, at sorted positions neuron · width + offset."""
        width = self.of(part)[0].width
        for slot in self._holding(part, int(positions[0]) // width, int(positions[-1]) // width):
            low, high = torch.searchsorted(positions, torch.tensor(slot.span)).tolist()
            if low < high:
                yield slot, low, high

    def rows(self, tensors: Mapping[str, Tensor], part: str, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        """A copy of one part of the neurons at ``index`` (see ``cut``), or of those ``offsets``: ``[neuron, ...]``."""
        found = self.cut(part, index)
        pieces = [slot.take(lying(tensors, slot.tensor), index[a:b] - slot.start, offsets) for slot, a, b in found]
        return joined(pieces)

    def entries(self, tensors: Mapping[str, Tensor], part: str, positions: Tensor) -> Tensor:
        """A copy of single numbers of one part, at positions as for ``cut_entries``: ``[len(positions)]``."""
        found = self.cut_entries(part, positions)
        pieces = [slot.take_entries(lying(tensors, slot.tensor), positions[a:b] - slot.span[0]) for slot, a, b in found]
        return joined(pieces)


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

    @property
    def units(self) -> tuple[str, ...]:
        """The kinds of unit that its blocks hold, "mlp" first."""
        return units_in(self)

    @property
    def costs(self) -> dict[str, int] | None:
        """Parameters per unit of each block if several kinds share a budget (see ``allocate``); None with one kind."""
        return {block.name: block.width for block in self.blocks} if len(self.units) > 1 else None

    def fits(self, tensors: Mapping[str, Tensor]) -> bool:
        """Whether every tensor that the layout names is in ``tensors`` (names only; no tensor is read)."""
        return all(slot.tensor in tensors for block in self.blocks for slot in block.slots)
