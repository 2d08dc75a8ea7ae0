"""Sweeps over items: what rows say when ``evaluate`` gives one score per item."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from test_sweeps import BUDGETS, SELECTORS, data, trio

from surgery import Trajectory, sweep
from surgery.measure import Row, Sweep
from surgery.measure.rows import CEILING, EARLIER, LATER, judged, scored
from surgery.measure.statistics import paired, recovery_intervals

N = 80


class PerItem:
    """Item i is right once a share of the neurons that only it knows is earlier's; qa goes the other way."""

    def __init__(self, earlier, kind=np.asarray, items=N) -> None:
        self.earlier, self.kind, self.items = earlier, kind, [items]  # no setting: its code tells it from another
        self.called: list[object] = []

    def __call__(self, model):
        self.called.append(model)
        pairs = zip(self.earlier.model.layers, model.model.layers, strict=True)
        part = float(
            torch.cat([(a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1) for a, b in pairs]).float().mean()
        )
        needs = np.random.default_rng(0).uniform(0.02, 1.0, *self.items)
        right = part >= needs
        return {"math": self.kind(right), "qa": self.kind(0.3 + 0.5 * (1 - part) * needs), "code": 0.5}


@pytest.fixture(scope="module")
def models():
    return trio()


def swept(models, evaluate, **more):
    return sweep(
        Trajectory(**models),
        data(),
        selectors=SELECTORS[2:],
        budgets=BUDGETS,
        evaluate=evaluate,
        **more,
    )


def test_a_score_is_the_mean_of_its_items(models):
    """Arrays, lists and tensors of any real dtype say the same as the means; a float stays a float."""
    kinds = (np.asarray, lambda x: x.tolist(), torch.tensor, lambda x: torch.tensor(x).to(torch.bfloat16))
    found = [swept(models, PerItem(models["earlier"], kind)) for kind in kinds]
    means = swept(models, lambda model: {k: np.mean(v) for k, v in PerItem(models["earlier"])(model).items()})
    for row, mean in zip(found[0], means, strict=True):
        assert row.metrics == pytest.approx(mean.metrics, abs=1e-6)
        assert row.recovery == (None if mean.recovery is None else pytest.approx(mean.recovery, abs=1e-6))
        assert set(row.items) == {"math", "qa"}
        assert set(row.paired) == {"math", "qa"}
        assert mean.items == mean.paired == {}
        assert mean.interval is mean.underpowered is None
    assert [replace(r, seconds=0.0) for r in found[0]] == [replace(r, seconds=0.0) for r in found[1]]
    assert [replace(r, seconds=0.0) for r in found[0]] == [replace(r, seconds=0.0) for r in found[2]]
    assert found[3].rows[0].items["math"] == found[0].rows[0].items["math"]


def test_rows_hold_the_statistics_of_their_items(models):
    """The row's intervals and tests are those of the pure functions on its items; the earlier row holds the loss."""
    found = swept(models, PerItem(models["earlier"]))
    earlier, later, ceiling, *rows = found.rows
    e, b = (np.array(row.items["math"]) for row in (earlier, later))
    assert earlier.paired["math"].gain == pytest.approx(e.mean() - b.mean())
    for row in rows:
        now = np.array(row.items["math"])
        assert [row.interval] == recovery_intervals(now[None], e, b)
        assert row.interval[0] <= row.recovery <= row.interval[1]
        assert [row.paired["math"]] == paired(now[None], b)
        assert row.paired["qa"].gain == pytest.approx(row.delta["qa"])
        assert row.paired["qa"].interval[0] <= row.delta["qa"] <= row.paired["qa"].interval[1]
        assert (row.paired["math"].test, row.paired["qa"].test) == ("McNemar", "sign flip")
        assert row.healing == pytest.approx(now[(e == 1) & (b == 0)].mean())
        assert row.preservation is None or 0 <= row.preservation <= 1
        assert 0 < row.retention["qa"] < 1
    assert ceiling.recovery == ceiling.healing == 1.0


