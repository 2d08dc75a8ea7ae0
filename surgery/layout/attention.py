"""Finding the units of attention: KV groups and value channels, where they are certain."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from surgery.layout.slots import Block, Slot
from surgery.units import noun

# q, k, v and o, relative to the attention module
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj", "o_proj"),
    ("q_proj", "k_proj", "v_proj", "out_proj"),
    ("q_proj", "k_proj", "v_proj", "dense"),
    ("self.query", "self.key", "self.value", "output.dense"),
)
# class → the fused projection, o, and how q, k and v lie in it
_FUSED = {
    "GPT2Attention": ("c_attn", "c_proj", "q k v"),
    "GPTBigCodeAttention": ("c_attn", "c_proj", "by group"),  # with one KV head the two are the same
    "Phi3Attention": ("qkv_proj", "o_proj", "q k v"),
    "MptAttention": ("Wqkv", "out_proj", "q k v"),
    "GPTNeoXAttention": ("query_key_value", "dense", "by group"),
    "BloomAttention": ("query_key_value", "dense", "by group"),
    "FalconAttention": ("query_key_value", "dense", "by group"),
    "CodeGenAttention": ("qkv_proj", "out_proj", "four times q v k"),
}
_GATED = ("Qwen3NextAttention", "Qwen3_5Attention", "Qwen3_5MoeAttention")  # q_proj holds [q, gate] of each head
_HARMLESS = re.compile(r"(q|k|qk|query|key)_(layer)?norm|rotary(_emb)?|\w*dropout|_lora_dropout|act(_fn)?")


class Unclear(Exception):
    """Why the units of an attention module are not certain."""


@dataclass(frozen=True)
class Piece:
    """Where one of q, k, v, the gate or o lies: a linear module, its axis in the words k, r, d (and g), a cut."""

    part: str
    linear: str
    axes: str
    g: int | tuple[int, int] | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Heads:
    """An attention module's pieces and the sizes of their axes: k groups of r query heads of d channels."""

    pieces: tuple[Piece, ...]
    sizes: dict[str, int]
    found: str


def find_heads(path: str, module: nn.Module, hidden: int, model: nn.Module) -> tuple[str, Heads]:
    """The submodule that holds the projections, and what they are."""
    named = f"{path.rpartition('.')[2]} {type(module).__name__}".lower()
    if re.search(r"cross|encoder_attn", named) or getattr(module, "is_cross_attention", False):
        raise Unclear("it attends to another sequence")
    for inner, one in module.named_modules():
        known = any(kind.__module__.startswith("transformers.") for kind in type(one).__mro__)
        fused = _FUSED.get(type(one).__name__)
        if fused and known:
            found = _fused(one, *fused)
        elif names := next((n for n in _SEPARATE if all(linear_of(one, name) for name in n)), None):
            found = _separate(one, names)
        else:
            continue
        _check(one, found, hidden, model)
        if found.sizes["r"] > 1 and not known:
            raise Unclear("which of its query heads share a KV head is only known for attention of transformers")
        return inner, found
    raise Unclear(f"{type(module).__name__} has no q, k, v and o of its own for every head")


def linear_of(module: nn.Module, name: str) -> Any:
    """The linear layer or Conv1D of that name below a module, or None."""
    held = dict(module.named_modules()).get(name)
    return held if isinstance(held, nn.Linear) or type(held).__name__ == "Conv1D" else None


def ends_of(linear: Any) -> tuple[int, int]:
    out, into = linear.weight.shape if isinstance(linear, nn.Linear) else linear.weight.shape[::-1]
    return int(into), int(out)


def _head_width(module: Any) -> int:
    for one in (module, getattr(module, "self", None)):
        for name in ("head_dim", "head_size", "attention_head_size"):
            if isinstance(width := getattr(one, name, None), int) and width > 0:
                return width
    raise Unclear(f"{type(module).__name__} does not say how wide a head is")


