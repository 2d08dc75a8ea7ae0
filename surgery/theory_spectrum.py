"""In how few dimensions the damage lies: the directions of largest curvature, random ones, and ranked neurons."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path

from surgery.budget import allocate, top
from surgery.evidence import Table, write_json
from surgery.neurons import Neurons
from surgery.theory import combined, inner
from surgery.theory_krylov import orthonormal
from surgery.theory_landscape import Landscape
from surgery.theory_subspaces import Span, coordinates


@dataclass(frozen=True)
class DamageSpectrum:
    """In how few dimensions the damage lies: ½ Σ λ_i ⟨u_i, δB⟩² over the directions of largest curvature.

    ``curvatures`` λ_i and ``coefficients`` ⟨u_i, δB⟩ belong to the eigenvectors u_i of H on some coordinates;
    ``cumulative`` is ½ Σ_{i ≤ d} λ_i ⟨u_i, δB⟩² for d = 1, 2, ... ``random`` holds, for each size in ``sizes``, what
    random subspaces of as many dimensions among the same coordinates hold (one number a draw). ``ranked`` is the same
    for the best neurons by a score: (dimensions, damage held). ``home`` = ½ δᵀHδ of all the coordinates together,
    ``total`` = ½ δBᵀHδB.
    The one direction δB itself would hold everything: the question is what directions hold that don't know δB.
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
    """How much of the quadratic damage the directions of largest curvature hold, beside random ones and ranked neurons.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        span: what ``eigenspace(land, k)`` found, among a mask's neurons or all parameters.
        draws: random subspaces, each as large as the span; smaller sizes are the beginnings of these.
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
