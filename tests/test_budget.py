"""Budgets: the split over layers adds up, fits, is fair; the choice inside a layer is the highest."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from surgery import Neurons, allocate, top

HOWS = ("proportional", "global", "uniform")
# few distinct values, so that ties are the rule; and floats of any size
VALUES = st.one_of(st.integers(0, 3).map(float), st.floats(0, 1e6, width=32))
LAYERS = st.lists(st.lists(VALUES, min_size=1, max_size=12), min_size=1, max_size=6)
BUDGETS = st.floats(0, 1) | st.sampled_from([0.0, 0.01, 0.5, 1.0])


def neurons(layers: list[list[float]]) -> Neurons:
    return Neurons({f"layers.{i}": torch.tensor(values, dtype=torch.float32) for i, values in enumerate(layers)})


def allocated(scores: Neurons, budget: float, how: str) -> dict[str, int] | None:
    """The counts; None where nothing says which layer should get them, which has to be an error."""
    k = round(budget * scores.total)
    if how != "uniform" and 0 < k < scores.total and all(not v.any() for v in scores.values()):
        with pytest.raises(ValueError, match="every score is zero"):
            allocate(scores, budget, how=how)
        return None
    return allocate(scores, budget, how=how)


@settings(deadline=None, max_examples=150)
@given(LAYERS, BUDGETS, st.sampled_from(HOWS))
def test_counts_add_up_and_fit(layers, budget, how):
    """Exactly round(β·N) neurons, none of them negative, none above what the layer has, in the layers' order."""
    scores = neurons(layers)
    counts = allocated(scores, budget, how)
    if counts is not None:
        assert list(counts) == list(scores)
        assert sum(counts.values()) == round(budget * scores.total)
        assert all(0 <= counts[name] <= size for name, size in scores.sizes.items())


@settings(deadline=None, max_examples=150)
@given(LAYERS, BUDGETS, st.sampled_from(HOWS))
def test_no_neuron_left_out_scores_higher_than_one_taken_in_its_layer(layers, budget, how):
    """And among equals the lower index is taken."""
    scores = neurons(layers)
    counts = allocated(scores, budget, how)
    if counts is None:
        return
    mask = top(scores, counts)
    assert mask.count() == counts
    for name, value in scores.items():
        order = sorted(range(len(value)), key=lambda i, value=value: (-float(value[i]), i))
        assert mask.indices(name).tolist() == sorted(order[: counts[name]])


@settings(deadline=None, max_examples=150)
@given(LAYERS, BUDGETS)
def test_global_takes_the_best_of_the_whole_model(layers, budget):
    """The k best by a plain sort in Python: the lower layer first among equals, then the lower index."""
    scores = neurons(layers)
    assume(any(value.any() for value in scores.values()))
    ranked = sorted(
        ((-float(value), layer, i) for layer, values in enumerate(scores.values()) for i, value in enumerate(values))
    )
    chosen = ranked[: round(budget * scores.total)]
    counts = allocate(scores, budget, how="global")
    assert list(counts.values()) == [sum(layer == at for _, at, _ in chosen) for layer in range(len(scores))]
    mask = top(scores, counts)
    assert {(layer, i) for _, layer, i in chosen} == {
        (layer, i) for layer, name in enumerate(scores) for i in mask.indices(name).tolist()
    }


@settings(deadline=None, max_examples=150)
@given(LAYERS, st.floats(0, 1), st.floats(0, 1))
def test_a_bigger_global_budget_contains_the_smaller(layers, one, other):
    """Nested masks, also among ties."""
    scores = neurons(layers)
    assume(any(value.any() for value in scores.values()))
    small, big = (top(scores, allocate(scores, b, how="global")) for b in sorted((one, other)))
    assert (small & big).equal(small)


@settings(deadline=None, max_examples=150)
@given(st.lists(st.integers(1, 9), min_size=2, max_size=6), st.integers(0, 200))
def test_proportional_is_the_largest_remainder(sums, k):
    """Where no layer is full, every layer gets its share rounded down, and the largest remainders one more each."""
    size = 200  # each layer can hold all of k, so that no cap meddles
    scores = neurons([[float(s)] + [0.0] * (size - 1) for s in sums])
    counts = list(allocate(scores, k / scores.total).values())
    assert sum(counts) == k
    exact = [k * s / sum(sums) for s in sums]  # of small integers: the comparisons below allow for one rounding
    for share, n in zip(exact, counts, strict=True):
        assert math.floor(share + 1e-9) <= n <= math.ceil(share - 1e-9)
    up = [share - math.floor(share + 1e-9) for share, n in zip(exact, counts, strict=True) if n > share + 1e-9]
    down = [share - n for share, n in zip(exact, counts, strict=True) if n < share - 1e-9]
    assert not up or not down or min(up) >= max(down) - 1e-9


