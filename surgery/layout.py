"""Finding the neurons of any model: the only place that knows architectures, and it knows them by their structure.

A neuron is found where it is certain: expert modules by what they declare, other MLPs by the shapes of their linear
layers, both checked against the model's own tensor-parallel plan. What is not certain is refused with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.hooks import listening
from surgery.slots import Block, Layout, Slot

Spec = Mapping[str, Mapping[str, str]]
Shapes = Mapping[str, tuple[int, ...]]
WAY_OUT = "Describe it yourself with layout= (docs/how-to/add-an-architecture.md)"
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)


def find_layout(model: nn.Module, spec: Spec | None = None) -> Layout:
    """Where the neurons of a live model lie (on any device, ``meta`` too).

    Args:
        model: a causal LM of transformers, or any module built of linear layers in a ``ModuleList``.
        spec: your own layout: ``{"model.layers.{layer}.mlp": {"gate_proj.weight": "n d -> n d", ...}}``, tensor names
            relative to the block and their einops patterns, the consumer last.

    Raises:
        ValueError: the neurons can't be found for certain; the message says why and what to do.

    Source: ours.
    """
    if spec is not None:
        return spec_layout(spec, {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)})
    hidden, plan = _hidden(model), _plan(model)
    blocks = [*_expert_blocks(model), *_dense_blocks(model, hidden, plan)]
    order = {name: at for at, (name, _) in enumerate(model.named_modules(remove_duplicate=False))}
    layout = Layout(tuple(sorted(blocks, key=lambda block: order[block.name])))
    _check_complete(model, layout)
    _check_plan(model, layout, plan)
    _check_dtypes(model, layout)
    return layout


def spec_layout(spec: Spec, shapes: Shapes) -> Layout:
    """The layout that a user describes (see ``find_layout``), over tensors of the given shapes.

    Raises:
        ValueError: a template fits no tensor, a tensor is missing, or the parts of a block differ in length.
    """
    blocks = []
    for template, tensors in spec.items():
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
    if len({slot.neurons for slot in slots}) != 1:
        raise ValueError(f"the parts of {path} differ in length: { ({s.tensor: s.neurons for s in slots}) }")
    consumer = slots[-1].tensor.rpartition(".")[0]
    experts = slots[-1].shape[0] if slots[-1].stacked else 0
    return Block(path, slots[0].neurons, tuple(slots), consumer, experts, found="your layout")


def _hidden(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if config is not None:
        return int(getattr(config, "get_text_config", lambda: config)().hidden_size)
    for module in model.modules():
        if isinstance(module, nn.Embedding):
            return module.embedding_dim
    raise ValueError(f"{type(model).__name__} has neither a config nor an embedding to read its width from. {WAY_OUT}")


def _expert_blocks(model: nn.Module) -> Iterator[Block]:
    """Stacked experts: three-dimensional weights called gate_up / up and down, or input and output linear modules."""
    for path, module in model.named_modules():
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
    declared = all(hasattr(module, name) for name in ("is_transposed", "is_concatenated", "has_gate"))
    found = "expert module: what it declares" if declared else "expert module: the shapes of its weights"
    if declared:
        if module.has_gate != gated or not (transposed if module.is_transposed else straight):
            raise ValueError(f"{path} declares a layout that its shapes {tuple(up.shape)} contradict. {WAY_OUT}")
        transposed = module.is_transposed
    elif transposed == straight:
        raise ValueError(f"the stacked weights of {path} can be read in two ways or none. {WAY_OUT}")
    runs = "(n g)" if declared and not module.is_concatenated else "(g n)"
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


def _dense_blocks(model: nn.Module, hidden: int, plan: Mapping[str, str]) -> Iterator[Block]:
    """MLPs by structure: inside a layer, one linear layer back to the hidden size and those that feed it."""
    covered: set[str] = set()
    layers = []
    for path, module in model.named_modules():
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
        consumers = [name for name in square if _style(plan, f"{path}.{name}").startswith("rowwise")]
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


def _plan(model: nn.Module) -> dict[str, str]:
    return {str(k): str(v) for k, v in (getattr(model, "_tp_plan", None) or {}).items()}


def _style(plan: Mapping[str, str], path: str) -> str:
    generic = re.sub(r"\.\d+(?=\.|$)", ".*", path)
    return next((style for key, style in plan.items() if generic == key or generic.endswith(f".{key}")), "")


def _check_plan(model: nn.Module, layout: Layout, plan: Mapping[str, str]) -> None:
    """The sharded axis of the tensor-parallel plan has to be the neuron axis (linear layers only)."""
    for block in layout.blocks if plan else ():
        for slot in block.slots:
            path = slot.tensor.rpartition(".")[0]
            if block.experts or not isinstance(model.get_submodule(path), nn.Linear):
                continue
            wrong = "colwise" if slot.part == "down" else "rowwise"
            if _style(plan, path).startswith(wrong):
                raise ValueError(
                    f"{path} was taken for the {slot.part} of an MLP, but the model's tensor-parallel plan shards it "
                    f"{_style(plan, path)!r}, across another axis. {WAY_OUT}"
                )


def _check_dtypes(model: nn.Module, layout: Layout) -> None:
    held = dict(model.named_parameters(remove_duplicate=False)) | dict(model.named_buffers(remove_duplicate=False))
    for slot in (slot for block in layout.blocks for slot in block.slots):
        if held[slot.tensor].dtype not in (torch.float64, torch.float32, torch.float16, torch.bfloat16):
            raise ValueError(
                f"{slot.tensor} is stored as {held[slot.tensor].dtype}: quantised weights can't be reverted exactly. "
                f"Roll the unquantised checkpoint back and quantise it again"
            )


def _check_complete(model: nn.Module, layout: Layout) -> None:
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


def folder_layout(folder: Path, shapes: Shapes, spec: Spec | None = None) -> Layout:
    """Where the neurons of a folder of safetensors lie, by the names and shapes on disk.

    Args:
        folder: holds ``config.json``; no code in it is ever run.
        shapes: tensor name → shape, as the shards' headers say.
        spec: your own layout (see ``find_layout``), over the names on disk.

    Raises:
        ValueError: a tensor is missing or has another shape than the config says, or the neurons can't be found.

    Source: ours.
    """
    if spec is not None:
        return spec_layout(spec, shapes)
    model = _meta_model(folder)
    live = find_layout(model)
    prefix = f"{model.base_model_prefix}."
    renamed: dict[str, list[Slot]] | None = None
    blocks = []
    for block in live.blocks:
        slots: list[Slot] = []
        for slot in block.slots:
            names = (slot.tensor, slot.tensor.removeprefix(prefix), prefix + slot.tensor)
            if name := next((name for name in names if name in shapes), None):
                slots.append(_at(slot, name, shapes, folder))
                continue
            renamed = _on_disk(model, live) if renamed is None else renamed
            there = renamed.get(f"{slot.part}:{slot.tensor}", [slot])  # only experts are stored under other names
            slots += [_at(other, other.tensor, shapes, folder) for other in there]
        blocks.append(Block(block.name, block.neurons, tuple(slots), block.consumer, block.experts, block.found))
    return Layout(tuple(blocks))


def _at(slot: Slot, name: str, shapes: Shapes, folder: Path) -> Slot:
    if name not in shapes:
        raise ValueError(f"{folder} has no tensor {name!r}, which its config.json calls for")
    if shapes[name] != slot.shape:
        raise ValueError(f"{name!r} has the shape {shapes[name]} in {folder}, and its config.json expects {slot.shape}")
    return Slot(slot.part, name, slot.pattern, slot.shape, slot.g, slot.parts, slot.start)


def _meta_model(folder: Path) -> Any:
    import transformers

    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True)
    except (ValueError, OSError, KeyError) as error:
        raise ValueError(
            f"{folder}/config.json can't be read as a model's configuration: {error}. {WAY_OUT}"
        ) from error
    kinds = ("AutoModelForCausalLM", "AutoModelForMaskedLM", "AutoModelForImageTextToText", "AutoModel")
    for kind in kinds:
        try:
            with torch.device("meta"):
                return getattr(transformers, kind).from_config(config)
        except ValueError as error:
            reason = error
    raise ValueError(f"transformers can't build the model of {folder}: {reason}. {WAY_OUT}")


def _on_disk(model: Any, live: Layout) -> dict[str, list[Slot]]:
    """The slots on disk of every stacked slot in memory, read off transformers' own conversion.

    Marker tensors that number their neurons (the hidden axis is cut to 1) go through the conversion that
    ``save_pretrained`` uses; what comes out has the names on disk, and its numbers say which neurons it holds.
    """
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError as error:
        raise ValueError(f"this transformers can't tell the names on disk ({error}). {WAY_OUT}") from error
    markers, owners, base = {}, [], 0
    for block in live.blocks:
        for tensor in dict.fromkeys(slot.tensor for slot in block.slots) if block.experts else ():
            slots = [slot for slot in block.slots if slot.tensor == tensor]
            marker = _marker(slots[0], base)
            markers[tensor] = marker
            owners.append((base, slots))
            base += marker.numel()
    found: dict[str, list[Slot]] = {f"{slot.part}:{slot.tensor}": [] for _, slots in owners for slot in slots}
    starts = torch.tensor([start for start, _ in owners])
    for name, tensor in revert_weight_conversion(model, markers).items():
        start, slots = owners[int(torch.searchsorted(starts, tensor.flatten()[0], right=True)) - 1]
        for slot in slots:
            if (there := _read(name, tensor - start, slot)) is not None:
                found[f"{slot.part}:{slot.tensor}"].append(there)
    for key, slots in found.items():
        slots.sort(key=lambda slot: slot.start)
        part, tensor = key.split(":", 1)
        want = next(s for b in live.blocks for s in b.slots if s.tensor == tensor and s.part == part)
        if sum(slot.neurons for slot in slots) != want.neurons:
            raise ValueError(f"the names on disk of {tensor} can't be told for certain. {WAY_OUT}")
    return found


def _axes(slot: Slot) -> list[tuple[str, int]]:
    """The axes of the slot's tensor as its pattern names them, with their sizes."""
    return list(zip(re.findall(r"\([^)]*\)|\w+", slot.pattern.split("->")[0]), slot.shape, strict=True))


