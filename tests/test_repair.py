"""repair: minimal where the problem is monotone, honest where it is not, few evaluations, the model whole."""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import ceil, log
from pathlib import Path

import numpy as np
import pytest
import torch
from test_sweeps import same, snapshot, trio

from surgery import (
    AMCSelector,
    DamageSelector,
    Neurons,
    RandomSelector,
    Trajectory,
    load_prompts,
    repair,
    rolled_back,
    sweep,
)
from surgery.layout import find_layout
from surgery.measure.repair import BUDGETS

N = 96
GRID = [k / N for k in range(1, N + 1)]


@pytest.fixture(scope="module")
def models():
    return trio()


class Planted:
    """Scores that are given functions of the share of reverted neurons; counts its calls."""

    def __init__(self, models, math=lambda x: x, qa=lambda x: -x, fail=None, items=0) -> None:
        self.models, self.math, self.qa, self.fail, self.items = models, math, qa, [fail], (items,)
        self.called: list[object] = []

    @property
    def calls(self) -> int:
        return len(self.called)

    def share(self, model) -> float:
        pairs = zip(self.models["earlier"].model.layers, model.model.layers, strict=True)
        return float(
            torch.cat([(a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1) for a, b in pairs]).float().mean()
        )

    def __call__(self, model):
        self.called.append(model)
        if self.calls in self.fail:
            raise RuntimeError("out of power")
        x = self.share(model)
        if model is not self.models["later"]:
            return {"math": self.spread(1.0), "qa": self.spread(-1.0), "code": 0.5}
        return {"math": self.spread(self.math(x)), "qa": self.spread(self.qa(x)), "code": 0.5}

    def spread(self, mean: float):
        return mean + np.random.default_rng(0).normal(0, 0.3, self.items) * (mean != 0) if self.items[0] else mean


def tuned(models, evaluate, selector=None, run=None, **more):
    return repair(
        run or Trajectory(**models), None, selector=selector or RandomSelector(0.0), evaluate=evaluate, metric="math",
        **{"budgets": GRID, **more},
    )  # fmt: skip


@pytest.mark.parametrize("wanted", [0.005, 0.1, 0.37, 0.5, 0.8, 0.99, 1.0])
@pytest.mark.parametrize("curve", [lambda x: x, lambda x: x**3, lambda x: x**0.3, lambda x: round(4 * x) / 4])
def test_it_is_minimal_on_a_monotone_problem(models, wanted, curve):
    """The smallest of the budgets offered, whatever the curve; a search's number of evaluations."""
    evaluate = Planted(models, curve)
    found = tuned(models, evaluate, recovery=wanted)
    assert found.outcome == "repaired"
    assert found.chosen.budget == next(b for b in GRID if curve(b) >= wanted)
    assert found.chosen == found.best
    assert found.mask.equal(RandomSelector(found.chosen.budget).select(found.run))
    assert evaluate.calls <= 3 + ceil(log(len(GRID), 1.5)) + 1
    assert str(found).startswith("Repaired: math lost 1.0000, from 1.0000 to 0.0000. Reverting ")
    assert "not ordered" not in str(found)


