"""Which tensors several checkpoints have in common, and what is said where they have not."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint, State
from surgery.compat import passing_buffers

KINDS = ("attention", "mlp", "norm", "other", "embedding", "head")
_LAYER = re.compile(r"((?:.*?\.)?(\d+))\.(.+)")  # the first number of a name is the layer's; an expert's comes later
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"mlp|ffn|ffwd|feed_?forward|fc|dense|moe|expert|intermediate|output", re.IGNORECASE)
_HEAD = re.compile(r"head|embed_out|cls", re.IGNORECASE)
_EMBEDDING = re.compile(r"emb|wte|wpe|project_(in|out)", re.IGNORECASE)


@dataclass(frozen=True)
class Place:
    """The path of a tensor's layer ("model.layers.0", None outside), its kind, and the path of its module."""

    layer: str | None
    kind: str
    module: str

    @property
    def number(self) -> int | None:
        """The layer's number."""
        return None if self.layer is None else int(self.layer.rpartition(".")[2])

    @property
    def order(self) -> tuple[bool, str, int, int]:
        """What places are sorted by: layers by their number, then what lies outside of them; kinds as in ``KINDS``."""
        stack = (self.layer or "").rpartition(".")[0]
        return self.layer is None, stack, self.number or 0, KINDS.index(self.kind)


def places_of(dims: Mapping[str, int]) -> dict[str, Place]:
    """The place of every tensor of a model, from their names and numbers of dimensions alone.

    Kinds: "attention"; "mlp" (experts and their router, too); "norm": modules that hold vectors only; "embedding" and
    "head" outside the layers; "other". A norm inside attention (q_norm) is part of the attention. A layer's module is
    its child.

    >>> found = places_of({"model.layers.12.mlp.down_proj.weight": 2, "model.norm.weight": 1})
    >>> [(place.layer, place.kind) for place in found.values()]
    [('model.layers.12', 'mlp'), (None, 'norm')]
    """
    split = {name: _LAYER.fullmatch(name) for name in dims}
    homes = {
        name: f"{found[1]}.{found[3].split('.')[0]}" if found else name.rpartition(".")[0] or name
        for name, found in split.items()
    }
    wide = {home for name, home in homes.items() if dims[name] > 1}
    places = {}
    for name, home in homes.items():
        found, child = split[name], home.rpartition(".")[2]
        if home not in wide:
            kind = "norm"
        elif found:
            kind = "attention" if _ATTENTION.search(child) else "mlp" if _MLP.search(child) else "other"
        else:
            kind = "head" if _HEAD.search(home) else "embedding" if _EMBEDDING.search(home) else "other"
        places[name] = Place(found[1] if found else None, kind, home)
    return places


_REAL = ("float64", "float32", "float16", "bfloat16")
Opened = Mapping[str, Tensor]


def alike(opened: Mapping[str, Opened]) -> tuple[dict[str, int], tuple[str, ...]]:
    """The parameters that all checkpoints have (name → dimensions), tied ones once, and what is left out and why.

    Left out are tensors outside the layers that only some have, or that have another number of rows there (a padded
    vocabulary), and those that hold no real numbers. Buffers that are never saved are no parameters.

    Raises:
        ValueError: a tensor in the layers is not the same in all: they are different models, or one of them calls it
            by another name.
    """
    names = {who: _names(tensors) for who, tensors in opened.items()}
    tied = {who: _tied(opened[who], names[who]) for who in opened}
    common = [name for name in next(iter(names.values())) if all(name in one for one in names.values())]
    _check_names(names, tied, common)
    left_out = [
        f"{name}: only in {', '.join(w for w in names if name in names[w])}"
        for name in dict.fromkeys(name for who in names for name in names[who] if name not in tied[who])
        if name not in common
    ]
    known = [tied[who] for who in tied if isinstance(opened[who], State | dict)]
    kept: dict[str, int] = {}
    for name in common:
        if known and all(one.get(name) in common for one in known):
            continue  # the same memory as another that is read
        told = {who: _told(tensors, name) for who, tensors in opened.items()}
        if why := _why_not(name, told):
            left_out.append(f"{name}: {why}")
        else:
            kept[name] = len(next(iter(told.values()))[0])
    if not kept:
        raise ValueError(f"{', '.join(opened)} have no tensor of real numbers in common: they are different models")
    return kept, tuple(left_out)


def _names(tensors: Opened) -> list[str]:
    if not isinstance(tensors, State):
        return list(tensors)
    passing = passing_buffers(tensors.module)
    return [name for name in tensors if name not in passing]


def _tied(tensors: Opened, names: list[str]) -> dict[str, str]:
    """Names of tensors that are the very memory of one before, with that one's name, where that can be told."""
    if not isinstance(tensors, State | dict):
        return {}
    first: dict[object, str] = {}
    found = {}
    for name in names:
        one = tensors[name]
        if one.numel() and not one.is_meta:
            owner = first.setdefault((one.data_ptr(), one.device, one.dtype, one.shape, one.stride()), name)
            if owner != name:
                found[name] = owner
    return found


def _check_names(names: Mapping[str, list[str]], tied: Mapping[str, Mapping[str, str]], common: list[str]) -> None:
    stacks = {_stack(name) for name in common} - {None}
    for who, found in names.items():
        for name in found:
            missing = [other for other in names if name not in names[other]]
            if not missing or name in tied[who]:
                continue
            if _stack(name) in stacks or (_stack(name) and not stacks):
                raise ValueError(
                    f"{who} has {name!r}, and {missing[0]} has not: they are different models, or one of them has it "
                    f"under another name (experts have others in memory than on disk). Compare folders with folders "
                    f"and live models with live models: model.save_pretrained(folder) makes the one of the other"
                )


def _stack(name: str) -> str | None:
    """The path of the list of layers that a tensor lies in."""
    found = re.match(r"(.*?(^|\.))\d+\.", name)
    return found[1] if found else None


def _why_not(name: str, told: Mapping[str, tuple[tuple[int, ...], str]]) -> str | None:
    (one, (shape, _)), *others = told.items()
    for who, (other, _) in others:
        if other != shape:
            if _stack(name) is not None or other[1:] != shape[1:]:
                what = f"{name!r} has the shape {shape} in {one}, {other} in {who}"
                raise ValueError(f"{what}: they are different models")
            return f"{shape[0]} rows in {one}, {other[0]} in {who}"
    odd = [(who, dtype) for who, (_, dtype) in told.items() if dtype not in _REAL]
    return f"{odd[0][1]} in {odd[0][0]}, no real numbers" if odd else None


def _told(tensors: Opened, name: str) -> tuple[tuple[int, ...], str]:
    """The shape and the dtype of a tensor, from the header alone where there is one."""
    if isinstance(tensors, Checkpoint):
        return tensors.shapes[name], str(tensors.dtypes[name]).removeprefix("torch.")
    one = tensors[name]
    if one.is_meta:
        raise ValueError(f"{name!r} is on the meta device (offloaded or empty): load it first")
    return tuple(one.shape), str(one.dtype).removeprefix("torch.")
