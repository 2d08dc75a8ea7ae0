"""The theory's mathematics against full matrices, finite differences and the paper's worked example."""

from __future__ import annotations

import math

import pytest
import scipy.sparse.linalg
import torch
from mutants import dies
from torch import Tensor

from surgery.theory import curvature, fisher
from surgery.theory import vectors as theory
from surgery.theory import vectors as theory_krylov
from surgery.theory.vectors import (
    Point,
    allowed,
    along,
    combined,
    descent,
    distances,
    eigenpairs,
    inner,
    largest,
    noise,
    norm,
    orthonormal,
    parts,
    slope,
)

torch.manual_seed(0)
X = torch.randn(7, 5, dtype=torch.float64)
THETA = {name: torch.randn(shape, dtype=torch.float64) for name, shape in (("a", (5, 6)), ("b", (6,)), ("c", (6, 4)))}
V, U = noise(THETA, 1), noise(THETA, 2)
SIZES = [tensor.numel() for tensor in THETA.values()]


def logits(at: Point) -> Tensor:
    """A small classifier: ``[7 rows, 4 tokens]`` from 60 parameters."""
    return (X @ at["a"] + at["b"]).tanh() @ at["c"]


def loss(at: Point) -> Tensor:
    return logits(at).log_softmax(-1)[:, 1].sum() + (at["b"] ** 3).sum()


def divergence(at: Point, target: Point = THETA) -> Tensor:
    p = logits(target).detach().log_softmax(-1)
    return (p.exp() * (p - logits(at).log_softmax(-1))).sum()


def flat(v: Point) -> Tensor:
    return torch.cat([v[name].flatten() for name in THETA])


def unflat(v: Tensor) -> Point:
    return {name: piece.view_as(THETA[name]) for name, piece in zip(THETA, v.split(SIZES), strict=True)}


def full(function, at: Point = THETA) -> Tensor:
    return torch.func.hessian(lambda v: function(unflat(v)))(flat(at))


