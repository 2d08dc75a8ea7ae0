"""stage_damage: every domain judged once, repairs one after the other, the model whole at the end."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from families import pair
from mutants import dies
from test_repair import GRID
from test_rollback_callback import CHOICE, asked
from test_sweeps import data, same, snapshot, trio

from surgery import RandomSelector, Trajectory, rollback
from surgery.measure import Stage, stage_damage
from surgery.measure import stage as judging
from surgery.measure.rows import fell

DOMAINS = {"math": data(), "code": data()}


class Shares:
    """Scores with items that are given functions of the share of reverted neurons."""

    def __init__(self, models: Any, **scores: Any) -> None:
        self.models, self.scores = [models], scores
        self.fail: list[int] = []
        self.called: list[float] = []

    def __call__(self, model: Any) -> Any:
        pairs = zip(self.models[0]["earlier"].model.layers, model.model.layers, strict=True)
        hits = [(a.mlp.up_proj.weight == b.mlp.up_proj.weight).all(1).float().mean() for a, b in pairs]
        self.called.append(share := float(np.mean(hits)))
        if len(self.called) in self.fail:
            raise RuntimeError("out of power")
        noise = np.random.default_rng(0).normal(0, 0.01, 20)
        return {name: score(share) + noise * (1 + share) for name, score in self.scores.items()}


@pytest.fixture
def models() -> Any:
    return trio()


def judged(models: Any, evaluate: Any, **settings: Any) -> Stage:
    how = {"selector": RandomSelector(0.0), "budgets": GRID, "recovery": 0.3, "limit": 0.5, **settings}
    return stage_damage(Trajectory(**models), DOMAINS, evaluate=evaluate, **how)


def is_honest(models: Any) -> None:
    """Hurt where it fell; two repairs, of which the second starts from the first; the last row is the union's."""
    evaluate = Shares(models, math=lambda x: x, code=lambda x: x**2, qa=lambda x: 1 - x)
    before = snapshot(models["later"])
    found = judged(models, evaluate, keep=["qa"])
    assert same(models["later"], before)
    assert found.hurt == ("math", "code")
    first, second = found.repairs.values()
    assert second.sweep.rows[1].metrics["code"] == pytest.approx(first.chosen.metrics["code"], abs=1e-3)
    assert found.mask.equal(first.mask | second.mask)
    with rollback(models["later"], to=models["earlier"], mask=found.mask):
        scores = {name: float(np.mean(items)) for name, items in evaluate(models["later"]).items()}
    assert found.repaired.metrics == pytest.approx(scores, abs=1e-6)
    assert set(first.limits) == {"code", "qa"}
    assert set(second.limits) == {"math", "qa"}


def test_it_is_honest(models):
    is_honest(models)


@pytest.mark.parametrize(
    "mutant",
    [
        lambda patch: patch.setattr(judging, "fell", lambda *_: False),
        lambda patch: patch.setattr(judging, "fell", lambda earlier, later, name: fell(later, earlier, name)),
        lambda patch: patch.setattr(judging, "reduce", lambda _, masks: masks[0]),
        lambda patch: patch.setattr(judging, "Trajectory", lambda **given: Trajectory(**trio())),
        lambda patch: patch.setattr(judging, "ExitStack", Leaving),
    ],
)
def test_dishonest_ones_are_seen(mutant, models):
    dies(mutant, lambda: is_honest(models))


class Leaving:
    """A stack that undoes nothing."""

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def enter_context(self, _: Any) -> None:
        return None


def test_what_did_not_fall_is_not_hurt_and_costs_two_evaluations(models):
    evaluate = Shares(models, math=lambda x: -x, code=lambda x: 0.0 * x)
    found = judged(models, evaluate)
    assert (found.hurt, found.mask, len(evaluate.called)) == ((), None, 2)
    assert found.verdict.startswith(
        "The stage hurt no domain. Not hurt: math, code.\nmath: not hurt: math rose by 1.00"
    )


def test_one_domain_of_two_is_hurt(models):
    scores = Shares(models, math=lambda x: -x, code=lambda x: x)
    found = judged(models, scores)
    assert found.verdict.startswith("The stage hurt code. Not hurt: math.\nmath: not hurt: math rose by")
    assert "\ncode: hurt, can be repaired: code lost " in found.verdict
    assert found.repaired.delta["math"] >= -0.5
    found = judged(models, scores, limit=0.2)  # what is wanted of code costs math too much
    assert (found.mask, found.repaired) == (None, None)
    assert "\ncode: hurt, can't be repaired within the limits: code lost " in found.verdict


def test_a_domain_that_the_first_repair_wins_back_needs_none(models):
    found = judged(models, Shares(models, math=lambda x: x, code=lambda x: float(x > 0.2)))
    assert found.hurt == ("math", "code")
    assert found.mask.equal(found.repairs["math"].mask)
    assert "\ncode: hurt, and won back by the repairs before: code" in found.verdict


def test_the_model_is_whole_after_an_error(models):
    before = snapshot(models["later"])
    for fail in range(1, 12):
        evaluate = Shares(models, math=lambda x: x, code=lambda x: x**2)
        evaluate.fail.append(fail)
        with pytest.raises(RuntimeError, match="out of power"):
            judged(models, evaluate)
        assert same(models["later"], before)


def test_by_likelihood_the_kept_domain_answers_with_the_later_model(tmp_path):
    """The domain that the stage trains is measured on the later model's answers, and spared."""
    earlier, later = pair("llama", step=0.2)
    ids = asked(earlier, 7)[0]["input_ids"][:, :5]
    bare = {"input_ids": ids, "attention_mask": ids.new_ones(ids.shape)}
    run = Trajectory(earlier=earlier, later=later)
    found = stage_damage(run, {"old": [bare]}, keep={"new": [bare]}, **{**CHOICE, "limit": 0.0})
    assert found.hurt == ("old",)
    assert set(found.repairs["old"].limits) == {"new"}
    assert found.repairs["old"].outcome == "not repairable"  # nothing may be lost of the later model's own answers
    assert found.later.metrics["new"] > found.earlier.metrics["new"]
    assert "nats per response token" in found.verdict
    place = found.save(tmp_path / "surgery", step=3)
    assert sorted(path.name for path in place.iterdir()) == ["stage.json", "verdict.txt"]
    told = json.loads((place / "stage.json").read_text())
    assert told["hurt"] == ["old"]
    assert told["lost"]["old"]["items"] == 8
    assert found.save(place).is_dir()  # written again
    (tmp_path / "own").mkdir()
    (tmp_path / "own/notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="is never replaced"):
        found.save(tmp_path / "own")


def test_what_cannot_be_asked(models):
    fine = Shares(models, math=lambda x: x, code=lambda x: x)
    run = Trajectory(**models)
    for domains, settings, message in (
        ({}, {}, "expected prompts by domain"),
        ({"qa": data()}, {"evaluate": fine}, "evaluate returns no metric called 'qa', only"),
        (DOMAINS, {"evaluate": fine, "keep": ["qa"]}, "evaluate returns no metric called 'qa'"),
        (DOMAINS, {"keep": ["qa"]}, 'pass prompts, keep={"qa": batches}'),
        (DOMAINS, {"keep": {"math": data()}}, "keep: 'math' is one of the domains"),
    ):
        with pytest.raises(ValueError, match=message):
            stage_damage(run, domains, **settings)