def test_equal_remainders_go_to_the_lower_layer():
    """Two neurons over three equal layers: the first two."""
    assert list(allocate(neurons([[1.0] * 10] * 3), 2 / 30).values()) == [1, 1, 0]
    assert list(allocate(neurons([[1.0] * 10] * 3), 2 / 30, how="uniform").values()) == [1, 1, 0]
    assert list(allocate(neurons([[1.0] * 10] * 3), 2 / 30, how="global").values()) == [2, 0, 0]


def test_a_full_layer_gives_what_is_over_to_the_others_in_proportion():
    """A layer with nearly all of the score holds two neurons; the others share the rest 3 : 1."""
    scores = neurons([[500.0, 500.0], [3.0] + [0.0] * 19, [1.0] + [0.0] * 19])
    assert list(allocate(scores, 10 / 42).values()) == [2, 6, 2]


def test_layers_without_a_score_come_last_but_come():
    """Once every scored layer is full, the others take the rest, so that the counts add up."""
    assert list(allocate(neurons([[1.0, 1.0], [0.0] * 4, [0.0] * 2]), 5 / 8).values()) == [2, 2, 1]


def test_uniform_gives_each_layer_its_fraction():
    """β of each layer, whatever its scores."""
    scores = neurons([[0.0] * 10, [7.0] * 20, [1.0] * 30])
    assert list(allocate(scores, 0.1, how="uniform").values()) == [1, 2, 3]


def test_halves_round_to_even_like_python_does():
    """k = round(β·N), not its integer part: 2.6 of 10 are three."""
    assert sum(allocate(neurons([[1.0] * 10]), 0.26).values()) == 3


@pytest.mark.parametrize("how", HOWS)
def test_neurons_without_a_score_are_never_chosen(how):
    """Not even where they would fill the budget: then it is an error that says so."""
    values = {"a": torch.tensor([9.0, 1.0, 1.0, 1.0]), "b": torch.tensor([2.0, 2.0])}
    scores = Neurons(values, missing={"a": torch.tensor([True, True, False, False])})
    counts = allocate(scores, 4 / 6, how=how)
    mask = top(scores, counts)
    assert mask.indices("a").tolist() == [2, 3]
    assert mask.indices("b").tolist() == [0, 1]
    with pytest.raises(ValueError, match="only 4 of 6"):
        allocate(scores, 5 / 6, how=how)
    with pytest.raises(ValueError, match="2 have a score"):
        top(scores, {"a": 3, "b": 0})


@pytest.mark.parametrize("budget", [-0.01, 1.01, 2, float("nan"), float("inf"), "0.02", None])
def test_a_budget_is_a_fraction(budget):
    """Percentages, strings and NaN are refused with the example of what to type."""
    with pytest.raises(ValueError, match=r"0\.02 is 2 %"):
        allocate(neurons([[1.0]]), budget)


def test_what_can_not_be_split_is_refused():
    """Negative scores proportionally, an unknown rule, a mask, counts of other blocks."""
    with pytest.raises(ValueError, match='how="global"'):
        allocate(neurons([[1.0, -1.0]]), 0.5)
    assert sum(allocate(neurons([[1.0, -1.0]]), 0.5, how="global").values()) == 1
    with pytest.raises(ValueError, match="'best'"):
        allocate(neurons([[1.0]]), 0.5, how="best")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="got a mask"):
        allocate(Neurons({"a": torch.tensor([True])}), 0.5)
    with pytest.raises(ValueError, match="counts are for"):
        top(neurons([[1.0]]), {"elsewhere": 1})
    with pytest.raises(ValueError, match="asked for"):
        top(neurons([[1.0]]), {"layers.0": -1})


def test_nothing_and_everything_need_no_score():
    """Budgets 0 and 1 are decided without one: all-zero scores are no error there."""
    zeros = neurons([[0.0] * 3, [0.0] * 2])
    assert list(allocate(zeros, 0.0).values()) == [0, 0]
    assert list(allocate(zeros, 1.0).values()) == [3, 2]
