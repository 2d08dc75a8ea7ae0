"""stability: masks of resampled prompts, whatever the selector; chance is what unrelated masks show."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from test_sweeps import Evaluate, data, same, snapshot, trio

from surgery import AMCSelector, Neurons, RandomSelector, Trajectory, activation
from surgery.layout import find_layout
from surgery.measure import jaccard, stability
from surgery.measure.stability import _drawn

N = 96


@pytest.fixture(scope="module")
def models():
    return trio()


def prompts(lengths=(9, 5, 12), rows=6):
    """Batches of different lengths; the first token of every row is its number."""
    found = []
    for at, length in enumerate(lengths):
        ids = torch.randint(3, 64, (rows, length), generator=torch.Generator().manual_seed(at))
        ids[:, 0] = torch.arange(at * rows, (at + 1) * rows)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids + 100})
    return found


@dataclass(frozen=True)
class Seen:
    """Takes the neurons whose numbers are those of the prompts that it sees, and notes the prompts."""

    budget: float
    seen: tuple[list[list[int]], ...] = ()

    def select(self, run, data=None):
        sizes = find_layout(run.load()).sizes
        rows = [int(row[0]) for batch in data for row in batch["input_ids"]]
        self.seen[0].append(rows)
        flat = torch.zeros(N, dtype=torch.bool)
        flat[rows] = True
        return Neurons(dict(zip(sizes, flat.split(list(sizes.values())), strict=True)))


def test_draws_are_of_the_asked_size_without_replacement_and_seeded(models):
    """Any Selector; every batch keeps its length; the same seed draws the same prompts, another seed others."""
    notes = [[], [], []]
    for note, seed in zip(notes, (0, 0, 1), strict=True):
        stability(Trajectory(**models), prompts(), Seen(0.1, (note,)), sizes=(3, 10), draws=4, seed=seed)
    assert notes[0] == notes[1] != notes[2]
    everything, *draws = notes[0]
    assert everything == list(range(18))
    assert [len(draw) for draw in draws] == [3] * 4 + [10] * 4
    assert all(len(set(draw)) == len(draw) for draw in draws)
    assert len(set(map(tuple, draws))) == 8
    assert set().union(*draws) == set(everything)


def test_rows_keep_their_own_tensors_and_lengths():
    """A chosen row is that row, in all its tensors; batches without a chosen row are left out."""
    batches = prompts()
    found = _drawn(batches, torch.tensor([17, 1, 4]))
    assert [batch["input_ids"].shape for batch in found] == [(2, 9), (1, 12)]
    assert torch.equal(found[0]["input_ids"], batches[0]["input_ids"][[1, 4]])
    assert torch.equal(found[1]["labels"], batches[2]["labels"][[5]])
    texts = [{**batch, "text": [f"{at}.{row}" for row in range(6)]} for at, batch in enumerate(batches)]
    assert _drawn(texts, torch.tensor([17, 1, 4]))[0]["text"] == ["0.1", "0.4"]  # as a DataLoader carries them along
    whole = _drawn(batches, torch.randperm(18))
    assert all(torch.equal(a[k], b[k]) for a, b in zip(whole, batches, strict=True) for k in a)


def test_jaccard_by_hand(models):
    """A mask that is its prompts: the Jaccard of the masks is that of the draws."""
    note = []
    found = stability(Trajectory(**models), prompts(), Seen(0.1, (note,)), sizes=(6,), draws=3)
    a, b, c = map(set, note[1:])
    (one,) = found.agreements
    assert one.jaccard == tuple(len(x & y) / len(x | y) for x, y in ((a, b), (a, c), (b, c)))
    assert one.to_all == (6 / 18,) * 3
    assert found.neurons == 18


def test_chance_is_what_unrelated_masks_show(models):
    """k/(2N − k), checked on random masks; a mask that asks no prompts always agrees."""
    run = Trajectory(**models)
    found = stability(run, prompts(), RandomSelector(0.3), sizes=(4,), draws=3)
    assert found.agreements[0].jaccard == (1.0,) * 3
    masks = [RandomSelector(0.3, seed).select(run) for seed in range(40)]
    shown = np.mean([jaccard(a, b) for a, b in pairwise(masks)])
    assert found.chance == pytest.approx(shown, abs=0.03)


def test_more_prompts_agree_more_and_masks_are_those_of_the_selector(models):
    """On A, which is a mean over tokens; the mask of all prompts is the selector's own."""
    run, selector = Trajectory(**models), AMCSelector(0.2, "A", "A", how="global")
    found = stability(run, prompts(rows=20), selector, sizes=(2, 40), draws=4)
    few, many = found.agreements
    assert found.chance < np.mean(few.jaccard) < np.mean(many.jaccard) <= 1
    assert np.mean(many.to_all) > np.mean(few.to_all)
    assert found.mask.equal(selector.select(run, prompts(rows=20)))


