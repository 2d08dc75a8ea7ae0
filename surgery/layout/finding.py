"""Finding the neurons of any model (its attention: surgery/layout/attention.py), by its structure.

A neuron is found where it is certain: expert modules by what they declare, other MLPs by the shapes of their linear
layers, both checked against the model's own tensor-parallel plan. What is not certain is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from surgery.compat import declared, tensor_parallel_plan, uncompiled, wrapper_of
from surgery.layout.attention import attention_blocks
from surgery.layout.plain import check_stored
from surgery.layout.slots import Block, Layout, Slot
from surgery.tables import briefly
from surgery.units import Units, kinds_of, module_of

WAY_OUT = "Describe it yourself with layout= (docs/how-to/add-an-architecture.md)"


def check_unwrapped(whose: str, names: Iterable[str]) -> None:
    """Raise ``ValueError`` where tensor names are a wrapper's: the live wrapper's own, or what was saved from one."""
    if found := wrapper_of(names):
        name, what, way = found
        raise ValueError(
            f"{whose} is wrapped by {what}: it holds {name!r}. Pass the model inside, {way}, or what that model saves"
        )


def style(plan: Mapping[str, str], path: str) -> str:
    """How the plan shards a module, like "colwise"; "" where it says nothing."""
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return next((style for key, style in plan.items() if generic == key or generic.endswith(f".{key}")), "")


def check_plan(model: nn.Module, layout: Layout, plan: Mapping[str, str]) -> None:
    """The sharded axis of the tensor-parallel plan has to be the neuron axis (linear layers only)."""
    for block in layout.blocks if plan else ():
        for slot in block.slots:
            path = slot.tensor.rpartition(".")[0]
            if block.experts or not isinstance(model.get_submodule(path), nn.Linear):
                continue
            wrong = "colwise" if slot.part in ("down", "o") else "rowwise"
            if style(plan, path).startswith(wrong):
                whose = "an MLP" if block.kind == "mlp" else "an attention"
                raise ValueError(
                    f"{path} was taken for the {slot.part} of {whose}, but the model's tensor-parallel plan shards it "
                    f"{style(plan, path)!r}, across another axis. {WAY_OUT}"
                )


def check_dtypes(model: nn.Module, layout: Layout) -> None:
    """No slot may be quantised."""
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for slot in (slot for block in layout.blocks for slot in block.slots):
        check_stored(slot.tensor, held[slot.tensor].dtype, f"the live {type(model).__name__}")


def check_complete(model: nn.Module, layout: Layout) -> None:
    """There is a block, and one in every layer of a stack that has any."""
    if not layout.blocks:
        raise ValueError(f"no MLP was recognised in {type(model).__name__}. {WAY_OUT}")
    for path, module in model.named_modules():
        if not isinstance(module, nn.ModuleList) or re.search(r"\.\d+\.", f".{path}."):
            continue
        bare = [n for n, _ in module.named_children() if not _holds(layout, f"{path}.{n}")]
        if 0 < len(bare) < len(module):
            raise ValueError(
                f"no MLP was recognised in {len(bare)} of {len(module)} layers of {path}: {bare[:5]}. {WAY_OUT}"
            )


def _holds(layout: Layout, path: str) -> bool:
    return any(name == path or name.startswith(f"{path}.") for name in layout)


Spec = Mapping[str, Mapping[str, str]]
Shapes = Mapping[str, tuple[int, ...]]
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def find_layout(model: nn.Module, spec: Spec | None = None, *, units: Units = "mlp") -> Layout:
    """Where the neurons of a live model lie, or the units of its attention (on any device, ``meta`` too).

    Args:
        model: a causal LM of transformers, or any module built of linear layers in a ``ModuleList``.
        spec: your own layout: ``{"model.layers.{layer}.mlp": {"gate_proj.weight": "n d -> n d", ...}}``, tensor names
            relative to the block and their einops patterns, the consumer last. It wins over ``units``.
        units: "mlp"; "kv_group" or "value_channel" for attention; or a tuple of "mlp" and one of those. Of a model that
            also reads images or sound these are the language model's; ``spec`` describes others.

    Returns:
        The blocks in the model's own order; ``notes`` says what is not covered, and why.

    Raises:
        ValueError: the units can't be found for certain; the message says why and what to do.

    Source: ours; KV groups are the paper's attention units in kind.
    """
    model = uncompiled(model)
    check_unwrapped(f"the {type(model).__name__}", (name for name, _ in model.named_parameters()))
    if spec is not None:
        return spec_layout(spec, {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    hidden, plan, kinds, top = _hidden(model), tensor_parallel_plan(model), kinds_of(units), _reads_text(model)
    blocks: list[Block] = []
    notes = [f"not covered: all but {top}, which reads text; describe other towers with layout="] if top else []
    if "mlp" in kinds:
        blocks += [*_expert_blocks(model, top), *_dense_blocks(model, top, hidden, plan)]
        check_complete(model, Layout(tuple(blocks)))
    for kind in kinds:
        if kind != "mlp":
            found, left = attention_blocks(model, kind, hidden, top)
            blocks += found
            notes += left
    order = {name: at for at, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    layout = Layout(tuple(sorted(blocks, key=lambda block: order[module_of(block.name)])), tuple(notes))
    check_plan(model, layout, plan)
    check_dtypes(model, layout)
    return layout


def spec_layout(spec: Spec, shapes: Shapes) -> Layout:
    """The layout that a user describes (see ``find_layout``), over tensors of the given shapes.

    Raises:
        ValueError: a template fits no tensor, a tensor is missing, or the parts of a block differ in length.
    """
    blocks = []
    for template, tensors in spec.items():
        if not tensors:
            raise ValueError(f"your layout names no tensor of {template!r}")
        first = next(iter(tensors))
        holes = re.escape(f"{template}.{first}").replace(re.escape("{layer}"), r"(\d+)")
        names = [name for name in shapes if re.fullmatch(holes, name)]
        if not names:
            raise ValueError(
                f"no tensor is named like {template}.{first}; there is {next(iter(shapes), 'none')!r}, ..."
            )
        for name in sorted(names, key=lambda name: [int(n) for n in re.findall(r"\d+", name)]):
            blocks.append(_spec_block(name.removesuffix(f".{first}"), tensors, shapes))
    return Layout(tuple(blocks))


def _spec_block(path: str, tensors: Mapping[str, str], shapes: Shapes) -> Block:
    slots = []
    for at, (name, pattern) in enumerate(tensors.items()):
        if f"{path}.{name}" not in shapes:
            raise ValueError(f"your layout names {path}.{name!r}, and there is no such tensor")
        shape = shapes[f"{path}.{name}"]
        parts = 2 if re.search(r"\bg\b", pattern) else 1
        for g in range(parts):
            label = "down" if at == len(tensors) - 1 else name if parts == 1 else f"{name}[{g}]"
            slots.append(Slot(label, f"{path}.{name}", pattern, shape, g if parts > 1 else None, parts))
            try:
                slots[-1].view(torch.empty(shape, device="meta"))
            except Exception as error:  # einops can raise anything about a pattern
                raise ValueError(
                    f"your layout's pattern {pattern[:80]!r} does not fit {path}.{name} of the shape {shape}: "
                    f"{briefly(error)}"
                ) from error
    if len({slot.neurons for slot in slots}) != 1:
        raise ValueError(f"the parts of {path} differ in length: { ({s.tensor: s.neurons for s in slots}) }")
    consumer = slots[-1].tensor.rpartition(".")[0]
    experts = slots[-1].shape[0] if slots[-1].stacked else 0  # of a user's patterns only experts are stacked
    return Block(path, slots[0].neurons, tuple(slots), consumer, experts, found="your layout")


def _hidden(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if config is not None:
        return int(getattr(config, "get_text_config", lambda: config)().hidden_size)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise ValueError(f"{type(model).__name__} has neither a config nor an embedding to read its width from. {WAY_OUT}")


def _reads_text(model: Any) -> str:
    """The path of what reads text in a model of images, sound and text: a part of its configuration; else ""."""
    config = getattr(model, "config", None)
    if getattr(config, "get_text_config", lambda: config)() is config:
        return ""
    decoder = model.get_decoder()
    return next(str(path) for path, module in model.named_modules() if module is decoder)


def _expert_blocks(model: nn.Module, top: str) -> Iterator[Block]:
    """Stacked experts: three-dimensional weights called gate_up / up and down, or input and output linear modules."""
    for path, module in model.get_submodule(top).named_modules(prefix=top):
        held = dict(module.named_parameters(recurse=False))
        up = held.get("gate_up_proj", held.get("up_proj"))
        if up is not None and up.ndim == 3 and "down_proj" in held:
            names = ("gate_up_proj" if "gate_up_proj" in held else "up_proj", "down_proj")
            yield _experts(path, path, module, names, up, held["down_proj"], held)
        into = getattr(getattr(module, "input_linear", None), "weight", None)
        out = getattr(getattr(module, "output_linear", None), "weight", None)
        if into is not None and out is not None and into.ndim == out.ndim == 3 and not _ATTENTION.search(path):
            names = ("input_linear.weight", "output_linear.weight")
            yield _experts(path, f"{path}.output_linear", module, names, into, out, {})


def _experts(
    path: str, consumer: str, module: Any, names: tuple[str, str], up: Tensor, down: Tensor, held: Mapping[str, Tensor]
) -> Block:
    gated = up.shape[1] == 2 * down.shape[2] or up.shape[2] == 2 * down.shape[1]
    transposed = up.shape[1] == down.shape[2] and up.shape[2] == down.shape[1] * (1 + gated)
    straight = up.shape[2] == down.shape[1] and up.shape[1] == down.shape[2] * (1 + gated)
    says = declared(module)
    found = "expert module: what it declares" if says else "expert module: the shapes of its weights"
    if says:
        if says.gated != gated or not (transposed if says.transposed else straight):
            raise ValueError(f"{path} declares a layout that its shapes {tuple(up.shape)} contradict. {WAY_OUT}")
        transposed = says.transposed
    elif transposed == straight:
        raise ValueError(f"the stacked weights of {path} can be read in two ways or none. {WAY_OUT}")
    runs = "(n g)" if says and not says.concatenated else "(g n)"
    slots = []
    wide = (runs, "(e n) g d", "(e n) g") if gated else ("n", "(e n) d", "(e n)")
    weight = f"e d {wide[0]} -> {wide[1]}" if transposed else f"e {wide[0]} d -> {wide[1]}"
    for name, pattern, suffix in ((names[0], weight, ""), (f"{names[0]}_bias", f"e {wide[0]} -> {wide[2]}", ".bias")):
        if name == names[0] or name in held:
            shape = tuple(up.shape) if name == names[0] else tuple(held[name].shape)
            slots += _parts(f"{path}.{name}", pattern, shape, gated, suffix)
    slots.append(
        Slot("down", f"{path}.{names[1]}", "e n d -> (e n) d" if transposed else "e d n -> (e n) d", tuple(down.shape))
    )
    return Block(path, slots[0].neurons, tuple(slots), consumer, experts=up.shape[0], found=found)


def _parts(tensor: str, pattern: str, shape: tuple[int, ...], gated: bool, suffix: str) -> list[Slot]:
    """The slots of a producer's tensor: gate and up where they are fused in it, else up alone."""
    if not gated:
        return [Slot(f"up{suffix}", tensor, pattern, shape)]
    return [Slot(f"{part}{suffix}", tensor, pattern, shape, g, 2) for g, part in enumerate(("gate", "up"))]


