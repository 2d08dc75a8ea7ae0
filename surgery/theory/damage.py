"""Propositions 1 and 2, measured: the terms of the damage, its split, and in how few dimensions it lies."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

import torch

from surgery.masks.budget import allocate, top
from surgery.masks.mask import Mask
from surgery.masks.neurons import Neurons
from surgery.tables import Table, write_json
from surgery.theory.landscape import Landscape, Span, coordinates, whole
from surgery.theory.vectors import Point, Vector, along, combined, inner, largest, noise, norm, orthonormal, parts

FRACTIONS = (0.125, 0.25, 0.5, 0.75, 1.0)


@dataclass(frozen=True)
class DamageTerms:
    """Proposition 1, measured: how much of the loss the gradient and curvature at the earlier checkpoint explain.

    Along θA + t·δB the loss rises by ``true``; ``first`` = t⟨∇L, δB⟩ and ``second`` = ½ t² δBᵀHδB are the terms of its
    expansion at θA; ``remainder`` = true − first − second. All in nats per response token, one number per fraction t.
    ``gradient`` is ‖∇L_A(θA)‖, ``displacement`` ‖δB‖. ``random``: the second-order term at t = 1 of random
    displacements that move each tensor as far as δB does.
    """

    fractions: tuple[float, ...]
    true: tuple[float, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]
    remainder: tuple[float, ...]
    random: tuple[float, ...]
    gradient: float
    displacement: float
    tokens: int

    def table(self) -> Table:
        """One row per fraction of the way."""
        rows = zip(self.fractions, self.true, self.first, self.second, self.remainder, strict=True)
        return Table(
            f"Proposition 1: rise of L_A along θA + t·δB (nats a response token; {self.tokens} tokens, "
            f"‖∇L_A(θA)‖ = {self.gradient:.2g}, ‖δB‖ = {self.displacement:.4g}{self._chance()})",
            ("t", "true", "first order", "second order", "remainder", "second / true"),
            tuple((*row, row[3] / row[1] if row[1] else None) for row in rows),
        )

    def _chance(self) -> str:
        mean = sum(self.random) / max(len(self.random), 1)
        return f"; second order of random displacements as large: {mean:.3g}" if self.random else ""

    def __str__(self) -> str:
        return str(self.table())

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(self, path)


def damage_terms(
    land: Landscape, fractions: tuple[float, ...] = FRACTIONS, *, draws: int = 3, seed: int = 0
) -> DamageTerms:
    """Proposition 1: L_A(θA + t δB) − L_A(θA), its expansion t⟨∇L_A, δB⟩ + ½ t² δBᵀHδB, and the remainder.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        fractions: points along δB, each t in (0, 1].
        draws: number of random displacements to compare with.
        seed: of the random displacements.

    Returns:
        ``DamageTerms``. One backward pass, a forward pass with tangents for the curvature of δB and of each draw, a
        forward pass for each t; memory: one mapping as large as the model beside the landscape's own.

    Raises:
        ValueError: a fraction outside (0, 1].

    Source: the paper, Proposition 1.
    """
    if not fractions or not all(0 < t <= 1 for t in fractions):
        raise ValueError(f"fractions={fractions}: expected numbers in (0, 1], like {FRACTIONS}")
    start = land.value(land.theta)
    gradient = land.gradient(land.theta)
    slope, flat = inner(gradient, land.delta), norm(gradient)
    del gradient
    curved = land.quadratic(land.delta)
    true = tuple(land.value(along(land.theta, t, land.delta)) - start for t in fractions)
    first = tuple(t * slope for t in fractions)
    second = tuple(t * t * curved / 2 for t in fractions)
    rest = tuple(a - b - c for a, b, c in zip(true, first, second, strict=True))
    chance = tuple(land.quadratic(_shuffled(land.delta, seed + draw)) / 2 for draw in range(draws))
    size = norm(land.delta)
    return DamageTerms(tuple(fractions), true, first, second, rest, chance, flat, size, land.tokens)


def _shuffled(delta: Point, seed: int) -> Vector:
    """A random vector, each tensor as long as that of δ."""
    random = noise(delta, seed)
    for name, tensor in random.items():
        tensor.mul_(delta[name].norm() / tensor.norm().clamp(min=1e-30))
    return random


@dataclass(frozen=True)
class DamageSplit:
    """Proposition 2, measured: how much of the quadratic damage lies inside a subspace S.

    ``inside`` = ½ δ_SᵀHδ_S, ``leakage`` = δ_SᵀHδ_⊥, ``outside`` = ½ δ_⊥ᵀHδ_⊥ add up to ``total`` = ½ δBᵀHδB (nats
    per response token). ``leakage`` may be negative. ``motion``: the part of ‖δB‖² in S. ``dimension``: of S.
    """

    inside: float
    leakage: float
    outside: float
    motion: float
    dimension: int
    parameters: int

    @property
    def total(self) -> float:
        """½ δBᵀHδB."""
        return self.inside + self.leakage + self.outside

    def table(self) -> Table:
        """One row per term."""
        named = (
            ("inside S", self.inside),
            ("leakage", self.leakage),
            ("outside S", self.outside),
            ("all", self.total),
        )
        return Table(
            f"Proposition 2: the quadratic damage over S ({self.dimension:,} of {self.parameters:,} dimensions are "
            f"{100 * self.dimension / self.parameters:.3g} %, and hold {100 * self.motion:.3g} % of ‖δB‖²)",
            ("term", "nats a token", "share"),
            tuple((name, value, value / self.total if self.total else None) for name, value in named),
        )

    def __str__(self) -> str:
        return str(self.table())

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(self, path)


def damage_split(land: Landscape, subspace: Mask | Span) -> DamageSplit:
    """Proposition 2: ½ δBᵀHδB = ½ δ_SᵀHδ_S + δ_SᵀHδ_⊥ + ½ δ_⊥ᵀHδ_⊥.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        subspace: bool Neurons or Entries, for S = the coordinates of a mask; or a ``Span`` from ``eigenspace``.

    Returns:
        ``DamageSplit``. Two Hessian–vector products; memory: four mappings as large as the model.

    Raises:
        ValueError: the mask is empty or of another model.

    Source: the paper, Proposition 2.
    """
    place = subspace if isinstance(subspace, Span) else coordinates(land, subspace)
    inside, leakage, outside = parts(land.product, land.delta, lambda v: whole(land, place.project(v)))
    motion = inner(place.project(land.delta), land.delta) / (inner(land.delta, land.delta) or 1.0)
    size = sum(tensor.numel() for tensor in land.theta.values())
    return DamageSplit(inside, leakage, outside, motion, place.dimension, size)


@dataclass(frozen=True)
class CurvatureBounds:
    """The constants of Assumptions 1 and 6 on a subspace S: smallest curvature, largest, and coupling.

    ``mu`` = μ_A, the smallest curvature on S; ``beta`` = β, the largest of the whole space (a lower bound);
    ``xi`` = ξ_A = ‖P_S H P_⊥‖ (a lower bound); ``felt`` = ‖P_S H δ_⊥‖ / ‖δ_⊥‖, the coupling along this δB. All in nats
    per squared unit of the parameters. ``step`` = 1/β, the step size that Theorem 1 allows.
    """

    mu: float
    beta: float
    xi: float
    felt: float
    dimension: int

    @property
    def step(self) -> float:
        """1 / β, in squared units of the parameters per nat."""
        return 1 / self.beta if self.beta else float("inf")

    def table(self) -> Table:
        """One row per constant."""
        told = (
            ("μ_A, smallest curvature on S", self.mu),
            ("β, largest curvature anywhere", self.beta),
            ("ξ_A, coupling of S to the rest", self.xi),
            ("coupling along δB", self.felt),
            ("1 / β, the step size allowed", self.step),
        )
        return Table(f"Constants of the theory on S ({self.dimension} dimensions)", ("constant", "value"), told)

    def __str__(self) -> str:
        return str(self.table())

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(self, path)


def curvature_bounds(land: Landscape, span: Span, *, steps: int = 15) -> CurvatureBounds:
    """μ_A, β and ξ_A of Assumptions 1 and 6, estimated on a span.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        span: S, as ``eigenspace`` returns it.
        steps: Hessian–vector products for β, and twice as many for ξ_A.

    Returns:
        ``CurvatureBounds``; β and ξ_A are lower bounds. Memory: four mappings as large as the model.

    Source: the paper, Assumptions 1 and 6.
    """

    def coupling(rows: Point) -> Vector:
        """P_S H P_⊥ H P_S, on the coefficients in S: its largest eigenvalue is ξ²."""
        reached = land.product(whole(land, span.combine(tuple(rows["c"].tolist()))))
        away = along(reached, -1.0, span.project(reached))
        return {"c": rows["c"].new_tensor(span.coefficients(land.product(away)))}

    away = along(land.delta, -1.0, span.project(land.delta))
    felt = sum(c * c for c in span.coefficients(land.product(away))) ** 0.5 / max(norm(away), 1e-300)
    xi = max(largest(coupling, {"c": torch.zeros(span.dimension, dtype=torch.float64)}, steps), 0.0) ** 0.5
    beta = max(largest(land.product, land.theta, steps), span.values[0])
    return CurvatureBounds(min(span.values), beta, xi, felt, span.dimension)


@dataclass(frozen=True)
class DamageSpectrum:
    """In how few dimensions the damage lies: ½ Σ λ_i ⟨u_i, δB⟩² over the directions of largest curvature.

    ``curvatures`` λ_i and ``coefficients`` ⟨u_i, δB⟩ belong to the eigenvectors u_i of H on some coordinates;
    ``cumulative`` is ½ Σ_{i ≤ d} λ_i ⟨u_i, δB⟩² for d = 1, 2, ... ``random``: for each size in ``sizes``, the damage in
    random subspaces of as many dimensions among the same coordinates (one number per draw). ``ranked``: the same for
    the best neurons by a score, (dimensions, damage). ``home`` = ½ δᵀHδ of all the coordinates together,
    ``total`` = ½ δBᵀHδB. The one direction δB holds all the damage, so only directions chosen without δB are compared.
    """

    curvatures: tuple[float, ...]
    residuals: tuple[float, ...]
    coefficients: tuple[float, ...]
    cumulative: tuple[float, ...]
    sizes: tuple[int, ...]
    random: tuple[tuple[float, ...], ...]
    ranked: dict[str, tuple[tuple[int, float], ...]]
    dimension: int
    home: float
    total: float

    def tables(self) -> tuple[Table, ...]:
        """The eigenvectors beside random subspaces; and the neurons that a score ranks first."""
        shown = [
            (d, self.curvatures[d - 1], self.cumulative[d - 1], self._share(self.cumulative[d - 1]),
             *(self._share(one) for one in (sum(draws) / len(draws), min(draws), max(draws))))
            for d, draws in zip(self.sizes, self.random, strict=True)
        ]  # fmt: skip
        title = (
            f"Damage in the directions of largest curvature ({self.dimension:,} coordinates hold {self.home:.4g} of "
            f"{self.total:.4g} nats a token; share is of the {self.home:.4g})"
        )
        head = ("dimensions", "curvature", "damage", "share", "random: mean share", "lowest", "highest")
        rows = [(name, size, held, self._share(held)) for name, curve in self.ranked.items() for size, held in curve]
        more = (Table("Damage in the best neurons", ("ranked by", "dimensions", "damage", "share"), tuple(rows)),)
        return (Table(title, head, tuple(shown)), *(more if rows else ()))

    def _share(self, held: float) -> float | None:
        return held / self.home if self.home else None

    def __str__(self) -> str:
        return "\n\n".join(map(str, self.tables()))

    def save(self, path: str | Path) -> None:
        """Write JSON."""
        write_json(self, path)


def damage_spectrum(
    land: Landscape,
    span: Span,
    *,
    draws: int = 5,
    ranked: Mapping[str, Neurons] | None = None,
    seed: int = 0,
) -> DamageSpectrum:
    """How much of the quadratic damage lies in the directions of largest curvature, in random ones, in ranked neurons.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        span: the result of ``eigenspace(land, k)``, among a mask's neurons or all parameters.
        draws: number of random subspaces, each as large as the span; smaller sizes are their first directions.
        ranked: name → scores: for S = the coordinates of the 1, 2, 4, ... best neurons.
        seed: of the random subspaces.

    Returns:
        ``DamageSpectrum``. A forward pass with tangents per size, draw and score.

    Raises:
        ValueError: scores of another model.

    Source: ours, for the paper's claim that the damage is low-dimensional (Assumption 4).
    """
    sizes = _doubling(span.dimension)
    rows = span.home.take(land.delta)
    random: list[list[float]] = [[] for _ in sizes]
    for draw in range(draws):
        basis = orthonormal(rows, span.dimension, seed + draw)
        weights = [inner(one, rows) for one in basis]
        for found, size in zip(random, sizes, strict=True):
            inside = combined(zip(weights[:size], basis[:size], strict=True))
            found.append(land.quadratic(span.home.put(inside)) / 2)
    curves = {name: _curve(land, scores) for name, scores in (ranked or {}).items()}
    coefficients = span.coefficients(land.delta)
    held = tuple(accumulate(value * c * c / 2 for value, c in zip(span.values, coefficients, strict=True)))
    return DamageSpectrum(
        span.values, span.residuals, coefficients, held, sizes, tuple(map(tuple, random)), curves,
        span.home.dimension, land.quadratic(span.home.put(rows)) / 2, land.quadratic(land.delta) / 2,
    )  # fmt: skip


def _doubling(limit: int) -> tuple[int, ...]:
    return tuple(sorted({min(2**power, limit) for power in range(limit.bit_length() + 1)}))


def _curve(land: Landscape, scores: Neurons) -> tuple[tuple[int, float], ...]:
    found = []
    for count in _doubling(scores.total):
        mask = top(scores, allocate(scores, count / scores.total, how="global"))
        place = coordinates(land, mask)
        found.append((place.dimension, land.quadratic(place.project(land.delta)) / 2))
    return tuple(found)
