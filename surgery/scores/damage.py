"""D, damage: which neurons lost the earlier skill, by the gradient of the distance from the earlier model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.opening import Weights
from surgery.checkpoints.trajectory import Trajectory, check_finite
from surgery.devices import fetched, room, sent
from surgery.layout.sharding import Ranks, local, ranks_of
from surgery.layout.slots import Block, Slot
from surgery.live.answers import respond
from surgery.live.earlier import earlier_model, is_bare
from surgery.live.hooks import as_live, collecting, parts_of, rows_in
from surgery.live.losses import Distillation, Divergence, Loss, check_loss, distillation, summed, tokens_in
from surgery.live.prompts import Batch, batches_of, each, fitting, on_cpu, passes, vocabulary_of
from surgery.live.resident import with_earlier
from surgery.masks.edits import Rows
from surgery.masks.neurons import Neurons
from surgery.reverting.rollback import Rollback, rollback
from surgery.scores.inner_products import inner
from surgery.scores.memory import remember, remembering
from surgery.units import Units


@remembering(last=8)
def damage(
    run: Trajectory, data: Iterable[Batch], *, loss: Loss | Divergence = "hellinger", units: Units = "mlp"
) -> Neurons:
    """D, damage: the first-order gain of reverting a neuron, D_n = ⟨∇L(θB), δB,n⟩.

    L is the distance of the later model's predictions from the earlier model's. D is positive where reverting lowers
    it. The sum over some neurons estimates the gain of reverting them together, per response token, for small steps.

    Args:
        run: a trajectory with ``earlier`` and ``later``; the later model is loaded once (``run.load``).
        data: batches of the damaged domain, ``[batch, token]``, with labels on the response tokens. The labels need not
            be right; the earlier model first answers batches without labels (``respond``).
        loss: "hellinger" or "kl", the ``distillation`` from the earlier checkpoint, or your own ``loss(model, batch)``:
            a scalar mean over the batch's response tokens, smaller = better. The Hellinger distance counts every
            changed answer alike; in the lab it chose better, above all from few prompts (benchmarks/results).
        units: which kinds of unit: "mlp", "kv_group", "value_channel", or a tuple (see ``find_layout``).

    Returns:
        Scores of either sign, in the loss's unit. Gradients have the weights' dtype; products and sums are float32,
        sums over batches float64. One tensor's gradient is in memory at a time.

    Raises:
        ValueError: no batch, no response token, no gradient (frozen, quantised or offloaded weights), or the
            checkpoints are of different models.

    Source: ours, from Proposition 1: damage is local, and to leading order additive over coordinates.
    """
    run.check_whole()
    batches, loss = answered(run, data, loss, anew=True)
    total, model = _total(run, units), run.load()
    tokens = tokens_in(batches)
    value: Any = 0.0  # on the model's device: it is waited for at the end
    with total.collecting(model):
        for batch in each("gradients", batches):
            one = summed(loss, model, batch)
            one.backward()
            value = value + one.detach().double()
    found = total.mean(tokens, run, units)
    gain, value = sum(float(sums.sum()) for sums in total.sums.values()) / tokens, ranks_of(model).same(float(value))
    return Neurons(found, made_by={"damage": {"tokens": tokens, "sum": gain, "loss": value / tokens}})


def promised(scores: Neurons, mask: Neurons) -> float:
    """The first-order gain of reverting a mask: the sum of its units' D."""
    return sum(float(scores[name][chosen].double().sum()) for name, chosen in mask.items())


def overpromised(made_by: Mapping[str, Any]) -> str | None:
    """A warning where the D of a mask's units adds up to more than the loss, which is all that can be won back.

    None for a user's own loss, which may be negative.
    """
    told, loss = made_by.get("damage", {}), made_by.get("selector", {}).get("loss")
    if loss not in ("kl", "hellinger") or "promised" not in told or told["promised"] <= told["loss"]:
        return None
    unit = " nats" if loss == "kl" else ""
    return (
        f"their D adds up to {told['promised']:.3g}{unit}, more than the loss of {told['loss']:.3g}, which is all that "
        f"can be won back: expect less than the sum, and measure it with surgery sweep"
    )