def _dense_blocks(model: nn.Module, top: str, hidden: int, plan: Mapping[str, str]) -> Iterator[Block]:
    """MLPs by structure: inside a layer, one linear layer back to the hidden size and those that feed it."""
    covered: set[str] = set()
    layers = []
    for path, module in model.get_submodule(top).named_modules(prefix=top):
        if not re.search(r"\.\d+(\.|$)", f".{path}") or _ATTENTION.search(path):
            continue
        if re.search(r"(^|\.)\d+$", path):
            layers.append((path, module))
        if block := _mlp(path, _linears(module, depth=1), hidden, plan):
            covered.add(path)
            yield block
    for path, module in layers:  # BERT keeps the two halves of an MLP in two modules side by side
        done = any(f"{one}.".startswith(f"{path}.") or f"{path}.".startswith(f"{one}.") for one in covered)
        if not done and (block := _mlp(path, _linears(module, depth=2), hidden, plan)):
            yield block


def _linears(module: nn.Module, depth: int) -> dict[str, nn.Module]:
    """Linear layers and Conv1Ds below a module, at most ``depth`` steps down and not in its attention."""
    found = {}
    for name, child in module.named_modules():
        weight = getattr(child, "weight", None)
        linear = isinstance(child, nn.Linear) or type(child).__name__ == "Conv1D"
        if name and linear and isinstance(weight, Tensor) and name.count(".") < depth and not _ATTENTION.search(name):
            found[name] = child
    return found