def _sizes_of(heads: int, groups: int, width: int) -> dict[str, int]:
    if not groups or heads % groups:
        raise Unclear(f"{heads} query heads over {groups} KV heads")
    return {"k": groups, "r": heads // groups, "d": width}


def _separate(module: nn.Module, names: tuple[str, ...]) -> Heads:
    q, k, v, o = (ends_of(linear_of(module, name)) for name in names)
    d = _head_width(module)
    gated = q[1] == 2 * o[0] and type(module).__name__ in _GATED
    if q[0] != k[0] or q[0] != v[0] or k[1] != v[1] or o[0] % d or k[1] % d or q[1] != o[0] * (1 + gated):
        raise Unclear(f"its projections {names} have shapes that don't fit heads of {d}")
    query = [Piece("q", names[0], "k r g d", 0), Piece("gate", names[0], "k r g d", 1)]
    pieces = [
        *(query if gated else [Piece("q", names[0], "k r d")]),
        Piece("k", names[1], "k d"),
        Piece("v", names[2], "k d"),
        Piece("o", names[3], "k r d"),
    ]
    sizes = _sizes_of(o[0] // d, k[1] // d, d)
    return Heads(_plain(pieces, sizes), {**sizes, "g": 2}, "structure: the shapes of q, k, v and o")


def _fused(module: Any, fused: str, out: str, how: str) -> Heads:
    d, (_, width), heads = _head_width(module), ends_of(linear_of(module, fused)), ends_of(linear_of(module, out))[0]
    if heads % d or width % d or (width - heads) % (2 * d):
        raise Unclear(f"its projection {fused} is {width} wide, which does not fit heads of {d}")
    sizes = _sizes_of(heads // d, (width - heads) // (2 * d), d)
    groups, r = sizes["k"], sizes["r"]
    edges = (0, heads, heads + groups * d, width)
    if how == "four times q v k":
        if groups % 4 or r > 1:
            raise Unclear(f"{groups} heads do not lie in four runs")
        pieces = [Piece(part, fused, "p g k d", at) for at, part in ((0, "q"), (2, "k"), (1, "v"))]
        pieces.append(Piece("o", out, "p k d"))
        return Heads(
            tuple(pieces), {"p": 4, "k": groups // 4, "r": 1, "d": d, "g": 3}, f"{type(module).__name__}: {how}"
        )
    if how == "q k v" or groups == 1:
        cuts = {part: (edges[at], edges[at + 1]) for at, part in enumerate("qkv")}
        pieces = [Piece(part, fused, "k r d" if part == "q" else "k d", rows=cut) for part, cut in cuts.items()]
    else:
        spread: dict[str, Any] = {"q": (0, r) if r > 1 else 0, "k": r, "v": r + 1}
        pieces = [Piece(part, fused, "k g d", at) for part, at in spread.items()]
    pieces = [*pieces, Piece("o", out, "k r d")]
    words = "q, k, v one after the other" if pieces[0].rows else "q, k, v group by group"
    return Heads(_plain(pieces, sizes), {**sizes, "g": r + 2}, f"{type(module).__name__}: {words}")


def _plain(pieces: list[Piece], sizes: dict[str, int]) -> tuple[Piece, ...]:
    """Without the axis r where every query head has a KV head of its own."""
    if sizes["r"] > 1:
        return tuple(pieces)
    return tuple(Piece(p.part, p.linear, p.axes.replace("k r", "k"), p.g, p.rows) for p in pieces)


def _check(module: nn.Module, heads: Heads, hidden: int, model: nn.Module) -> None:
    """Refuse what else the module holds, another width than the model's, and another head count than its config's."""
    into, out = (linear_of(module, p.linear) for p in (heads.pieces[0], heads.pieces[-1]))
    if ends_of(into)[0] != hidden or ends_of(out)[1] != hidden:
        raise Unclear(
            f"it reads {ends_of(into)[0]} and writes {ends_of(out)[1]} channels, and the model is {hidden} wide"
        )
    config: Any = getattr(model, "config", None)
    config = getattr(config, "get_text_config", lambda: config)()
    total = heads.sizes["k"] * heads.sizes["r"] * heads.sizes.get("p", 1)
    if isinstance(told := getattr(config, "num_attention_heads", None), int) and told != total:
        raise Unclear(f"it has {total} heads by its shapes and {told} by the configuration")
    linears = {piece.linear for piece in heads.pieces}
    roots = {name.split(".")[0] for name in linears}
    inside = module.get_submodule("self") if "self" in roots else module
    for name, _ in inside.named_children():
        if name not in roots and name not in ("query", "key", "value") and not _HARMLESS.fullmatch(name):
            raise Unclear(f"it also has {name!r}, and which heads that belongs to is not known")
    if other := [name for name, _ in inside.named_parameters(recurse=False) if name != "sinks"]:
        raise Unclear(f"it also has {other[0]!r}, and which heads that belongs to is not known")


_MIXER = re.compile(r"attn|attention|mixer|mamba|delta_?net|ssm|conv$", re.IGNORECASE)
_QUERY_NORM, _KEY_NORM = re.compile(r"(q|query|qk)_(layer)?norm"), re.compile(r"(k|key)_(layer)?norm")
_SPLIT_NORM = 'its norm of q or k runs over all heads at once, so no head stands alone; units="value_channel" does'


class NoAttention(ValueError):
    """No attention of a model can be read for certain."""


def attention_blocks(model: nn.Module, kind: str, hidden: int, inside: str = "") -> tuple[list[Block], tuple[str, ...]]:
    """The attention blocks of a model with units of one kind, and in words what they leave out.

    Args:
        model: the live model, on any device.
        kind: "kv_group" or "value_channel".
        hidden: the model's width; attention of another width is not covered.
        inside: the path of the part of the model to look at.

    Raises:
        NoAttention: no attention of the model can be read for certain; the message says why.

    Source: ours.
    """
    blocks, reasons, top = [], {}, ""
    for path, module in model.get_submodule(inside).named_modules(prefix=inside):
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
            f"no {noun((kind,))} were found for certain in {type(model).__name__}: {why}. "
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
