"""Selectors with units="weight": what they take, how the random ones are drawn, and that acting on each is exact."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import dataclass
from functools import cache, partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, fewer
from mutants import dies
from test_attribution import pair
from test_entries import SEVEN, in_parts, law_exact
from test_laws import hashes, same, snapshot
from test_scores import batches
from test_weight_scores import parts_of
from test_weight_scores import trajectory as three

from surgery import (
    AMCSelector,
    Checkpoint,
    DamageSelector,
    Entries,
    RandomSelector,
    Trajectory,
    repair,
    rolled_back,
    save,
    sweep,
)
from surgery.checkpoints.checkpoint import State
from surgery.live.losses import cross_entropy
from surgery.masks.mask import load_mask
from surgery.measure import stability
from surgery.reverting.provenance import MASK
from surgery.scores import weights as weight_ranking
from surgery.scores.weights import entry_gains
from surgery.selectors import rounds as weight_selection
from surgery.selectors import selectors as selection
from surgery.selectors.rounds import by_damage, by_magnitude
from surgery.selectors.settings import units_asked

# what only hands over to a function beneath, which is tested on more families: one dense, one of experts
TWO = fewer(("llama", "qwen3_moe"), SEVEN)
RANDOM = partial(RandomSelector, units="weight")
KINDS = (
    DamageSelector(0.01, units="weight"),
    DamageSelector(0.01, units=("mlp", "weight")),
    AMCSelector(0.01, "M", "M", units="weight"),
    AMCSelector(0.01, "M", "M", "global", units="weight"),
    RANDOM(0.01),
)


@cache
def two(family: str, dtype: torch.dtype = torch.float32) -> Trajectory:
    earlier, later = pair(family, dtype)
    return Trajectory(earlier=earlier, later=later)


# As the function beneath.


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.float32) for f in TWO), *((f, torch.bfloat16) for f in fewer(("llama",), SEVEN))],
    ids=str,
)
def test_damage_goes_round_by_round_to_where_the_loss_is_least(family, dtype):
    run, data = two(family, dtype), batches(labels=True)
    for budget in (0.002, 0.05, 0.3):
        ours = DamageSelector(budget, units="weight").select(run, data)
        theirs = by_damage(run, data, budget, units=units_asked(run, "weight"))
        assert isinstance(ours, Entries)
        assert ours.equal(theirs)
        assert ours.made_by["entries"] == theirs.made_by["entries"]
        assert 0 < ours.made_by["entries"]["rounds"] <= 55  # so many make 30 %: none takes more than a hundredth
    assert ours.made_by["selector"] == {
        "class": "DamageSelector", "budget": 0.3, "how": "global", "loss": "hellinger", "units": "weight",
        "rounds": 16,
    }  # fmt: skip


def test_a_mask_asked_for_again_costs_no_pass():
    """The same mask again, and no loss measured twice: what was measured is kept with the run."""
    run, data, passes = two("llama"), batches(labels=True), []
    handle = run.load().register_forward_hook(lambda *_: passes.append(None))
    first, once = DamageSelector(0.05, units="weight").select(run, data), len(passes)
    again, twice = DamageSelector(0.05, units="weight").select(run, data), len(passes)
    handle.remove()
    assert again.equal(first)
    assert once == twice > 0


def test_the_loss_is_passed_on():
    run, data = two("llama"), batches(labels=True)
    own = DamageSelector(0.02, loss=cross_entropy, units="weight")
    assert own.select(run, data).equal(by_damage(run, data, 0.02, units=units_asked(run, "weight"), loss=cross_entropy))
    assert not own.select(run, data).equal(DamageSelector(0.02, units="weight").select(run, data))


def test_names_tell_them_apart():
    """Rows of a sweep's file are told apart by name."""
    assert DamageSelector(0.1, units="weight").name == "D of single weights"
    assert AMCSelector(0.1, "M", "M", "global", "weight").name == "M of single weights"
    assert AMCSelector(0.1, "M", "M", units=("mlp", "weight")).name == "M (proportional) of single weights of neurons"
    assert RANDOM(0.1).name == "random of single weights"
    names = [one.name for one in KINDS]
    assert len(set(names)) == len(names)


