"""The theory on live models: against full Hessians of tiny ones, over families, and against its own promises."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch
from families import build, config, pair
from mutants import dies
from test_layout import permute
from test_scores import batches
from torch import Tensor, nn
from torch.nn import functional as F

from surgery import Entries, Neurons, Trajectory, damage
from surgery.layout import find_layout
from surgery.live import distillation
from surgery.live.losses import cross_entropy
from surgery.masks import entries
from surgery.masks.entries import shapes_of
from surgery.theory import (
    Landscape,
    contraction,
    curvature,
    curvature_bounds,
    damage_spectrum,
    damage_split,
    damage_terms,
    eigenspace,
)
from surgery.theory import damage as theory_damage
from surgery.theory import landscape as theory_landscape
from surgery.theory import vectors as theory
from surgery.theory.landscape import coordinates, differentiable
from surgery.theory.vectors import along, inner, noise, norm

FEW = ("llama", "qwen3", "gpt2", "phi3", "qwen3_moe")
DATA = batches(labels=True)


def by_definition(earlier: nn.Module, later: nn.Module) -> float:
    """KL(p_earlier ‖ p_later), the mean over the positions that predict a response token, one by one."""
    found = []
    for batch in DATA:
        inputs = {key: batch[key] for key in ("input_ids", "attention_mask")}
        with torch.no_grad():
            p, q = (model(**inputs, use_cache=False).logits.double().log_softmax(-1) for model in (earlier, later))
        for row, at in (batch["labels"][:, 1:] != -100).nonzero().tolist():
            found.append(float(F.kl_div(q[row, at], p[row, at], log_target=True, reduction="sum")))
    return sum(found) / len(found)


def land_of(family: str, step: float = 0.02, dtype: torch.dtype = torch.float64, **settings: Any) -> Landscape:
    earlier, later = pair(family, dtype, step) if dtype == torch.float32 else wide(family, step)
    return Landscape.around(Trajectory(earlier=earlier, later=later), DATA, **settings)


def wide(family: str, step: float) -> tuple[nn.Module, nn.Module]:
    earlier, later = pair(family, torch.float64, step)
    for model in (earlier, later):
        if model._can_set_experts_implementation():
            model.set_experts_implementation("eager")  # the grouped product has no float64
    return earlier, later


def every(land: Landscape, mask: bool = True, third: bool = False) -> Neurons:
    layout = find_layout(land.model)
    return Neurons({n: (torch.arange(b.neurons) % 3 == 0) if third else torch.full((b.neurons,), mask)
                    for n, b in layout.items()})  # fmt: skip


# A model of a few hundred parameters, and its whole Hessian.


@cache
def small(family: str) -> tuple[Landscape, Tensor]:
    """A landscape of a model of 300 to 700 parameters, and the full Hessian of its loss at θA, row by row."""
    settings = dict(hidden_size=4, intermediate_size=6, num_hidden_layers=1, num_attention_heads=1, head_dim=4,
                    num_key_value_heads=1, vocab_size=12, n_embd=4, n_layer=1, n_head=1, n_inner=6, n_positions=16,
                    max_position_embeddings=16)  # fmt: skip
    made = config(family)
    for name, value in settings.items():
        if hasattr(made, name):
            setattr(made, name, value)
    if hasattr(made, "layer_types") and made.layer_types:
        made.layer_types = made.layer_types[:1]
    from transformers import AutoModelForCausalLM

    torch.manual_seed(1)
    earlier = AutoModelForCausalLM.from_config(made).double().eval()
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    later = copy.deepcopy(earlier)
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    data = [
        {**batch, "input_ids": batch["input_ids"] % 12, "labels": batch["labels"].clamp(max=11)} for batch in DATA[1:]
    ]
    land = Landscape.around(Trajectory(earlier=earlier, later=later), data)
    sizes = [tensor.numel() for tensor in land.theta.values()]

    def loss(flat: Tensor) -> Tensor:
        pieces = zip(land.theta, flat.split(sizes), strict=True)
        at = {name: piece.view_as(land.theta[name]) for name, piece in pieces}
        return torch.stack([land._loss(batch, at) * share for batch, share in land._shares()]).sum()

    with differentiable(earlier):
        hessian = torch.autograd.functional.hessian(loss, flat(land, land.theta), vectorize=True)
    return land, hessian.detach()


def flat(land: Landscape, v: Any) -> Tensor:
    return torch.cat([(v[n] if n in v else torch.zeros_like(t)).flatten() for n, t in land.theta.items()])


def law_whole_hessian(family: str) -> None:
    land, hessian = small(family)
    assert 200 < len(hessian) < 800
    scale = float(hessian.abs().max())
    for seed in range(3):
        v = noise(land.theta, seed)
        torch.testing.assert_close(flat(land, land.product(v)), hessian @ flat(land, v), rtol=1e-4, atol=1e-5 * scale)
        assert land.quadratic(v) == pytest.approx(float(flat(land, v) @ hessian @ flat(land, v)), rel=1e-5)
    assert float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[0]) > -1e-5 * scale  # θA is a minimum
    delta = flat(land, land.delta)
    terms = damage_terms(land, (0.5, 1.0))
    assert terms.second == pytest.approx([float(delta @ hessian @ delta) * t * t / 2 for t in (0.5, 1.0)], rel=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_products_are_those_of_the_whole_hessian(family):
    law_whole_hessian(family)


def law_split(family: str) -> None:
    """Proposition 2 over a mask's coordinates, from the whole Hessian and an independent list of the coordinates."""
    land, hessian = small(family)
    mask = every(land, third=True)
    marks = {name: torch.zeros_like(tensor) for name, tensor in land.theta.items()}
    for name, block in find_layout(land.model).items():
        for slot in block.slots:
            slot.view(marks[slot.tensor])[mask[name]] = 1
    chosen = flat(land, marks).bool()
    delta = flat(land, land.delta)
    s, rest = delta * chosen, delta * ~chosen
    found = damage_split(land, mask)
    wanted = [float(one) for one in (s @ hessian @ s / 2, s @ hessian @ rest, rest @ hessian @ rest / 2)]
    assert [found.inside, found.leakage, found.outside] == pytest.approx(wanted, rel=1e-4, abs=1e-9)
    assert found.total == pytest.approx(float(delta @ hessian @ delta) / 2, rel=1e-5)
    assert found.motion == pytest.approx(float((s @ s) / (delta @ delta)), rel=1e-6)
    assert (found.dimension, found.parameters) == (int(chosen.sum()), len(delta))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_the_split_is_that_of_the_whole_hessian(family):
    law_split(family)