def close(found: Point, wanted: Tensor, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(flat(found), wanted, rtol=rtol, atol=rtol * float(wanted.abs().max()))


@pytest.mark.parametrize("function", [loss, divergence])
def test_curvature_is_the_full_hessian_times_the_vector(function):
    close(curvature(function, THETA, V), full(function) @ flat(V))


def test_curvature_is_what_the_gradient_changes_by():
    step = 1e-5
    ahead, behind = (slope(loss, along(THETA, s, V))[1] for s in (step, -step))
    close(curvature(loss, THETA, V), (flat(ahead) - flat(behind)) / (2 * step), rtol=1e-6)


@pytest.mark.parametrize("name", list(THETA))
def test_names_that_a_vector_lacks_are_zero(name):
    part = {name: V[name]}
    padded = {other: V[other] if other == name else torch.zeros_like(V[other]) for other in V}
    for found in (curvature(loss, THETA, part), fisher(logits, THETA, part)):
        assert list(found) == [name]
    torch.testing.assert_close(curvature(loss, THETA, part)[name], curvature(loss, THETA, padded)[name])
    torch.testing.assert_close(fisher(logits, THETA, part)[name], fisher(logits, THETA, padded)[name])


def test_curvature_of_a_line_and_of_what_is_not_used_is_zero():
    assert not any(bool(t.any()) for t in curvature(lambda at: at["b"].sum(), THETA, V).values())
    assert not bool(curvature(lambda at: (at["b"] ** 2).sum(), THETA, V)["a"].any())


def test_fisher_is_the_jacobian_and_the_softmax_around_it():
    z = logits(THETA)
    jacobian = torch.func.jacrev(lambda v: logits(unflat(v)))(flat(THETA))
    wanted = torch.zeros(sum(SIZES), sum(SIZES), dtype=torch.float64)
    for row in range(len(z)):
        p = z[row].softmax(-1)
        wanted += jacobian[row].T @ (p.diag() - p[:, None] * p[None]) @ jacobian[row]
    close(fisher(logits, THETA, V), wanted @ flat(V))
    assert float(torch.linalg.eigvalsh(wanted)[0]) > -1e-9


def test_fisher_is_the_hessian_of_the_divergence_at_its_minimum_and_only_there():
    close(fisher(logits, THETA, V), flat(curvature(divergence, THETA, V)))
    away = along(THETA, 0.5, U)
    there = flat(curvature(divergence, away, V))
    assert float((flat(fisher(logits, away, V)) - there).norm()) > 1e-2 * float(there.norm())


@pytest.mark.parametrize(
    "product", [lambda v: curvature(loss, THETA, v), lambda v: fisher(logits, THETA, v)], ids=["hessian", "fisher"]
)
def test_products_are_symmetric(product):
    assert inner(U, product(V)) == pytest.approx(inner(V, product(U)), rel=1e-9)


def test_fisher_is_never_negative():
    for seed in range(20):
        v = noise(THETA, seed)
        assert inner(v, fisher(logits, THETA, v)) >= 0
    shift = {"c": torch.ones(6, 4, dtype=torch.float64)}  # moves all tokens' logits together: no probability moves
    assert abs(inner(shift, fisher(logits, THETA, shift))) < 1e-12


def test_a_vector_of_another_space_is_refused():
    for product in (lambda v: curvature(loss, THETA, v), lambda v: fisher(logits, THETA, v)):
        with pytest.raises(ValueError, match=r"'b' of shape \(5,\).*of shape \(6,\) there"):
            product({"b": torch.zeros(5, dtype=torch.float64)})
        with pytest.raises(ValueError, match=r"'x'.*not there"):
            product({"x": torch.zeros(5, dtype=torch.float64)})


def test_inner_products_are_summed_in_float64():
    many = {"a": torch.full((1 << 20,), 1e-4), "b": torch.tensor([1e4])}
    assert inner(many, many) == pytest.approx(1e8 + (1 << 20) * float(torch.tensor(1e-4)) ** 2, abs=1e-6)
    assert inner({"a": torch.ones(3)}, {"b": torch.ones(3)}) == 0


def known(values: list[float], seed: int = 0) -> tuple[Tensor, Tensor]:
    """A symmetric matrix over THETA's space with these eigenvalues (the rest 0), and its eigenvectors."""
    torch.manual_seed(seed)
    q, _ = torch.linalg.qr(torch.randn(sum(SIZES), sum(SIZES), dtype=torch.float64))
    spectrum = torch.zeros(sum(SIZES), dtype=torch.float64)
    spectrum[: len(values)] = torch.tensor(values, dtype=torch.float64)
    return q @ spectrum.diag() @ q.T, q


@pytest.mark.parametrize(
    ("values", "k"),
    [([9.0, 5.0, 2.0, 1.0], 3), ([9.0, 5.0, 5.0, 5.0, 1.0], 4), ([3.0], 2), ([1.0] * 60, 5), ([4.0, -6.0, 1.0], 2)],
)
def test_eigenpairs_of_a_known_matrix(values, k):
    matrix, _ = known(values)
    found = eigenpairs(lambda v: unflat(matrix @ flat(v)), THETA, k, tolerance=1e-8)
    wanted = sorted([*values, *[0.0] * (60 - len(values))], reverse=True)[:k]
    assert found.values == pytest.approx(wanted, abs=1e-7)
    vectors = torch.stack([flat(u) for u in found.vectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(k, dtype=torch.float64), rtol=0, atol=1e-9)
    left = (matrix @ vectors.T - vectors.T * torch.tensor(found.values)).norm(dim=0)
    assert float(left.max()) < 1e-6
    assert largest(lambda v: unflat(matrix @ flat(v)), THETA, 30) == pytest.approx(max(values), rel=1e-6)


def test_eigenpairs_are_those_of_scipy():
    matrix, _ = known(torch.linspace(10, 1, 60).tolist())
    found = eigenpairs(lambda v: unflat(matrix @ flat(v)), THETA, 4, tolerance=1e-9)
    values, vectors = scipy.sparse.linalg.eigsh(matrix.numpy(), k=4, which="LA")
    assert found.values == pytest.approx(values[::-1].tolist(), rel=1e-9)
    alike = torch.stack([flat(u) for u in found.vectors]) @ torch.from_numpy(vectors[:, ::-1].copy())
    torch.testing.assert_close(alike.abs(), torch.eye(4, dtype=torch.float64), rtol=0, atol=1e-6)


def test_residuals_are_those_of_the_pairs():
    matrix, _ = known(torch.linspace(10, 1, 60).tolist())
    found = eigenpairs(lambda v: unflat(matrix @ flat(v)), THETA, 4, steps=9)
    for value, u, residual in zip(found.values, found.vectors, found.residuals, strict=True):
        assert float((matrix @ flat(u) - value * flat(u)).norm()) == pytest.approx(residual, rel=1e-6, abs=1e-9)
    assert found.steps == 9
    assert max(found.residuals) > 1e-3  # nine steps are not enough, and it says so


def test_a_space_smaller_than_asked_for_gives_what_it_has():
    small = {"w": torch.zeros(3, dtype=torch.float64)}
    found = eigenpairs(lambda v: {"w": v["w"] * torch.tensor([3.0, 2.0, 1.0])}, small, 8)
    assert found.values == pytest.approx((3, 2, 1))


def test_no_curvature_at_all():
    found = eigenpairs(lambda v: {n: torch.zeros_like(t) for n, t in v.items()}, THETA, 3)
    assert found.values == (0, 0, 0)
    assert largest(lambda v: {n: torch.zeros_like(t) for n, t in v.items()}, THETA) == 0


def test_bad_questions_are_refused():
    with pytest.raises(ValueError, match="k=0: expected 1 to steps=100"):
        eigenpairs(lambda v: dict(v), THETA, 0)
    with pytest.raises(ValueError, match="NaN or infinite"):
        eigenpairs(lambda v: {n: t * math.nan for n, t in v.items()}, THETA, 2)


def test_random_subspaces_are_orthonormal_and_repeatable():
    found = torch.stack([flat(u) for u in orthonormal(THETA, 9, 4)])
    torch.testing.assert_close(found @ found.T, torch.eye(9, dtype=torch.float64), rtol=0, atol=1e-12)
    assert torch.equal(found, torch.stack([flat(u) for u in orthonormal(THETA, 9, 4)]))


def projection(rank: int, seed: int = 3):
    basis = orthonormal(THETA, rank, seed)
    return lambda v: combined((inner(u, v), u) for u in basis)


@pytest.mark.parametrize("rank", [1, 7, 59])
def law_parts(rank):
    """Proposition 2: the three parts against the full matrix, adding up to the whole; Pythagoras of the norms."""
    hessian, project = full(loss), projection(rank)
    inside = flat(project(V))
    outside = flat(V) - inside
    found = theory.parts(lambda v: unflat(hessian @ flat(v)), V, project)
    wanted = (inside @ hessian @ inside / 2, inside @ hessian @ outside, outside @ hessian @ outside / 2)
    assert found == pytest.approx([float(one) for one in wanted], rel=1e-9)
    assert sum(found) == pytest.approx(float(flat(V) @ hessian @ flat(V)) / 2, rel=1e-9)
    assert norm(V) ** 2 == pytest.approx(float(inside @ inside + outside @ outside), rel=1e-12)


@pytest.mark.parametrize("rank", [1, 7, 59])
def test_parts_add_up(rank):
    law_parts(rank)


def without_half(patch: pytest.MonkeyPatch) -> None:
    def mutant(operator, delta, project, original=parts):
        inside, leakage, outside = original(operator, delta, project)
        return 2 * inside, leakage, outside

    patch.setattr(theory, "parts", mutant)


def without_leakage(patch: pytest.MonkeyPatch) -> None:
    def mutant(operator, delta, project, original=parts):
        inside, _, outside = original(operator, delta, project)
        return inside, 0.0, outside

    patch.setattr(theory, "parts", mutant)


def law_fisher() -> None:
    test_fisher_is_the_hessian_of_the_divergence_at_its_minimum_and_only_there()


def uncentred(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(theory, "in_probability", lambda z, moved: z.softmax(-1) * moved)


def unweighted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(theory, "in_probability", lambda z, moved: moved)


def law_degenerate() -> None:
    test_eigenpairs_of_a_known_matrix([9.0, 5.0, 5.0, 5.0, 1.0], 4)


def once_orthogonalised_against_the_last(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        theory_krylov, "_orthogonalise", lambda v, basis, original=theory_krylov._orthogonalise: original(v, basis[-1:])
    )


MUTANTS = [
    (without_half, lambda: law_parts(7)),
    (without_leakage, lambda: law_parts(7)),
    (uncentred, law_fisher),
    (unweighted, law_fisher),
    (once_orthogonalised_against_the_last, law_degenerate),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_mutants_die(mutant, law):
    law()
    dies(mutant, law)


def first_two(v: Point) -> Point:
    return {"w": v["w"] * torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)}


def test_the_papers_worked_example():
    """δB = (0.20, −0.10, 0.05), S = the first two coordinates, α = 0.5, μ = 1: 0.224 → 0.112, the third untouched."""
    centre = {"w": torch.zeros(3, dtype=torch.float64)}
    start = {"w": torch.tensor([0.20, -0.10, 0.05], dtype=torch.float64)}
    points = list(descent(first_two, start, 0.5, 1))  # L_A = ½ (w1² + w2²): curvature μ = 1 on S, no coupling
    torch.testing.assert_close(points[1]["w"], torch.tensor([0.10, -0.05, 0.05], dtype=torch.float64))
    (before, outside), (after, still) = distances(points, centre, first_two)
    assert (round(before, 3), round(after, 3)) == (0.224, 0.112)
    assert outside == still == pytest.approx(0.05)
    assert list(allowed(1.0, 0.5, before, 0.0, [outside, still])) == pytest.approx([before, after])


def test_the_bound_holds_for_every_quadratic_and_the_coupling_is_needed():
    project, needed = projection(5), 0
    for seed in range(10):
        matrix, _ = known([5.0, 4.0, 3.0, 2.0, 1.0] + [0.2] * 55, seed)

        def image(v: Point, matrix: Tensor = matrix) -> Point:
            return unflat(matrix @ flat(v))

        basis = torch.stack([flat(u) for u in orthonormal(THETA, 5, 3)])
        mu = float(torch.linalg.eigvalsh(basis @ matrix @ basis.T)[0])
        coupling = basis @ matrix @ (torch.eye(60, dtype=torch.float64) - basis.T @ basis)
        xi = float(torch.linalg.matrix_norm(coupling, 2))
        zero = {name: torch.zeros_like(tensor) for name, tensor in THETA.items()}
        seen = list(distances(descent(image, V, 1 / 5, 25), zero, project))
        inside, outside = zip(*seen, strict=True)
        with_coupling = list(allowed(mu, 1 / 5, inside[0], xi, outside))
        assert all(a <= b * (1 + 1e-12) for a, b in zip(inside, with_coupling, strict=True))
        needed += any(a > b for a, b in zip(inside, allowed(mu, 1 / 5, inside[0], 0.0, outside), strict=True))
    assert needed  # some of them break the bound without coupling: leaving ξ out is an error
