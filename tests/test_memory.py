"""A selector that is asked for several budgets measures once; whatever may have changed is measured again."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from families import pair
from test_scores import batches
from torch import nn

from surgery import AMCSelector, DamageSelector, Trajectory, damage, rollback, sweep
from surgery.checkpoints.checkpoint import moment_of
from surgery.live import earlier_model
from surgery.live.losses import cross_entropy
from surgery.live.prompts import passes as grouped
from surgery.scores import memory

DATA = batches(labels=True)


@pytest.fixture
def run(tmp_path: Path) -> Trajectory:
    """Two folders."""
    earlier, later = pair("llama")
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    return Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")


class Passes:
    """How many passes went through a model's first layer since it was asked last."""

    def __init__(self, model: nn.Module) -> None:
        self.count = 0
        model.get_submodule("model.layers.0").register_forward_hook(self.one)

    def one(self, *_: object) -> None:
        self.count += 1

    def since(self) -> int:
        found, self.count = self.count, 0
        return found


@pytest.mark.parametrize(
    "selector",
    [
        lambda budget: DamageSelector(budget),
        lambda budget: DamageSelector(budget, protect={"qa": batches(labels=True)[:1]}),
        lambda budget: DamageSelector(budget, units="weight"),
        lambda budget: AMCSelector(budget, "A", "A"),
    ],
)
def test_a_second_budget_costs_no_pass_over_the_model(run, selector):
    passes = Passes(run.load())
    first = selector(0.1).select(run, DATA)
    assert passes.since() > 0
    second = selector(0.05).select(run, (batch for batch in batches(labels=True)))  # the same tokens, other objects
    if getattr(selector(0.1), "units", "") != "weight":  # whose loss is measured at other numbers of weights
        assert passes.since() == 0
        assert second.equal(selector(0.05).select(Trajectory(earlier=run.earlier, later=run.later), DATA))
    assert selector(0.1).select(run, DATA).equal(first)


def test_two_distances_ask_the_earlier_model_once(run):
    passes = Passes(run.load())
    both = [DamageSelector(0.1, loss=loss, units="mlp") for loss in ("hellinger", "kl")]
    one, other = (selector.select(run, DATA) for selector in both)
    assert passes.since() == 3 * len(grouped(DATA)[0])
    assert not one.equal(other)
    assert other.equal(both[1].select(Trajectory(earlier=run.earlier, later=run.later), DATA))


def changes(run: Trajectory) -> Iterator[tuple[str, Trajectory, list[dict[str, torch.Tensor]]]]:
    """What has to be measured again, one change after the other."""
    yield "other prompts", run, DATA[:1]
    labels = {**DATA[0], "labels": DATA[0]["labels"].clone()}
    labels["labels"][0, -1] = -100
    yield "one label less", run, [labels, *DATA[1:]]
    model = run.load()
    with torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    yield "a number written", run, DATA
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    cross_entropy(model, DATA[0]).backward()
    optimizer.step()
    model.zero_grad()
    yield "a step of training", run, DATA
    for parameter in model.parameters():
        parameter.data = parameter.data * 1.5
    yield "what torch does not count", run, DATA
    run.load(dtype=torch.float64)
    yield "a conversion", run, DATA
    pair("llama", step=0.1)[1].save_pretrained(run.earlier)
    yield "another earlier model", run, DATA


def test_what_changed_is_measured_again(run):
    passes, selector = Passes(run.load()), DamageSelector(0.1, units="mlp")
    selector.select(run, DATA)
    passes.since()
    for what, one, data in changes(run):
        passes.since()
        found = damage(one, data)  # itself always measured
        assert passes.since() > 0, what
        mask = selector.select(one, data)
        assert passes.since() > 0, what
        assert mask.made_by["damage"]["sum"] == found.made_by["damage"]["sum"], what
        selector.select(one, data)
        assert passes.since() == 0, what


def test_an_undone_edit_is_no_change_and_one_in_force_is():
    earlier, later = pair("llama")
    run, selector = Trajectory(earlier=earlier, later=later), DamageSelector(0.1)
    passes, mask = Passes(later), selector.select(run, DATA)
    passes.since()
    with rollback(later, to=earlier, mask=mask):
        within = selector.select(run, DATA)
        assert passes.since() > 0
        with rollback(later, to=earlier, mask=within):
            pass
        assert selector.select(run, DATA).equal(within)
        assert passes.since() == 0
    assert selector.select(run, DATA).equal(mask)
    assert passes.since() == 0


def test_a_write_between_an_edit_and_its_undo_is_noticed():
    earlier, later = pair("llama")
    run, selector = Trajectory(earlier=earlier, later=later), DamageSelector(0.1)
    passes, mask = Passes(later), selector.select(run, DATA)
    with rollback(later, to=earlier, mask=mask), torch.no_grad():
        later.lm_head.weight[3, 5] += 1
    passes.since()
    selector.select(run, DATA)
    assert passes.since() > 0


def test_undone_in_another_order_is_another_moment():
    earlier, later = pair("llama")
    mask = DamageSelector(0.5).select(Trajectory(earlier=earlier, later=later), DATA)
    start = moment_of(later)
    first, second = (rollback(later, to=earlier, mask=mask, strength=s) for s in (1.0, 2.0))
    first.undo()
    second.undo()  # which puts back what the first had written
    assert moment_of(later) is not start


def test_the_earlier_model_in_its_place_is_another_moment(run):
    model = run.load()
    start = moment_of(model)
    with earlier_model(run):
        assert moment_of(model) is not start
    assert moment_of(model) is start
    with earlier_model(run), torch.no_grad():
        model.lm_head.weight[3, 5] += 1
    assert moment_of(model) is not start


def test_a_loss_of_ones_own_is_measured_each_time_outside_a_sweep(run):
    calls: list[int] = []

    def own(model: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        calls.append(1)
        return cross_entropy(model, batch)

    for budget in (0.1, 0.2):
        DamageSelector(budget, loss=own).select(run, DATA)
    assert len(calls) == 2 * len(DATA)
    calls.clear()
    sweep(run, DATA, selectors=[DamageSelector(0.1, loss=own)], budgets=[0.1, 0.2], evaluate=lambda _: {"math": 1.0})
    assert len(calls) == len(DATA)


def test_what_is_handed_out_is_a_copy(run):
    with memory.remembered():
        first = damage(run, DATA)
        kept = {name: values.clone() for name, values in first.items()}
        for values in first.values():
            values.zero_()
        first.made_by["damage"]["sum"] = None
        again = damage(run, DATA)
    assert all(torch.equal(again[name], kept[name]) for name in kept)
    assert again.made_by["damage"]["sum"] is not None


def test_it_goes_with_the_run_and_keeps_little(tmp_path, monkeypatch, run):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    own = Trajectory(earlier=run.earlier, later=run.later)
    for at in range(12):
        data = [{name: value.clone() for name, value in batch.items()} for batch in DATA]
        data[0]["input_ids"][0, 1] = at
        DamageSelector(0.1).select(own, data)
    assert {name.rpartition(".")[2]: len(kept) for name, kept in own.memory.items()} == {"damage": 8, "_distilled": 1}
    gc.collect()
    assert len(list((tmp_path / "temporary").iterdir())) == 1  # of the last prompts
    gone = weakref.ref(own.load())
    del own
    gc.collect()
    assert gone() is None
    assert list((tmp_path / "temporary").iterdir()) == []