def test_single_weights_are_coordinates_too(monkeypatch):
    """Those of all weights of some neurons are those of the neurons, also where a part comes in several runs."""
    land, _ = small("llama")
    whole = every(land, third=True)
    shapes = shapes_of(find_layout(land.model))
    chosen = {
        part: torch.arange(n * width)[whole[part.rpartition("/")[0]].repeat_interleave(width)]
        for part, (n, width) in shapes.items()
    }
    monkeypatch.setattr(entries, "_RUN", 7)
    some, all_ = coordinates(land, Entries(chosen, shapes=shapes)), coordinates(land, whole)
    assert some.dimension == all_.dimension
    torch.testing.assert_close(
        flat(land, some.project(land.delta)), flat(land, all_.project(land.delta)), rtol=0, atol=0
    )


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_spectrum_and_constants_are_those_of_the_whole_hessian(family, masked):
    land, hessian = small(family)
    mask = every(land, third=True) if masked else None
    span = eigenspace(land, 4, mask=mask, tolerance=1e-4)
    project = coordinates(land, mask).project
    p = torch.stack([flat(land, project(_unit(land, at))) for at in range(len(hessian))])
    values = torch.linalg.eigvalsh(p @ hessian @ p).flip(0)[:4]
    assert span.values == pytest.approx(values.tolist(), rel=1e-3)
    u = torch.stack([flat(land, span.home.put(vector)) for vector in span.vectors])
    torch.testing.assert_close(u @ u.T, torch.eye(4, dtype=u.dtype), rtol=0, atol=1e-9)
    delta = flat(land, land.delta)
    found = damage_spectrum(land, span, draws=2)
    held = (values * (u @ delta) ** 2 / 2).cumsum(0)
    assert found.cumulative == pytest.approx(held.tolist(), rel=1e-3)
    assert found.home == pytest.approx(float(p @ delta @ hessian @ (p @ delta)) / 2, rel=1e-4)
    assert found.total == pytest.approx(float(delta @ hessian @ delta) / 2, rel=1e-4)
    assert found.cumulative[-1] == pytest.approx(damage_split(land, span).inside, rel=1e-3)
    bounds = curvature_bounds(land, span, steps=12)
    coupling = u @ hessian @ (torch.eye(len(hessian)) - u.T @ u)
    assert bounds.mu == pytest.approx(float(values[-1]), rel=1e-3)
    assert bounds.beta == pytest.approx(float(torch.linalg.eigvalsh((hessian + hessian.T) / 2)[-1]), rel=1e-3)
    if masked:  # among all parameters an eigenspace is coupled to nothing
        assert bounds.xi == pytest.approx(float(torch.linalg.matrix_norm(coupling, 2)), rel=1e-3)
        away = delta - u.T @ (u @ delta)
        assert bounds.felt == pytest.approx(float((coupling @ delta).norm() / away.norm()), rel=1e-3)
        assert bounds.felt <= bounds.xi * (1 + 1e-6)
    else:
        assert bounds.xi < 1e-3 * bounds.mu


