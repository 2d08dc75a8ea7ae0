"""Overlap against plain sets and against chance by enumeration; profiles against sums."""

from __future__ import annotations

import json
from importlib import import_module
from itertools import combinations
from math import comb

import pytest
import torch
from families import build
from test_evidence_changes import run_of, sequence
from test_scores import batches

from surgery import AMCSelector, Neurons, RandomSelector, activation, magnitude
from surgery.evidence import Overlap, Profile, overlap, profile
from surgery.evidence.overlap import chance_jaccard
from surgery.layout import find_layout

evidence_overlap = import_module("surgery.evidence.overlap")


SIZES = {"a": 40, "b": 25, "c": 60}


def scores(seed: int, sizes: dict[str, int] | None = None, scale: float = 1.0) -> Neurons:
    random = torch.Generator().manual_seed(seed)
    sizes = sizes or SIZES
    return Neurons(
        {n: torch.rand(size, generator=random) * (1 + scale * at) for at, (n, size) in enumerate(sizes.items())}
    )


def zeros() -> Neurons:
    return Neurons({name: torch.zeros(size) for name, size in SIZES.items()})


def best(held: Neurons, count: int, blocks: list[str] | None = None) -> set[tuple[str, int]]:
    """The definition: all neurons in one list, the largest first, ties by layer and index, none at zero or below."""
    every = [(n, i) for n in blocks or list(held) for i in range(len(held[n])) if bool(held.available(n)[i])]
    order = sorted(every, key=lambda one: -float(held[one[0]][one[1]]))  # stable
    return {one for one in order[:count] if float(held[one[0]][one[1]]) > 0}


def ratio(a: set[tuple[str, int]], b: set[tuple[str, int]]) -> float:
    return len(a & b) / len(a | b) if a | b else 1.0


@pytest.mark.parametrize("top", [0.01, 0.05, 0.1, 0.33, 1.0])
def test_overlap_is_that_of_plain_sets(top):
    held = {name: scores(at) for at, name in enumerate(("code", "math", "qa"))}
    found = overlap(held, top)
    sets = {name: best(one, round(top * 125)) for name, one in held.items()}
    for i, one in enumerate(held):
        for j, other in enumerate(held):
            assert found.jaccard[i][j] == pytest.approx(ratio(sets[one], sets[other]))
            assert found.of(one, other) == found.jaccard[i][j] == found.jaccard[j][i]
    assert found.neurons == 125
    assert dict(found.sizes) == {name: len(one) for name, one in sets.items()}
    for layer in found.layers:
        size = SIZES[layer.block]
        inside = {name: best(one, round(top * size), [layer.block]) for name, one in held.items()}
        for (i, one), (j, other) in combinations(enumerate(held), 2):
            assert layer.jaccard[i][j] == pytest.approx(ratio(inside[one], inside[other]))
            assert layer.chance[i][j] == pytest.approx(chance_jaccard(size, len(inside[one]), len(inside[other])))
    assert found.mean == pytest.approx(sum(found.of(*pair) for pair in found.pairs()) / 3)


@pytest.mark.parametrize("top", [0.008, 0.1, 1.0])
def test_the_overlap_of_a_domain_with_itself_is_one(top):
    held = scores(0)
    found = overlap({"one": held, "same": held}, top)
    assert found.jaccard == ((1.0, 1.0), (1.0, 1.0))
    assert all(layer.jaccard == ((1.0, 1.0), (1.0, 1.0)) for layer in found.layers)
    assert found.mean == 1.0


def test_disjoint_sets_have_none():
    one = Neurons({"a": torch.tensor([3.0, 2.0, 0.0, 0.0])})
    other = Neurons({"a": torch.tensor([0.0, 0.0, 2.0, 3.0])})
    assert overlap({"one": one, "other": other}, 0.5).of("one", "other") == 0.0


@pytest.mark.parametrize(("n", "a", "b"), [(7, 3, 2), (6, 4, 4), (5, 5, 2), (8, 0, 3), (4, 0, 0), (9, 1, 1)])
def test_chance_is_the_mean_over_all_draws(n, a, b):
    fixed = set(range(a))  # by symmetry one of the draws may be held
    every = [set(some) for some in combinations(range(n), b)]
    want = sum(len(fixed & some) / len(fixed | some) if fixed | some else 1.0 for some in every) / comb(n, b)
    assert chance_jaccard(n, a, b) == pytest.approx(want, rel=1e-12)


def test_chance_of_large_models():
    assert chance_jaccard(10_000_000, 1_000_000, 1_000_000) == pytest.approx(0.1 / 1.9, rel=1e-5)
    assert chance_jaccard(350_208, 35_021, 35_021) == pytest.approx(0.1 / 1.9, rel=1e-4)
    with pytest.raises(ValueError, match="5 and 3 of 4"):
        chance_jaccard(4, 5, 3)