def answered(
    run: Trajectory, data: Iterable[Batch], loss: Loss | Divergence, anew: bool = False
) -> tuple[list[Batch], Loss]:
    """The batches, answered by the earlier model where they have no labels, and the loss that a name stands for.

    The distance from the earlier model comes with batches that fit in memory (``fitting``, or ``anew`` as ``passes``
    groups them), a loss of the user's own with those that were given.
    """
    check_loss(loss)
    if not isinstance(loss, str):
        batches = list(fitting(_batches(data)) if isinstance(loss, Distillation) else _batches(data))
        if not tokens_in(batches):
            raise ValueError(
                "no batch has a response token to predict: all labels are -100, or they are one token long"
            )
        return batches, loss
    batches, far = _distilled(run, on_cpu(_batches(data)), anew)
    return batches, far.by(loss)


@remember
def _distilled(run: Trajectory, data: list[Batch], anew: bool) -> tuple[list[Batch], Distillation]:
    with earlier_model(run) as earlier:  # once, for the answers and for the predictions
        batches = earlier_answers(run, data)
        batches = counting(passes(batches)[0]) if anew else list(fitting(batches))
        return batches, distillation(earlier, batches)


def counting(batches: list[Batch]) -> list[Batch]:
    """The batches without those of which no token counts; as given where none does."""
    return [batch for batch in batches if tokens_in([batch])] or batches


def earlier_answers(run: Trajectory, data: Iterable[Batch], path: Path | None = None) -> list[Batch]:
    """The batches, answered by the earlier model where they have no labels; kept in a file, or read from it."""
    batches = _batches(data)
    if all("labels" in batch for batch in batches):
        return batches
    return _answers(run, batches) if path is None else _answered(run, batches, path)


@remember
def _answers(run: Trajectory, data: list[Batch]) -> list[Batch]:
    return _answered(run, data)


def _answered(run: Trajectory, batches: list[Batch], path: Path | None = None) -> list[Batch]:
    with earlier_model(run) as earlier:
        return respond(earlier, batches, path=path, tokens=_shared(earlier, run))


def _shared(earlier: nn.Module, run: Trajectory) -> int | None:
    """How many tokens the later model has, if the earlier one has more; else None."""
    own, limit = vocabulary_of(earlier), None if is_bare(run.later) else vocabulary_of(run.load())
    return limit if own is not None and limit is not None and limit < own else None


def check_wide(model: nn.Module) -> None:
    """Raise ``ValueError`` unless the model's dtype has values between those of two checkpoints."""
    if narrow := {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}:
        raise ValueError(
            f"in {narrow.pop()} most blends of two checkpoints round to one of them: load the model in float32, "
            f"run.load(dtype=torch.float32)"
        )


@remembering(last=8)
def reversal_cost(
    run: Trajectory, data: Iterable[Batch], *, loss: Divergence = "hellinger", units: Units = "mlp"
) -> Neurons:
    """What reverting a neuron costs a domain that the later model answers well.

    cost_n = ⟨∇L(θR), θR,n − θB,n⟩ with θR the later model with all neurons reverted, and L the distance of the
    predictions from the later model's. At θB the gradient of L is zero; at θR it contains the costs that neurons cause
    together.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: batches of the domain to protect; the later model first answers batches without labels.
        loss: "kl" or "hellinger", from the later model's predictions.
        units: as for ``damage``.

    Returns:
        Scores of either sign in the unit of ``damage`` with that loss; positive where reverting hurts.

    Raises:
        ValueError: as ``damage``.

    Source: ours, from Proposition 1.
    """
    run.check_whole()
    model, (live,) = run.load(), run.live(units=units)
    batches = counting(passes(respond(model, on_cpu(_batches(data))))[0])
    far = distillation(model, batches, divergence=loss)
    tokens = tokens_in(batches)
    with _all_back(model, run, live) as done:
        total = _Total(live, lambda part: done.before(part.block, part.slot, part.offsets))
        with total.collecting(model):
            for batch in each("gradients of what it costs", batches):
                summed(far, model, batch).backward()
    found = total.mean(tokens, run, units)
    return Neurons(found, made_by={"reversal_cost": {"tokens": tokens}})


def _batches(data: Iterable[Batch]) -> list[Batch]:
    batches = list(batches_of(data))
    if not batches:
        raise ValueError("gradients are taken on prompts of a domain, and data is empty")
    return batches


