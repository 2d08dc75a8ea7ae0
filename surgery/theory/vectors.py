"""Mappings of tensors as vectors: Hessian products, Fisher information, and the largest eigenpairs."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

Point = Mapping[str, Tensor]
Vector = dict[str, Tensor]
Operator = Callable[[Point], Vector]
Projection = Callable[[Point], Vector]


def inner(a: Point, b: Point) -> float:
    """⟨a, b⟩, each tensor's products summed in float64."""
    return sum((float((a[name].double() * b[name].double()).sum()) for name in a if name in b), 0.0)


def norm(a: Point) -> float:
    """‖a‖, the L2 norm over all numbers."""
    return math.sqrt(inner(a, a))


def along(theta: Point, t: float, v: Point) -> Vector:
    """θ + t·v, where v may lack names of θ."""
    return {name: tensor + t * v[name] if name in v else tensor for name, tensor in theta.items()}


def combined(pieces: Iterable[tuple[float, Point]]) -> Vector:
    """Σ w_i · v_i of pairs (w_i, v_i), one at a time."""
    total: Vector = {}
    for weight, vector in pieces:
        for name, tensor in vector.items():
            total[name] = total[name].add_(tensor, alpha=weight) if name in total else tensor * weight
    return total


def noise(like: Point, seed: int) -> Vector:
    """A standard normal vector, drawn on the CPU so that a seed gives the same one on every device."""
    random = torch.Generator().manual_seed(seed)
    return {n: torch.randn(t.shape, generator=random, dtype=torch.float32).to(t) for n, t in like.items()}


