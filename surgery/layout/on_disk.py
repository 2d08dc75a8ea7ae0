"""The neurons of a folder: the same blocks as in memory, under the names and in the shapes that the files have."""

from __future__ import annotations

import re
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from surgery.compat import as_loaded, as_saved, auto_class
from surgery.layout.finding import WAY_OUT, Shapes, Spec, find_layout, spec_layout
from surgery.layout.slots import Block, Layout, Slot
from surgery.tables import briefly, read_json
from surgery.units import Units

_AXES = r"\([^)]*\)|\w+"


def folder_layout(folder: Path, shapes: Shapes, spec: Spec | None = None, units: Units = "mlp") -> Layout:
    """Where the neurons (or other units) of a folder of safetensors lie, by the names and shapes on disk.

    Args:
        folder: holds ``config.json``; no code in it is ever run.
        shapes: tensor name → shape, as the shards' headers say.
        spec: your own layout (see ``find_layout``), over the names on disk.
        units: which kinds of unit (see ``find_layout``).

    Raises:
        ValueError: a tensor is missing or has another shape than the config says, or the neurons can't be found.

    Source: ours.
    """
    if spec is not None:
        return spec_layout(spec, shapes)
    model = meta_model(folder, shapes)
    live = find_layout(model, units=units)
    try:
        names = as_loaded(model, shapes)
    except ValueError as error:
        raise ValueError(f"{folder}: {error}") from error
    converted: dict[str, list[Slot]] = {}
    blocks = []
    for block in live.blocks:
        slots: list[Slot] = []
        for slot in block.slots:
            name, parts = names.whole.get(slot.tensor), names.parts.get(slot.tensor)
            if parts and (name is None or shapes[name] != slot.shape):
                if _key(slot) not in converted:
                    _on_disk(model, block, converted)
                there = [(one, parts.get(names.spelt(one.tensor), one.tensor)) for one in converted[_key(slot)]]
            else:
                there = [(slot, name or slot.tensor)]
            slots += [_at(one, name, shapes, folder) for one, name in there]
        blocks.append(replace(block, slots=tuple(slots)))
    return Layout(tuple(blocks), live.notes)


def _at(slot: Slot, name: str, shapes: Shapes, folder: Path) -> Slot:
    if name not in shapes:
        raise ValueError(f"{folder} has no tensor {name!r}, which its config.json calls for")
    if shapes[name] != slot.shape:
        raise ValueError(f"{name!r} has the shape {shapes[name]} in {folder}, and its config.json expects {slot.shape}")
    return replace(slot, tensor=name)


def configuration(folder: Path, shapes: Shapes) -> Any:
    """What a folder's ``config.json`` says, as transformers reads it; no code that it brings or names is ever run.

    Raises:
        ValueError: it can't be read, counts more than the folder's tensors, has a model type that transformers does
            not know, or names code on the hub.
    """
    import transformers

    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{folder} has no config.json: copy the model's there, with its tokenizer (a training checkpoint may have "
            f"them in huggingface/). {WAY_OUT}, or pass the model live"
        )
    try:
        stored = read_json(folder / "config.json", {})
        check_counts(stored, shapes)
        if not (why := _unknown(stored)):
            return transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # whatever a damaged configuration makes transformers raise
        why = briefly(error)
    raise ValueError(
        f"{folder}/config.json can't be read as a model's configuration: {why}. {WAY_OUT}, or pass the model live"
    )


def _unknown(stored: dict[str, Any]) -> str:
    """Why transformers is not asked to read a configuration; empty where it is."""
    import transformers

    kind = stored.get("model_type")
    if not isinstance(kind, str):
        return "it names no model_type"  # transformers would guess one from the folder's name
    if kind not in transformers.CONFIG_MAPPING:
        own = ", and the folder's own code is never run" * ("auto_map" in stored)
        return f"transformers {transformers.__version__} knows no model type {kind[:60]!r}{own}"
    code = next(_kernels(stored), None)
    return f"it asks for {code[:60]!r}, code on the hub, which is never run" if code else ""


def _kernels(stored: Any, named: bool = False) -> Iterator[str]:
    """The repositories in a configuration that name an implementation of attention or of experts."""
    if isinstance(stored, str) and named and "/" in stored:
        yield stored
    elif isinstance(stored, dict):
        for key, value in stored.items():
            yield from _kernels(value, named or key.endswith("_implementation"))


def class_of(folder: Path, shapes: Shapes) -> tuple[Any, Any]:
    """A folder's configuration, and the auto class of transformers that reads the folder's model.

    Raises:
        ValueError: the configuration can't be read, or transformers has no model of that kind.
    """
    import transformers

    config = configuration(folder, shapes)
    kind = auto_class(config)
    if kind is None:
        raise ValueError(f"transformers can't build the model of {folder}, a {type(config).__name__}. {WAY_OUT}")
    return config, getattr(transformers, kind)


_LAYERS = re.compile(r"(num|n)_(hidden_)?layers?|(num_)?(en|de)coder_layers|depth")
_MANY = re.compile(r"(num|n)_(\w+_)?(experts|labels|heads|groups)")


