"""The earlier domain's loss around the earlier checkpoint: where the theory's terms are measured on live models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.checkpoint import Checkpoint
from surgery.compat import can_set_experts_implementation
from surgery.hooks import evaluating
from surgery.opening import open_weights
from surgery.predictions import Distillation, Loss, distillation, positions, predicting
from surgery.prompts import Batch
from surgery.responses import respond
from surgery.slots import Layout
from surgery.swap import live_tensor
from surgery.theory import Point, Vector, combined, curvature, fisher, in_probability, inner, pushed, slope
from surgery.trajectory import Trajectory


@dataclass(frozen=True)
class Landscape:
    """The earlier domain's loss L_A around the earlier checkpoint θA, and the later training's displacement δB.

    By default L_A = KL(p_earlier ‖ p_θ), in nats per response token: its gradient at θA is zero and its Hessian there
    is the Fisher information, exactly. Made by ``Landscape.around``.

    Args:
        model: the earlier model, live, float32 or wider; never written to.
        theta: θA, parameter name → tensor.
        delta: δB = θB − θA, of the same names.
        batches: the earlier domain's prompts with their responses.
        loss: ``loss(model, batch)``, a mean over response tokens.
        layout: where the neurons lie, if given.

    Source: the paper, Section 5; the choice of L_A is ours.
    """

    model: nn.Module = field(repr=False)
    theta: Vector = field(repr=False)
    delta: Vector = field(repr=False)
    batches: list[Batch] = field(repr=False)
    loss: Loss = field(repr=False)
    layout: Layout | None = field(default=None, repr=False)

    @classmethod
    def around(cls, run: Trajectory, data: Iterable[Batch], *, loss: Loss | None = None) -> Landscape:
        """The landscape of a trajectory's earlier domain.

        Args:
            run: a trajectory with ``earlier`` and ``later``. A folder is loaded in float32 whatever its dtype; a live
                earlier model has to be float32 or wider.
            data: batches of the earlier domain; without labels the earlier model answers them first (``respond``).
            loss: another loss, twice differentiable, a mean over the batch's response tokens (default: the KL).

        Returns:
            A ``Landscape``. It holds two mappings as large as the model (θA, which is the live model's own, and δB);
            what is measured on it takes up to four more for a while, and the graph of one batch.

        Raises:
            ValueError: no batch, weights narrower than float32, or checkpoints of different models.
        """
        batches = list(data)
        if not batches:
            raise ValueError("the loss is taken on prompts of the earlier domain, and data is empty")
        model, theta, delta = _points(run)
        if loss is None:
            batches = respond(model, batches)
            with differentiable(model):  # by the same kernels as what is compared with it, so that L_A(θA) is zero
                loss = distillation(model, batches)
        return cls(model, theta, delta, batches, loss, run.layout)

    @property
    def tokens(self) -> int:
        """How many response tokens the loss is a mean over."""
        return sum(int(positions(batch).sum()) for batch in self.batches)

    def value(self, at: Point) -> float:
        """L_A at a point (names that it lacks are θA's)."""
        with differentiable(self.model), torch.no_grad():
            return sum(float(self._loss(batch, at)) * share for batch, share in self._shares())

    def gradient(self, at: Point) -> Vector:
        """∇L_A at a point, for the names that the point has."""
        with differentiable(self.model):
            return combined((share, slope(partial(self._loss, batch), at)[1]) for batch, share in self._shares())

    def product(self, v: Point) -> Vector:
        """H v at θA, restricted to the names of v: by the Fisher for the KL, by two backward passes for other losses.

        Memory: the mapping that is returned, one more for a while, and one batch's graph.
        """
        with differentiable(self.model):
            return combined(self._products(v))

    def _products(self, v: Point) -> Iterator[tuple[float, Vector]]:
        for batch, share in self._shares():
            if isinstance(self.loss, Distillation):
                yield 1 / self.tokens, fisher(partial(self._logits, batch), self.theta, v)
            else:
                yield share, curvature(partial(self._loss, batch), self.theta, v)

    def quadratic(self, v: Point) -> float:
        """vᵀ H v at θA; for the KL by one forward pass with tangents and no backward pass."""
        if not isinstance(self.loss, Distillation):
            return inner(v, self.product(v))
        total = 0.0
        with differentiable(self.model):
            for batch in self.batches:
                z, moved = pushed(partial(self._logits, batch), self.theta, v)
                total += float((in_probability(z, moved) * moved).double().sum())
        return total / self.tokens

    def _shares(self) -> Iterator[tuple[Batch, float]]:
        for batch in self.batches:
            yield batch, int(positions(batch).sum()) / self.tokens

    def _loss(self, batch: Batch, at: Point) -> Tensor:
        if isinstance(self.loss, Distillation):
            return divergence(self._logits(batch, at), self.loss.of(batch))
        return functional(self.model, {**self.theta, **at}, self.loss, batch)

    def _logits(self, batch: Batch, at: Point) -> Tensor:
        return functional(self.model, {**self.theta, **at}, predicting, batch)


def divergence(logits: Tensor, target: Tensor) -> Tensor:
    """Mean over rows of KL(softmax(target) ‖ softmax(logits)), in operations that autograd differentiates twice."""
    wide = torch.promote_types(logits.dtype, torch.float32)
    p, q = target.to(logits.device, wide).log_softmax(-1), logits.to(wide).log_softmax(-1)
    impossible = p == -torch.inf  # 0 · (−∞ − q) is 0
    return torch.where(impossible, 0.0, p.exp() * (p - q).masked_fill(impossible, 0.0)).sum() / max(len(logits), 1)


class _Asked(nn.Module):
    """A function of a model and a batch as a module, so that ``functional_call`` can give the model other weights."""

    def __init__(self, model: nn.Module, function: Any) -> None:
        super().__init__()
        self.model, self.function = model, function

    def forward(self, batch: Batch) -> Tensor:
        found: Tensor = self.function(self.model, batch)
        return found


def functional(model: nn.Module, at: Point, function: Any, batch: Batch) -> Tensor:
    """``function(model, batch)`` with the model's parameters at a point; the model keeps its own."""
    named = {f"model.{name}": tensor for name, tensor in at.items()}
    found: Tensor = torch.func.functional_call(_Asked(model, function), named, (batch,))
    return found


@contextmanager
def differentiable(model: Any) -> Iterator[None]:
    """While the body runs, a model in eval mode whose attention and experts can be differentiated twice.

    Embeddings forget their padding token meanwhile: backward passes leave its row out, also where it is attended (as
    end of sequence, say), and forward ones do not.
    """
    experts = model.get_experts_implementation() if can_set_experts_implementation(model) else None
    padding = {one: one.padding_idx for one in model.modules() if isinstance(one, nn.Embedding)}
    try:
        for one in padding:
            one.padding_idx = None
        if experts is not None:
            model.set_experts_implementation("eager")
        with evaluating(model), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if experts is not None:
            model.set_experts_implementation(experts)
        for one, index in padding.items():
            one.padding_idx = index


def _points(run: Trajectory) -> tuple[nn.Module, Vector, Vector]:
    """The earlier model, live, its parameters θA, and δB."""
    earlier, later = run.source("earlier"), run.source("later")
    if isinstance(earlier, Mapping) and not isinstance(earlier, Checkpoint):
        raise ValueError("the loss is taken on the earlier model: pass earlier as a folder, a hub id or an nn.Module")
    model = earlier if isinstance(earlier, nn.Module) else Trajectory(later=earlier).load(dtype=torch.float32)
    live = open_weights(model, run.layout)
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in theta.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name!r} is {tensor.dtype}, and second-order terms drown in its rounding: pass the earlier "
                f"checkpoint as a folder (it is loaded in float32), or the model in float32"
            )
    source = open_weights(later, run.layout, live)
    delta = {}
    for name, tensor in theta.items():
        delta[name] = live_tensor(source, live, name).to(tensor).sub(tensor)
        if not bool(delta[name].isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite numbers in {live.name} or {source.name}")
    return model, theta, delta
