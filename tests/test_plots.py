"""Figures draw the numbers that they are given."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.measure.rows import CEILING, EARLIER, LATER, Row, Sweep, ceiling_of

pytest.importorskip("matplotlib")
from surgery.plots.sweeps import dose_response, layer_budgets, pareto_front


def test_dose_response_draws_recovery_in_percent(tmp_path: Path) -> None:
    rows = [Row("M", budget, 4, {"math": 1.0}, 0.1, recovery) for budget, recovery in ((0.02, 0.3), (0.01, 0.1))]
    references = [Row(EARLIER, 0, 0, {"math": 1.0}, 0.1), Row(LATER, 0, 0, {"math": 0.5}, 0.1)]
    both = ceiling_of(("mlp", "kv_group"))
    ceilings = (Row(CEILING, 1.0, 9, {"math": 0.9}, 0.1, 0.8), Row(both, 1.0, 11, {"math": 0.95}, 0.1, 0.9))
    ax = dose_response(Sweep("math", (*references, *ceilings, *rows)))
    lines = {line.get_label(): line for line in ax.get_lines()}
    assert list(lines["M"].get_xdata()) == [1.0, 2.0]
    assert list(lines["M"].get_ydata()) == [10.0, 30.0]
    assert list(lines[CEILING].get_ydata()) == [80.0, 80.0]
    assert list(lines[both].get_ydata()) == [90.0, 90.0]
    assert lines[CEILING].get_linestyle() != lines[both].get_linestyle()
    ax.figure.savefig(tmp_path / "figure.png")
    assert (tmp_path / "figure.png").stat().st_size > 0


def test_a_budget_of_0_has_no_place_on_the_axis_and_no_recovery_none_at_all() -> None:
    """From 0 % recovered of nothing a level line was drawn; where the metric rose saving ended inside matplotlib."""
    references = (Row(EARLIER, 0, 0, {"math": 1.0}, 0.1), Row(LATER, 0, 0, {"math": 0.5}, 0.1))
    rows = [Row("M", budget, 4, {"math": 1.0}, 0.1, recovery) for budget, recovery in ((0.0, 0.0), (0.02, 0.3))]
    lines = {line.get_label(): line for line in dose_response(Sweep("math", (*references, *rows))).get_lines()}
    assert list(lines["M"].get_xdata()) == [2.0]
    risen = [Row("M", 0.02, 4, {"math": 1.0}, 0.1)]
    with pytest.raises(ValueError, match="no row has a recovery of math, which did not fall: nothing to draw"):
        dose_response(Sweep("math", (*references, *risen)))


def test_layer_budgets_draws_counts() -> None:
    ax = layer_budgets({"A": {"layers.0": 1, "layers.1": 5}, "M": {"layers.0": 3, "layers.1": 3}})
    assert [list(line.get_ydata()) for line in ax.get_lines()] == [[1, 5], [3, 3]]


def ranked(name: str, recovery: float | None, **delta: float) -> Row:
    return Row(name, 0.02, 5, {"math": 0.5, **delta}, 0.0, recovery=recovery, delta=delta)


def test_the_front_joins_the_rows_that_no_other_beats():
    rows = (
        ranked("earlier", None),
        ranked("D", 0.3, qa=0.1, code=0.2),  # loses nothing
        ranked("D", 0.8, qa=-0.02, code=0.1),
        ranked("random", 0.2, qa=0.0, code=0.0),  # beaten by the first
        ranked("ceiling", 0.7, qa=-0.5, code=-0.1),  # beaten by the second
        ranked("WiSE-FT", 0.9, qa=-0.1, code=-0.4),
    )
    ax = pareto_front(Sweep("math", rows))
    (front,) = (line for line in ax.lines if line.get_label() == "front")
    assert [tuple(point) for point in front.get_xydata().round(6).tolist()] == [
        (0.0, 30.0), (0.02, 80.0), (0.4, 90.0), (0.5, 90.0),
    ]  # fmt: skip
    assert {line.get_label() for line in ax.lines} == {"D", "random", "ceiling", "WiSE-FT", "front"}
    with pytest.raises(ValueError, match="nothing to draw"):
        pareto_front(Sweep("math", rows[:1]))