def test_large_budgets_are_not_asked_for_where_a_small_one_is_enough(models):
    """Single weights take longer to choose, the more there are."""
    found = tuned(models, Planted(models, lambda x: min(1.0, 2 * x)), recovery=0.5)
    assert found.chosen.budget == 0.25
    assert max(row.budget for row in found.sweep.rows[3:]) <= GRID[len(GRID) // 3]


@pytest.mark.parametrize("most", [0.2, 0.5, 0.9])
def test_the_goal_is_a_share_of_what_can_be_won_back(models, most):
    """Where reverting everything brings back less than was lost, that is all there is to win back."""
    found = tuned(models, Planted(models, lambda x: most * x), recovery=0.75)
    assert found.goal == pytest.approx(0.75 * most)
    assert found.chosen.budget == next(b for b in GRID if b >= 0.75)


def test_a_part_that_gives_more_than_everything_raises_the_goal(models):
    """What was measured is what can be won back, also where reverting the rest does harm."""
    found = tuned(models, Planted(models, lambda x: 4 * x if x <= 0.2 else 1 - 0.6 * x), recovery=1.0)
    reached = max(row.recovery for row in found.sweep.rows[2:])
    assert reached > found.ceiling.recovery == pytest.approx(0.4)
    assert found.goal == pytest.approx(reached)
    assert found.chosen.recovery == pytest.approx(reached)
    assert "they are not ordered" in str(found)


@pytest.mark.parametrize(("allowed", "wanted"), [(0.3, 0.8), (0.02, 0.5), (0.8, 0.9)])
def test_limits_that_cannot_be_met_are_said_and_the_best_within_them_is_found(models, allowed, wanted):
    """Recovery x costs x: the best is the largest budget whose cost is within the limit."""
    evaluate = Planted(models)
    found = tuned(models, evaluate, recovery=wanted, keep=["qa"], limit=allowed)
    assert found.outcome == "not repairable"
    assert found.chosen is found.mask is None
    assert found.best.budget == max(b for b in GRID if b <= allowed)
    assert evaluate.calls <= 3 + 2 * (ceil(log(len(GRID), 1.5)) + 1)
    assert f"No budget brings back {100 * wanted:g} % of what can be won back" in str(found)
    assert f"while qa loses at most {allowed:g}; the best within the limits, budget {found.best.budget:g}" in str(found)
    with pytest.raises(ValueError, match="there is nothing to write: Not repaired"):
        found.save("anywhere")


def test_limits_that_are_met_cost_nothing(models):
    found = tuned(models, Planted(models, lambda x: x**0.5), recovery=0.5, limit={"qa": 0.3, "code": 0.0})
    assert found.chosen.budget == 0.25
    assert found.chosen.delta["qa"] == pytest.approx(-0.25)
    assert found.limits == {"qa": -0.3, "code": 0.0}


def test_a_limit_and_a_goal_that_are_met_exactly_are_met(models):
    """In binary 0.79 − 0.80 < −0.01 and (0.95 − 0.5) / (1 − 0.5) < 0.9: that refused one point of a hundred."""
    evaluate = Planted(models, lambda x: 0.95 if x > 0.2 else 0.5, lambda x: 0.79 if x > 0.2 else 0.80)
    found = tuned(models, evaluate, keep=["qa"], limit=0.01, recovery=0.9)
    assert found.outcome == "repaired"
    assert found.chosen.budget == 20 / N
    assert found.chosen.delta["qa"] < -0.01


@pytest.mark.parametrize("worst", [-0.5, -3.0])
def test_a_part_that_heals_is_found_where_everything_does_harm(models, worst):
    """Bisection went on among the largest budgets; below −1 nothing but the ceiling was measured."""
    found = tuned(models, Planted(models, lambda x: 4 * x if x <= 0.25 else worst), recovery=0.9)
    assert found.ceiling.recovery == pytest.approx(worst)
    assert (found.outcome, found.chosen.budget) == ("repaired", 22 / N)
    none = tuned(models, Planted(models, lambda x: worst * x), recovery=0.9, budgets=[0.1, 0.5])
    assert (none.outcome, none.best.budget) == ("not repairable", 0.1)
    assert "No budget brings back anything; the best within the limits, budget 0.1, brings back -" in none.verdict


def test_a_limit_that_nothing_keeps(models):
    found = tuned(models, Planted(models, qa=lambda x: -float(x > 0)), recovery=0.5, keep=["qa"])
    assert found.chosen is found.best is None
    assert "no measured budget keeps the limits" in str(found)


@pytest.mark.parametrize("seed", range(8))
def test_it_is_honest_on_a_problem_that_is_not_monotone(models, seed):
    """What it returns was measured to keep what was asked; what it saw go the other way, it says."""
    rng = np.random.default_rng(seed)
    heights, costs = rng.uniform(0, 1, N + 1), rng.uniform(-1, 0, N + 1)
    heights[0] = costs[0] = 0.0
    evaluate = Planted(models, lambda x: heights[round(N * x)], lambda x: costs[round(N * x)])
    found = tuned(models, evaluate, recovery=0.6, limit={"qa": 0.6})
    rows = found.sweep.rows[3:]
    for row in rows:
        assert row.recovery == pytest.approx(heights[row.neurons])
    assert found.goal == pytest.approx(0.6 * max(row.recovery for row in found.sweep.rows[2:]))
    good = [row for row in rows if row.recovery >= found.goal and row.delta["qa"] >= -0.6]
    assert found.chosen == (good[0] if good else None)
    recoveries = [row.recovery for row in rows]
    kept = [row.delta["qa"] >= -0.6 for row in rows]
    ordered = recoveries == sorted(recoveries) and kept == sorted(kept, reverse=True)
    assert ("they are not ordered" in str(found)) != ordered


def test_a_limit_met_again_at_a_larger_budget_is_said(models):
    """Recovery grows as it should, and the cost does not: broken in the middle, kept at the end."""
    found = tuned(models, Planted(models, qa=lambda x: -1.0 if 0.4 < x < 0.6 else 0.0), recovery=0.8, limit={"qa": 0.5})
    assert found.chosen.budget == 77 / N
    assert "they are not ordered" in str(found)


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
    assert found.chosen.budget == 0.5
    assert "they are not ordered" in str(found)


def test_the_model_is_whole_at_the_end_and_after_an_error(models):
    """Bit for bit, whichever evaluation fails."""
    before = snapshot(models["later"])
    tuned(models, Planted(models), recovery=0.5, limit={"qa": 0.2})
    assert same(models["later"], before)
    for fail in range(1, 9):
        with pytest.raises(RuntimeError, match="out of power"):
            tuned(models, Planted(models, fail=fail), recovery=0.5, limit={"qa": 0.2})
        assert same(models["later"], before)


def test_it_shares_a_sweeps_file(models, tmp_path):
    """Rows that a sweep measured are not measured again, and the other way round."""
    file, budgets = tmp_path / "rows.jsonl", [0.125, 0.25, 0.5, 0.75]
    run, evaluate = Trajectory(**models), Planted(models)
    sweep(run, None, selectors=[RandomSelector(0.0)], budgets=budgets, evaluate=evaluate, path=file)
    again = Planted(models)
    found = tuned(models, again, recovery=0.5, budgets=budgets, path=file)
    assert (found.chosen.budget, again.calls) == (0.5, 0)
    more = tuned(models, again, recovery=0.5, budgets=[*budgets, 0.375], path=file)
    assert (more.chosen.budget, again.calls) == (0.5, 1)


def test_doubt_is_said_where_items_leave_it(models):
    """An interval that reaches below what was asked, or below a limit, is no certainty."""
    found = tuned(models, Planted(models, lambda x: x**0.5, items=40), recovery=0.6, limit={"qa": 0.4})
    low = round(100 * found.chosen.interval[0])
    assert low < 60
    assert f"not certain: the interval of recovery reaches down to {low} %, below the goal of 60 %" in str(found)
    assert "not certain: the change of qa may be -" in str(found)
    none = tuned(models, Planted(models), recovery=0.5)
    assert none.notes == ("evaluate returned no score per item, so there are no intervals and no test",)


def test_nothing_lost_is_said_and_nothing_is_chosen(models, tmp_path):
    """Where the metric rose, with items and without: two evaluations, no mask."""
    for evaluate in (Planted(models, lambda x: 2.0), Planted(models, lambda x: 2.0, items=40)):
        found = tuned(models, evaluate)
        assert (found.outcome, found.mask, evaluate.calls) == ("intact", None, 2)
        gain = found.sweep.rows[1].metrics["math"] - found.sweep.rows[0].metrics["math"]
        assert str(found).startswith(f"Nothing was lost: math rose by {gain:.4f}")
        assert found.lost is None or -found.lost.interval[1] <= gain <= -found.lost.interval[0]
        assert found.lost is None or f"[{-found.lost.interval[1]:.4f}, {-found.lost.interval[0]:.4f}]" in found.verdict
        with pytest.raises(ValueError, match="there is nothing to write: Nothing was lost"):
            found.save(tmp_path / "healed")


def test_a_loss_that_more_items_would_show_says_how_many(models):
    rng = np.random.default_rng(1)
    noise = {True: rng.normal(0.1, 1, 30), False: rng.normal(0, 1, 30)}
    found = tuned(models, lambda model: {"math": noise[model is not models["later"]]})
    assert found.outcome == "intact"
    assert "underpowered: a loss of this size needs about " in str(found)


@pytest.mark.parametrize("items", [1, 5, 6])
def test_items_too_few_for_any_test_are_said_to_be(models, items):
    """With five items p is at least 0.06, however much was lost: "no significant loss" is no all-clear."""
    found = tuned(models, lambda model: {"math": np.full(items, 1.0 if model is not models["later"] else -1.0)})
    assert (found.outcome == "intact") == (items < 6)
    assert ("underpowered: a loss of this size needs about 6 prompts or items" in str(found)) == (items < 6)


def test_any_selector_with_a_budget_and_the_default_budgets(models):
    """From 0.1 % to all, in few evaluations; the paper's selector with nested masks."""
    evaluate = Planted(models)
    found = tuned(models, evaluate, AMCSelector(0.0, "M", "M", how="global"), recovery=0.3, budgets=BUDGETS)
    assert found.chosen.budget == 0.3
    assert evaluate.calls <= 3 + 6
    assert (BUDGETS[0], BUDGETS[-1], len(BUDGETS)) == (0.0002, 1.0, 23)
    assert list(BUDGETS) == sorted(BUDGETS)


def test_what_cannot_be_asked(models):
    """With what to type instead; before anything is rolled back."""
    for more, evaluate, message in (
        (dict(keep=["science"]), Planted(models), r"'science' is none of the other metrics.*'code', 'qa'"),
        (dict(keep=["math"]), Planted(models), "'math' is none of the other metrics"),
        (dict(keep="qa"), Planted(models), "expected a list of metrics"),
        (dict(budgets=[]), Planted(models), "expected fractions in"),
        (dict(budgets=[0.0, 0.1]), Planted(models), "expected fractions in"),
        (dict(budgets=[1.5]), Planted(models), "expected fractions in"),
        (dict(recovery=0.0), Planted(models), "expected a share in"),
        (dict(recovery=1.5), Planted(models), "expected a share in"),
        (dict(recovery=float("nan")), Planted(models), "expected a share in"),
        (dict(limit={"qa": float("nan")}), Planted(models), "nan of 'qa': expected how much it may lose"),
        (dict(limit=-0.1, keep=["qa"]), Planted(models), "expected how much it may lose"),
        (dict(selector="D"), Planted(models, fail=1), "has no field 'budget' to sweep over"),
        ({}, "perplexity", 'or "lm_eval:task,task"'),
        ({}, None, "prompts of the damaged domain"),
    ):
        with pytest.raises(ValueError, match=message):
            tuned(models, evaluate, **more)


LAB = Path(__file__).parents[1] / "benchmarks" / "lab" / "seed0"


def test_it_repairs_the_lab(tmp_path):
    """Math hurt by QA, from prompts without labels: one half chose, the other measured, and QA did not pay."""
    run = Trajectory(earlier=LAB / "math", later=LAB / "qa")
    math, qa = (
        load_prompts(LAB / "data" / f"{name}.calibration.jsonl", LAB / "qa", limit=64) for name in ("math", "qa")
    )
    done = repair(run, math, keep={"qa": qa}, selector=DamageSelector(0.01), budgets=[0.02, 0.16, 0.64], recovery=0.5)
    assert done.outcome == "repaired"
    assert done.chosen.recovery >= done.goal > 0
    assert done.chosen.delta["qa"] >= -0.01
    healed = Trajectory(earlier=LAB / "math", later=done.save(tmp_path / "healed"))
    by_hand = rolled_back(run.later, to=run.earlier, mask=done.mask)
    assert all(torch.equal(tensor, by_hand[name]) for name, tensor in healed.weights("later")[0].tensors.items())


def test_the_table_explains_its_columns_and_leaves_out_empty_ones(models):
    """Scores below zero have no part that is kept: then there is no such column, and no word about it."""
    below = Planted(models, lambda x: x**0.5, items=40)
    found = tuned(models, lambda model: {"math": [x - 2 for x in below(model)["math"]]}, recovery=0.6)
    head = str(found.sweep).splitlines()[0].split()
    assert "healed" in head
    assert "kept" not in head
    assert "healed: the part of each item's loss in math that came back" in str(found)
    assert "kept" not in str(found)
    assert "budget: the most" not in str(found)
    weights = tuple(replace(row, selector="D of single weights") for row in found.sweep)
    assert "budget: the most that is reverted; single weights" in str(replace(found.sweep, rows=weights))
    raised = Planted(models, lambda x: x**0.5, items=40)
    above = str(tuned(models, lambda model: {name: score + 2 for name, score in raised(model).items()}, recovery=0.6))
    assert "kept: the part of math that later still had and that stayed" in above
    assert "Δ: the change against later; in round brackets the score itself" in above


@dataclass(frozen=True)
class Stopping:
    """A selector that takes a quarter at most, whatever the budget."""

    budget: float

    def select(self, run, data=None):
        return RandomSelector(min(self.budget, 0.25)).select(run)


def test_a_mask_that_is_measured_is_not_measured_again(models):
    """Larger budgets of a selector that stops by itself cost no evaluation."""
    evaluate = Planted(models, lambda x: min(x, 0.2))
    found = tuned(models, evaluate, Stopping(0.1), recovery=1.0, budgets=[0.1, 0.25, 0.5, 0.75, 0.9, 1.0])
    assert found.outcome == "repaired"
    assert found.chosen.budget == 0.25
    different = {row.neurons for row in found.sweep.rows[3:]}
    assert len(found.sweep.rows) - 3 > len(different)
    assert evaluate.calls == 3 + len(different)
