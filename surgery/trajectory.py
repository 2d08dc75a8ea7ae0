"""A trajectory: the checkpoints of one model in training order, and what changed between them."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from surgery.checkpoint import Checkpoint, Source, State, tensors_of
from surgery.layout import find_layout
from surgery.slots import Block, Layout
from surgery.stored import folder_layout
from surgery.units import Units, kinds_of, noun


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
        stages: every checkpoint in training order by name, where there are more than three (see ``through``).

    Each checkpoint is a folder, a hub id in the local cache, an ``nn.Module`` or a mapping of tensors.

    Source: the paper, Section 5 (θ0, θA, θB).
    """

    base: Source | None = None
    earlier: Source | None = None
    later: Source | None = None
    layout: Layout | None = field(default=None, repr=False)
    model: nn.Module | None = field(default=None, repr=False)
    units: Units = "mlp"
    stages: Mapping[str, Source] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        kinds = kinds_of(self.units)
        if self.layout is not None and kinds not in (("mlp",), self.layout.units):
            raise ValueError(
                f"units={self.units!r}, and the layout given has {noun(self.layout.units)}: pass one of both"
            )

    @classmethod
    def through(
        cls, stages: Mapping[str, Source], *, earlier: str | None = None, later: str | None = None, **settings: Any
    ) -> Trajectory:
        """A trajectory of any number of checkpoints, by name in training order.

        Args:
            stages: name → checkpoint, like {"base": ..., "code": ..., "math": ..., "qa": ..., "cw": ...}. A stage's
                update is its checkpoint less the one before.
            earlier: which of them a rollback goes back to (default: the one before ``later``).
            later: which of them is rolled back (default: the last).
            settings: ``layout``, ``model`` and ``units``, as in ``Trajectory``.

        Raises:
            ValueError: fewer than two stages, a name that is not among them, or ``later`` not after ``earlier``.

        >>> Trajectory.through({"base": "runs/base", "math": "runs/math", "qa": "runs/qa"})
        Trajectory(base='runs/base', earlier='runs/math', later='runs/qa', units='mlp')
        """
        names = list(stages)
        if len(names) < 2:
            raise ValueError(f"a trajectory has two or more checkpoints, got {names}")
        if unknown := {earlier, later} - {None, *names}:
            raise ValueError(f"no stage is called {unknown.pop()!r}: expected one of {', '.join(names)}")
        last = names.index(later) if later is not None else len(names) - 1
        first = names.index(earlier) if earlier is not None else last - 1
        if not 0 <= first < last:
            raise ValueError(f"{later or names[last]!r} has to come after {earlier or 'another'!r} in {names}")
        base = stages[names[first - 1]] if first else None
        return cls(base, stages[names[first]], stages[names[last]], stages=dict(stages), **settings)

    @property
    def checkpoints(self) -> dict[str, Source]:
        """Every checkpoint by name, in training order: the stages, or what there is of base, earlier and later."""
        if self.stages is not None:
            return dict(self.stages)
        given = {"base": self.base, "earlier": self.earlier, "later": self.later}
        return {name: source for name, source in given.items() if source is not None}

    def steps(self) -> dict[str, Trajectory]:
        """Each stage as a trajectory of its own, by the name of the checkpoint it led to: earlier is the one before."""
        found = self.checkpoints
        bases = [None, *found.values()]
        return {
            after: Trajectory(base, found[before], found[after], layout=self.layout, units=self.units)
            for base, (before, after) in zip(bases, pairwise(found), strict=False)
        }

    def opened(self) -> dict[str, Weights]:
        """Every checkpoint by name, in training order, opened and found to be of one model."""
        names, sources = list(self.checkpoints), list(self.checkpoints.values())
        last = open_weights(sources[-1], self.layout, units=self.units)
        return dict(zip(names, [*(open_weights(one, self.layout, last) for one in sources[:-1]), last], strict=True))

    def weights(self, *names: str) -> list[Weights]:
        """The checkpoints of those names, opened: "base", "earlier" and "later" are roles, all others stages."""
        later = open_weights(self.source("later"), self.layout, units=self.units)
        return [later if n == "later" else open_weights(self.source(n), self.layout, later) for n in names]

    def source(self, name: str) -> Source:
        """The checkpoint of that name, as it was given; ValueError where it was not."""
        if name not in ("base", "earlier", "later"):
            return self._stage(name)
        source: Source | None = getattr(self, name)
        if source is None:
            raise ValueError(f"this needs the {name} checkpoint: pass Trajectory({name}=...)")
        return source

    def _stage(self, name: str) -> Source:
        if name not in (self.stages or {}):
            raise ValueError(f"no stage is called {name!r}: expected one of {', '.join(self.checkpoints)}")
        assert self.stages is not None
        return self.stages[name]

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
