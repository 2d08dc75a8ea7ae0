"""Finding the units of attention: KV groups and value channels, where they can be told for certain."""

from __future__ import annotations

import re
from collections.abc import Iterator

from torch import nn

from surgery.heads import Heads, Piece, Unclear, ends_of, find_heads, linear_of
from surgery.slots import Block, Slot
from surgery.units import noun

_MIXER = re.compile(r"attn|attention|mixer|mamba|delta_?net|ssm|conv$", re.IGNORECASE)
_QUERY_NORM, _KEY_NORM = re.compile(r"(q|query|qk)_(layer)?norm"), re.compile(r"(k|key)_(layer)?norm")
_SPLIT_NORM = 'its norm of q or k runs over all heads at once, so no head stands alone; units="value_channel" does'


class NoAttention(ValueError):
    """No attention of a model can be read for certain."""


def attention_blocks(model: nn.Module, kind: str, hidden: int) -> tuple[list[Block], tuple[str, ...]]:
    """The attention blocks of a model with units of one kind, and in words what they leave out.

    Args:
        model: the live model, on any device.
        kind: "kv_group" or "value_channel".
        hidden: the model's width; attention of another width (a vision tower's) is not covered.

    Raises:
        NoAttention: no attention of the model can be read for certain; the message says why.

    Source: ours.
    """
    blocks, reasons, top = [], {}, ""
    for path, module in model.named_modules():
        mixes = _MIXER.search(path.rpartition(".")[2]) and re.search(r"\.\d+\.", f".{path}")
        if not mixes or (top and path.startswith(top)) or not any(p.ndim > 1 for p in module.parameters()):
            continue
        top = f"{path}."
        try:
            blocks.append(_block(path, module, kind, hidden, model))
        except Unclear as reason:
            reasons[path] = str(reason)
    if not blocks:
        why = next((f"{path}: {reason}" for path, reason in reasons.items()), "it has no attention")
        raise NoAttention(
            f"no {noun((kind,))} can be told for certain in {type(model).__name__}: {why}. "
            f'Or leave attention out: units="mlp"'
        )
    return blocks, tuple(_notes(model, blocks, reasons))


def _notes(model: nn.Module, blocks: list[Block], reasons: dict[str, str]) -> Iterator[str]:
    """One line per sort of place that is not covered, however many layers have it."""
    sorts: dict[tuple[str, str], list[str]] = {}
    for path, reason in reasons.items():
        sorts.setdefault((re.sub(r"\.\d+(?=\.|$)", ".*", path), reason), []).append(path)
    named = [*(block.name for block in blocks), *reasons]
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not re.search(r"\.\d+\.", f".{path}."):
            inside = [f"{path}.{name}" for name, _ in module.named_children()]
            bare = [one for one in inside if not any(name.startswith(f"{one}.") for name in named)]
            if 0 < len(bare) < len(inside):
                sorts[f"{path}.*", "they have no attention"] = bare
    for (_, reason), paths in sorts.items():
        others = f" and {len(paths) - 1} more" if len(paths) > 1 else ""
        yield f"not covered: {paths[0]}{others}: {reason}"


def _block(path: str, module: nn.Module, kind: str, hidden: int, model: nn.Module) -> Block:
    inner, heads = find_heads(path, module, hidden, model)
    home = f"{path}.{inner}".rstrip(".")
    own = module.get_submodule(inner)
    slots = tuple(slot for piece in heads.pieces for slot in _slots(home, own, piece, heads.sizes, kind))
    slots += tuple(_extras(home, own, heads, kind))
    consumer = next(piece for piece in heads.pieces if piece.part == "o")
    axes, rest = _cut(consumer, kind)
    pattern = f"({consumer.axes}) -> {_joined(axes)} {' '.join(rest)}".rstrip()
    sizes = _sizes(consumer, heads.sizes)
    width = ends_of(own.get_submodule(consumer.linear))[0]
    heard = Slot("h", f"{home}.{consumer.linear}", pattern, (width,), sizes=sizes)
    held = {slot.tensor for slot in slots} | {f"{home}.{piece.linear}.weight" for piece in heads.pieces}
    left = [piece.part for piece in heads.pieces if piece.part not in _PARTS[kind].split()]
    projected = tuple(f"{piece.linear}." for piece in heads.pieces if piece.part in left)
    others = [name for name, _ in own.named_parameters() if f"{home}.{name}" not in held]
    left += [name for name in others if not name.startswith(projected)]
    found = f"{heads.found}; left out: {', '.join(left)}" if left else heads.found
    return Block(f"{home}[{kind}]", heard.neurons, slots, heard.tensor, found=found, heard=heard)


