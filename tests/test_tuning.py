"""recommend: minimal where the problem is monotone, honest where it is not, few evaluations, the model whole."""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, log2

import numpy as np
import pytest
import torch
from test_sweeps import same, snapshot, trio

from surgery import AMCSelector, Neurons, RandomSelector, Trajectory, find_layout, recommend, sweep
from surgery.tuning import BUDGETS

N = 96
GRID = [k / N for k in range(1, N + 1)]


@pytest.fixture(scope="module")
def models():
    return trio()


class Planted:
    """Scores that are given functions of the share of reverted neurons; counts its calls."""

    def __init__(self, models, math=lambda x: x, qa=lambda x: -x, fail=None, items=0) -> None:
        self.models, self.math, self.qa, self.fail, self.items, self.calls = models, math, qa, fail, items, 0

    def share(self, model) -> float:
        pairs = zip(self.models["earlier"].model.layers, model.model.layers, strict=True)
        return float(
            torch.cat([(a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1) for a, b in pairs]).float().mean()
        )

    def __call__(self, model):
        self.calls += 1
        if self.calls == self.fail:
            raise RuntimeError("out of power")
        x = self.share(model)
        if model is not self.models["later"]:
            return {"math": self.spread(1.0), "qa": self.spread(-1.0), "code": 0.5}
        return {"math": self.spread(self.math(x)), "qa": self.spread(self.qa(x)), "code": 0.5}

    def spread(self, mean: float):
        return mean + np.random.default_rng(0).normal(0, 0.3, self.items) * (mean != 0) if self.items else mean


