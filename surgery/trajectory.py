"""A trajectory: the checkpoints of one model in training order, and what changed between them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoint import Checkpoint, Source, State, tensors_of
from surgery.layout import find_layout
from surgery.slots import Block, Layout
from surgery.stored import folder_layout
from surgery.units import Units, kinds_of, noun

CHUNK = 1 << 20  # bytes of float32 that one chunk of a part may take: it stays in the processor's cache


@dataclass(frozen=True)
class Weights:
    """A source of weights, opened: its tensors and where its neurons lie."""

    tensors: Mapping[str, Tensor]
    layout: Layout
    name: str


def open_weights(
    source: Source, layout: Layout | None = None, like: Weights | None = None, units: Units = "mlp"
) -> Weights:
    """Open a folder, module or mapping and find its neurons or other units.

    Args:
        source: a folder, hub id, ``nn.Module`` or mapping of tensors.
        layout: the user's own layout; it wins over everything found.
        like: weights of the same model: their layout serves where the names are the same; its units are looked for.
        units: which kinds of unit to find (see ``find_layout``).

    Raises:
        ValueError: the units can't be found, or are not those of ``like``; a tensor outside the MLPs has another
            shape there. Outside the layers another number of rows (a padded or extended vocabulary) is only a
            warning: such tensors are never touched. Other dtypes are fine, and so are tensors that only one has.
    """
    tensors = tensors_of(source)
    name = _name(source)
    kinds = kinds_of(units) if like is None else like.layout.units
    found = layout or _layout(tensors, like, name, kinds)
    if like is not None and found.sizes != like.layout.sizes:
        raise ValueError(_differs(found.sizes, name, like.layout.sizes, like.name))
    _check_shapes(tensors, found, name)
    if like is not None:
        _check_alike(tensors, found, name, like)
    return Weights(tensors, found, name)


def _layout(tensors: Mapping[str, Tensor], like: Weights | None, name: str, kinds: tuple[str, ...]) -> Layout:
    if isinstance(own := getattr(tensors, "layout", None), Layout):
        later: Any = getattr(tensors, "later", None)  # a rolled-back view: its mask may be over other units
        return own if own.units == kinds or later is None else _layout(later.tensors, like, name, kinds)
    if isinstance(tensors, State):
        return find_layout(tensors.module, units=kinds)
    if like is not None and like.layout.fits(tensors) and _kind(tensors) in (None, _kind(like.tensors)):
        return like.layout  # the same names alone are not enough: a gated MLP has those of an ungated one
    if isinstance(tensors, Checkpoint) and (tensors.folder / "config.json").exists():
        files = [tensors.folder / file for file in ("config.json", *tensors.headers)]
        state = tuple((file.stat().st_size, file.stat().st_mtime_ns) for file in files)
        return _folder_layout(tensors.folder, state, kinds)
    if like is not None:
        slots = (slot.tensor for block in like.layout.blocks for slot in block.slots)
        missing = [tensor for tensor in slots if tensor not in tensors]
        raise ValueError(f"{name} lacks {len(missing)} tensors that {like.name} has, the first of them {missing[0]!r}")
    raise ValueError(f"where the neurons of {name} lie can't be told from bare tensors: pass layout=")


def _kind(tensors: Mapping[str, Tensor]) -> str | None:
    """The model type that a folder's or a live model's configuration names; None where there is no configuration."""
    if isinstance(tensors, State):
        return getattr(getattr(tensors.module, "config", None), "model_type", None)
    if not isinstance(tensors, Checkpoint) or not (tensors.folder / "config.json").exists():
        return None
    try:
        return str(json.loads((tensors.folder / "config.json").read_text(encoding="utf-8"))["model_type"])
    except (ValueError, KeyError, TypeError):
        return "unreadable"


@lru_cache(maxsize=8)
def _folder_layout(folder: Path, _state: tuple[tuple[int, int], ...], kinds: tuple[str, ...]) -> Layout:
    """The layout of a folder, found once for as long as its files stay as they are (seconds for a large MoE)."""
    return folder_layout(folder, Checkpoint(folder).shapes, units=kinds)


def _check_shapes(tensors: Mapping[str, Tensor], layout: Layout, name: str) -> None:
    shapes = tensors.shapes if isinstance(tensors, Checkpoint) else None
    for slot in (slot for block in layout.blocks for slot in block.slots):
        if slot.tensor not in tensors:
            raise ValueError(f"{name} has no tensor {slot.tensor!r}")
        shape = shapes[slot.tensor] if shapes else tuple(tensors[slot.tensor].shape)
        if shape != slot.shape:
            raise ValueError(f"{slot.tensor!r} has the shape {shape} in {name}, expected {slot.shape}")


def _check_alike(tensors: Mapping[str, Tensor], layout: Layout, name: str, like: Weights) -> None:
    for block in layout.blocks:
        ours, theirs = _widths(block), _widths(like.layout[block.name])
        if ours != theirs:
            raise ValueError(
                f"{name} and {like.name} are different models: a neuron of {block.name!r} is made of {ours} numbers in "
                f"the one and {theirs} in the other"
            )
    in_mlp = {slot.tensor for one in (layout, like.layout) for block in one.blocks for slot in block.slots}
    mine, its = _shapes(tensors, in_mlp), _shapes(like.tensors, in_mlp)
    other = [tensor for tensor in mine if tensor in its and mine[tensor] != its[tensor]]
    what = {
        tensor: f"{tensor!r} has the shape {mine[tensor]} in {name}, {its[tensor]} in {like.name}" for tensor in other
    }
    for tensor in other:
        if re.search(r"\.\d+\.", tensor) or mine[tensor][1:] != its[tensor][1:]:  # in a layer, or not only longer
            raise ValueError(f"{what[tensor]}: they are different models")
    if other:
        warnings.warn(
            f"{what[other[0]]}: another vocabulary, or another padding of it. It lies outside the MLPs and stays "
            f"untouched; the same token ids have to mean the same in both",
            stacklevel=4,
        )


def _widths(block: Block) -> dict[str, int]:
    return {part: block.of(part)[0].width for part in block.parts}


def _shapes(tensors: Mapping[str, Tensor], without: set[str]) -> dict[str, tuple[int, ...]]:
    shapes = tensors.shapes if isinstance(tensors, Checkpoint) else None
    return {name: shapes[name] if shapes else tuple(tensors[name].shape) for name in tensors if name not in without}


def _differs(ours: Mapping[str, int], name: str, theirs: Mapping[str, int], other: str) -> str:
    for block in dict.fromkeys([*ours, *theirs]):
        if ours.get(block) != theirs.get(block):
            return (
                f"{name} and {other} are different models: block {block!r} has {ours.get(block, 'no')} neurons in the "
                f"one and {theirs.get(block, 'none')} in the other"
            )
    return f"{name} and {other} are different models: their blocks come in another order"


def _name(source: Source) -> str:
    if isinstance(source, nn.Module):
        return f"the live {type(source).__name__}"
    folder = getattr(source, "folder", None)
    return str(folder or (source if not isinstance(source, Mapping) else "the mapping"))


@dataclass(frozen=True)
class Trajectory:
    """Three checkpoints of one model in training order.

    Args:
        base: before the earlier domain was trained; only C needs it.
        earlier: after the earlier domain: what a rollback goes back to.
        later: after the later domain: what is rolled back.
        layout: where the neurons lie, if surgery can't find them by itself; it wins over ``units``.
        model: the later model, if it is live already; ``load`` returns it instead of reading the folder again.
        units: what scores and masks of this trajectory are over: "mlp" (default), "kv_group", "query_head",
            "value_channel", or a tuple of "mlp" and one of the others (see ``find_layout``).

    Each checkpoint is a folder, a hub id in the local cache, an ``nn.Module`` or a mapping of tensors.

    Source: the paper, Section 5 (θ0, θA, θB).
    """

    base: Source | None = None
    earlier: Source | None = None
    later: Source | None = None
    layout: Layout | None = field(default=None, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    units: Units = "mlp"

    def __post_init__(self) -> None:
        kinds = kinds_of(self.units)
        if self.layout is not None and kinds not in (("mlp",), self.layout.units):
            raise ValueError(
                f"units={self.units!r}, and the layout given has {noun(self.layout.units)}: pass one of both"
            )

    def weights(self, *names: str) -> list[Weights]:
        """The checkpoints of those names ("base", "earlier", "later"), opened and found to be of one model."""
        later = open_weights(self.source("later"), self.layout, units=self.units)
        return [later if n == "later" else open_weights(self.source(n), self.layout, later) for n in names]

    def source(self, name: str) -> Source:
        """The checkpoint of that name, as it was given; ValueError where it was not."""
        source: Source | None = getattr(self, name)
        if source is None:
            raise ValueError(f"this needs the {name} checkpoint: pass Trajectory({name}=...)")
        return source

    def load(self, device: Any = None, dtype: Any = None) -> nn.Module:
        """The later model, live and in eval mode.

        Args:
            device: where to put it (default: where it is, or the CPU).
            dtype: torch dtype (default: the checkpoint's own).
        """
        found = self.model if self.model is not None else self.later
        if isinstance(found, nn.Module):
            return found.to(device=device, dtype=dtype).eval() if (device or dtype) else found
        if not isinstance(found, Checkpoint) and isinstance(found, Mapping):
            raise ValueError("a bare mapping of tensors has no forward pass: pass a folder or an nn.Module as later")
        if found is None:
            raise ValueError("there is no later checkpoint to load: pass Trajectory(later=...)")
        from transformers import AutoModelForCausalLM

        folder = found.folder if isinstance(found, Checkpoint) else Checkpoint(found).folder
        model: nn.Module = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype or "auto", local_files_only=True)
        return (model.to(device) if device else model).eval()


def pieces(block: Block, part: str, others: list[Block], chunk: int = CHUNK) -> Iterator[tuple[int, int]]:
    """Runs of neurons of one part that every layout holds in one tensor, each at most ``chunk`` bytes of float32."""
    slots = [slot for one in (block, *others) for slot in one.of(part)]
    cuts = sorted({edge for slot in slots for edge in (slot.start, slot.stop)})
    step = max(1, chunk // (4 * max(slots[0].width, 1)))
    for low, high in pairwise(cuts):
        for start in range(low, high, step):
            yield start, min(start + step, high)


def reading(weights: Weights, name: str, part: str) -> Callable[[int, int], Tensor]:
    """A function that reads neurons start…stop of one part as float32 ``[neuron, width]`` on the CPU."""
    views: dict[int, Tensor] = {}  # of the slot that was read last: making a view takes longer than reading a chunk

    def read(start: int, stop: int) -> Tensor:
        slot = next(s for s in weights.layout[name].of(part) if s.start <= start < s.stop)
        if slot.start not in views:
            views.clear()
            view = slot.view(weights.tensors[slot.tensor]).detach()
            views[slot.start] = view.flatten(1, slot.stacked) if slot.stacked else view
        view, first, last = views[slot.start], start - slot.start, stop - slot.start
        if slot.stacked:
            rows = view.shape[1]
            one, other = divmod(first, rows)[0], (last - 1) // rows
            view = view[one : other + 1].flatten(0, 1)[first - one * rows : last - one * rows]
        else:
            view = view[first:last]
        return view.to("cpu", torch.float32).reshape(stop - start, -1)

    return read


def _check_finite(weights: Weights, name: str, part: str, start: int, read: Tensor) -> None:
    if bad := int((~read.isfinite()).sum()):
        slot = next(s for s in weights.layout[name].of(part) if s.start <= start < s.stop)
        raise ValueError(f"{slot.tensor!r} of {weights.name} holds {bad} NaN or infinite numbers")


def displacements(run: Trajectory, *names: str) -> Iterator[tuple[str, int, int, tuple[Tensor, ...]]]:
    """What each step of training changed, chunk by chunk: ``(block, start, stop, (δ, ...))``.

    Args:
        run: the trajectory.
        names: the checkpoints in order: ("earlier", "later") gives δB, ("base", "earlier", "later") gives δA and δB.

    Yields:
        For one part of neurons start…stop of a block: the differences, float32 ``[neuron, width]``. Every part of
        every neuron comes exactly once, its row contiguous; memory is bounded by ``CHUNK`` per checkpoint. NaN and
        infinite weights come as they are (``check_finite``).
    """
    opened = run.weights(*names)
    for name, block in opened[-1].layout.items():
        others = [one.layout[name] for one in opened[:-1]]
        for part in block.parts:
            readers = [reading(one, name, part) for one in opened]
            for start, stop in pieces(block, part, others):
                read = [reader(start, stop) for reader in readers]
                yield name, start, stop, tuple((b - a).contiguous() for a, b in pairwise(read))


def check_finite(run: Trajectory, *names: str) -> None:
    """Find the NaN or infinite numbers that made a score so: costs a second reading, so it is asked for only then.

    Raises:
        ValueError: there are some among the units' weights; the message names the first tensor.
    """
    for one in run.weights(*names):
        for name, block in one.layout.items():
            for part in block.parts:
                read = reading(one, name, part)
                for start, stop in pieces(block, part, []):
                    _check_finite(one, name, part, start, read(start, stop))