def _unit(land: Landscape, at: int) -> dict[str, Tensor]:
    v = {name: torch.zeros_like(tensor) for name, tensor in land.theta.items()}
    for tensor in v.values():
        if at < tensor.numel():
            tensor.view(-1)[at] = 1
            return v
        at -= tensor.numel()
    raise AssertionError(at)


# Families.


@pytest.mark.parametrize("family", [*FEW, "bloom", "mpt", "gpt_oss", "deepseek_v3", "qwen3_next"])
def test_the_fisher_is_the_hessian_at_the_earlier_checkpoint(family):
    """Two ways that share nothing: forward mode around the softmax, and two backward passes through the KL."""
    land = land_of(family)
    v, u = noise(land.theta, 1), noise(land.theta, 2)
    found = land.product(v)
    with differentiable(land.model):
        pieces = [(share, curvature(partial(land._loss, batch), land.theta, v)) for batch, share in land._shares()]
    wanted = theory.combined(pieces)
    assert norm(along(found, -1, wanted)) < 1e-4 * norm(wanted)
    assert inner(u, found) == pytest.approx(inner(v, land.product(u)), rel=1e-3, abs=1e-6 * norm(found) * norm(u))
    assert land.quadratic(v) == pytest.approx(inner(v, found), rel=1e-4)
    assert norm(land.gradient(land.theta)) < 1e-6 * norm(wanted)


@pytest.mark.parametrize("family", FEW)
def test_values_and_gradients_are_those_of_the_distillation(family):
    """The differentiable KL against the one that is trained with, and against a loop over positions."""
    land = land_of(family)
    later = copy.deepcopy(land.model)
    with torch.no_grad():
        for name, parameter in later.named_parameters():
            parameter.add_(land.delta[name])
    assert land.value(land.theta) == 0
    there = along(land.theta, 1, land.delta)
    assert land.value(there) == pytest.approx(by_definition(land.model, later), rel=1e-4)
    found, total = land.gradient(there), distillation(land.model, DATA)
    (sum(total(later, batch) * share for batch, share in land._shares())).backward()
    wanted = {n: p.grad if p.grad is not None else torch.zeros_like(p) for n, p in later.named_parameters()}
    assert norm(along(found, -1, wanted)) < 1e-4 * norm(wanted)


@pytest.mark.parametrize("family", FEW)
def test_a_small_step_loses_half_its_square_times_the_curvature(family):
    land = land_of(family)
    terms = damage_terms(land, (0.01, 0.02), draws=0)
    assert all(abs(rest) < 0.05 * true for rest, true in zip(terms.remainder, terms.true, strict=True))
    assert terms.true[1] / terms.true[0] == pytest.approx(4, rel=0.05)


def test_the_loss_that_is_trained_with_refuses_a_second_derivative():
    """Its gradient is kept as numbers, so that a second derivative would be silently wrong."""
    land = land_of("qwen3")
    with differentiable(land.model), pytest.raises(RuntimeError, match="differentiated twice"):
        curvature(lambda at: theory_landscape.functional(land.model, at, land.loss, DATA[0]), land.theta, land.delta)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_another_loss_has_a_slope_and_its_own_hessian(family):
    land = land_of(family, loss=cross_entropy)
    terms = damage_terms(land, (0.005, 0.01), draws=0)
    both = [first + second for first, second in zip(terms.first, terms.second, strict=True)]
    assert abs(terms.first[0]) > 1e-6
    assert both == pytest.approx(terms.true, rel=2e-2)
    step = 1e-3
    ahead, behind = (land.gradient(along(land.theta, s, land.delta)) for s in (step, -step))
    wanted = {n: (ahead[n] - behind[n]) / (2 * step) for n in ahead}
    assert norm(along(land.product(land.delta), -1, wanted)) < 1e-2 * norm(wanted)