def _total(run: Trajectory, units: Units) -> _Total:
    live, earlier = with_earlier(run, units)
    later = unrounded(run, live, units)
    return _Total(
        live,
        lambda part: as_live(earlier, live, part),
        lambda part, _: as_live(later, live, part),
    )


def unrounded(run: Trajectory, live: Weights, units: Units) -> Weights:
    """The later weights as δB needs them: the live ones, or the folder's where the live ones are those rounded.

    Else the rounding, which may be larger than what training changed, would be part of δB.
    """
    if not isinstance(run.later, str | Path | Checkpoint):
        return live
    (stored,) = run.weights("later", units=units)
    narrow = {live.tensors[slot.tensor].dtype for block in live.layout.blocks for slot in block.slots}
    wide = {stored.tensors[slot.tensor].dtype for block in stored.layout.blocks for slot in block.slots}
    return stored if any(torch.promote_types(one, other) != one for one in narrow for other in wide) else live


def _all_back(model: nn.Module, run: Trajectory, live: Weights) -> Rollback:
    """All units reverted. Their old values, most of a model, are kept off a GPU that has no room for them."""
    mask = Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in live.layout.sizes.items()})
    sizes = {local(live.tensors[slot.tensor]).device: 0 for block in live.layout.blocks for slot in block.slots}
    for edit in mask.edits(live.layout, live.name):
        tensor = local(live.tensors[edit.slot.tensor])
        sizes[tensor.device] += edit.numbers * tensor.element_size()
    fits = all(home.type != "cuda" or 4 * size <= room(home) for home, size in sizes.items())
    keep_on = None if fits else "cpu"
    return rollback(model, to=run.tensors("earlier"), mask=mask, keep_on=keep_on, layout=run.layout)


@dataclass
class _Total:
    """Σ over backward passes of ⟨∇, θ − θ'⟩ per neuron; every gradient is reduced and freed as it comes.

    ``other`` gives rows of θ', and ``own`` those of θ (default: the live tensor's), shaped as the live ones.
    """

    live: Weights
    other: Callable[[Rows], Tensor]
    own: Callable[[Rows, Tensor], Tensor] = rows_in
    sums: dict[str, Tensor] = field(init=False)  # beside the weights while gradients come
    ranks: Ranks = field(init=False)
    _parts: dict[tuple[str, Slot], list[tuple[Rows, Tensor | None]]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        homes = {
            block.name: local(self.live.tensors[block.slots[0].tensor]).device for block in self.live.layout.blocks
        }
        self.sums = {
            block.name: torch.zeros(block.neurons, dtype=torch.float64, device=homes[block.name])
            for block in self.live.layout.blocks
        }
        self.ranks = self.live.ranks

    @contextmanager
    def collecting(self, model: nn.Module) -> Iterator[None]:
        """While the body runs, the weights of the neurons take gradients, and nothing else does.

        At the end the sums are those of all processes that hold the model together.
        """
        with collecting(model, self.live.layout, self.add):
            yield
        self.sums = self.ranks.sums(fetched(self.sums))

    def mean(self, tokens: int, run: Trajectory, units: Units) -> dict[str, Tensor]:
        """The sums per token; where they are NaN or infinite, a ``ValueError`` that names the cause."""
        if not all(bool(sums.sum().isfinite()) for sums in self.sums.values()):
            check_finite(run, "earlier", "later", units=units)
            raise ValueError(
                "the gradient is NaN or infinite on these prompts: the loss is, or it overflowed (a model in float16: "
                "load it with dtype=torch.bfloat16 or torch.float32)"
            )
        return {name: (sums / tokens).float() for name, sums in self.sums.items()}

    def add(self, block: Block, slot: Slot, grad: Tensor, now: Tensor) -> None:
        """Reduce one slot of one tensor's gradient."""
        sums = self.sums[block.name]
        if (block.name, slot) not in self._parts:
            self._parts[block.name, slot] = [
                (part, None if part.offsets is None else sent(part.index, sums.device))
                for part in parts_of(block, slot, now, self.ranks)
            ]
        for part, index in self._parts[block.name, slot]:
            there = self.own(part, now)
            views = rows_in(part, grad), there, self.other(part).reshape(there.shape)
            for at, products in inner(part, *views):
                here, stop = products.to(sums.device), at + len(products)
                if index is None:
                    sums[slot.start + at : slot.start + stop] += here
                else:
                    sums[index[at:stop]] += here
