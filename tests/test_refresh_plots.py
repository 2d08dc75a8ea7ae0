"""Figures and tables of refreshes: what they show is what they were given."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest
from families import build
from test_refreshing import refresh

GRPO = "GRPO: all parameters"
pytestmark = pytest.mark.skipif(importlib.util.find_spec("matplotlib") is None, reason="needs surgery[plots]")


def lines(ax: Any) -> dict[str, list[tuple[float, float]]]:
    return {line.get_label(): list(zip(*line.get_data(), strict=True)) for line in ax.get_lines()}


def test_dynamics_of_several_runs_show_mean_range_and_start() -> None:
    from surgery.plots.refresh import refresh_dynamics

    ax = refresh_dynamics({"math": {0: [0.8, 0.9], 5: [0.9, 1.0]}, "qa": {5: 0.4, 0: 0.5}})
    found = lines(ax)
    assert found["math"] == [(0, pytest.approx(85)), (5, pytest.approx(95))]
    assert found["qa"] == [(0, 50), (5, 40)]
    (band,) = ax.collections
    corners = {(float(x), round(float(y), 6)) for x, y in band.get_paths()[0].vertices}
    assert corners >= {(0, 80), (0, 90), (5, 90), (5, 100)}
    starts = [line for line in ax.get_lines() if line.get_markersize() == 8]
    assert [line.get_data() for line in starts] == [([0], [pytest.approx(85)]), ([0], [50])]
    assert "%" in ax.get_ylabel()


def test_dynamics_of_a_refresh() -> None:
    from surgery.plots.refresh import refresh_dynamics

    model, told = build("llama"), iter([0.1, 0.4, 0.2])
    with refresh(model, validate=lambda _: {"math": next(told), "qa": 0.5}) as done:
        found = lines(refresh_dynamics(done))
    assert found["math"] == [(0, 10), (1, 40), (2, 20)]
    assert found["qa"] == [(0, 50), (1, 50), (2, 50)]
    with refresh(model) as done:
        for nothing in (done, {}, {"math": {}}):
            with pytest.raises(ValueError, match="validate="):
                refresh_dynamics(nothing)


def test_recovery_at_cost() -> None:
    from surgery.plots.refresh import recovery_at_cost

    ax = recovery_at_cost({"refresh": [(100, 0.2), (200, 0.5)], "rollback": [(640, 0.47)]})
    found = lines(ax)
    assert found["refresh"] == [(100, 20), (200, 50)]
    assert found["rollback"] == [(640, 47)]
    assert ax.get_xscale() == "log"


def curve(question: str, method: str, seed: str, points: list[tuple[int, int, float, float]]) -> dict[str, Any]:
    made = [
        {"step": step, "cost": cost, "scores": {"math": math, "code": 0.9, "qa": qa, "cw": 0.7}}
        for step, cost, math, qa in points
    ]
    return {"question": question, "method": method, "seed": seed, "points": made}


def test_costs_take_the_last_step_within_the_column() -> None:
    """Recovery against the earlier and later models of the same seed; the worst change elsewhere."""
    from benchmarks.questions.refresh_report import Costs, over_steps

    found = {"curves": []}
    for seed, later in (("seed0", 0.8), ("seed1", 0.7)):
        found["curves"] += [
            curve("equal cost", "earlier", seed, [(0, 0, 0.9, 0.5)]),
            curve("equal cost", GRPO, seed, [(0, 0, later, 0.9), (1, 1024, later, 0.9), (2, 2048, 1.0, 0.8)]),
            curve("equal cost", "rollback", seed, [(0, 0, later, 0.9), (1, 640, (later + 0.9) / 2, 0.91)]),
        ]  # fmt: skip
    costs = Costs(found)
    assert costs.within(GRPO, 1000) == []
    assert [(seed, point["step"]) for seed, point in costs.within(GRPO, 2000)] == [
        ("seed0", 1),
        ("seed1", 1),
    ]
    recovered = [costs.recovery(*one) for one in costs.within(GRPO, 5000)]
    assert recovered == pytest.approx([2.0, 1.5])
    assert [costs.worst(*one) for one in costs.within(GRPO, 5000)] == pytest.approx([-0.1, -0.1])
    assert costs.means("rollback") == [(640, pytest.approx(0.5))]
    assert costs.methods == [GRPO, "rollback"]
    row = next(line for line in costs.table().splitlines() if line.startswith("| rollback"))
    assert "50.0 ± 0.0 [+0.0]" in row
    best = costs.best().splitlines()
    assert best[2] == "| 640 | rollback: 50.0 ± 0.0 | rollback: 50.0 ± 0.0 |"
    assert best[5].startswith("| 4,000 | GRPO: all parameters: 175.0 ± 25.0 | rollback")
    assert "| 1 | 75.0 ± 5.0 |" in over_steps(found, "equal cost", GRPO, (1, 7))
