"""The earlier domain's loss around its checkpoint, and subspaces of the parameters there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.checkpoints.configuration import differences
from surgery.checkpoints.opening import open_weights
from surgery.checkpoints.trajectory import Trajectory
from surgery.compat import can_set_experts_implementation, uncompiled
from surgery.layout.sharding import check_one_process
from surgery.layout.slots import Layout
from surgery.live.answers import respond
from surgery.live.earlier import AsLive
from surgery.live.hooks import evaluating
from surgery.live.losses import Distillation, Loss, cross_entropy, distillation, predicting, targets_of, tokens_in
from surgery.live.prompts import Batch
from surgery.masks.edits import Edit
from surgery.masks.mask import Mask, checked
from surgery.theory.vectors import (
    Point,
    Vector,
    combined,
    curvature,
    eigenpairs,
    fisher,
    in_probability,
    inner,
    pushed,
    slope,
)


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
            A ``Landscape``. It holds two mappings as large as the model (θA, which is the live model's own, and δB).
            Measurements on it temporarily take up to four more, and the graph of one batch.

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
        return tokens_in(self.batches)

    def value(self, at: Point) -> float:
        """L_A at a point (names that it lacks are θA's)."""
        with differentiable(self.model), torch.no_grad():
            return sum(float(self._loss(batch, at)) * share for batch, share in self._shares())

    def gradient(self, at: Point) -> Vector:
        """∇L_A at a point, for the names that the point has."""
        with differentiable(self.model):
            return combined((share, slope(partial(self._loss, batch), at)[1]) for batch, share in self._shares())

    def product(self, v: Point) -> Vector:
        """H v at θA, restricted to the names of v: the Fisher product for the KL, two backward passes for other losses.

        Memory: the returned mapping, temporarily one more, and one batch's graph.
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
            yield batch, tokens_in([batch]) / self.tokens

    def _loss(self, batch: Batch, at: Point) -> Tensor:
        if isinstance(self.loss, Distillation):
            return divergence(self._logits(batch, at), self.loss.of(batch))
        if self.loss is cross_entropy:
            logits = self._logits(batch, at)
            return nn.functional.cross_entropy(logits, targets_of(batch).to(logits.device))
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
    earlier, later = run.source("earlier"), run.tensors("later")
    if isinstance(earlier, Mapping) and not isinstance(earlier, Checkpoint):
        raise ValueError("the loss is taken on the earlier model: pass earlier as a folder, a hub id or an nn.Module")
    model = (
        uncompiled(earlier)
        if isinstance(earlier, nn.Module)
        else Trajectory(later=run.tensors("earlier")).load(dtype=torch.float32)
    )
    for one in (model, later):
        check_one_process(one, "its landscape")
    live = open_weights(model, run.layout)
    theta = {name: parameter.detach() for name, parameter in model.named_parameters()}
    for name, tensor in theta.items():
        if tensor.dtype not in (torch.float32, torch.float64):
            raise ValueError(
                f"{name!r} is {tensor.dtype}, and its rounding hides second-order terms: pass the earlier "
                f"checkpoint as a folder (it is loaded in float32), or the model in float32"
            )
    source = open_weights(later, run.layout, live)
    if other := differences(live.tensors, source.tensors):
        raise ValueError(
            f"the loss is followed from {live.name} to {source.name} in one forward pass, and they have two: another "
            f"{', '.join(list(other)[:3])}"
        )
    there, delta = AsLive(source, live), {}
    for name, tensor in theta.items():
        delta[name] = there[name].to(tensor).sub(tensor)
        if not bool(delta[name].isfinite().all()):
            raise ValueError(f"{name!r} holds NaN or infinite numbers in {live.name} or {source.name}")
    return model, theta, delta


@dataclass(frozen=True)
class Coordinates:
    """All numbers of a mask's neurons (or every parameter), as the coordinates that a small vector is kept in.

    ``take`` reads them from a vector of the whole space, ``put`` is the vector that is zero elsewhere.
    """

    edits: tuple[Edit, ...] | None  # None: every parameter
    shapes: Vector = field(repr=False)  # the whole space's tensors, for their shapes, dtypes and devices

    def take(self, v: Point) -> Vector:
        """The coordinates of v; a tensor that v lacks is zero."""
        if self.edits is None:
            return dict(v)
        found = {}
        for edit in self.edits:
            whole = v[edit.slot.tensor] if edit.slot.tensor in v else torch.zeros_like(self.shapes[edit.slot.tensor])
            found[_name(edit)] = edit.take(whole)
        return found

    def put(self, rows: Point) -> Vector:
        """The whole space's vector with these coordinates: only the tensors that hold any of them."""
        if self.edits is None:
            return dict(rows)
        found: Vector = {}
        for edit in self.edits:
            tensor = edit.slot.tensor
            if tensor not in found:
                found[tensor] = torch.zeros_like(self.shapes[tensor])
            edit.put(found[tensor], rows[_name(edit)])
        return found

    def project(self, v: Point) -> Vector:
        """P v."""
        return self.put(self.take(v))

    @property
    def dimension(self) -> int:
        """How many numbers."""
        if self.edits is None:
            return sum(tensor.numel() for tensor in self.shapes.values())
        return sum(edit.numbers for edit in self.edits)


def _name(edit: Edit) -> str:
    return f"{edit.block.name}/{edit.slot.part}/{int(edit.index[0])}"  # of single numbers a slot may have several


@dataclass(frozen=True)
class Span:
    """A subspace S spanned by a few orthonormal vectors: the directions of largest curvature among some coordinates.

    Args:
        home: the coordinates in which the vectors are kept.
        vectors: orthonormal, in those coordinates.
        values: the curvature λ of each, descending, in nats per squared unit of the parameters.
        residuals: ‖H u − λ u‖ of each within the coordinates, their error.
        steps: how many Hessian–vector products it took.

    Source: the paper's conflict subspace S; that the largest eigenvectors span it is ours.
    """

    home: Coordinates = field(repr=False)
    vectors: tuple[Vector, ...] = field(repr=False)
    values: tuple[float, ...]
    residuals: tuple[float, ...] = field(repr=False)
    steps: int

    def coefficients(self, v: Point) -> tuple[float, ...]:
        """⟨u_i, v⟩ of each vector."""
        rows = self.home.take(v)
        return tuple(inner(u, rows) for u in self.vectors)

    def combine(self, coefficients: tuple[float, ...]) -> Vector:
        """Σ c_i u_i, as a vector of the whole space."""
        return self.home.put(combined(zip(coefficients, self.vectors, strict=True)))

    def project(self, v: Point) -> Vector:
        """P_S v."""
        return self.combine(self.coefficients(v))

    @property
    def dimension(self) -> int:
        """How many directions."""
        return len(self.vectors)


Subspace = Coordinates | Span


def coordinates(land: Landscape, mask: Mask | None = None) -> Coordinates:
    """The coordinates of what a mask selects in a landscape; None: every parameter.

    Raises:
        ValueError: the mask is empty, holds scores, or is of another model.
    """
    if mask is None:
        return Coordinates(None, land.theta)
    layout = open_weights(land.model, land.layout, units=checked(mask).units).layout
    edits = tuple(mask.edits(layout, "the earlier model"))
    if not edits:
        raise ValueError("the mask selects nothing, and a subspace needs a dimension: choose more neurons")
    return Coordinates(edits, land.theta)


def whole(land: Landscape, v: Point) -> Vector:
    """v with zeros for the tensors that it lacks (they take no memory), so that H v comes for every tensor."""
    return {
        n: v[n] if n in v else torch.zeros((), dtype=t.dtype, device=t.device).expand_as(t)
        for n, t in land.theta.items()
    }


def eigenspace(
    land: Landscape,
    k: int = 16,
    *,
    mask: Mask | None = None,
    steps: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Span:
    """The k directions of largest curvature of the earlier domain's loss, among a mask's neurons or all parameters.

    The largest eigenpairs of P H P at θA, P the projection on the coordinates, by Lanczos.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        k: how many.
        mask: bool Neurons or Entries: only what it selects moves (default: every parameter).
        steps: at most this many Hessian–vector products. Each keeps a vector as large as the coordinates, so choose few
            steps, or a mask, for a large model.
        tolerance: stop when the residual of each is below this fraction of its curvature.
        seed: of the random start.

    Returns:
        A ``Span``; ``residuals`` are its errors.

    Raises:
        ValueError: the mask is empty or of another model; k is not in 1…steps.

    Source: ours; the paper's S is a low-dimensional subspace on shared active neurons (Assumption 4).
    """
    home = coordinates(land, mask)
    found = eigenpairs(
        lambda rows: home.take(land.product(home.put(rows))),
        home.take(land.theta), k, steps=steps, tolerance=tolerance, seed=seed,
    )  # fmt: skip
    return Span(home, found.vectors, found.values, found.residuals, found.steps)
