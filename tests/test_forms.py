"""Whatever form a checkpoint is stored in, every verb says of it what it says of the plain folder of its weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import adapted
import pytest
import torch
from adapted import KINDS
from test_scores import batches
from torch import nn
from training_folders import as_distributed, as_ranks

from surgery import (
    AMCSelector,
    DamageSelector,
    RandomSelector,
    Selector,
    Trajectory,
    activation,
    conflict,
    damage,
    magnitude,
    refresh,
    strengths,
    sweep,
)
from surgery.evidence import changes, directions, gradients_along, overlap
from surgery.live import distillation, earlier_model
from surgery.measure import history, likelihood, stage_damage
from surgery.report import analyse
from surgery.tables import as_json
from surgery.theory import Landscape, damage_terms

FAMILIES = {name: KINDS[name] for name in ("dense", "fused gate and up", "experts on disk one by one", "biased")}
QUICK = ("dense", "experts on disk one by one")
STAGES = ("base", "math", "qa")
FORMS = ("adapters", "rank files", "distributed")


@dataclass(frozen=True)
class Shelf:
    """The same three stages in every form: name of the form → stage → folder."""

    plain: dict[str, Path]
    forms: dict[str, dict[str, Path]]


@pytest.fixture(
    scope="module",
    params=[*QUICK, *(pytest.param(one, marks=pytest.mark.slow) for one in FAMILIES if one not in QUICK)],
)
def shelf(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Shelf:
    kind, place = FAMILIES[request.param], tmp_path_factory.mktemp("forms")
    base = adapted.base(kind, place / "base")
    tuned = {name: adapted.adapter(kind, base, place / name, seed=at) for at, name in enumerate(STAGES[1:])}
    plain = {"base": base} | {name: adapted.merged(base, one, place / f"{name}-plain") for name, one in tuned.items()}
    for one in tuned.values():  # their base is the first stage
        adapted.settings(one, base_model_name_or_path=None)
    ranks = {name: place / f"{name}-ranks" for name in STAGES}
    cut = {name: place / f"{name}-dcp" for name in STAGES}
    for name, folder in plain.items():
        as_ranks(folder, ranks[name])
        as_distributed(folder, cut[name])
    return Shelf(plain, {"adapters": {"base": base, **tuned}, "rank files": ranks, "distributed": cut})


def run_of(stages: dict[str, Path]) -> Trajectory:
    return Trajectory.through(stages)


DATA = batches(labels=True)


def scored(model: nn.Module) -> dict[str, Any]:
    """Likelihoods of the responses, an item each."""
    return dict(likelihood({"math": DATA, "qa": DATA[:1]})(model))


def first_mask(run: Trajectory) -> Any:
    return RandomSelector(0.3, units="mlp").select(run)


def refreshed(run: Trajectory) -> Any:
    model = run.load()
    with earlier_model(run) as earlier:
        loss = distillation(earlier, DATA)
    with refresh(model, loss, DATA, 2, 1e-3, first_mask(run)) as done:
        return done.losses if hasattr(done, "losses") else as_json(done)


VERBS: dict[str, Callable[[Trajectory], Any]] = {
    "M": magnitude,
    "C": conflict,
    "A": lambda run: activation(run.load(), DATA),
    "D": lambda run: damage(run, DATA),
    "changes": changes,
    "directions": lambda run: directions(run, top=0.2),
    "overlap": lambda run: overlap({name: magnitude(step) for name, step in run.steps().items()}, top=0.2),
    "gradients along": lambda run: gradients_along(run, {"math": DATA, "qa": DATA[:1]}),
    "history": lambda run: history(run, scored),
    "terms": lambda run: damage_terms(Landscape.around(run, DATA)),
    "sweep": lambda run: sweep(run, DATA, selectors=[DamageSelector(0.1)], budgets=[0.2], evaluate=scored),
    "stage": lambda run: stage_damage(run, {"math": DATA}, evaluate=scored, budgets=[0.2, 0.5]),
    "strengths": lambda run: strengths(run, DATA, first_mask(run), passes=4),
    "refresh": refreshed,
    "analyse": lambda run: analyse(run, {"math": DATA, "qa": DATA[:1]}, refresh_steps=2, budgets=[0.2]),
}  # fmt: skip


def numbers(value: Any) -> Any:
    """What is said, without seconds, and without what names files and their hashes."""
    if isinstance(value, torch.Tensor):
        return value.double().tolist()
    value = as_json(value)
    if isinstance(value, dict):
        skipped = {"seconds", "made", "made_by", "run"}
        return {name: numbers(one) for name, one in value.items() if name not in skipped}
    return [numbers(one) for one in value] if isinstance(value, list) else value


def near(one: Any, other: Any, where: str = "") -> list[str]:
    """Where two of these differ by more than the rounding of one float32."""
    if isinstance(one, dict) and isinstance(other, dict) and one.keys() == other.keys():
        return [said for name in one for said in near(one[name], other[name], f"{where}/{name}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [said for at, pair in enumerate(zip(one, other, strict=True)) for said in near(*pair, f"{where}/{at}")]
    if isinstance(one, float) and isinstance(other, float):
        return [] if one == pytest.approx(other, rel=1e-4, abs=1e-6) else [f"{where}: {one} and {other}"]
    return [] if one == other else [f"{where}: {one} and {other}"]


CHOOSERS = [
    *[AMCSelector(0.2, letters, letters) for letters in ("A", "M", "C", "AMC")],
    AMCSelector(0.2, "A", "AMC", units=("mlp", "value_channel")),
    AMCSelector(0.01, "M", "M", "global", "weight"),
    DamageSelector(0.2),
    DamageSelector(0.2, units="kv_group", loss="kl"),
    DamageSelector(0.002, units=("mlp", "weight"), rounds=1),
    RandomSelector(0.2),
]


@pytest.mark.parametrize("chooser", CHOOSERS, ids=lambda one: one.name)
def test_every_selector_chooses_the_same_in_every_form(shelf: Shelf, chooser: Selector) -> None:
    expected = chooser.select(run_of(shelf.plain), DATA)
    assert sum(expected.count().values()) > 0
    for form in FORMS:
        assert chooser.select(run_of(shelf.forms[form]), DATA).equal(expected), form


def test_a_step_between_adapters_has_its_base(shelf: Shelf) -> None:
    """Though none of its own checkpoints is whole."""
    stages, plain = shelf.forms["adapters"], shelf.plain
    four, expected = ([one["base"], one["math"], one["qa"], one["math"]] for one in (stages, plain))
    found, told = (
        changes(Trajectory.through(dict(zip("abcd", one, strict=True))).steps()["d"]) for one in (four, expected)
    )
    assert near(numbers(found), numbers(told)) == []


@pytest.mark.filterwarnings("ignore:nothing in|:FutureWarning")
@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_says_the_same_of_every_form(shelf: Shelf, verb: str) -> None:
    expected = numbers(VERBS[verb](run_of(shelf.plain)))
    for form in FORMS:
        assert near(numbers(VERBS[verb](run_of(shelf.forms[form]))), expected) == [], form
