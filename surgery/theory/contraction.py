"""The paper's Theorem 1, measured: how a refresh contracts the harmful part of a displacement, and what else moves."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch
from surgery.tables import Table, write_json
from surgery.theory.damage import CurvatureBounds, curvature_bounds
from surgery.theory.landscape import Landscape, Span
from surgery.theory.vectors import Point, Vector, allowed, along, descent, inner, largest, norm


@dataclass(frozen=True)
class Neighbour:
    """How far another domain's loss moved during a refresh, and the bound of Theorem 1, at each step.

    ``change`` = L_C(θ_t) − L_C(θB); ``first`` = ⟨∇L_C(θB), θ_t − θB⟩; ``bound`` = abs(first) + ½ β_C ‖θ_t − θB‖² with
    β_C the largest curvature of L_C at θB. Nats per response token.
    """

    change: tuple[float, ...]
    first: tuple[float, ...]
    bound: tuple[float, ...]
    beta: float


@dataclass(frozen=True)
class Contraction:
    """Theorem 1, measured: the distance to the earlier checkpoint inside S at each step of a refresh, and its bound.

    ``inside`` = ‖P_S(θ_t − θA)‖, ``outside`` = ‖(I − P_S)(θ_t − θA)‖; ``bound`` = (1 − αμ)^t ‖P_S δB‖ is the
    theorem's without coupling, ``coupled`` adds α ξ_A · outside at every step. ``loss`` is L_A at each step.
    """

    step: float
    bounds: CurvatureBounds
    inside: tuple[float, ...]
    outside: tuple[float, ...]
    bound: tuple[float, ...]
    coupled: tuple[float, ...]
    loss: tuple[float, ...]
    others: dict[str, Neighbour]

    def tables(self) -> tuple[Table, ...]:
        """The distances at each step, the constants, and the other domains."""
        shown = _shown(len(self.inside))
        columns = (self.inside, self.bound, self.coupled, self.outside, self.loss)
        steps = Table(
            f"Theorem 1: the distance to θA in S ({self.bounds.dimension} dimensions) over a refresh with α = "
            f"{self.step:.3g}, 1 − αμ = {1 - self.step * self.bounds.mu:.4g}",
            ("step", "in S", "bound", "bound with coupling", "outside S", "L_A (nats)"),
            tuple((t, *(column[t] for column in columns)) for t in shown),
        )
        rows = tuple(
            (name, t, one.change[t], one.first[t], one.bound[t]) for name, one in self.others.items() for t in shown[1:]
        )
        head = ("domain", "step", "change", "first order", "bound")
        others = (Table("Other domains: rise of the loss (nats a token)", head, rows),) if rows else ()
        return (steps, self.bounds.table(), *others)

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(self, path)


def contraction(
    land: Landscape,
    span: Span,
    *,
    steps: int = 30,
    step: float | None = None,
    start: float = 1.0,
    points: Iterable[Point] | None = None,
    others: Mapping[str, Iterable[Batch]] | None = None,
    bounds: CurvatureBounds | None = None,
) -> Contraction:
    """Theorem 1: ‖P_S(θ_t − θA)‖ of a refresh and its bound (1 − αμ_A)^t ‖P_S δB‖; other domains and their bound.

    The refresh is gradient descent on L_A from θB, θ ← θ − α ∇L_A(θ), over all of the landscape's batches at once; or
    any other refresh whose points are given.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        span: S, as ``eigenspace`` returns it.
        steps: number of steps of the descent.
        step: α (default: 1/β, the largest that the theorem allows). With ``points`` the α for the bound.
        start: the descent begins at θA + start · δB; below 1 it begins nearer to θA, where the theory is local.
        points: θ_0 = θB, θ_1, ... of your own refresh, parameter name → tensor. Only one is held at a time, so a
            generator that yields ``dict(model.named_parameters())`` after each step works.
        others: domain → batches with labels: their loss is −log p of the responses.
        bounds: the result of ``curvature_bounds(land, span)``, if you have it already.

    Returns:
        ``Contraction``. Memory: five mappings as large as the model, and one per other domain.

    Raises:
        ValueError: a step that is not positive, no point, or a point that lacks a parameter.

    Source: the paper, Theorem 1 and its proof (Appendix C).
    """
    bounds = bounds or curvature_bounds(land, span)
    step = bounds.step if step is None else step
    if not step > 0:
        raise ValueError(f"step={step}: expected a positive step size α, like {bounds.step:.3g} (1/β)")
    origin = along(land.theta, start, land.delta)
    watched = {name: _Watched(land, origin, list(batches)) for name, batches in (others or {}).items()}
    inside, outside, loss = [], [], []
    for point in descent(land.gradient, origin, step, steps) if points is None else points:
        error = _error(point, land.theta)
        within = span.project(error)
        inside.append(norm(within))
        outside.append(norm(along(error, -1.0, within)))
        loss.append(land.value(point))
        for one in watched.values():
            one.see(point)
    if not inside:
        raise ValueError("points is empty: give θB first, then the point after each step")
    free, coupled = (tuple(allowed(bounds.mu, step, inside[0], xi, outside)) for xi in (0.0, bounds.xi))
    return Contraction(
        step, bounds, tuple(inside), tuple(outside), free, coupled, tuple(loss),
        {name: one.told() for name, one in watched.items()},
    )  # fmt: skip


def _error(point: Point, theta: Point) -> Vector:
    if missing := [name for name in theta if name not in point]:
        raise ValueError(f"a point lacks {len(missing)} parameters, the first of them {missing[0]!r}")
    return {name: point[name].detach().to(tensor) - tensor for name, tensor in theta.items()}


class _Watched:
    """Another domain's loss, its gradient and curvature at θB, and what it did since."""

    def __init__(self, land: Landscape, start: Vector, batches: list[Batch]) -> None:
        self.land = Landscape(land.model, start, {}, batches, cross_entropy, land.layout)
        self.start = self.land.value(start)
        self.gradient = self.land.gradient(start)
        self.beta = largest(self.land.product, start, 10)
        self.change: list[float] = []
        self.first: list[float] = []
        self.bound: list[float] = []

    def see(self, point: Point) -> None:
        """Measure one point."""
        moved = _error(point, self.land.theta)
        self.change.append(self.land.value(point) - self.start)
        self.first.append(inner(self.gradient, moved))
        self.bound.append(abs(self.first[-1]) + self.beta * inner(moved, moved) / 2)

    def told(self) -> Neighbour:
        """What was measured."""
        return Neighbour(tuple(self.change), tuple(self.first), tuple(self.bound), self.beta)


def _shown(count: int, rows: int = 12) -> list[int]:
    """At most so many places among 0 … count − 1, the first and the last among them."""
    every = -(-count // rows)
    return sorted({*range(0, count, every), count - 1})