def _cut(piece: Piece, kind: str) -> tuple[list[str], list[str]]:
    """The axes of a piece that count units, and the others; g, where one part of it is taken, comes with those."""
    axes = piece.axes.split()
    counted = {"kv_group": ["p", "k"], "value_channel": ["p", "k", "d"]}[kind]
    return [a for a in axes if a in counted], [a for a in axes if a not in counted]


def _joined(axes: list[str]) -> str:
    return axes[0] if len(axes) == 1 else f"({' '.join(axes)})"


def _sizes(piece: Piece, sizes: dict[str, int]) -> tuple[tuple[str, int], ...]:
    return tuple((axis, sizes[axis]) for axis in piece.axes.split() if axis != "g")


_PARTS = {"kv_group": "q gate k v o", "value_channel": "gate v o"}


def _slots(home: str, module: nn.Module, piece: Piece, sizes: dict[str, int], kind: str) -> Iterator[Slot]:
    if piece.part not in _PARTS[kind].split():
        return
    linear = linear_of(module, piece.linear)
    axes, rest = _cut(piece, kind)
    right = f"{_joined(axes)} {' '.join(rest)}".strip()
    # a Linear has its outputs first, a Conv1D its inputs; o is cut along its inputs
    first = isinstance(linear, nn.Linear) != (piece.part == "o")
    left = f"({piece.axes}) m" if first else f"m ({piece.axes})"
    held = [("weight", f"{left} -> {right} m", "")]
    if piece.part != "o" and linear.bias is not None:
        held.append(("bias", f"({piece.axes}) -> {right}", ".bias"))
    for tensor, pattern, suffix in held:
        shape = tuple(getattr(linear, tensor).shape)
        name = f"{home}.{piece.linear}.{tensor}"
        parts = 1 if piece.g is None else sizes["g"]
        cut = _sizes(piece, sizes)
        yield Slot(f"{piece.part}{suffix}", name, pattern, shape, piece.g, parts, sizes=cut, rows=piece.rows)


def _extras(home: str, module: nn.Module, heads: Heads, kind: str) -> Iterator[Slot]:
    """What belongs to exactly one head beside the projections: sinks, and norms with weights of their own a head.

    Raises:
        Unclear: a norm of q or k takes its statistic over all heads, so that no head stands alone.
    """
    k, r, d = (heads.sizes[axis] for axis in "krd")
    if kind == "value_channel":
        return
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    for name, shape in shapes.items():
        query, key = _QUERY_NORM.fullmatch(name.split(".")[0]), _KEY_NORM.fullmatch(name.split(".")[0])
        if (query or key) and name.count(".") > 1:
            raise Unclear('its heads have norms in tensors of their own; units="value_channel" needs none')
        count = k * r if query or name == "sinks" else k
        axes, sizes = ("k r", {"k": k, "r": r}) if count == k * r and r > 1 else ("k", {"k": k})
        cut = tuple(sizes.items())
        if name == "sinks":
            yield Slot("sinks", f"{home}.{name}", f"({axes}) -> {axes}", shape, sizes=cut)
        elif (query or key) and shape == (count, d):
            yield Slot(name.split(".")[0], f"{home}.{name}", f"({axes}) d -> {axes} d", shape, sizes=cut)
        elif (query or key) and shape not in ((d,), ()):
            raise Unclear(_SPLIT_NORM)