@pytest.mark.parametrize("family", ["llama", "phi3", "qwen3_moe"])
def test_terms_add_up(family):
    land = land_of(family, dtype=torch.float32)
    terms = damage_terms(land)
    for true, *rest in zip(terms.true, terms.first, terms.second, terms.remainder, strict=True):
        assert sum(rest) == pytest.approx(true, rel=1e-9, abs=1e-12)
    span = eigenspace(land, 3, mask=every(land), steps=6)
    for subspace in (every(land), every(land, third=True), span):
        split = damage_split(land, subspace)
        assert split.total == pytest.approx(terms.second[-1], rel=1e-3)
        assert 0 <= split.motion <= 1
        assert min(split.inside, split.outside) >= 0


@pytest.mark.parametrize("family", ["llama", "phi3"])
def test_the_order_of_neurons_changes_no_number(family):
    earlier, later = wide(family, 0.02)
    numbers = []
    for _ in range(2):
        land = Landscape.around(Trajectory(earlier=earlier, later=later), DATA)
        mask = every(land)
        span = eigenspace(land, 2, mask=mask, tolerance=1e-4, steps=20)
        terms, split = damage_terms(land, draws=0), damage_split(land, mask)
        bounds, spectrum = curvature_bounds(land, span, steps=3), damage_spectrum(land, span, draws=0)
        moved = contraction(land, span, steps=1, step=0.1, bounds=bounds)
        numbers.append([*terms.true, *terms.second, split.inside, split.leakage, split.motion, *spectrum.curvatures,
                        *spectrum.cumulative, bounds.mu, *moved.inside, *moved.outside])  # fmt: skip
        for model in (earlier, later):
            permute(model, find_layout(model))
    assert numbers[1] == pytest.approx(numbers[0], rel=2e-3, abs=1e-9)


def test_how_prompts_are_batched_changes_no_number():
    earlier, later = pair("qwen3", torch.float64)
    run = Trajectory(earlier=earlier, later=later)
    single = [
        {key: value[row : row + 1] for key, value in batch.items()}
        for batch in DATA
        for row in range(len(batch["labels"]))
    ]
    one, other = Landscape.around(run, DATA), Landscape.around(run, [b for b in single if (b["labels"] != -100).any()])
    assert one.tokens == other.tokens
    for first, second in zip(damage_terms(one).true, damage_terms(other).true, strict=True):
        assert first == pytest.approx(second, rel=1e-4)
    assert norm(along(one.product(one.delta), -1, other.product(other.delta))) < 1e-4 * norm(one.product(one.delta))


# Theorem 1.


class Three(nn.Module):
    """The paper's worked example as a model: three numbers, of which the loss sees two."""

    def __init__(self, numbers: tuple[float, ...]) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(numbers, dtype=torch.float64))


def test_the_papers_worked_example():
    """δB = (0.20, −0.10, 0.05), S = the first two coordinates, α = 0.5, μ = 1: 0.224 → 0.112, the third untouched."""
    batch = {"input_ids": torch.ones(1, 2, dtype=torch.long)}
    model, delta = Three((0, 0, 0)), {"w": torch.tensor([0.20, -0.10, 0.05], dtype=torch.float64)}
    land = Landscape(model, {"w": model.w.detach()}, delta, [batch], lambda m, _: (m.w[:2] ** 2).sum() / 2)
    span = eigenspace(land, 2)
    assert span.values == pytest.approx((1, 1))
    found = contraction(land, span, steps=1, step=0.5)
    assert [round(one, 3) for one in found.inside] == [0.224, 0.112]
    assert found.outside == pytest.approx((0.05, 0.05))
    assert found.bound == pytest.approx(found.inside)
    assert (found.bounds.mu, found.bounds.beta) == pytest.approx((1, 1))
    assert found.bounds.xi == pytest.approx(0, abs=1e-6)
    terms = damage_terms(land)
    assert (terms.gradient, terms.true[-1], terms.second[-1]) == pytest.approx((0, 0.025, 0.025))
    split = damage_split(land, span)
    assert (split.inside, split.leakage, split.outside) == pytest.approx((0.025, 0, 0), abs=1e-12)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_near_the_earlier_checkpoint_a_refresh_does_what_the_theorem_says(family):
    land, hessian = small(family)
    near = replace(land, delta={name: 0.02 * tensor for name, tensor in land.delta.items()})
    span = eigenspace(near, 3, tolerance=1e-4)
    found = contraction(near, span, steps=6, others={"same": land.batches})
    u = torch.stack([flat(land, span.home.put(vector)) for vector in span.vectors])
    error = flat(land, near.delta)
    for t, inside in enumerate(found.inside):  # the exact evolution of a quadratic loss
        assert inside == pytest.approx(float((u @ error).norm()), rel=2e-2)
        error = error - found.step * hessian @ error
        assert inside <= found.bound[t] * 1.02
        assert inside <= found.coupled[t] * 1.02
    assert list(found.loss) == sorted(found.loss, reverse=True)
    one = found.others["same"]
    assert all(abs(c) <= b * (1 + 1e-6) for c, b in zip(one.change, one.bound, strict=True))
    assert one.change == pytest.approx(one.first, rel=0.05, abs=1e-7)


