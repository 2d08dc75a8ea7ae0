"""The paper's scores A, M and C, their products, and what a unit is worth where kinds of unit share a budget."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.trajectory import CHUNK, Trajectory, check_finite, displacements
from surgery.compat import runs_on, uncompiled
from surgery.devices import fetched, sent
from surgery.layout.finding import find_layout
from surgery.layout.sharding import Ranks, owned, ranks_of, stored
from surgery.layout.slots import Block, Layout
from surgery.live.hooks import Routing, evaluating, listening, parts_of, untracked
from surgery.live.prompts import Batch, batches_of, check_fits, each, on_cpu, passes, response_mask, right_padded
from surgery.masks.neurons import Neurons
from surgery.scores.adapters import squares_of
from surgery.scores.memory import remembering
from surgery.units import Units, kind_of


@remembering(last=8)
def activation(
    model: nn.Module, data: Iterable[Batch], *, layout: Layout | None = None, units: Units = "mlp"
) -> Neurons:
    """A, activation: the mean of abs(h_n) over the earlier domain's tokens, h the input of the MLP's consumer.

    A = 1/T · Σ_t abs(h_n(t)). Tokens: the response tokens (``labels != -100``) if a batch has labels, else all
    attended ones. In a MoE the mean of neuron i of expert e is over the tokens routed to e. An expert that no token
    reached has no activation (``Neurons.missing``); it is named in ``made_by["never_routed"]`` and never selected. For
    a unit of attention the mean is over its channels of o's input (for a value channel, over its group's heads).

    Args:
        model: the later model, live; run in eval mode, unchanged afterwards.
        data: batches of ``{"input_ids", "attention_mask"[, "labels"]}``, ``[batch, token]``.
        layout: where the neurons lie (default: found).
        units: which kinds of unit to find (see ``find_layout``) if no layout is given.

    Returns:
        Scores ≥ 0 in the units of the activations; sums in float32 per batch, float64 over batches.

    Raises:
        ValueError: there is no token to average over, a prompt is longer than the model's context or holds a token that
            is not of its vocabulary, or weights are offloaded.
        RuntimeError: a hook did not fire.

    Source: the paper ("most active neurons"); the statistic is ours.
    """
    model = uncompiled(model)
    layout = layout or find_layout(model, units=units)
    listeners = [_Listener(block) for block in layout.blocks]
    ranks = ranks_of(model)
    inner = getattr(model, "base_model", model) if ranks.mesh is None else model  # FSDP gathers from the outside in
    device = runs_on(model)
    if device.type == "meta":
        raise ValueError("the model's weights are on the meta device (offloaded or empty): load it before listening")
    with evaluating(model), untracked(ranks):
        for batch in map(right_padded, each("activations", passes(on_cpu(batches_of(data)))[0])):
            _run(model, inner, batch, listeners, device)
    _fetch(listeners)
    _together(model, ranks, listeners)
    return _mean(layout, listeners, model)


class _Listener:
    """Accumulates Σ w·abs(h) and Σ w of one block: ``[channel]`` and, per expert, ``[expert]``."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.sums = torch.zeros((), dtype=torch.float64)  # like the counts, where the model runs
        self.width = 0  # channels that are heard (of each expert); with tensor parallelism fewer than there are
        self.counts = torch.zeros((), dtype=torch.float64)
        self.weights = torch.zeros(0)
        self.fired = False

    def __call__(self, h: Tensor, routing: Routing | None) -> None:
        self.fired, self.width = True, h.shape[-1]
        rows = h.reshape(-1, h.shape[-1]).abs()
        weights = self.weights.to(rows.device)
        if routing is None:
            if len(rows) != len(weights):
                raise RuntimeError(f"{self.block.name}: {len(rows)} activations for {len(weights)} tokens")
            self.sums = self.sums + (weights @ rows.float()).double()
            self.counts = self.counts + weights.sum().double().reshape(1)
            return
        # Experts come sorted or one at a time in most implementations; index_add does not care.
        per_row = weights[routing.tokens]
        sums = torch.zeros(self.block.experts, rows.shape[1], device=rows.device)
        sums.index_add_(0, routing.experts, rows.float() * per_row[:, None])
        self.sums = self.sums + sums.flatten().double()
        counts = torch.zeros(self.block.experts, device=rows.device).index_add_(0, routing.experts, per_row)
        self.counts = self.counts + counts.double()


def _fetch(listeners: list[_Listener]) -> None:
    """What they heard, on the CPU."""
    sums = fetched({one.block.name: one.sums for one in listeners})
    counts = fetched({one.block.name: one.counts for one in listeners})
    for one in listeners:
        one.sums, one.counts = sums[one.block.name], counts[one.block.name].expand(max(one.block.experts, 1))