def _marker(slot: Slot, base: int) -> Tensor:
    """Numbers base, base + 1, … in the shape of the slot's tensor with its hidden axis cut to 1."""
    shape = [1 if axis == "d" else size for axis, size in _axes(slot)]
    return torch.arange(base, base + torch.Size(shape).numel()).reshape(shape)


def _read(name: str, numbers: Tensor, slot: Slot) -> Slot | None:
    """The slot that a converted marker is, if it holds neurons of ``slot``'s part."""
    marker = _marker(slot, 0)
    small = Slot(slot.part, name, slot.pattern, tuple(marker.shape), slot.g, slot.parts)
    width = next((size for axis, size in _axes(slot) if axis == "d"), 1)
    if numbers.shape == marker.shape:
        same = torch.equal(numbers, marker)
        return Slot(slot.part, name, slot.pattern, slot.shape, slot.g, slot.parts) if same else None
    own = small.view(marker).reshape(-1)
    at = torch.searchsorted(own, numbers.flatten()) if bool((own.diff() > 0).all()) else None
    if at is None or numbers.ndim != 2 or 1 not in numbers.shape:
        return None
    if int(at[-1]) >= len(own) or not torch.equal(own[at], numbers.flatten()) or not bool((at.diff() == 1).all()):
        return None
    rows = numbers.shape[1] == 1
    shape = (len(at), width) if rows else (width, len(at))
    return Slot(slot.part, name, "n d -> n d" if rows else "d n -> n d", shape, start=int(at[0]))