def test_points_of_ones_own_refresh_are_measured_as_the_descent_is():
    land, _ = small("llama")
    span = eigenspace(land, 3, steps=8)
    bounds = curvature_bounds(land, span, steps=5)
    own = contraction(land, span, steps=4, bounds=bounds)
    model = copy.deepcopy(land.model)

    def refresh():
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.add_(land.delta[name])
        loss, optimiser = distillation(land.model, land.batches), torch.optim.SGD(model.parameters(), lr=bounds.step)
        yield dict(model.named_parameters())
        for _ in range(4):
            optimiser.zero_grad()
            for batch, share in land._shares():
                (loss(model, batch) * share).backward()
            optimiser.step()
            yield dict(model.named_parameters())

    with differentiable(model):  # the prompts hold padding tokens that are attended, and training leaves them out
        given = contraction(land, span, points=refresh(), bounds=bounds)
    for name in ("inside", "outside", "bound", "coupled", "loss"):
        assert getattr(given, name) == pytest.approx(getattr(own, name), rel=1e-4)


def test_a_start_nearer_to_the_earlier_checkpoint():
    land, _ = small("gpt2")
    span = eigenspace(land, 2, steps=5)
    half = contraction(land, span, steps=0, start=0.5, bounds=curvature_bounds(land, span, steps=1))
    assert half.inside[0] == pytest.approx(0.5 * math.hypot(*span.coefficients(land.delta)), rel=1e-6)


# What is left as it was, what is read, what is refused.


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_nothing_is_left_behind(family):
    earlier, later = pair(family)
    earlier.train()
    before = [{n: t.clone() for n, t in model.state_dict().items()} for model in (earlier, later)]
    kept = getattr(earlier.config, "_experts_implementation", None)
    land = Landscape.around(Trajectory(earlier=earlier, later=later), DATA)
    span = eigenspace(land, 2, mask=every(land), steps=8)
    contraction(land, span, steps=1, others={"b": DATA}, bounds=curvature_bounds(land, span, steps=2))
    damage_terms(land)
    for model, was in zip((earlier, later), before, strict=True):
        assert all(torch.equal(tensor, was[name]) for name, tensor in model.state_dict().items())
        assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
    assert earlier.training
    assert getattr(earlier.config, "_experts_implementation", None) == kept


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_folders_in_bfloat16_are_read_in_float32(family, tmp_path):
    earlier, later = pair(family, torch.bfloat16)
    for name, model in (("math", earlier), ("qa", later)):
        model.save_pretrained(tmp_path / name)
    land = Landscape.around(Trajectory(earlier=tmp_path / "math", later=tmp_path / "qa"), DATA)
    live = Landscape.around(Trajectory(earlier=earlier.float(), later=later), DATA)
    assert {tensor.dtype for tensor in land.theta.values()} == {torch.float32}
    assert all(torch.equal(tensor, live.delta[name]) for name, tensor in land.delta.items())
    assert damage_terms(land).true == pytest.approx(damage_terms(live).true, rel=1e-3)


