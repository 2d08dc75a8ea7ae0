"""Subspaces of the parameters: the coordinates of a mask, and the span of a few vectors in them."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from surgery.edits import Rows
from surgery.masks import checked
from surgery.neurons import Neurons
from surgery.opening import open_weights
from surgery.theory import Point, Vector, combined, inner
from surgery.theory_krylov import eigenpairs
from surgery.theory_landscape import Landscape


@dataclass(frozen=True)
class Coordinates:
    """All numbers of a mask's neurons (or every parameter), as the coordinates that a small vector is kept in.

    ``take`` reads them from a vector of the whole space, ``put`` is the vector that is zero elsewhere.
    """

    edits: tuple[Rows, ...] | None  # None: every parameter
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


def _name(edit: Rows) -> str:
    return f"{edit.block.name}/{edit.slot.part}/{edit.slot.start}"


@dataclass(frozen=True)
class Span:
    """A subspace S spanned by a few orthonormal vectors: the directions of largest curvature among some coordinates.

    Args:
        home: the coordinates in which the vectors are kept.
        vectors: orthonormal, in those coordinates.
        values: the curvature λ of each, descending, in nats per squared unit of the parameters.
        residuals: ‖H u − λ u‖ of each within the coordinates: how exact they are.
        steps: how many Hessian–vector products it took.

    Source: the paper's conflict subspace S; that the largest eigenvectors serve for it is ours.
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


def coordinates(land: Landscape, mask: Neurons | None = None) -> Coordinates:
    """The coordinates of a mask's neurons, or other units, in a landscape; None: every parameter.

    Raises:
        ValueError: the mask is empty, holds scores, or is of another model.
    """
    if mask is None:
        return Coordinates(None, land.theta)
    layout = open_weights(land.model, land.layout, units=checked(mask).units).layout
    edits = tuple(edit for edit in mask.edits(layout, "the earlier model") if isinstance(edit, Rows))
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
    mask: Neurons | None = None,
    steps: int = 100,
    tolerance: float = 1e-2,
    seed: int = 0,
) -> Span:
    """The k directions in which the earlier domain's loss curves most, among a mask's neurons or all parameters.

    The largest eigenpairs of P H P at θA, P the projection on the coordinates, by Lanczos.

    Args:
        land: the earlier domain's loss around the earlier checkpoint.
        k: how many.
        mask: bool Neurons: only these neurons' numbers move (default: every parameter).
        steps: at most so many Hessian–vector products. Each keeps a vector as large as the coordinates: for all
            parameters of a large model choose few, or a mask.
        tolerance: stop when the residual of each is below so much of its curvature.
        seed: of the random start.

    Returns:
        A ``Span``; its ``residuals`` say how exact it is.

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