def test_items_survive_the_file_and_old_files_load(models, tmp_path):
    """A resumed sweep says bit for bit what the first one said; a file written before there were items still loads."""
    file = tmp_path / "sweep.jsonl"
    first = swept(models, PerItem(models["earlier"]), path=file)
    evaluate = PerItem(models["earlier"])
    again = swept(models, evaluate, path=file)
    assert again == first
    assert again.rows[3].interval is not None
    assert max(map(len, file.read_text().splitlines()[1:])) < 20 * N  # a few characters an item
    head, *lines = file.read_text().splitlines()
    old = [{k: v for k, v in json.loads(line).items() if k != "items"} for line in lines]
    file.write_text("\n".join([head, *(json.dumps({**line, "recovery": None, "delta": {}}) for line in old)]) + "\n")
    without = swept(models, evaluate, path=file)
    assert not evaluate.called
    assert [row.recovery for row in without] == [row.recovery for row in first]
    assert {row.interval for row in without} == {None}


def test_rows_of_other_items_are_refused_before_they_are_in_the_file(models, tmp_path):
    """A resumed sweep of a longer evaluation: numpy spoke of shapes, and the file held rows of both from then on."""
    file = tmp_path / "sweep.jsonl"
    first = swept(models, PerItem(models["earlier"]), path=file)
    head, *lines = file.read_text().splitlines()
    file.write_text("\n".join([head, *lines[:-1]]) + "\n")
    message = f"'math' has {N + 1} items in '{first.rows[-1].selector}' and {N} in 'later'.*another file"
    with pytest.raises(ValueError, match=message):
        swept(models, PerItem(models["earlier"], items=N + 1), path=file)
    assert swept(models, PerItem(models["earlier"]), path=file).rows[-1].items == first.rows[-1].items


def test_the_table_says_intervals_tests_and_doubt(models):
    """Intervals beside the numbers, a star where p < 0.05, the word underpowered where it is, in 160 columns."""
    text = str(swept(models, PerItem(models["earlier"])))
    assert max(map(len, text.splitlines()[:8])) <= 160
    assert "100.0 % [100, 100]*" in text
    assert "exact McNemar and sign-flip permutation" in text
    assert f"over {N} items" in text
    few = str(swept(models, PerItem(models["earlier"], items=5)))
    assert "? underpowered: the loss itself" in few
    assert "is not significant with 5 items" in few


def test_a_wide_interval_is_called_underpowered():
    """Significant loss, noisy gain: the recovery's interval is wider than the loss, and the row says so."""
    rng = np.random.default_rng(0)
    later, earlier = np.zeros(50), rng.normal(0.3, 0.5, 50)
    scores = {EARLIER: earlier, LATER: later, "noisy": rng.normal(0.1, 2.0, 50), "clean": 0.5 * earlier}
    rows = [Row(name, 0.1, 1, *_first_two(items)) for name, items in scores.items()]
    *_, noisy, clean = judged(rows, rows[0], rows[1], "m")
    assert "points wide" in noisy.underpowered
    assert clean.underpowered is None
    assert clean.interval == pytest.approx((0.5, 0.5), abs=1e-6)
    table = str(Sweep("m", tuple(judged(rows, rows[0], rows[1], "m"))))
    low, high = noisy.interval
    assert f"[{round(100 * low)}, {round(100 * high)}]?" in table
    assert [line.rstrip().split("  ")[0] for line in table.splitlines() if "]?" in line] == ["noisy"]


def _first_two(items):
    metrics, held = scored({"m": items})
    return metrics, 0.0, None, {}, held


def test_a_metric_that_rose_has_nothing_to_recover():
    """No recovery, no interval, no healing; Δ and retention of the others stay."""
    rows = [Row(n, 0, 1, *_first_two(np.full(20, x))) for n, x in ((EARLIER, 0.2), (LATER, 0.5), (CEILING, 0.3))]
    row = judged(rows, rows[0], rows[1], "m")[2]
    assert (row.recovery, row.interval, row.underpowered, row.healing) == (None,) * 4


def test_bad_items_are_refused_by_name():
    """More than one dimension, none, NaN; another number of items than the later model had."""
    for value, message in (
        (np.zeros((2, 2)), r"'m' has the shape \(2, 2\)"),
        ([], r"'m' has the shape \(0,\)"),
        ([0.0, float("nan")], "'m' is NaN or infinite on 1 items"),
    ):
        with pytest.raises(ValueError, match=message):
            scored({"m": value})
    rows = [Row(n, 0, 1, *_first_two(np.zeros(size))) for n, size in ((EARLIER, 3), (LATER, 4))]
    with pytest.raises(ValueError, match="3 items in 'earlier' and 4 in 'later'"):
        judged(rows, rows[0], rows[1], "m")