def test_what_is_found_prints_and_is_saved(tmp_path):
    land = land_of("qwen3", dtype=torch.float32)
    span = eigenspace(land, 3, mask=every(land), steps=6)
    later = copy.deepcopy(land.model)
    with torch.no_grad():
        for name, parameter in later.named_parameters():
            parameter.add_(land.delta[name])
    scores = damage(Trajectory(earlier=land.model, later=later), DATA)
    spectrum = damage_spectrum(land, span, draws=2, ranked={"D": scores})
    moved = contraction(land, span, steps=2, others={"code": DATA}, bounds=curvature_bounds(land, span, steps=3))
    assert [size for size, _ in spectrum.ranked["D"]][-1] == coordinates(land, every(land)).dimension
    assert spectrum.ranked["D"][-1][1] == pytest.approx(spectrum.home, rel=1e-4)
    found = [damage_terms(land), damage_split(land, every(land)), spectrum, moved.bounds, moved]
    for one, word in zip(found, ("remainder", "leakage", "dimensions", "μ_A", "bound with coupling"), strict=True):
        assert word in str(one)
        one.save(tmp_path / "it.json")
        assert json.loads((tmp_path / "it.json").read_text())["kind"] == type(one).__name__


def test_bad_questions_are_refused():
    earlier, later = pair("qwen3")
    run, land = Trajectory(earlier=earlier, later=later), land_of("qwen3")
    with pytest.raises(ValueError, match="data is empty"):
        Landscape.around(run, [])
    with pytest.raises(ValueError, match="pass earlier as a folder"):
        Landscape.around(replace(run, earlier=dict(earlier.state_dict())), DATA)
    with pytest.raises(ValueError, match=r"torch.bfloat16.*float32"):
        Landscape.around(Trajectory(earlier=build("qwen3", torch.bfloat16), later=later), DATA)
    broken = copy.deepcopy(later)
    with torch.no_grad():
        next(broken.parameters()).view(-1)[3] = math.nan
    with pytest.raises(ValueError, match="NaN or infinite numbers"):
        Landscape.around(replace(run, later=broken), DATA)
    with pytest.raises(ValueError, match=r"fractions=\(0,\): expected numbers in \(0, 1\]"):
        damage_terms(land, (0,))
    with pytest.raises(ValueError, match="selects nothing"):
        damage_split(land, every(land, mask=False))
    with pytest.raises(ValueError, match="different models"):
        damage_split(land, Neurons({"x": torch.ones(3, dtype=torch.bool)}))
    span = eigenspace(land, 1, steps=2)
    bounds = curvature_bounds(land, span, steps=1)
    with pytest.raises(ValueError, match="step=-1: expected a positive step size"):
        contraction(land, span, step=-1, bounds=bounds)
    with pytest.raises(ValueError, match="points is empty"):
        contraction(land, span, points=[], bounds=bounds)
    with pytest.raises(ValueError, match=r"lacks \d+ parameters"):
        contraction(land, span, points=[{}], bounds=bounds)
    with pytest.raises(ValueError, match="prompts without responses"):
        contraction(land, span, others={"code": batches(labels=False)}, bounds=bounds)


# Mutants.


def missing_half(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Landscape, "quadratic", lambda self, v, original=Landscape.quadratic: 2 * original(self, v))


def wrong_point(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, v, original=Landscape.product):
        return original(replace(self, theta=along(self.theta, 1, self.delta)), v)

    patch.setattr(Landscape, "product", mutant)


def missing_cross_term(patch: pytest.MonkeyPatch) -> None:
    def mutant(operator, delta, project, original=theory.parts):
        inside, _, outside = original(operator, delta, project)
        return inside, 0.0, outside

    patch.setattr(theory_damage, "parts", mutant)


def one_part_forgotten(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, layout, whose, original=Neurons.edits):
        return (edit for edit in original(self, layout, whose) if edit.slot.part not in ("down", "c_proj"))

    patch.setattr(Neurons, "edits", mutant)


def batches_weighed_alike(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Landscape, "_shares", lambda self: ((batch, 1 / len(self.batches)) for batch in self.batches))


def sum_for_mean(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Landscape, "tokens", property(lambda self: 1))


MUTANTS = [
    (missing_half, lambda: law_whole_hessian("gpt2")),
    (wrong_point, lambda: law_whole_hessian("gpt2")),
    (sum_for_mean, lambda: law_whole_hessian("gpt2")),
    (missing_cross_term, lambda: law_split("gpt2")),
    (one_part_forgotten, lambda: law_split("gpt2")),
    (wrong_point, lambda: law_split("llama")),
    (batches_weighed_alike, lambda: test_values_and_gradients_are_those_of_the_distillation("gpt2")),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=[mutant.__name__ for mutant, _ in MUTANTS])
def test_mutants_die(mutant, law):
    law()
    dies(mutant, law)