def test_random_scores_overlap_as_chance_says():
    found = [overlap({"one": scores(2 * at, scale=0), "other": scores(2 * at + 1, scale=0)}, 0.2) for at in range(300)]
    values = torch.tensor([one.of("one", "other") for one in found])
    error = float(values.std()) / len(values) ** 0.5
    assert abs(float(values.mean()) - found[0].chance[0][1]) < 4 * error
    layers = torch.tensor([[layer.jaccard[0][1] - layer.chance[0][1] for layer in one.layers] for one in found])
    assert bool((layers.mean(0).abs() < 4 * layers.std(0) / len(values) ** 0.5).all())


def test_a_liking_for_the_same_layers_is_not_taken_for_the_same_neurons():
    """Where one layer has the large scores of all, the whole model's overlap is above chance, and not within layers."""
    found = [overlap({"one": scores(2 * at, scale=5), "other": scores(2 * at + 1, scale=5)}, 0.2) for at in range(200)]
    values = torch.tensor([one.of("one", "other") for one in found])
    error = float(values.std()) / len(values) ** 0.5
    assert float(values.mean()) > found[0].chance[0][1] + 10 * error
    chance = torch.tensor([one.chance_in_layers[0][1] for one in found])
    assert abs(float((values - chance).mean())) < 4 * error + 0.005  # a ratio of means: an approximation


def test_chance_in_layers_by_hand():
    one = Neurons({"a": torch.tensor([9.0, 8.0, 0.0, 0.0]), "b": torch.tensor([7.0, 0.0])})
    other = Neurons({"a": torch.tensor([0.0, 9.0, 8.0, 0.0]), "b": torch.zeros(2)})
    found = overlap({"one": one, "other": other}, 0.5)
    expected = 2 * 2 / 4 + 1 * 0 / 2  # neurons in common, over the layers
    assert found.chance_in_layers[0][1] == pytest.approx(expected / (3 + 2 - expected))


def test_what_did_not_change_is_in_no_set():
    held = Neurons({"a": torch.tensor([0.0, 0.0, 0.0, 5.0, 0.0, 0.0]), "b": torch.zeros(4)})
    other = Neurons({"a": torch.tensor([0.0, 0.0, 0.0, 0.0, 7.0, 0.0]), "b": torch.tensor([1.0, 0, 0, 0])})
    found = overlap({"one": held, "other": other}, 0.5)
    assert found.of("one", "other") == 0.0
    assert dict(found.sizes) == {"one": 1, "other": 2}
    assert "scores above zero: one 1, other 2" in str(found)
    assert found.layers[1].jaccard[0][1] == 0.0


def test_neurons_without_a_score_are_left_out_and_told():
    never = {"b": torch.arange(25) < 10}
    one, other = scores(0), Neurons(dict(scores(1)), missing=never)
    found = overlap({"one": one, "other": other}, 0.2)
    assert (found.neurons, found.without_score) == (115, 10)
    assert "10 without a score" in str(found)
    cut = {"a": one["a"], "b": one["b"][10:], "c": one["c"]}, {"a": other["a"], "b": other["b"][10:], "c": other["c"]}
    same = overlap({"one": Neurons(cut[0]), "other": Neurons(cut[1])}, 0.2)
    assert (found.jaccard, found.chance, found.sizes) == (same.jaccard, same.chance, same.sizes)
    assert [layer.jaccard for layer in found.layers] == [layer.jaccard for layer in same.layers]
    whole = {"a": torch.arange(40) < 41}
    gone = overlap({"one": one, "other": Neurons(dict(scores(1)), missing=whole)}, 0.2)
    assert [layer.block for layer in gone.layers] == ["b", "c"]


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "qwen3_moe"])
def test_changed_and_active_neurons_of_a_model(family):
    run = run_of(sequence(family, torch.bfloat16))
    changed = overlap({name: magnitude(step) for name, step in run.steps().items()}, 0.1)
    assert changed.domains == ("s1", "s2")
    assert changed.neurons == sum(find_layout(build(family)).sizes.values())
    model = run.load()
    data = batches(labels=True)
    active = overlap({"x": activation(model, data[:1]), "y": activation(model, data[1:])}, 0.05)
    assert 0 < active.of("x", "y") <= 1


@pytest.mark.parametrize(
    ("held", "top", "message"),
    [
        ({"one": scores(0)}, 0.1, "two or more domains"),
        ({"one": scores(0), "other": scores(1)}, 0, r"top=0: expected a share of the neurons in \(0, 1\]"),
        ({"one": scores(0), "other": scores(1)}, 10, "top=10: expected"),
        ({"one": scores(0), "other": scores(1)}, 0.003, "top=0.003 selects none of 125 neurons: expected 0.008"),
        ({"one": scores(0), "other": scores(1)}, float("nan"), "top=nan: expected"),
        ({"one": scores(0), "other": Neurons({"a": torch.ones(3) > 0})}, 0.1, "'other' is a mask"),
        ({"one": scores(0), "other": scores(1, {"a": 3})}, 0.1, "different models"),
        ({"one": scores(0), "other": zeros()}, 0.1, "the same checkpoint"),
        (
            {"one": Neurons({"a": torch.ones(2)}, missing={"a": torch.tensor([True, False])}),
             "other": Neurons({"a": torch.ones(2)}, missing={"a": torch.tensor([False, True])})},
            0.1, "no neuron has a score in every domain",
        ),
    ],
)  # fmt: skip
def test_bad_input_is_told(held, top, message):
    with pytest.raises(ValueError, match=message):
        overlap(held, top)