class _Reached(Exception):
    """Stops a forward pass once the block has been computed."""


def probe(model: nn.Module, layout: Layout, block: Block, neurons: int = 4) -> list[str]:
    """Verify a block by autograd: with all activations but neuron i's set to zero, only neuron i's slices get gradient.

    Args:
        model: the live model; unchanged afterwards.
        layout: its layout.
        block: which block.
        neurons: how many neurons to try, spread over the block.

    Returns:
        What is wrong, in words; empty if nothing is.

    Source: ours.
    """
    inner = block.neurons // max(block.experts, 1)
    tensors = {slot.tensor: model.get_parameter(slot.tensor) for slot in block.slots}
    problems = []
    for i in torch.linspace(0, inner - 1, neurons).round().long().unique().tolist():
        grads = _gradients(model, block, i, tensors)
        for slot in block.slots:
            grad = grads[slot.tensor]
            hit = _rows_hit(slot, grad) if grad is not None else set()
            if hit - {i}:
                problems.append(
                    f"{slot.tensor} ({slot.part}): neuron {i} also lies in the rows of {sorted(hit - {i})[:5]}"
                )
            elif not hit:
                problems.append(f"{slot.tensor} ({slot.part}): neuron {i} gets no gradient")
    return problems


def _rows_hit(slot: Slot, grad: Tensor) -> set[int]:
    """Which neurons (of any expert) have a gradient in the slot."""
    rows = slot.view(grad)
    nonzero = rows.reshape(*rows.shape[: 1 + slot.stacked], -1).ne(0).any(-1).nonzero()
    return {int(i) for i in nonzero[:, -1]}


def _gradients(model: nn.Module, block: Block, i: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor | None]:
    def only(h: Tensor, _: Any) -> Tensor:
        keep = torch.zeros(h.shape[-1], dtype=h.dtype, device=h.device)
        keep[i] = 1
        return h * keep

    def stop(_m: nn.Module, _a: Any, out: Any) -> None:
        outputs.append(out[0] if isinstance(out, tuple) else out)
        raise _Reached

    outputs: list[Tensor] = []
    needed = {name: tensor.requires_grad for name, tensor in tensors.items()}
    device = next(iter(tensors.values())).device
    vocabulary = int(getattr(getattr(model, "config", None), "vocab_size", 0) or 32)
    ids = torch.randint(vocabulary, (2, 16), generator=torch.Generator().manual_seed(0)).to(device)
    handle = model.get_submodule(block.consumer).register_forward_hook(stop)
    try:
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        with torch.enable_grad(), listening(model, block, only):
            with suppress(_Reached):
                model(input_ids=ids, use_cache=False)
        weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(1)).to(outputs[0])
        found = torch.autograd.grad((outputs[0] * weights).sum(), list(tensors.values()), allow_unused=True)
    finally:
        handle.remove()
        for name, tensor in tensors.items():
            tensor.requires_grad_(needed[name])
    return dict(zip(tensors, found, strict=True))