def check_counts(stored: Any, shapes: Shapes) -> None:
    """Raise ``ValueError`` where a configuration counts more than the folder holds: to build that would take hours."""
    most = max(4096, *(size for shape in shapes.values() for size in shape))
    for key, value in stored.items():
        limit = len(shapes) if _LAYERS.fullmatch(key) else most if _MANY.fullmatch(key) else None
        if isinstance(value, dict):
            check_counts(value, shapes)
        elif limit is not None and isinstance(value, int) and value > limit:
            raise ValueError(f"it calls for {key} = {value}, and the folder's {len(shapes)} tensors are not as many")


def meta_model(folder: Path, shapes: Shapes) -> Any:
    """A folder's model on the meta device: its modules and shapes, without numbers.

    Raises:
        ValueError: the configuration can't be read, or transformers can't build the model.
    """
    config, kind = class_of(folder, shapes)
    try:
        with torch.device("meta"):
            return kind.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever sizes that are none make transformers and torch raise
        raise ValueError(f"transformers can't build the model of {folder}: {briefly(error)}. {WAY_OUT}") from error


def _on_disk(model: Any, block: Block, found: dict[str, list[Slot]]) -> None:
    """Add to ``found`` the slots on disk of a block's stacked tensors, read off transformers' own conversion.

    Marker tensors that number their neurons (the hidden axis is cut to 2) go through the conversion that
    ``save_pretrained`` uses; what comes out has the names on disk, and its numbers say which neurons it holds.
    """
    owners, markers, base = [], {}, 0
    for tensor in dict.fromkeys(slot.tensor for slot in block.slots):
        slots = [slot for slot in block.slots if slot.tensor == tensor]
        owners.append((base, slots))
        markers[tensor] = _marker(slots[0]) + base
        base += markers[tensor].numel()
    marked = [(start, [_Marked(slot, _marker(slot)) for slot in slots]) for start, slots in owners]
    starts = [start for start, _ in owners]
    for name, numbers in as_saved(model, markers).items():
        start, those = marked[bisect_right(starts, int(numbers.flatten()[0])) - 1]
        for one in those:
            if (there := _read(name, numbers - start, one)) is not None:
                found.setdefault(_key(one.slot), []).append(there)
    for slot in block.slots:
        parts = sorted(found.get(_key(slot), []), key=lambda part: part.start)
        if [part.start for part in parts] != [0, *accumulate(part.neurons for part in parts)][:-1] or (
            sum(part.neurons for part in parts) != slot.neurons
        ):
            raise ValueError(f"the names on disk of {slot.tensor} are not certain. {WAY_OUT}")
        found[_key(slot)] = parts


def _key(slot: Slot) -> str:
    return f"{slot.part}:{slot.tensor}"


def _axes(slot: Slot) -> list[tuple[str, int]]:
    """The axes of the slot's tensor as its pattern names them, with their sizes."""
    return list(zip(re.findall(_AXES, slot.pattern.split("->")[0]), slot.shape, strict=True))


def _marker(slot: Slot) -> Tensor:
    """Numbers 0, 1, … in the shape of the slot's tensor with its hidden axis cut to 2.

    Two, not one: transformers 5.17 squeezes what it splits, and an axis of size 1 would be gone with its place.
    """
    shape = [2 if axis == "d" else size for axis, size in _axes(slot)]
    return torch.arange(torch.Size(shape).numel(), dtype=torch.int32).reshape(shape)


@dataclass(frozen=True)
class _Marked:
    """A slot and its marker."""

    slot: Slot
    marker: Tensor

    @cached_property
    def own(self) -> Tensor:
        """The marker's neurons: [neuron, 2], or [neuron] of a bias."""
        slot = self.slot
        small = Slot(slot.part, slot.tensor, slot.pattern, tuple(self.marker.shape), slot.g, slot.parts)
        return small.view(self.marker).flatten(0, int(slot.stacked))

    @cached_property
    def neuron(self) -> Tensor:
        """Number → the neuron that begins with it; -1 where none does. A layer has as many tensors as experts."""
        found = torch.full((self.marker.numel(),), -1)
        found[self.own.reshape(len(self.own), -1)[:, 0].long()] = torch.arange(len(self.own))
        return found


def _read(name: str, numbers: Tensor, marked: _Marked) -> Slot | None:
    """The slot that a converted marker is, if it holds neurons of the slot's part."""
    slot, marker, own = marked.slot, marked.marker, marked.own
    if torch.equal(numbers, marker):
        return replace(slot, tensor=name)
    if numbers.ndim > 1 and torch.equal(numbers.mT, marker):
        left, right = slot.pattern.split("->")
        axes = re.findall(_AXES, left)
        pattern = f"{' '.join([*axes[:-2], axes[-1], axes[-2]])} ->{right}"
        return replace(slot, tensor=name, pattern=pattern, shape=(*slot.shape[:-2], slot.shape[-1], slot.shape[-2]))
    width = next((size for axis, size in _axes(slot) if axis == "d"), 0)
    if numbers.ndim != own.ndim:
        return None
    for pattern, rows in (("n d -> n d", numbers), ("d n -> n d", numbers.mT)) if width else (("n -> n", numbers),):
        if rows.shape[1:] != own.shape[1:] or not 0 <= (begins := int(rows.flatten()[0])) < marker.numel():
            continue
        first = int(marked.neuron[begins])
        if first >= 0 and torch.equal(own[first : first + len(rows)], rows):
            sizes = {"n": len(rows), "d": width}
            shape = tuple(sizes[axis] for axis in pattern.split("->")[0].split())
            return Slot(slot.part, name, pattern, shape, start=first)
    return None