def test_the_same_checkpoint_twice_is_told():
    model = build("qwen3")
    run = run_of([build("qwen3", seed=1), model, model])
    with pytest.raises(ValueError, match="no score of 's2' is above zero"):
        overlap({name: magnitude(step) for name, step in run.steps().items()}, 0.1)


def test_what_is_printed_and_saved(tmp_path):
    found = overlap({name: scores(at) for at, name in enumerate("xyz")}, 0.1)
    whole, layers = found.tables()
    assert [row[0] for row in whole.rows] == ["x–y", "x–z", "y–z"]
    assert [row[0] for row in layers.rows] == ["a", "b", "c"]
    found.save(tmp_path / "overlap.json")
    told = json.loads((tmp_path / "overlap.json").read_text())
    assert told["kind"] == "Overlap"
    assert told["jaccard"][0][1] == found.of("x", "y")
    assert isinstance(found, Overlap)


@pytest.mark.parametrize("mutant", ["lowest", "zeros", "whole"])
def test_mutants_die(mutant, monkeypatch):
    if mutant == "lowest":
        real = evidence_overlap.budget.top
        monkeypatch.setattr(
            evidence_overlap.budget,
            "top",
            lambda s, n: real(Neurons({k: 9 - v for k, v in s.items()}, missing=s.missing), n),
        )
    elif mutant == "zeros":
        monkeypatch.setattr(evidence_overlap, "_share_of", lambda one, top: round(top * len(one)))
    else:
        monkeypatch.setattr(
            evidence_overlap, "chance_jaccard", lambda n, a, b: 1.0 if a == b == 0 else a * b / n / (a + b)
        )
    with pytest.raises(AssertionError):
        laws()


def laws() -> None:
    for top in (0.05, 0.1, 0.33):
        test_overlap_is_that_of_plain_sets(top)
    test_what_did_not_change_is_in_no_set()
    test_chance_is_the_mean_over_all_draws(7, 3, 2)


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral", "qwen3_moe"])
def test_a_profile_adds_up(family):
    run = run_of(sequence(family, torch.bfloat16))
    layout = find_layout(build(family), units=("mlp", "kv_group"))
    mask = RandomSelector(0.3, seed=1, units=("mlp", "kv_group")).select(run)
    found = profile(mask, layout.costs)
    assert [(one.block, one.amount, one.units) for one in found.blocks] == [
        (block, count, mask.sizes[block]) for block, count in mask.count().items()
    ]
    assert [one.kind for one in found.kinds] == ["mlp", "kv_group"]
    assert sum(one.share for one in found.blocks) == pytest.approx(1)
    assert sum(one.share for one in found.kinds) == pytest.approx(1)
    for kind in found.kinds:
        parts = [one for one in found.blocks if one.kind == kind.kind]
        assert kind.amount == sum(one.amount for one in parts)
        assert kind.units == sum(one.units for one in parts)
        assert kind.parameters == sum(int(one.amount) * layout[one.block].width for one in parts)
    assert isinstance(found, Profile)
    assert [row[0] for row in found.tables()[1].rows] == ["mlp", "kv_group"]
    assert profile(mask).blocks[0].parameters is None


def test_a_profile_of_scores_and_of_nothing(tmp_path):
    held = scores(0)
    found = profile(held)
    total = sum(float(value.double().sum()) for value in held.values())
    assert [one.share for one in found.blocks] == pytest.approx(
        [float(v.double().sum()) / total for v in held.values()]
    )
    assert found.what == "sum of scores"
    nothing = profile(Neurons({"a": torch.zeros(4, dtype=torch.bool)}))
    assert nothing.blocks[0].share == 0.0
    found.save(tmp_path / "profile.json")
    assert json.loads((tmp_path / "profile.json").read_text())["kind"] == "Profile"
    with pytest.raises(ValueError, match="below zero"):
        profile(Neurons({"a": torch.tensor([-1.0, 2.0])}))
    with pytest.raises(ValueError, match="costs count the parameters"):
        profile(held, {"a": 1})


def test_a_profile_of_a_selection():
    run = run_of(sequence("qwen3"))
    mask = AMCSelector(budget=0.1).select(run, batches(labels=True))
    assert sum(one.amount for one in profile(mask).blocks) == round(0.1 * mask.total)
