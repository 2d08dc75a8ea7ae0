"""The largest eigenpairs of an operator on mappings of tensors, and random subspaces to compare them with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from surgery.theory import Operator, Point, Vector, combined, inner, noise, norm


@dataclass(frozen=True)
class Eigenpairs:
    """The largest eigenvalues of an operator, descending, with orthonormal vectors.

    ``residuals``: ‖A u − λ u‖ of each, in the unit of the eigenvalues. ``steps``: how often the operator was applied.
    """

    values: tuple[float, ...]
    vectors: tuple[Vector, ...]
    residuals: tuple[float, ...]
    steps: int


def eigenpairs(
    operator: Operator, like: Point, k: int, *, steps: int = 100, tolerance: float = 1e-3, seed: int = 0
) -> Eigenpairs:
    """The k largest eigenpairs of a symmetric operator by Lanczos, every new vector orthogonalised against all before.

    Ours, not ``scipy.sparse.linalg.eigsh``, with which it agrees: that keeps every vector as one flat numpy array on
    the CPU, so all parameters would be concatenated, and each step would carry a vector as large as the model from a
    GPU and back. Here a vector is a mapping of tensors that stays on its device.

    Args:
        operator: v → A v.
        like: a point with the names and shapes of the space's vectors.
        k: how many; fewer are given where the space has fewer dimensions.
        steps: at most so many applications of the operator; each keeps one vector.
        tolerance: stop when each of the k largest has a residual below so much of itself.
        seed: of the random start.

    Raises:
        ValueError: k is not in 1…steps, or the operator gave NaN.

    Source: Lanczos with full reorthogonalisation, restarted where the space it has seen is closed.
    """
    if not 1 <= k <= steps:
        raise ValueError(f"k={k}: expected 1 to steps={steps}")
    dimension = sum(tensor.numel() for tensor in like.values())
    basis: list[Vector] = []
    diagonal: list[float] = []
    beside: list[float] = []  # of the diagonal; 0 where a new start was needed
    kth = 0.0
    new, limit, first = noise(like, seed), min(steps, dimension), 0
    while len(basis) < limit:
        _orthogonalise(new, basis)
        basis.append(_scaled(new))
        image = operator(basis[-1])
        diagonal.append(inner(basis[-1], image))
        new = {name: tensor.clone() for name, tensor in image.items()}
        _orthogonalise(new, basis)
        left = norm(new)
        values, mixes = _tridiagonal(diagonal, beside)
        closed = left <= 1e-6 * max(float(values.abs().max()), 1e-300)
        if closed:  # what this start reaches is known; another may reach further copies of an eigenvalue
            left, enough = 0.0, first >= k and _top(diagonal[first:], beside[first:]) <= kth * (1 + 1e-9) + 1e-300
            first, kth, new = len(basis), float(values[min(k, len(values)) - 1]), noise(like, seed + len(basis))
        else:
            enough = not first and len(basis) >= k and _settled(left * mixes[-1, :k], tolerance * values[:k])
        if enough:
            break
        beside.append(left)
    chosen = range(min(k, len(basis)))
    return Eigenpairs(
        tuple(float(values[i]) for i in chosen),
        tuple(combined(zip(mixes[:, i].tolist(), basis, strict=True)) for i in chosen),
        tuple(left * abs(float(mixes[-1, i])) for i in chosen),
        len(basis),
    )


def largest(operator: Operator, like: Point, steps: int = 20, seed: int = 0) -> float:
    """The largest eigenvalue of a symmetric operator, from below, with three vectors in memory.

    Lanczos without its basis: rounding may repeat eigenvalues, which does not move the largest.
    """
    before: Vector = {}
    now, left = _scaled(noise(like, seed)), 0.0
    diagonal: list[float] = []
    beside: list[float] = []
    for _ in range(steps):
        image = operator(now)
        diagonal.append(inner(now, image))
        new = combined(((1.0, image), (-diagonal[-1], now), (-left, before)))
        left = norm(new)
        values, _ = _tridiagonal(diagonal, beside)
        if left <= 1e-6 * max(float(values.abs().max()), 1e-300):
            break
        beside.append(left)
        before, now = now, _scaled(new)
    return float(values[0])


def _tridiagonal(diagonal: list[float], beside: list[float]) -> tuple[Tensor, Tensor]:
    """Eigenvalues, descending, and eigenvectors (columns) of the matrix that Lanczos reduced the operator to."""
    off = torch.tensor(beside[: len(diagonal) - 1], dtype=torch.float64)
    matrix = torch.tensor(diagonal, dtype=torch.float64).diag() + off.diag(1) + off.diag(-1)
    if not bool(matrix.isfinite().all()):
        raise ValueError("the operator gave NaN or infinite numbers: look for them in the weights, or use float32")
    values, vectors = torch.linalg.eigh(matrix)
    return values.flip(0), vectors.flip(1)


def _top(diagonal: list[float], beside: list[float]) -> float:
    return float(_tridiagonal(diagonal, beside)[0][0])


def _settled(residuals: Tensor, allowed: Tensor) -> bool:
    return bool((residuals.abs() <= allowed.abs()).all())


def _orthogonalise(vector: Vector, basis: list[Vector]) -> None:
    for _ in range(2):  # once leaves what rounding brings back; twice is enough
        for other in basis:
            weight = inner(vector, other)
            for name, tensor in vector.items():
                tensor.sub_(other[name], alpha=weight)


def _scaled(vector: Vector) -> Vector:
    length = norm(vector)
    return {name: tensor / length for name, tensor in vector.items()}


def orthonormal(like: Point, k: int, seed: int) -> list[Vector]:
    """k random orthonormal vectors, uniform over the directions of the space."""
    basis: list[Vector] = []
    for at in range(k):
        new = noise(like, seed + 7919 * at)
        _orthogonalise(new, basis)
        basis.append(_scaled(new))
    return basis
