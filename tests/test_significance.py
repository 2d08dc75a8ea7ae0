"""Significance: laws of the intervals and tests, and what healing, preservation and retention mean."""

from __future__ import annotations

from math import comb

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from surgery.measure import statistics as significance
from surgery.measure.statistics import (
    bootstrap_means,
    healing,
    interval,
    mcnemar,
    paired,
    preservation,
    ratio_interval,
    recovery_intervals,
    retention,
    sign_flip,
    underpowered,
)

SCORES = st.lists(st.tuples(*[st.floats(0, 1, width=32)] * 3), min_size=1, max_size=30)
BITS = st.lists(st.tuples(*[st.integers(0, 1)] * 3), min_size=1, max_size=30)


def columns(rows):
    return [np.array(column, dtype=float) for column in zip(*rows, strict=True)]


def normal(items: int, mean: float = 0.0, seed: int = 0, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1.0, (rows, items))


@pytest.mark.parametrize("values", [normal(40)[0], np.arange(40) % 2.0])
def test_identical_items_are_no_difference(values):
    """The gain is 0, its interval [0, 0], p = 1, whatever the items are; the recovery of nothing is 0, exactly."""
    (same,) = paired(values[None], values)
    assert (same.gain, same.interval, same.p, same.items) == (0.0, (0.0, 0.0), 1.0, 40)
    assert recovery_intervals(values[None], values + 1, values) == [(0.0, 0.0)]
    assert recovery_intervals(values[None] + 1, values + 1, values) == [(1.0, 1.0)]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5))
@settings(max_examples=60, deadline=None)
def test_mcnemar_is_the_exact_binomial(up, down, still):
    """p = P(a fair coin's tosses are at least as lopsided); which items did not change has no say."""
    now, before = np.array([1] * up + [0] * down + [1] * still), np.array([0] * up + [1] * down + [1] * still)
    tosses = up + down
    lopsided = [k for k in range(tosses + 1) if abs(2 * k - tosses) >= abs(up - down)]
    want = sum(comb(tosses, k) for k in lopsided) / 2**tosses
    assert mcnemar(now, before) == pytest.approx(want, rel=1e-12)
    assert mcnemar(before, now) == mcnemar(now, before)


def test_mcnemar_by_hand_and_large():
    """10 of 10 in one direction: 2/1024; and thousands of items are no trouble."""
    assert mcnemar(np.ones(10), np.zeros(10)) == 2 / 1024
    assert mcnemar(np.arange(20_000) % 2, 1 - np.arange(20_000) % 2) == 1.0


def test_the_test_is_chosen_by_the_items():
    """0/1 in both models: McNemar; anything else: sign flips."""
    bits = np.arange(20) % 2.0
    assert paired(bits[None], 1 - bits)[0].test == "McNemar"
    assert paired(bits[None], 1 - bits)[0].p == mcnemar(bits, 1 - bits)
    assert paired(bits[None], bits * 0 + 1)[0].p == mcnemar(bits, bits * 0 + 1) == 2 / 2**10
    half = paired(bits[None] * 0.5, bits)[0]
    assert (half.test, half.p) == ("sign flip", sign_flip((bits * 0.5 - bits)[None])[0])
    assert paired(bits[None], bits * 0.5)[0].test == "sign flip"


def test_sign_flip_enumerates_few_items():
    """All signs of n equal differences: only two of the 2^n are as extreme."""
    assert sign_flip(np.ones((1, 8)))[0] == 2 / 2**8
    assert sign_flip(np.array([[3.0, -1.0]]))[0] == 1.0  # the four means are ±1 and ±2, and 1 was seen


def test_sign_flip_agrees_with_mcnemar_and_holds_its_level():
    """On 0/1 items both condition on what changed; under no effect 5 % of the p are below 5 %."""
    now, before = np.array([1.0] * 14 + [0.0] * 5 + [1.0] * 40), np.array([0.0] * 14 + [1.0] * 5 + [1.0] * 40)
    assert sign_flip((now - before)[None])[0] == pytest.approx(mcnemar(now, before), abs=0.01)
    null = sign_flip(normal(30, rows=2_000), flips=999)
    assert 0.035 < (null < 0.05).mean() < 0.065
    assert (sign_flip(normal(30, 1.0, rows=50)) < 0.01).all()
    assert 0 < sign_flip(np.full((1, 60), 1.0))[0] == 1 / 10_000  # never zero


def test_the_same_items_are_drawn_in_every_row_and_again():
    """Pairs stay pairs: a row and its double have doubled means, draw by draw; equal seeds give equal draws."""
    values = normal(50)[0]
    means = bootstrap_means(np.stack([values, 2 * values]), draws=300)
    assert np.allclose(means[1], 2 * means[0])
    assert np.array_equal(means[0], bootstrap_means(values, draws=300))
    assert not np.array_equal(means[0], bootstrap_means(values, draws=300, seed=1))


def test_one_item_is_every_resample():
    """There is no other item to draw: the interval is that one point."""
    assert bootstrap_means(np.array([[2.0], [3.0]]), draws=4).tolist() == [[2.0] * 4, [3.0] * 4]
    assert paired(np.array([[0.75]]), np.array([0.5]))[0].interval == (0.25, 0.25)


def test_resamples_are_the_same_in_pieces(monkeypatch):
    """How many are held at once has no say in the numbers."""
    values = normal(50, rows=3)
    whole = bootstrap_means(values, draws=300)
    monkeypatch.setattr(significance, "_CHUNK", 7 * values.size)
    assert np.array_equal(bootstrap_means(values, draws=300), whole)
    assert np.array_equal(bootstrap_means(values[1], draws=300), whole[1])  # nor has how many rows there are