def _together(model: nn.Module, ranks: Ranks, listeners: list[_Listener]) -> None:
    """Put together what the processes heard; with tensor parallelism each hears the channels of its own neurons."""
    if ranks.mesh is None:
        return
    weights = dict(stored(model).named_parameters(remove_duplicate=False))
    sums, counts = {}, {}
    for listener in (one for one in listeners if one.fired):
        block, experts = listener.block, max(listener.block.experts, 1)
        slot = (block.of("down") or block.of("o"))[0]
        heard = sums[block.name] = torch.zeros(experts, block.channels // experts, dtype=torch.float64)
        tensor, at = weights[slot.tensor], slot.dimension
        whole = listener.width == heard.shape[1]
        index = torch.arange(listener.width) if whole else owned(tensor)[at]
        if len(index) != listener.width:
            raise RuntimeError(f"{block.name}: {listener.width} channels, and this process holds {len(index)} of them")
        if ranks.first if whole else ranks.counts(tensor, at):
            heard[:, index] = listener.sums.reshape(experts, -1)
        counts[block.name] = listener.counts * ranks.first
    sums, counts = ranks.sums(sums), ranks.sums(counts)
    for listener in (one for one in listeners if one.fired):
        listener.sums, listener.counts = sums[listener.block.name].flatten(), counts[listener.block.name]


def _run(model: nn.Module, inner: Any, batch: Batch, listeners: list[_Listener], device: torch.device) -> None:
    from contextlib import ExitStack

    check_fits(model, batch["input_ids"])
    ids, weights = sent(batch["input_ids"], device), sent(response_mask(batch).flatten().float(), device)
    with ExitStack() as stack:
        for listener in listeners:
            listener.fired, listener.weights = False, weights
            stack.enter_context(listening(model, listener.block, listener))
        inputs = {"attention_mask": sent(batch["attention_mask"], device)} if "attention_mask" in batch else {}
        inner(input_ids=ids, **inputs, use_cache=False)
    silent = [listener.block.name for listener in listeners if not listener.fired]
    if silent:
        raise RuntimeError(
            f"{len(silent)} of {len(listeners)} blocks gave no activations, the first of them {silent[0]!r}: compiled "
            f"functions inside the model ignore new hooks. Pass the model that was not compiled"
        )


def _mean(layout: Layout, listeners: list[_Listener], model: nn.Module) -> Neurons:
    values, missing, never = {}, {}, []
    for block, listener in zip(layout.blocks, listeners, strict=True):
        counts = listener.counts
        if not bool(counts.sum() > 0):
            raise ValueError("the data has no token to average over: no batch, or no response token in any of them")
        per_neuron = counts.repeat_interleave(block.neurons // len(counts))
        values[block.name] = (block.pooled(listener.sums) / per_neuron.clamp(min=1)).float()
        missing[block.name] = per_neuron == 0
        never += [f"{block.name}[{e}]" for e in (counts == 0).nonzero().flatten().tolist()]
    made_by = {"activation": {"tokens": int(max(listener.counts.max() for listener in listeners))}}
    return Neurons(values, missing=missing, made_by={**made_by, **({"never_routed": never} if never else {})})


@remembering(last=8, live=False)
def magnitude(run: Trajectory, *, units: Units = "mlp") -> Neurons:
    """M, magnitude: the L2 norm of what the later training changed in a neuron, ‖δB,n‖.

    Of an adapter (LoRA) over its base it is that of B·A, from A and B alone; in 16 bits the merged weights' change
    differs from it by their rounding.

    Args:
        run: a trajectory with ``earlier`` and ``later``; read chunk by chunk, in float32 whatever the dtype.
        units: which kinds of unit: "mlp", "kv_group", "value_channel", or a tuple (see ``find_layout``).

    Returns:
        Scores ≥ 0 in the units of the weights.

    Raises:
        ValueError: the checkpoints are of different models, or hold NaN or infinite numbers.

    Source: the paper ("aggregate magnitude of ΔW (gate, up, down)"); the norm is ours.
    """
    later, earlier = run.weights("later", "earlier", units=units)
    squares = squares_of(later, earlier)
    if squares is None:
        squares = {name: torch.zeros(size, dtype=torch.float64) for name, size in later.layout.sizes.items()}
        for name, which, (b,) in _differences(run, "earlier", "later", units=units):
            squares[name][which] += products(b, b)
        squares = later.ranks.sums(squares)
    _check_finite(squares, run, "earlier", "later", units=units)
    return Neurons({name: value.sqrt().float() for name, value in squares.items()}, made_by={"magnitude": {}})


@remembering(last=8, live=False, of=("base", "earlier", "later"))
def conflict(run: Trajectory, *, units: Units = "mlp") -> Neurons:
    """C, conflict: how much the later update points against the earlier one, max(0, −cos(δA,n, δB,n)).

    Args:
        run: a trajectory with ``base``, ``earlier`` and ``later``.
        units: which kinds of unit: "mlp", "kv_group", "value_channel", or a tuple (see ``find_layout``).

    Returns:
        Scores in [0, 1]; 0 where either update is zero.

    Raises:
        ValueError: there is no ``base``; the checkpoints are of different models, or hold NaN or infinite numbers.

    Source: the paper (directional cosine, Section 4); the clamp is ours.
    """
    if run.base is None:
        raise ValueError("C compares two updates and needs the base checkpoint: pass Trajectory(base=...)")
    (later,) = run.weights("later", units=units)
    zeros = {name: torch.zeros(3, size, dtype=torch.float64) for name, size in later.layout.sizes.items()}
    for name, which, (a, b) in _differences(run, "base", "earlier", "later", units=units):
        for row, pair in enumerate(((a, b), (a, a), (b, b))):
            zeros[name][row, which] += products(*pair)
    found = later.ranks.sums(zeros)
    _check_finite(found, run, "base", "earlier", "later", units=units)
    values = {}
    for name, (ab, aa, bb) in found.items():
        norm = (aa * bb).sqrt()
        values[name] = torch.where(norm > 0, -ab / norm.clamp(min=1e-300), 0.0).clamp(0, 1).float()
    return Neurons(values, made_by={"conflict": {}})


def _differences(
    run: Trajectory, *names: str, units: Units
) -> Iterator[tuple[str, slice | Tensor, tuple[Tensor, ...]]]:
    """Block, neurons, and what each step changed in some of their numbers: float32 ``[neuron, number]``.

    Of a live model that several processes hold, each has the numbers that it counts.
    """
    *others, later = run.weights(*names, units=units)
    if later.ranks.mesh is None:
        for name, _, start, stop, found in displacements(run, *names, units=units, whole=False):
            yield name, slice(start, stop), found
        return
    for block in later.layout.blocks:
        parts = (parts_of(block, slot, later.tensors[slot.tensor], later.ranks) for slot in block.slots)
        for part in chain.from_iterable(parts):
            tensor, width = later.tensors[part.slot.tensor], part.slot.width
            for index in part.index.split(max(1, CHUNK // (4 * max(width, 1)))):
                some = replace(part, index=index)
                read = [*(some.read(one) for one in others), some.take(tensor)]
                rows = [one.detach().to("cpu", torch.float32).reshape(len(index), -1) for one in read]
                yield block.name, index, tuple((b - a).contiguous() for a, b in pairwise(rows))


def _check_finite(sums: dict[str, Tensor], run: Trajectory, *names: str, units: Units) -> None:
    bad = [name for name, value in sums.items() if not bool(value.sum().isfinite())]
    if bad and run.weights("later", units=units)[0].ranks.mesh is not None:
        raise ValueError(f"the weights of {bad[0]!r} hold NaN or infinite numbers in one of {', '.join(names)}")
    if bad:
        check_finite(run, *names, units=units)


def products(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products of two displacements ``[neuron, width]``: the same bits whatever lies around a row.

    Where the neurons are columns, one half of the numbers is added to the other until one is left: no kernel chooses an
    order by how many columns there are.
    """
    if a.stride(0) > 1 or a.shape[1] == 1:
        norms: Tensor = torch.linalg.vector_norm(a, dim=1) if a is b else (a * b).sum(1)
        return norms.double().square() if a is b else norms.double()
    found = a * b
    while (width := found.shape[1]) > 1:
        found[:, : width // 2] += found[:, width - width // 2 :]
        found = found[:, : width - width // 2]
    return found[:, 0].double()


def dot(a: Tensor, b: Tensor) -> Tensor:
    """Row-wise inner products of ``[neuron, width]``, in float32: the same whatever lies around a row."""
    return (a * b).contiguous().sum(1).double()  # columns of down come transposed; summed so, the order would vary


def product(found: dict[str, Neurons], letters: str, joint: bool) -> Neurons:
    """The product of some letters, or one alone: A and M divided by their layer's mean, C as it is.

    Where kinds share a budget C is divided by the mean of its kind, because the cosine of two long vectors is smaller
    than that of two short ones, by geometry alone.
    """
    level = {letter: score.relative() for letter, score in found.items() if letter != "C"}
    if "C" in found:
        level["C"] = _by_kind(found["C"]) if joint else found["C"]
    made, *others = (level[letter] for letter in "AMC" if letter in letters)
    for factor in others:
        made = made * factor
    return made


def _by_kind(scores: Neurons) -> Neurons:
    """Each score divided by the mean over all units of its kind in the model; zeros stay zeros."""
    held: dict[str, list[torch.Tensor]] = {}
    for name, value in scores.items():
        held.setdefault(kind_of(name), []).append(value.double())
    means = {kind: float(torch.cat(values).mean()) or 1.0 for kind, values in held.items()}
    return Neurons({n: value.double() / means[kind_of(n)] for n, value in scores.items()}, made_by=scores.made_by)


def costs_of(run: Trajectory, units: Units) -> dict[str, int] | None:
    """What ``allocate`` needs as ``costs``: parameters per unit where kinds share the budget, None with one kind."""
    (later,) = run.weights("later", units=units)
    return later.layout.costs


def worth(scores: Neurons, costs: dict[str, int] | None) -> Neurons:
    """What each unit is worth as a whole, from what one parameter of it is worth; the same with one kind of unit."""
    return (
        scores
        if costs is None
        else scores * Neurons({n: torch.full((s,), float(costs[n])) for n, s in scores.sizes.items()})
    )
