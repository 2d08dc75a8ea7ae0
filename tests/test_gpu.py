"""On a GPU as on the CPU: scores to float tolerance, bits exactly. Where there is none, on the simulated one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import nullcontext
from importlib import import_module
from typing import Any

import pytest
import torch
from families import build, fewer
from simulated import gpu
from torch import nn

from surgery import (
    AMCSelector,
    DamageSelector,
    Neurons,
    RandomSelector,
    Trajectory,
    activation,
    conflict,
    damage,
    likelihood,
    magnitude,
    refresh,
    rollback,
    strengths,
    sweep,
)
from surgery.evidence import gradients
from surgery.layout import find_layout
from surgery.live import distillation
from surgery.live.prompts import padded
from surgery.reverting import Rollback
from surgery.scores import reversal_cost
from surgery.theory import damage_terms
from surgery.theory.landscape import Landscape
from surgery.training import Masked

attribution = import_module("surgery.scores.damage")


DEVICE = "cuda"
SOME = ["qwen3", "llama", "gpt2", "phi3", "gpt_oss", "qwen3_moe"]
DATA = [padded([([5, 6, 7], [8, 9, 2]), ([3, 4], [10, 2])], 0), padded([([11, 12, 13, 14], [15, 2])], 0)]
SELECTORS = [
    AMCSelector(0.2),
    DamageSelector(0.2),
    DamageSelector(0.2, protect={"b": DATA[1:]}, loss="hellinger", units=("mlp", "kv_group")),
    DamageSelector(0.05, units="weight"),
    AMCSelector(0.05, "M", "M", units="weight"),
    RandomSelector(0.05, units="weight"),
]


@pytest.fixture(autouse=True)
def device() -> Iterator[None]:
    with nullcontext() if torch.cuda.is_available() else gpu():
        yield


def run_on(family: str, device: str, dtype: torch.dtype = torch.float32) -> tuple[Trajectory, nn.Module]:
    base, earlier, later = (build(family, dtype, seed).to(device) for seed in (1, 2, 3))
    return Trajectory(base=base, earlier=earlier, later=later), later


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("family", SOME)
def test_scores_are_those_of_the_cpu(family):
    (here, one), (there, other) = run_on(family, DEVICE), run_on(family, "cpu")
    pairs = [
        (magnitude(here), magnitude(there)),
        (conflict(here), conflict(there)),
        (activation(one, DATA), activation(other, DATA)),
        (damage(here, DATA), damage(there, DATA)),
    ]
    for found, expected in pairs:
        for name, values in expected.items():
            scale = float(values.abs().max())
            assert found[name].device.type == "cpu"
            assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-3 * scale + 1e-7), name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", fewer(("gpt2", "gpt_oss"), tuple(SOME)))
@pytest.mark.parametrize("selector", SELECTORS)
def test_what_is_selected_there_is_reverted_and_undone_to_the_bit(family, dtype, selector):
    run, model = run_on(family, DEVICE, dtype)
    before = bits(model)
    mask = selector.select(run, DATA)
    assert sum(mask.count().values())
    with rollback(model, to=run.earlier, mask=mask) as done:
        assert done.changed
        assert not same(bits(model), before)
        once = bits(model)
        with rollback(model, to=run.earlier, mask=mask):
            assert same(bits(model), once)
    assert same(bits(model), before)


@pytest.mark.parametrize("gigabytes", [0, 100])
@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_a_score_that_moves_the_model_keeps_what_was_there_off_a_gpu_without_room(family, gigabytes, monkeypatch):
    """All neurons are two thirds of a model: beside the weights they would be most of a second one."""
    monkeypatch.setattr(attribution, "room", lambda _: gigabytes << 30)
    (here, model), (there, _) = run_on(family, DEVICE), run_on(family, "cpu")
    before, kept = bits(model), []

    def watched(*args: Any, **settings: Any) -> Rollback:
        done = rollback(*args, **settings)
        kept.extend(rows.device.type for _, rows in done._old)
        return done

    monkeypatch.setattr(attribution, "rollback", watched)
    found = reversal_cost(here, DATA)
    assert set(kept) == {DEVICE if gigabytes else "cpu"}
    expected = reversal_cost(there, DATA)
    assert same(bits(model), before)
    for name, values in expected.items():
        scale = float(values.abs().max())
        assert torch.allclose(found[name], values, rtol=1e-3, atol=1e-3 * scale + 1e-7), name


@pytest.mark.parametrize("family", SOME)
def test_how_far_back_is_that_of_the_cpu_and_is_undone(family):
    (here, model), (there, _) = run_on(family, DEVICE), run_on(family, "cpu")
    before, mask = bits(model), DamageSelector(0.2, units="mlp").select(there, DATA)
    found, expected = (strengths(run, DATA, mask, passes=3) for run in (here, there))
    for name, values in expected.items():
        assert torch.allclose(found[name], values, atol=1e-2)
    with rollback(model, to=here.earlier, mask=mask, strength=found):
        assert not same(bits(model), before)
    assert same(bits(model), before)


def test_a_sweep_measures_what_it_measures_on_the_cpu():
    (here, one), (there, other) = run_on("qwen3", DEVICE), run_on("qwen3", "cpu")
    before = bits(one)
    score = likelihood({"a": DATA[:1], "b": DATA[1:]})
    selectors = [DamageSelector(0.1), AMCSelector(0.1)]
    tables = [
        sweep(run, DATA, selectors=selectors, budgets=[0.1, 0.3], evaluate=score, metric="a")
        for model, run in ((one, here), (other, there))
    ]
    for found, expected in zip(*tables, strict=True):
        assert (found.selector, found.budget) == (expected.selector, expected.budget)
        assert found.metrics == pytest.approx(expected.metrics, rel=1e-3)
    assert same(bits(one), before)


@pytest.mark.parametrize("family", SOME)
def test_a_masked_refresh_leaves_the_rest_and_is_undone(family):
    run, model = run_on(family, DEVICE, torch.bfloat16)
    before, mask = bits(model), DamageSelector(0.2).select(run, DATA)
    with rollback(model, to={name: old + 8 for name, old in before.items()}, mask=mask):  # every masked number moves
        moved = bits(model)
    loss = distillation(run.earlier, DATA)
    with refresh(model, loss, DATA, steps=2, lr=1e-2, mask=mask) as done:
        assert done.changed
        now = bits(model)
        for name, old in before.items():
            outside = moved[name] == old
            assert torch.equal(now[name][outside], old[outside])
    assert same(bits(model), before)


@pytest.mark.parametrize("family", ["qwen3", "gpt2"])
def test_gradients_likelihoods_and_the_theory_are_those_of_the_cpu(family):
    (here, one), (there, other) = run_on(family, DEVICE), run_on(family, "cpu")
    domains = {"a": DATA[:1], "b": DATA[1:]}
    assert gradients(one, domains).whole.cosines["a"]["b"] == pytest.approx(
        gradients(other, domains).whole.cosines["a"]["b"], abs=1e-3
    )
    for domain, scores in likelihood(domains)(other).items():
        assert likelihood(domains)(one)[domain] == pytest.approx(scores, rel=1e-3)
    terms = (damage_terms(Landscape.around(run, DATA)) for run in (here, there))
    found, expected = terms
    assert found.second == pytest.approx(expected.second, rel=1e-2)
    assert found.true == pytest.approx(expected.true, rel=1e-2)


def test_what_was_copied_before_the_model_moved_is_not_trained():
    model = build("qwen3")
    mask = Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in find_layout(model).sizes.items()})
    masked = Masked(model, mask)
    model.to(DEVICE)
    with masked, pytest.raises(ValueError, match=r'move the model first, model.to\("cuda:0"\)'):
        model(input_ids=DATA[0]["input_ids"].to(DEVICE)).logits.sum().backward()