# Of some units alone.

OWN: tuple[tuple[str, ...], ...] = (("mlp", "weight"), ("weight", "value_channel"), ("mlp", "kv_group", "weight"))


@pytest.mark.parametrize("units", OWN, ids=str)
@pytest.mark.parametrize("family", TWO)
def test_weights_of_the_units_beside_them_are_the_candidates(family, units):
    """The same Entries and ceiling as of a trajectory over those units, and their weights alone."""
    run, data = three(family), batches(labels=True)
    others = tuple(unit for unit in ("mlp", "kv_group", "value_channel") if unit in units)
    for ours, want in (
        (DamageSelector(0.02, units=units), by_damage(run, data, 0.02, units=others)),
        (AMCSelector(0.02, "M", "M", "global", units), by_magnitude(run, 0.02, "global", others)),
    ):
        mask = ours.select(run, data)
        assert mask.equal(want)
        assert set(mask.units) == set(others)
        assert units_asked(run, ours.units) == mask.units
    drawn = RANDOM(0.02, units=units).select(run)
    assert drawn.sizes == mask.sizes
    assert sum(drawn.count().values()) == round(0.02 * drawn.total)
    assert RANDOM(0.1, units=("mlp", "weight")).name == "random of single weights of neurons"


@pytest.mark.parametrize("family", SEVEN)
def test_no_whole_units_are_worth_more_than_the_weights_taken(family):
    """Why a budget of parameters for units and weights goes to weights: a unit's D, and M here, are its weights'."""
    run, data, kinds = three(family), batches(labels=True), ("mlp", "kv_group")
    gains = in_parts(entry_gains(run, data, units=kinds))
    changes = parts_of(run)
    for budget in (0.01, 0.2):
        flat = entry_gains(run, data, units=kinds)
        by_d: Any = flat.entries(flat.best(round(budget * len(flat.flat))))
        by_m: Any = AMCSelector(budget, "M", "M", "global", (*kinds, "weight")).select(run)
        for scores, weights, units in (
            (gains, by_d, DamageSelector(budget, units=kinds).select(run, data)),
            (changes, by_m, AMCSelector(budget, "M", "M", "global", kinds).select(run)),
        ):
            whole = sum(float(scores[part].double() @ held) for part, held in everywhere(units, scores).items())
            assert sum(float(scores[part][chosen].double().sum()) for part, chosen in weights.items()) > whole > 0