def test_every_item_is_drawn_as_often_as_any_other():
    """A row that is 1 on one item only has the mean 1/n on average, whichever item it is."""
    found = bootstrap_means(np.eye(20), draws=20_000).mean(-1)
    assert found == pytest.approx(np.full(20, 1 / 20), rel=0.03)
    assert found.sum() == pytest.approx(1.0)


def test_bootstrap_covers_what_it_says():
    """In 400 samples of 60 skewed items the 95 % interval holds the true mean in about 95 %."""
    samples = np.random.default_rng(0).exponential(1.0, (400, 60))
    spans = [interval(bootstrap_means(sample, draws=600, seed=at)) for at, sample in enumerate(samples)]
    covered = np.mean([low <= 1.0 <= high for low, high in spans])
    assert 0.90 < covered < 0.98
    assert np.mean([high - low for low, high in spans]) == pytest.approx(2 * 1.96 / 60**0.5, rel=0.1)


def test_recovery_intervals_cover_the_ratio():
    """The interval of a ratio of two paired means holds the true ratio in about 95 %, and is tighter than unpaired."""
    rng, covered = np.random.default_rng(1), []
    for _ in range(200):
        lost = rng.normal(0.5, 0.5, 100)
        now = 0.4 * lost + rng.normal(0, 0.2, 100)
        (span,) = recovery_intervals(now[None], lost, np.zeros(100))
        assert span is not None
        covered.append(span[0] <= 0.4 <= span[1])
    assert 0.90 < np.mean(covered) < 0.99


def test_a_ratio_over_noise_has_no_interval():
    """Where the loss itself may be nothing, recovery has no finite interval, and is called underpowered."""
    noise = normal(60, 0.05)[0]
    assert recovery_intervals(noise[None] * 0.3, noise, np.zeros(60)) == [None]
    assert recovery_intervals(np.zeros((1, 60)), noise, np.zeros(60)) == [None]  # nothing gained, over perhaps nothing
    (lost,) = paired(noise[None], np.zeros(60))
    assert "is not significant" in (underpowered(lost, (0.1, 0.2)) or "")
    assert "is not significant" in (underpowered(lost, None) or "")
    (none,) = paired(-abs(noise)[None], np.zeros(60))
    assert "nothing was lost" in (underpowered(none, None) or "")
    assert ratio_interval(np.ones(100), np.linspace(-1, 30, 100)) is None  # 3 % of the draws at or below zero
    assert ratio_interval(np.ones(100), np.linspace(0.1, 30, 100)) is not None


def test_underpowered_is_relative_to_what_was_asked():
    """An interval of 60 points answers "none or all?", and not "none or half?"."""
    (lost,) = paired(normal(200, 1.0), np.zeros(200))
    assert underpowered(lost, (0.1, 0.7)) is None
    assert "60 points wide, more than the 50 asked" in (underpowered(lost, (0.1, 0.7), 0.5) or "")
    assert "about 288 are needed" in (underpowered(lost, (0.1, 0.7), 0.5) or "")
    assert underpowered(lost, None) is not None


def test_the_items_said_to_be_needed_are_enough():
    """With that many items of the same kind the loss is significant."""
    rng = np.random.default_rng(3)
    (lost,) = paired(rng.normal(0.1, 1.0, (1, 100)), np.zeros(100))
    needed = int((underpowered(lost, None) or "").rsplit(" ", 1)[1])
    (more,) = paired(rng.normal(lost.gain, 1.0, (1, needed)), np.zeros(needed))
    assert needed > 100
    assert underpowered(more, (0.0, 0.5)) is None


def test_other_numbers_of_items_are_refused():
    with pytest.raises(ValueError, match="3 items against 4"):
        paired(np.zeros((1, 3)), np.zeros(4))


@given(BITS)
def test_of_right_and_wrong_answers_they_are_shares(rows):
    """On 0/1 items: shares of the items lost, still had, and won."""
    now, earlier, later = columns(rows)
    for view, of in (
        (healing, (earlier == 1) & (later == 0)),
        (preservation, (earlier == 1) & (later == 1)),
        (retention, (earlier == 0) & (later == 1)),
    ):
        found = view(now, earlier, later)
        assert found == (pytest.approx(now[of].mean()) if of.any() else None)


@given(SCORES)
def test_their_ends(rows):
    """In [0, 1]; later itself healed nothing and kept all; earlier healed all, preserved all, retained nothing."""
    now, earlier, later = columns(rows)
    for view, at_later, at_earlier in ((healing, 0, 1), (preservation, 1, 1), (retention, 1, 0)):
        found = view(now, earlier, later)
        if found is not None:
            assert -1e-12 <= found <= 1 + 1e-12
            assert view(later, earlier, later) == pytest.approx(at_later)
            assert view(earlier, earlier, later) == pytest.approx(at_earlier)


def test_what_was_broken_elsewhere_does_not_count_as_healing():
    """Recovery of the mean is 0 here; one of the two lost items is back all the same, and one kept item broke."""
    earlier, later, now = [1, 1, 1], [0, 0, 1], [1, 0, 0]
    assert (healing(now, earlier, later), preservation(now, earlier, later)) == (0.5, 0.0)
    assert preservation([-1.0], [-0.5], [-2.0]) is None  # a log-likelihood has no parts