def slope(loss: Callable[[Point], Tensor], theta: Point, create_graph: bool = False) -> tuple[Tensor, Vector, Vector]:
    """The loss, its gradient, and the leaves that it was taken with respect to (parameters it does not use: zero)."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    with torch.enable_grad():
        value = loss(leaves)
        grads = torch.autograd.grad(
            value, list(leaves.values()), create_graph=create_graph, allow_unused=True, materialize_grads=True
        )
    return value, dict(zip(leaves, grads, strict=True)), leaves


def curvature(loss: Callable[[Point], Tensor], theta: Point, v: Point) -> Vector:
    """The Hessian of a loss times a vector, H v = ∇⟨∇L(θ), v⟩, by two backward passes.

    Args:
        loss: a scalar function of a point, twice differentiable by autograd. Fused attention kernels are not: run it
            under ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``.
        theta: the point θ, a mapping from name to tensor.
        v: the vector, with tensors of θ's shapes; a name that it lacks counts as zero and is not computed in H v.

    Returns:
        H v restricted to the names of v, in the loss's unit per squared unit of the parameters. Memory: the graph of
        a backward pass and three mappings as large as v beside θ and v.

    Raises:
        ValueError: v has a name or shape that θ lacks.

    Source: the paper, Section 5 (H_A); computed as Pearlmutter did.

    >>> theta, v = {"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 0.0])}
    >>> curvature(lambda at: at["w"].prod() + at["w"][0] ** 2, theta, v)["w"]
    tensor([2., 1.])
    """
    _check(theta, v)
    _, grads, leaves = slope(lambda some: loss({**theta, **some}), {n: theta[n] for n in v}, create_graph=True)
    with torch.enable_grad():
        along_v = torch.stack([(grads[name] * v[name]).sum() for name in v]).sum()
    if not along_v.requires_grad:  # a loss that is linear in θ
        return {name: torch.zeros_like(v[name]) for name in v}
    found = torch.autograd.grad(along_v, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))


def pushed(logits: Callable[[Point], Tensor], theta: Point, v: Point) -> tuple[Tensor, Tensor]:
    """The logits z at θ and J v, how they move along v: each ``[row, token]``.

    By one forward-mode pass (no graph); where an operation of the model's own has no forward derivative, like Bloom's
    activation, by two backward passes.
    """
    _check(theta, v)
    some = {name: theta[name] for name in v}
    try:
        with torch.no_grad():
            z, moved, *_ = torch.func.jvp(lambda at: logits({**theta, **at}), (some,), (dict(v),))
    except (RuntimeError, NotImplementedError) as error:
        if "autograd.Function" not in str(error) and "forward AD" not in str(error):
            raise
        return _pushed_backwards(lambda at: logits({**theta, **at}), some, v)
    return z, moved


def _pushed_backwards(logits: Callable[[Point], Tensor], theta: Point, v: Point) -> tuple[Tensor, Tensor]:
    """Jᵀ u is linear in u, so J v is the derivative of ⟨Jᵀ u, v⟩ by u, wherever u is."""
    leaves = {name: tensor.detach().requires_grad_() for name, tensor in theta.items()}
    with torch.enable_grad():
        z = logits(leaves)
        u = torch.zeros_like(z, requires_grad=True)
        pulled = torch.autograd.grad(z, list(leaves.values()), u, create_graph=True, materialize_grads=True)
        along_v = torch.stack([(one * v[name]).sum() for name, one in zip(leaves, pulled, strict=True)]).sum()
        (moved,) = torch.autograd.grad(along_v, u)
    return z.detach(), moved


def in_probability(z: Tensor, moved: Tensor) -> Tensor:
    """(diag(p) − p pᵀ) u for each row, p = softmax(z): the curvature of a KL in the logits, ``[row, token]``."""
    wide = torch.promote_types(z.dtype, torch.float32)
    p, u = z.to(wide).softmax(-1), moved.to(wide)
    return p * (u - (p * u).sum(-1, keepdim=True))


def fisher(logits: Callable[[Point], Tensor], theta: Point, v: Point) -> Vector:
    """The Fisher information (Gauss–Newton matrix) times a vector: F v = Σ_rows Jᵀ (diag(p) − p pᵀ) J v.

    p = softmax of a row of logits, J = their derivative by θ. It is exact (no sampling), positive semidefinite, and the
    Hessian of Σ_rows KL(p_target ‖ p_θ) where p_θ equals the target.

    Args:
        logits: a function of a point that gives ``[row, token]``, twice differentiable or with forward derivatives.
        theta: the point θ.
        v: the vector; a name that it lacks counts as zero and is not computed in F v.

    Returns:
        F v restricted to the names of v: the sum over rows, in nats per squared unit of the parameters. Memory: one
        forward pass with tangents, then one backward pass; one mapping as large as v beside θ and v.

    Raises:
        ValueError: v has a name or shape that θ lacks.

    Source: ours, from the paper's Assumption 2: with KL(p_earlier ‖ p_θ) as the loss, H_A is this matrix.

    >>> theta, v = {"w": torch.zeros(1, 2)}, {"w": torch.tensor([[1.0, 0.0]])}
    >>> fisher(lambda at: at["w"], theta, v)["w"]
    tensor([[ 0.2500, -0.2500]])
    """
    z, moved = pushed(logits, theta, v)
    back = in_probability(z, moved).to(z.dtype)
    _, found, _ = slope(lambda some: (logits({**theta, **some}) * back).sum(), {n: theta[n] for n in v})
    return found


def _check(theta: Point, v: Point) -> None:
    for name, tensor in v.items():
        if name not in theta or theta[name].shape != tensor.shape:
            there = f"of shape {tuple(theta[name].shape)} there" if name in theta else "not there"
            raise ValueError(f"the vector's {name!r} of shape {tuple(tensor.shape)} has no partner in theta: {there}")


def parts(operator: Operator, delta: Point, project: Projection) -> tuple[float, float, float]:
    """Proposition 2: ½ δ_SᵀHδ_S, δ_SᵀHδ_⊥ and ½ δ_⊥ᵀHδ_⊥ with δ_S = P_S δ; they add up to ½ δᵀHδ.

    The operator and the projection give every name of δ.
    """
    inside = project(delta)
    outside = along(delta, -1.0, inside)
    of_inside = operator(inside)
    coupled, own = inner(of_inside, outside), inner(of_inside, inside)
    return own / 2, coupled, inner(operator(outside), outside) / 2


def descent(gradient: Operator, theta: Point, step: float, steps: int) -> Iterator[Vector]:
    """θ_0 … θ_steps of gradient descent, θ ← θ − α g(θ), one at a time (Theorem 1's refresh)."""
    now = dict(theta)
    yield now
    for _ in range(steps):
        now = along(now, -step, gradient(now))
        yield now


def distances(points: Iterable[Point], centre: Point, project: Projection) -> Iterator[tuple[float, float]]:
    """‖P_S(θ_t − θA)‖ and ‖(I − P_S)(θ_t − θA)‖ of each point."""
    for point in points:
        error = along(point, -1.0, centre)
        inside = project(error)
        yield norm(inside), norm(along(error, -1.0, inside))


def allowed(mu: float, step: float, start: float, xi: float, outside: Iterable[float]) -> Iterator[float]:
    """Theorem 1's bound on ‖P_S(θ_t − θA)‖ for t = 0, 1, ...: b ← (1 − αμ) b + α ξ ‖(I − P_S)(θ_t − θA)‖.

    With ξ = 0 that is (1 − αμ)^t ‖P_S δB‖. ``outside`` gives the norms outside S at t = 0, 1, ...
    """
    bound = start
    for off in outside:
        yield bound
        bound = (1 - step * mu) * bound + step * xi * off


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