def everywhere(units: Any, parts: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A mask of units as one of every weight of theirs, in float64."""
    masks = {part: units[part.rpartition("/")[0]] for part in parts}
    return {part: mask.double().repeat_interleave(len(parts[part]) // len(mask)) for part, mask in masks.items()}


# At random.


@pytest.mark.filterwarnings("ignore:weights of attention are no candidates")
@pytest.mark.parametrize("family", [*SEVEN, "deepseek_v3"])
def test_random_weights_are_exact_nested_and_reproducible(family):
    run = two(family)
    budgets = (0.0, 0.0007, 0.01, 0.3, 1.0)
    masks = [RANDOM(budget).select(run) for budget in budgets]
    for mask, budget in zip(masks, budgets, strict=True):
        assert sum(mask.count().values()) == round(budget * mask.total) == mask.made_by["entries"]["allowed"]
    assert all((small & big).equal(small) for small, big in pairwise(masks))
    assert masks[2].units == (("mlp",) if family == "deepseek_v3" else ("mlp", "kv_group"))
    assert RANDOM(0.01).select(run, batches(labels=False)).equal(masks[2])
    other = RANDOM(0.01, 1).select(run)
    assert sum((other & masks[2]).count().values()) < 0.1 * sum(other.count().values())
    assert RANDOM(0.01, 1).select(run).equal(other)
    assert other.made_by["selector"] == {"class": "RandomSelector", "budget": 0.01, "seed": 1, "units": "weight"}


def test_random_weights_are_uniform(monkeypatch):
    """Over many draws every slice of the weights, and every place in a chunk, has its share; draws meet by chance."""
    monkeypatch.setattr(weight_selection, "CHUNK", 500)
    run, draws, budget = two("llama"), 100, 0.05
    masks = [RANDOM(budget, seed).select(run) for seed in range(draws)]
    starts = torch.tensor([0, *masks[0].sizes.values()]).cumsum(0)[:-1]
    drawn = [torch.cat([one + start for one, start in zip(mask.values(), starts, strict=True)]) for mask in masks]
    everything = torch.arange(masks[0].total)
    for bins in (lambda place: place * 64 // len(everything), lambda place: place % 500, lambda place: place // 500):
        expected = torch.bincount(bins(everything)) * draws * budget
        deviation = (torch.bincount(bins(torch.cat(drawn)), minlength=len(expected)) - expected) / (
            expected * (1 - budget)
        ).sqrt()
        assert float(deviation.abs().max()) < 5
        assert abs(float(deviation.square().mean()) - 1) < 5 * (2 / len(deviation)) ** 0.5
    common = sum(len(torch.cat(two).unique()) for two in pairwise(drawn)) / (draws - 1)
    assert common == pytest.approx((2 - budget) * len(drawn[0]), rel=0.01)


def test_random_weights_do_not_depend_on_the_chunk(monkeypatch):
    run = two("qwen3_moe")
    whole = RANDOM(0.1).select(run)
    monkeypatch.setattr(weight_selection, "CHUNK", 13)
    assert RANDOM(0.1).select(run).equal(whole)


MEMORY = """
import threading, torch
from pathlib import Path
from surgery import RandomSelector, Trajectory
from surgery.layout.finding import spec_layout

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

def run(size):
    shapes = {"blocks.0.a": (size, 4096), "blocks.0.b": (4096, size)}
    made = {name: torch.zeros(shape, dtype=torch.bfloat16) for name, shape in shapes.items()}
    spec = {"blocks.{layer}": {"a": "n d -> n d", "b": "d n -> n d"}}
    return Trajectory(earlier=made, later=made, layout=spec_layout(spec, shapes))

RandomSelector(0.001, units="weight").select(run(16))  # what torch loads late
large = run(8192)  # 268 MB of lots; a boolean per weight would be 67
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
mask = RandomSelector(0.001, units="weight").select(large)
done.set(); thread.join()
assert sum(mask.count().values()) == round(0.001 * 2 * 8192 * 4096)
print(peak[0] - start)
"""


def test_anonymous_memory_of_drawing_is_bounded_by_a_chunk():
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(found.stdout) < 28, f"{found.stdout} MB"


# Acting on each.


@pytest.mark.parametrize("selector", KINDS, ids=lambda one: one.name)
@pytest.mark.parametrize(
    ("family", "dtype"),
    [("llama", torch.bfloat16), ("gpt2", torch.float32), ("gpt_oss", torch.float32), ("mixtral", torch.float16)],
)
def test_each_mask_rolls_back_and_is_undone(family, selector, dtype):
    run = three(family, dtype)
    later, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    mask = selector.select(run, batches(labels=True))
    assert same(snapshot(later), before)  # type: ignore[arg-type]
    assert sum(mask.count().values())
    law_exact(later, run.earlier, mask)  # type: ignore[arg-type]


@pytest.mark.parametrize("selector", KINDS, ids=lambda one: one.name)
@pytest.mark.parametrize("family", ["gpt2", "mixtral"])
def test_each_mask_of_folders_is_the_live_one_and_writes_a_folder(family, selector, tmp_path):
    """Selected from folders and from live models, saved and loaded; inputs stay as they are."""
    names = ("base", "earlier", "later")
    for seed, name in enumerate(names):
        build(family, torch.bfloat16, seed).save_pretrained(tmp_path / name)
    before = {name: hashes(tmp_path / name) for name in names}
    folders = Trajectory(*(tmp_path / name for name in names))
    live = Trajectory(*(Trajectory(later=tmp_path / name).load() for name in names))
    mask = selector.select(folders, batches(labels=True))
    assert mask.equal(selector.select(live, batches(labels=True)))
    mask.save(tmp_path / "mask")
    read = load_mask(tmp_path / "mask")
    assert read.equal(mask)
    assert read.made_by == mask.made_by
    out = save(rolled_back(folders.later, to=folders.earlier, mask=read), tmp_path / "out")  # type: ignore[arg-type]
    assert load_mask(out / MASK).equal(mask)
    old, new, later = (Checkpoint(tmp_path / name) for name in ("earlier", "out", "later"))
    moved = sum(int((new[name] != later[name]).sum()) for name in new)
    assert 0 < moved <= sum(mask.count().values())
    assert all(bool(((new[n] == later[n]) | (new[n] == old[n])).all()) for n in new)
    assert {name: hashes(tmp_path / name) for name in names} == before


# In a sweep.


def likeness(run: Trajectory) -> Any:
    weight = dict(State(run.earlier))["model.layers.0.mlp.up_proj.weight"]  # type: ignore[arg-type]

    def evaluate(model: Any) -> dict[str, float]:
        return {"same": float((model.model.layers[0].mlp.up_proj.weight == weight).float().mean()), "other": 0.0}

    return evaluate


def test_sweep_repair_and_stability_take_them():
    run, data = three("qwen3"), batches(labels=True)
    later, before = run.later, snapshot(run.later)  # type: ignore[arg-type]
    settings: Any = dict(budgets=[0.01, 0.1], evaluate=likeness(run))
    kinds = [*KINDS, AMCSelector(0.01, units="mlp")]
    table = sweep(run, data, selectors=kinds, **settings)  # type: ignore[arg-type]
    names = [row.selector for row in table]
    assert names[2:4] == ["ceiling (all units (neurons and KV groups))", "ceiling (all MLP neurons)"]
    (total,) = {one.select(run, data).total for one in KINDS if one.units == "weight"}
    for one in KINDS[2:]:
        assert [row.neurons for row in table[one.name]] == [round(0.01 * total), round(0.1 * total)]
    found = repair(run, data, selector=RANDOM(0.1), recovery=0.05, **settings)
    assert found.chosen is not None
    assert found.chosen.budget == 0.1
    assert "not ordered" not in str(found)
    assert found.ceiling is not None
    assert found.ceiling.selector == "ceiling (all units (neurons and KV groups))"
    same_masks = stability(run, data, RANDOM(0.01), sizes=[2], draws=2)
    assert same_masks.agreements[0].jaccard == (1.0,)
    assert f"{round(0.01 * total)} weights" in str(same_masks)
    assert same(snapshot(later), before)  # type: ignore[arg-type]


@dataclass(frozen=True)
class Own:
    budget: float = 0.1
    units: str = "weight"

    def select(self, run: Trajectory, data: Any = None) -> Any:
        return RANDOM(self.budget).select(run)


def test_a_selector_of_ones_own_with_those_units_has_their_ceiling():
    run = three("qwen3")
    table = sweep(run, None, selectors=[Own()], budgets=[0.1], evaluate=likeness(run))  # type: ignore[arg-type]
    assert [row.selector for row in table][2] == "ceiling (all units (neurons and KV groups))"


# What they need.


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            partial(DamageSelector, how="proportional"),
            'AMCSelector(budget, rank="M", allocate="M", how="proportional", units="weight")',
        ),
        (partial(DamageSelector, how="best"), 'expected "proportional", "global" or "uniform"'),
        (partial(DamageSelector, protect={"qa": []}), 'protect with units="mlp"'),
        (partial(AMCSelector, rank="D"), "expected some of the letters A, M and C"),
        (partial(AMCSelector, allocate=""), "expected some of the letters A, M and C"),
        (partial(AMCSelector), 'by M alone: AMCSelector(budget, rank="M", allocate="M", units="weight")'),
        (partial(AMCSelector, rank="M"), "single weights are ranked by M alone"),
        (partial(AMCSelector, rank="C", allocate="M"), "single weights are ranked by M alone"),
        (partial(RandomSelector), "expected a fraction"),
    ],
)
def test_what_is_refused_says_what_to_type(make, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make(1.1 if "fraction" in message else 0.1, units="weight")


def test_what_they_ask_for():
    run = two("llama")
    with pytest.raises(ValueError, match="D is measured on prompts"):
        DamageSelector(0.1, units="weight").select(run)
    assert AMCSelector(0.1, "M", "M", units="weight").select(run).count()
    assert (
        AMCSelector(0.1, "M", "M", units=("weight",))
        .select(run)
        .equal(AMCSelector(0.1, "M", "M", units="weight").select(run))
    )


# Mutants: each changes one thing, and one of the laws has to fail.


def without_a_stop(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selection, "by_damage", partial(weight_selection.by_damage, stop=False))


def one_look(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selection, "by_damage", lambda *given, rounds, **how: by_damage(*given, rounds=1, **how))


def loss_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        selection, "by_damage", lambda *given, units, rounds, loss: weight_selection.by_damage(*given, units=units)
    )


def neurons_weights_only(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selection, "units_asked", lambda run, units: ("mlp",))


def all_weights(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(selection, "units_asked", lambda run, units: units_asked(run, "weight"))


def how_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        selection, "by_magnitude", lambda run, budget, how, units: by_magnitude(run, budget, "uniform", units)
    )


def seed_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection, "_lots", lambda count, seed, lots=weight_selection._lots: lots(count, 0))


def in_order(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection, "_lots", lambda count, seed: torch.arange(count, 0, -1).float())


def nearly_in_order(patch: pytest.MonkeyPatch) -> None:
    def mutant(count, seed, lots=weight_selection._lots):
        return lots(count, seed).log() - torch.arange(count) / count

    patch.setattr(weight_selection, "_lots", lambda *given: mutant(*given).exp())


def chunks_alike(patch: pytest.MonkeyPatch) -> None:
    def mutant(count, seed, lots=weight_selection._lots):
        chunk = weight_selection.CHUNK
        return lots(chunk, seed).repeat(count // chunk + 1)[:count]

    patch.setattr(weight_selection, "_lots", mutant)


def drawn_for_each_budget(patch: pytest.MonkeyPatch) -> None:
    """Right at every budget, and not nested."""

    def mutant(run, budget, seed, units):
        return weight_selection.at_random(run, budget, seed + round(1000 * budget), units)

    patch.setattr(selection, "at_random", mutant)


def one_short(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection, "best", lambda flat, count: weight_ranking.best(flat, count)[: max(0, count - 1)])


def truncated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection, "round", int, raising=False)


def law_drawn() -> None:
    test_random_weights_are_exact_nested_and_reproducible("llama")


def law_uniform() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_random_weights_are_uniform(patch)


def law_damage() -> None:
    test_damage_goes_round_by_round_to_where_the_loss_is_least("llama", torch.float32)


def law_own_units() -> None:
    test_weights_of_the_units_beside_them_are_the_candidates("llama", ("mlp", "weight"))


MUTANTS = (
    (without_a_stop, law_damage), (one_look, law_damage), (loss_forgotten, test_the_loss_is_passed_on),
    (neurons_weights_only, law_damage), (all_weights, law_own_units), (how_forgotten, law_own_units),
    (seed_forgotten, law_drawn), (drawn_for_each_budget, law_drawn), (truncated, law_drawn),
    (in_order, law_uniform), (nearly_in_order, law_uniform), (chunks_alike, law_uniform), (one_short, law_drawn),
)  # fmt: skip


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant, law):
    dies(mutant, law)


@pytest.mark.parametrize("law", sorted({law for _, law in MUTANTS}, key=lambda law: law.__name__))
def test_without_a_mutant_the_laws_hold(law):
    law()
