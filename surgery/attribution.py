"""D, damage: which neurons the lost skill is lost through, by the gradient of what was lost."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from surgery.gradients import as_live, collecting, in_runs
from surgery.neurons import Neurons
from surgery.operators import rollback
from surgery.predictions import Loss, distillation, positions, predicting
from surgery.prompts import Batch
from surgery.responses import respond
from surgery.scores import dot, remember
from surgery.slots import Block, Slot
from surgery.swap import earlier_model
from surgery.trajectory import Trajectory, Weights, open_weights


@remember
def damage(run: Trajectory, data: Iterable[Batch], *, loss: Loss | None = None, nodes: int | None = None) -> Neurons:
    """D, damage: the first-order gain of reverting a neuron, D_n = ⟨∇L(θB), δB,n⟩ with L = KL(p_earlier ‖ p_later).

    Positive where going back lowers the loss. The sum over some neurons estimates what reverting them together gains
    (in nats per response token for the default loss), as long as the step is small.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: batches of the damaged domain, ``[batch, token]``, with labels on the response tokens. No label has to
            be right; batches without labels are answered by the earlier model first (``respond``).
        loss: another ``loss(model, batch)``, a scalar mean over the batch's response tokens, smaller = better
            (default: ``distillation`` from the earlier checkpoint).
        nodes: integrate along the straight way from the reverted neurons to the later ones, ∫⟨∇L(θ(t)), δB,n⟩dt, at so
            many Gauss–Legendre nodes. Then the scores add up to the whole difference: Σ D_n = L(θB) − L(θB with all
            neurons reverted), but for the jumps of a router that changes its mind on the way. It says where the
            damage sits; for choosing neurons the gradient at θB alone is as good (benchmarks/results). The weights
            have to be float32 or wider: run.load(dtype=torch.float32).

    Returns:
        Scores of either sign, in the loss's unit. Gradients have the weights' dtype; products and sums are float32,
        sums over batches float64. One tensor's gradient is in memory at a time.

    Raises:
        ValueError: no batch, no response token, no gradient (frozen, quantised or offloaded weights), or the
            checkpoints are of different models.

    Source: ours, from Proposition 1: damage is local, and to leading order additive over coordinates.
    """
    batches, loss = answered(run, data, loss)
    total, model = _total(run)
    tokens, value = sum(int(positions(batch).sum()) for batch in batches), 0.0
    for t, weight in _path(model, nodes):
        with _moved(model, run, t), total.collecting(model):
            for batch in batches:
                one = loss(model, batch) * int(positions(batch).sum())
                (one * (weight / t)).backward()  # what is left of δ at t is t · δ
                total.take()
                value += weight * float(one.detach())
    found = {name: (sums / tokens).float() for name, sums in total.sums.items()}
    gain = sum(float(sums.sum()) for sums in total.sums.values()) / tokens
    told = {"tokens": tokens, "sum": gain, **({"loss": value / tokens} if nodes is None else {"nodes": nodes})}
    return Neurons(found, made_by={"damage": told})


def answered(run: Trajectory, data: Iterable[Batch], loss: Loss | None) -> tuple[list[Batch], Loss]:
    """The batches, answered by the earlier model where they have no labels, and the loss (default: see ``damage``)."""
    batches = _some(data)
    if loss is not None:
        return batches, loss
    with earlier_model(run) as earlier:
        batches = respond(earlier, batches)
        return batches, distillation(earlier, batches)


def _path(model: nn.Module, nodes: int | None) -> list[tuple[float, float]]:
    """Places t between the reverted neurons (0) and the later ones (1), and their weights."""
    if nodes is None:
        return [(1.0, 1.0)]
    if not isinstance(nodes, int) or nodes < 1:
        raise ValueError(f"nodes={nodes!r}: expected 1 or more, or None for the gradient at the later model")
    if narrow := {p.dtype for p in model.parameters()} - {torch.float32, torch.float64}:
        raise ValueError(
            f"in {narrow.pop()} the way between two checkpoints has no points: most blends round to one of the ends. "
            f"Load the model wider: run.load(dtype=torch.float32)"
        )
    places, weights = np.polynomial.legendre.leggauss(nodes)
    return [((1 + float(x)) / 2, float(w) / 2) for x, w in zip(places, weights, strict=True)]


@contextmanager
def _moved(model: nn.Module, run: Trajectory, t: float) -> Iterator[None]:
    if t == 1:
        yield
        return
    sizes = open_weights(model, run.layout, units=run.units).layout.sizes
    everything = Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()})
    with rollback(model, to=run.source("earlier"), mask=everything, strength=1 - t, layout=run.layout):
        yield


@remember
def reversal_cost(run: Trajectory, data: Iterable[Batch], *, samples: int = 4, seed: int = 0) -> Neurons:
    """What reverting a neuron would cost a domain that the later model answers well: ½ ⟨δB,n, F δB,n⟩.

    F is the Fisher information of the later model's predictions on the data, so this is the leading term of
    KL(p_later ‖ p_reverted); the first-order term is zero. It is estimated without bias from labels that the later
    model samples itself: (∇ log p(y) · δ_n)² over batches.

    Args:
        run: a trajectory with ``earlier`` and ``later``.
        data: batches of the domain to protect; without labels the later model answers first.
        samples: how often labels are drawn for each batch.
        seed: of the drawing; torch's own random state stays as it was.

    Returns:
        Scores ≥ 0 in nats per response token, the unit of ``damage``.

    Raises:
        ValueError: as ``damage``.

    Source: ours, from Assumption 2 (a KL's Hessian at its minimum is the Fisher information).
    """
    total, model = _total(run)
    batches = respond(model, _some(data), seed=seed)
    squares = {name: torch.zeros_like(sums) for name, sums in total.sums.items()}
    tokens = sum(int(positions(batch).sum()) for batch in batches)
    cuda = [p.device for p in model.parameters() if p.device.type == "cuda"][:1]
    with torch.random.fork_rng(devices=cuda), total.collecting(model):
        torch.manual_seed(seed)
        for batch in batches * samples:
            logits = predicting(model, batch)
            drawn = torch.distributions.Categorical(logits=logits.detach().float(), validate_args=False).sample()
            functional.cross_entropy(logits.float(), drawn, reduction="sum").backward()
            for name, dots in total.take().items():
                squares[name] += dots.square()
    scale = 2 * samples * tokens
    return Neurons({name: (value / scale).float() for name, value in squares.items()}, made_by={"reversal_cost": {}})


def _some(data: Iterable[Batch]) -> list[Batch]:
    batches = list(data)
    if not batches:
        raise ValueError("gradients are taken on prompts of a domain, and data is empty")
    return batches


def _total(run: Trajectory) -> tuple[_Total, nn.Module]:
    model = run.load()
    live = open_weights(model, run.layout, units=run.units)
    (earlier,) = replace(run, later=model).weights("earlier")
    return _Total(live, earlier), model


@dataclass
class _Total:
    """Σ over backward passes of ⟨∇, θ − θ_earlier⟩ per neuron; every gradient is reduced and freed as it comes."""

    live: Weights
    source: Weights
    sums: dict[str, Tensor] = field(init=False)
    last: dict[str, Tensor] = field(init=False)  # of the backward pass that runs now

    def __post_init__(self) -> None:
        self.sums, self.last = self._zeros(), self._zeros()

    def _zeros(self) -> dict[str, Tensor]:
        return {block.name: torch.zeros(block.neurons, dtype=torch.float64) for block in self.live.layout.blocks}

    def take(self) -> dict[str, Tensor]:
        """Add what the last backward pass gave to the sums, and return it."""
        last, self.last = self.last, self._zeros()
        for name, value in last.items():
            self.sums[name] += value
        return last

    def collecting(self, model: nn.Module) -> AbstractContextManager[None]:
        """While the body runs, the weights of the neurons take gradients, and nothing else does."""
        return collecting(model, self.live.layout, self.add)

    def add(self, block: Block, slot: Slot, grad: Tensor, now: Tensor) -> None:
        """Reduce one slot of one tensor's gradient."""
        views = slot.view(grad), slot.view(now), as_live(self.source, self.live, block, slot)
        for first, (g, weight, earlier) in in_runs(slot, *views):
            self.last[block.name][first : first + len(g)] += dot(g, weight - earlier).cpu()