def test_recovery_of_each_draw(models):
    """With an evaluation: one recovery per draw and that of all prompts; the model is whole after it."""
    before, evaluate = snapshot(models["later"]), Evaluate(models["earlier"])
    found = stability(
        Trajectory(**models), prompts(), AMCSelector(0.25), sizes=(2, 6), draws=3, evaluate=evaluate, metric="math"
    )
    assert evaluate.calls == 2 + 1 + 2 * 3
    assert same(models["later"], before)
    assert found.recovery == pytest.approx(0.25)
    assert [one.recovery for one in found.agreements] == [pytest.approx((0.25,) * 3)] * 2
    with pytest.raises(RuntimeError):
        stability(
            Trajectory(**models), prompts(), AMCSelector(0.25), sizes=(2,), evaluate=Evaluate(models["earlier"], 5)
        )
    assert same(models["later"], before)


def test_it_prints_a_table_and_is_drawn(models):
    pytest.importorskip("matplotlib")
    from surgery.plots.sweeps import prompt_stability

    found = stability(
        Trajectory(**models), prompts(), AMCSelector(0.25), sizes=(2, 6), draws=3, evaluate=Evaluate(models["earlier"])
    )
    title, head, *lines = str(found).splitlines()
    assert title == "A×M×C: 24 neurons, 18 prompts to draw from"
    assert "recovery of math" in head
    assert len(lines) == 3
    assert f"{np.mean(found.agreements[0].jaccard):.2f} (" in lines[0]
    assert "25.0 % (25.0 … 25.0)" in lines[0]
    ax = prompt_stability(found)
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert drawn["two draws"] == [pytest.approx(np.mean(one.jaccard)) for one in found.agreements]
    assert drawn["a draw and all prompts"] == [pytest.approx(np.mean(one.to_all)) for one in found.agreements]
    assert drawn["unrelated masks"] == [found.chance] * 2
    ax = prompt_stability(found, of="recovery")
    drawn = {line.get_label(): list(line.get_ydata()) for line in ax.get_lines()}
    assert drawn["draws, A×M×C"] == [pytest.approx(100 * np.mean(one.recovery)) for one in found.agreements]
    assert drawn["all 18 prompts"] == [pytest.approx(100 * found.recovery)] * 2
    assert ax.get_ylabel() == "recovery of math (%)"
    with pytest.raises(ValueError, match="measured with evaluate="):
        prompt_stability(replace(found, recovery=None), of="recovery")
    with pytest.raises(ValueError, match="of='chance'"):
        prompt_stability(found, of="chance")


@pytest.mark.parametrize("sizes", [(size for size in (2, 6)), np.array([2, 6])])
def test_sizes_may_be_a_generator_or_an_array(models, sizes):
    """Of a generator the table had no line, and of NumPy's integers it was said that they are out of range."""
    found = stability(Trajectory(**models), prompts(), RandomSelector(0.1), sizes=sizes, draws=2)
    assert found == stability(Trajectory(**models), prompts(), RandomSelector(0.1), sizes=(2, 6), draws=2)
    assert len(str(found).splitlines()) == 4


def test_what_cannot_be_asked(models):
    """As many prompts as there are, or one draw, tell nothing."""
    run = Trajectory(**models)
    for sizes, draws, message in (
        ((18,), 5, "18 of 18 prompts.*from 1 to 17"),
        ((0,), 5, "0 of 18"),
        ((0.5,), 5, "0.5 of 18"),
        ((), 5, "sizes is empty"),
        ((4,), 1, "2 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            stability(run, prompts(), RandomSelector(0.1), sizes=sizes, draws=draws)
    with pytest.raises(ValueError, match="this operation needs"):
        jaccard(activation(models["later"], data()), activation(models["later"], data()))
    assert jaccard(*[Neurons({"a": torch.zeros(3, dtype=torch.bool)})] * 2) == 1.0