def _ends(module: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer."""
    weight: Any = module.weight
    if weight.ndim != 2:
        return (-1, -1)
    return (weight.shape[1], weight.shape[0]) if isinstance(module, nn.Linear) else (weight.shape[0], weight.shape[1])


def _mlp(path: str, linears: Mapping[str, nn.Module], hidden: int, plan: Mapping[str, str]) -> Block | None:
    ends = {name: _ends(module) for name, module in linears.items()}
    consumers = [name for name, (into, out) in ends.items() if out == hidden and into != hidden]
    square = [name for name, (into, out) in ends.items() if into == out == hidden]
    found = "structure: the shapes of its linear layers"
    if not consumers and len(square) >= 2:  # the MLP is as wide as the model: only the plan can tell which is which
        consumers = [name for name in square if style(plan, f"{path}.{name}").startswith("rowwise")]
        found = "tensor-parallel plan (the MLP is as wide as the model)"
        if not consumers and any(re.search(r"mlp|ffn|feed_forward|fc\d", f"{path}.{name}") for name in square):
            raise ValueError(
                f"{path}: its linear layers {square} are all {hidden} × {hidden}, so their shapes do not say which one "
                f"reads the neurons, and the model has no tensor-parallel plan that does. {WAY_OUT}"
            )
    feeds = {
        down: [
            n
            for n, (into, out) in ends.items()
            if n != down and into == hidden and out in (ends[down][0], 2 * ends[down][0])
        ]
        for down in consumers
    }
    feeds = {down: ups for down, ups in feeds.items() if ups}
    if not feeds:
        return None
    (down, ups), *more = feeds.items()
    width = ends[down][0]
    if more or len(ups) > 2 or (len(ups) == 2 and any(ends[up][1] != width for up in ups)):
        raise ValueError(f"{path} has several linear layers that could be an MLP's: {sorted(ends)}. {WAY_OUT}")
    slots = [
        slot for up, part in zip(*_named(ups), strict=True) for slot in _producer(path, up, part, linears[up], width)
    ]
    weight: Any = linears[down].weight
    pattern = "d n -> n d" if isinstance(linears[down], nn.Linear) else "n d -> n d"
    slots.append(Slot("down", f"{path}.{down}.weight", pattern, tuple(weight.shape)))
    return Block(path, width, tuple(sorted(slots, key=_rank)), f"{path}.{down}", found=found)


def _rank(slot: Slot) -> int:
    return ("gate", "up", "down", "gate.bias", "up.bias").index(slot.part)


def _named(ups: list[str]) -> tuple[list[str], list[str]]:
    """Producers and their parts; of two, the gate is the one called so (or w1), else the first."""
    if len(ups) == 1:
        return ups, ["up"]
    gate = next((up for up in ups if "gate" in up or up == "w1"), ups[0])
    return [gate, next(up for up in ups if up != gate)], ["gate", "up"]


def _producer(path: str, name: str, part: str, module: Any, width: int) -> Iterator[Slot]:
    linear, fused = isinstance(module, nn.Linear), _ends(module)[1] == 2 * width
    axis, rest = ("(g n)", "n g") if fused else ("n", "n")
    pattern = f"{axis} d -> {rest} d" if linear else f"d {axis} -> {rest} d"
    held = [("weight", pattern, "")] + ([("bias", f"{axis} -> {rest}", ".bias")] if module.bias is not None else [])
    for tensor, pattern, suffix in held:
        shape = tuple(getattr(module, tensor).shape)
        if fused:
            yield from _parts(f"{path}.{name}.{tensor}", pattern, shape, True, suffix)
        else:
            yield Slot(f"{part}{suffix}", f"{path}.{name}.{tensor}", pattern, shape)
