"""Results in the shapes that others read say what was measured: tables, the accuracy matrix, the Hub's files, logs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import yaml
from huggingface_hub import parse_eval_result_entries
from mutants import dies
from test_sweeps import Evaluate, data, trio

from surgery import RandomSelector, Trajectory, repair, sweep
from surgery.measure import accuracy_matrix, before_after, exports, history, write_eval_results
from surgery.measure.history import History
from surgery.measure.rows import Row, judged
from surgery.measure.statistics import paired


def row(name: str, budget: float = 0.0, **items: list[float]) -> Row:
    return Row(name, budget, 0, {one: float(np.mean(held)) for one, held in items.items()}, 0.0, items=items)


@pytest.fixture(scope="module")
def models():
    return trio()


def test_a_log_gets_every_row_of_a_sweep_once_and_judged(models):
    run, rows = Trajectory(**models), []
    found = sweep(
        run, data(), selectors=[RandomSelector(0.0)], budgets=[0.1, 0.25], evaluate=Evaluate(models["earlier"]),
        log=rows.append,
    )  # fmt: skip
    assert rows == [{**one.logged(), "seconds": at["seconds"]} for one, at in zip(found, rows, strict=True)]
    assert [(one["selector"], one["budget"]) for one in rows[2:]] == [
        ("ceiling (all MLP neurons)", 1.0), ("random", 0.1), ("random", 0.25),
    ]  # fmt: skip
    assert rows[-1]["recovery"] == pytest.approx(0.25)
    assert rows[-1]["change/qa"] == pytest.approx(-0.125)
    assert all(isinstance(value, str | int | float) for one in rows for value in one.values())


def test_a_log_gets_every_row_of_a_repair_with_intervals(models):
    rows, spread = [], np.random.default_rng(0).normal(0, 0.1, 40)
    score = Evaluate(models["earlier"])
    found = repair(
        Trajectory(**models), None, selector=RandomSelector(0.0), budgets=[0.1, 0.25, 0.5], recovery=0.3, metric="math",
        evaluate=lambda model: {name: value + spread for name, value in score(model).items()}, log=rows.append,
    )  # fmt: skip
    assert len(rows) == len(found.sweep)
    known = {(one.selector, one.budget): one.logged() for one in found.sweep}
    for one in rows:
        assert known[one["selector"], one["budget"]] == one
    chosen = next(one for one in rows if one["budget"] == found.chosen.budget)
    assert (chosen["recovery_low"], chosen["recovery_high"]) == found.chosen.interval
    assert chosen["p/qa"] == found.chosen.paired["qa"].p
    assert chosen["change_low/qa"] <= chosen["change/qa"] <= chosen["change_high/qa"]


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_before_and_after_have_lm_evals_shape_and_the_paired_difference():
    rng = np.random.default_rng(0)
    math, qa = rng.random(30).round(3), rng.integers(0, 2, 20).astype(float)
    before, after = row("later", math=[*math], qa=[*qa]), row("D", math=[*(math + 0.1)], qa=[*(1 - qa)])
    head, _, *lines = before_after(before, after).splitlines()
    assert cells(head) == [
        "Tasks", "Items", "Before", "", "Stderr", "After", "", "Stderr", "Difference", "95 % interval", "p",
    ]  # fmt: skip
    for line, name in zip(lines, ("math", "qa"), strict=True):
        task, items, old, sign, error, new, _, _, difference, span, p = cells(line)
        (one,) = paired(np.array([after.items[name]]), np.array(before.items[name]))
        assert (task, int(items), sign) == (name, len(before.items[name]), "±")
        assert float(old) == pytest.approx(np.mean(before.items[name]), abs=1e-4)
        assert float(error) == pytest.approx(np.std(before.items[name], ddof=1) / int(items) ** 0.5, abs=1e-4)
        assert float(new) - float(old) == pytest.approx(float(difference), abs=2e-4)
        assert [float(x) for x in span.strip("[]").split(",")] == pytest.approx(one.interval, abs=1e-4)
        assert float(p) == pytest.approx(one.p, rel=0.05)
    bare = [replace(one, items={}) for one in (before, after)]
    assert cells(before_after(*bare).splitlines()[2])[2:5] == [f"{before.metrics['math']:.4f}", "", ""]
    with pytest.raises(ValueError, match="has the metrics"):
        before_after(before, row("D", math=[*math]))


def taught(scores: dict[str, tuple[float, ...]]) -> History:
    return History(("base", "code", "math", "qa"), scores, ())


def the_matrix_is_its_definition() -> None:
    rng = np.random.default_rng(1)
    scores = {name: tuple(rng.random(4)) for name in ("qa", "math", "code", "science")}
    found = accuracy_matrix(taught(scores), row("D", qa=[0.5], math=[0.25], code=[0.75], science=[0.0]))
    assert found.stages == ("code", "math", "qa")
    r = np.array(found.scores)
    for i in range(3):
        for j, name in enumerate(found.stages):
            assert r[i, j] == scores[name][i + 1]
    assert found.acc == pytest.approx(r[2].mean())
    assert found.bwt == pytest.approx(((r[2, 0] - r[0, 0]) + (r[2, 1] - r[1, 1])) / 2)
    assert found.repaired == (0.75, 0.25, 0.5)
    assert found.acc_repaired == pytest.approx(0.5)
    assert found.bwt_repaired == pytest.approx(((0.75 - r[0, 0]) + (0.25 - r[1, 1])) / 2)
    said = str(found)
    assert f"ACC {found.acc:.4f} → 0.5000, BWT {found.bwt:+.4f} → {found.bwt_repaired:+.4f}" in said
    assert "after code" in said
    bare = accuracy_matrix(taught(scores))
    assert (bare.repaired, bare.acc_repaired, bare.bwt_repaired) == (None, None, None)
    assert str(bare).endswith(f"ACC {found.acc:.4f}, BWT {found.bwt:+.4f}")


def test_the_matrix_is_its_definition():
    the_matrix_is_its_definition()


def test_another_definition_is_seen():
    transfer = exports.AccuracyMatrix._transfer
    dies(
        lambda patch: patch.setattr(
            exports.AccuracyMatrix, "_transfer", lambda self, last: transfer(self, last) * 2 / 3
        ),
        the_matrix_is_its_definition,
    )


def test_the_matrix_of_real_checkpoints(models):
    """``history`` evaluates them, and the repaired row comes from the same evaluation."""
    run = Trajectory.through({"math": models["earlier"], "qa": models["later"]})
    score = Evaluate(models["earlier"])

    def evaluate(model):
        return {name: score(model)[name] for name in ("math", "qa")}

    done = repair(
        run, None, selector=RandomSelector(0.0), budgets=[0.5], recovery=0.3, evaluate=evaluate, metric="math"
    )
    found = accuracy_matrix(history(run, evaluate), done.chosen)
    assert found.bwt == pytest.approx(-0.6)
    assert found.bwt_repaired == pytest.approx(-0.3)


def test_what_is_no_matrix():
    for scores, message in (
        ({"math": (0.0,) * 4}, "needs a domain for two stages or more and for the last one"),
        ({"math": (0.0,) * 4, "code": (0.0,) * 4}, "and for the last one"),
    ):
        with pytest.raises(ValueError, match=message):
            accuracy_matrix(taught(scores))
    with pytest.raises(ValueError, match="has no score of 'math'"):
        accuracy_matrix(taught({"math": (0.0,) * 4, "qa": (0.0,) * 4}), row("D", qa=[1.0]))


def test_the_hub_reads_its_files_back(tmp_path):
    """By the Hub's own parser; the keys are those that its documentation lists."""
    found = row("D", **{"gsm8k": [0.0, 1.0], "mmlu_pro/law": [0.25]})
    benchmarks = {
        "gsm8k": {"dataset_id": "openai/gsm8k", "task_id": "gsm8k"},
        "mmlu_pro/law": {
            "dataset_id": "TIGER-Lab/MMLU-Pro", "task_id": "law", "dataset_revision": "abc", "date": "2026-11-28",
            "source_url": "https://example.org/log", "source_name": "log", "source_user": "me",
        },
    }  # fmt: skip
    files = write_eval_results(tmp_path, found, benchmarks, notes="after a rollback")
    assert files == [tmp_path / ".eval_results" / name for name in ("gsm8k.yaml", "mmlu_pro-law.yaml")]
    first, second = (yaml.safe_load(file.read_text()) for file in files)
    assert first == [{"dataset": {"id": "openai/gsm8k", "task_id": "gsm8k"}, "value": 0.5, "notes": "after a rollback"}]
    assert second[0]["source"] == {"url": "https://example.org/log", "name": "log", "user": "me"}
    assert second[0]["dataset"] == {"id": "TIGER-Lab/MMLU-Pro", "task_id": "law", "revision": "abc"}
    assert parse_eval_result_entries(second)[0].value == 0.25
    assert write_eval_results(tmp_path, found, benchmarks) == files  # written again


def test_results_that_the_hub_would_not_take(tmp_path):
    found = row("D", gsm8k=[1.0])
    for folder, benchmarks, message in (
        (tmp_path, {"math": {}}, "has no score of 'math'"),
        (tmp_path, {"gsm8k": {"dataset_id": "openai/gsm8k"}}, "the benchmark of 'gsm8k' is .*task_id"),
        (tmp_path, {"gsm8k": {"dataset_id": "a/b", "task_id": "c", "source_name": "x"}}, "source_url"),
        (tmp_path / "none", {}, "there is no folder"),
    ):
        with pytest.raises((ValueError, LookupError), match=message):
            write_eval_results(folder, found, benchmarks)
    assert not (tmp_path / ".eval_results").exists()


def test_a_row_without_items_is_logged_without_intervals():
    later, earlier = row("later", math=[0.0]), row("earlier", math=[1.0])
    bare = [replace(one, items={}) for one in (earlier, later)]
    told = judged(bare, *bare, "math")
    assert told[0].logged() == {"selector": "earlier", "budget": 0.0, "reverted": 0, "seconds": 0.0, "score/math": 1.0}