def tuned(models, evaluate, selector=None, **more):
    return recommend(
        models["later"], Trajectory(**models), None, selector=selector or RandomSelector(0.0), evaluate=evaluate,
        metric="math", **{"budgets": GRID, **more},
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [0.005, 0.1, 0.37, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("curve", [lambda x: x, lambda x: x**3, lambda x: x**0.3, lambda x: round(4 * x) / 4])
def test_it_is_minimal_on_a_monotone_problem(models, wanted, curve):
    """The smallest of the budgets offered, whatever the curve; a bisection's number of evaluations."""
    evaluate = Planted(models, curve)
    found = tuned(models, evaluate, recovery=wanted)
    assert found.budget == next(b for b in GRID if curve(b) >= wanted)
    assert found.chosen == found.best
    assert found.nested
    assert found.monotone
    assert found.evaluations == evaluate.calls <= 3 + ceil(log2(len(GRID))) + 1
    assert ", the smallest that does" in str(found)
    assert "ceiling: 100.0 % with all MLP neurons" in str(found)


@pytest.mark.parametrize(("allowed", "wanted"), [(0.3, 0.8), (0.02, 0.5), (0.8, 0.9)])
def test_limits_that_cannot_be_met_are_said_and_the_best_within_them_is_found(models, allowed, wanted):
    """Recovery x costs x: the best is the largest budget whose cost is within the limit."""
    evaluate = Planted(models)
    found = tuned(models, evaluate, recovery=wanted, limits={"qa": -allowed})
    assert found.chosen is found.budget is None
    assert found.best.budget == max(b for b in GRID if b <= allowed)
    assert evaluate.calls <= 3 + 2 * (ceil(log2(len(GRID))) + 1)
    assert f"no budget gives {100 * wanted:g} % recovery of math with Δ qa ≥ -{allowed:g}" in str(found)
    assert f"the best within the limits is budget {found.best.budget:g}" in str(found)
    assert "ceiling: 100.0 %" in str(found)


def test_limits_that_are_met_cost_nothing(models):
    found = tuned(models, Planted(models, lambda x: x**0.5), recovery=0.5, limits={"qa": -0.3, "code": 0.0})
    assert found.budget == 0.25
    assert found.chosen.delta["qa"] == pytest.approx(-0.25)


def test_a_limit_that_nothing_keeps(models):
    found = tuned(models, Planted(models), recovery=0.5, limits={"code": 0.1})
    assert found.chosen is found.best is None
    assert "none that was measured keeps the limits" in str(found)


def test_above_the_ceiling(models):
    """Where even everything is not enough, the best is everything."""
    found = tuned(models, Planted(models, lambda x: 0.4 * x), recovery=0.8)
    assert found.chosen is None
    assert found.best.budget == 1.0
    assert "ceiling: 40.0 %" in str(found)
    assert "fewer can give more" not in str(found)


def test_more_than_the_ceiling_is_explained(models):
    """Some of what is reverted does harm, so that fewer give more; and where none is enough, none "may do as well"."""
    found = tuned(models, Planted(models, lambda x: 1.6 * x if x <= 0.5 else 1.2 - 0.8 * x), recovery=0.9)
    assert found.chosen is None
    assert found.best.recovery > found.ceiling.recovery
    assert "with all MLP neurons; fewer can give more, as not everything that is reverted helps" in str(found)
    assert "a budget that was not measured may do" in str(found)
    assert "as well" not in str(found)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_honest_on_a_problem_that_is_not_monotone(models, seed):
    """What it recommends was measured to keep what was asked; what it saw go the other way, it says."""
    rng = np.random.default_rng(seed)
    heights, costs = rng.uniform(0, 1, N + 1), rng.uniform(-1, 0, N + 1)
    heights[0] = costs[0] = 0.0
    evaluate = Planted(models, lambda x: heights[round(N * x)], lambda x: costs[round(N * x)])
    found = tuned(models, evaluate, recovery=0.5, limits={"qa": -0.6})
    rows = found.sweep.rows[3:]
    for row in rows:
        assert row.recovery == pytest.approx(heights[row.neurons])
    good = [row for row in rows if row.recovery >= 0.5 and row.delta["qa"] >= -0.6]
    assert found.chosen == (good[0] if good else None)
    recoveries = [row.recovery for row in rows]
    kept = [row.delta["qa"] >= -0.6 for row in rows]
    went_one_way = recoveries == sorted(recoveries) and kept == sorted(kept, reverse=True)
    assert found.monotone == went_one_way
    assert ("does not go one way" in str(found)) != went_one_way
    assert (", the smallest that does" in str(found)) == (found.chosen is not None and went_one_way)


def test_a_limit_met_again_at_a_larger_budget_is_said(models):
    """Recovery grows as it should, and the cost does not: broken in the middle, kept at the end."""
    found = tuned(
        models, Planted(models, qa=lambda x: -1.0 if 0.4 < x < 0.6 else 0.0), recovery=0.8, limits={"qa": -0.5}
    )
    assert found.budget == 77 / N
    assert not found.monotone


@dataclass(frozen=True)
class Sliding:
    """Masks that are not nested: a window that moves as it grows."""

    budget: float

    def select(self, run, data=None):
        sizes = find_layout(run.load()).sizes
        k = round(self.budget * N)
        flat = torch.zeros(N, dtype=torch.bool)
        flat[torch.arange(N - k, N) if k % 2 else torch.arange(k)] = True
        return Neurons(dict(zip(sizes, flat.split(list(sizes.values())), strict=True)))


def test_masks_that_are_not_nested_are_said(models):
    found = tuned(models, Planted(models), Sliding(0.0), recovery=0.5)
    assert found.budget == 0.5
    assert not found.nested
    assert "the masks are not nested" in str(found)
    assert "perhaps not the smallest" in str(found)


def test_the_model_is_whole_at_the_end_and_after_an_error(models):
    """Bit for bit, whichever evaluation fails."""
    before = snapshot(models["later"])
    tuned(models, Planted(models), recovery=0.5, limits={"qa": -0.2})
    assert same(models["later"], before)
    for fail in range(1, 9):
        with pytest.raises(RuntimeError, match="out of power"):
            tuned(models, Planted(models, fail=fail), recovery=0.5, limits={"qa": -0.2})
        assert same(models["later"], before)


def test_it_shares_a_sweeps_file(models, tmp_path):
    """Rows that a sweep measured are not measured again, and the other way round."""
    file, budgets = tmp_path / "rows.jsonl", [0.125, 0.25, 0.5, 0.75]
    run, evaluate = Trajectory(**models), Planted(models)
    sweep(models["later"], run, None, selectors=[RandomSelector(0.0)], budgets=budgets, evaluate=evaluate, path=file)
    again = Planted(models)
    found = tuned(models, again, recovery=0.5, budgets=budgets, path=file)
    assert (found.budget, found.evaluations, again.calls) == (0.5, 0, 0)
    more = tuned(models, again, recovery=0.5, budgets=[*budgets, 0.375], path=file)
    assert (more.budget, more.evaluations) == (0.5, 1)


def test_doubt_is_said_where_items_leave_it(models):
    """An interval that reaches below what was asked, or below a limit, is no certainty."""
    found = tuned(models, Planted(models, lambda x: x**0.5, items=40), recovery=0.6, limits={"qa": -0.4})
    assert found.chosen.interval[0] < 0.6
    verdict = next(line for line in str(found).splitlines() if line.startswith("budget "))
    low = round(100 * found.chosen.interval[0])
    assert f"the smallest that does, but not for certain (its interval reaches down to {low} %): " in verdict
    assert str(found).count("reaches down to") == 2  # of recovery once, and of qa
    assert "not certain: the interval of Δ qa reaches down" in str(found)
    few = tuned(models, Planted(models, items=5), recovery=0.5)
    assert "underpowered: " in "\n".join(few.notes)
    none = tuned(models, Planted(models), recovery=0.5)
    assert len(none.notes) == 1  # without items there is nothing to say
    assert "certain" not in str(none)


def test_any_selector_with_a_budget_and_the_default_budgets(models):
    """From 0.1 % to all, in few evaluations; the paper's selector with nested masks."""
    evaluate = Planted(models)
    found = tuned(models, evaluate, AMCSelector(0.0, "M", "M", how="global"), recovery=0.3, budgets=BUDGETS)
    assert found.budget == 0.3
    assert found.nested
    assert evaluate.calls <= 3 + 6
    assert (BUDGETS[0], BUDGETS[-1], len(BUDGETS)) == (0.001, 1.0, 19)
    assert list(BUDGETS) == sorted(BUDGETS)


def test_what_cannot_be_asked(models):
    """With what to type instead; before anything is rolled back."""
    rise = Planted(models, lambda x: 2.0)
    for more, evaluate, message in (
        (dict(limits={"science": 0.0}), Planted(models), r"'science' is none of the other metrics.*'code', 'qa'"),
        (dict(limits={"math": 0.0}), Planted(models), "'math' is none of the other metrics"),
        (dict(budgets=[]), Planted(models), "expected fractions in"),
        (dict(budgets=[0.0, 0.1]), Planted(models), "expected fractions in"),
        (dict(budgets=[1.5]), Planted(models), "expected fractions in"),
        (dict(recovery=0.0), Planted(models), "expected a fraction above 0"),
        (dict(recovery=float("nan")), Planted(models), "expected a fraction above 0"),
        (dict(limits={"qa": float("nan")}), Planted(models), "that of 'qa' is NaN"),
        ({}, rise, "did not fall from earlier"),
        ({}, "perplexity", 'or "lm_eval:task,task"'),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(models, evaluate, **more)
