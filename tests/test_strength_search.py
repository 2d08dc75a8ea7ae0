"""Strengths: the laws of going back by a different part for each neuron, and of the strengths that are found."""

from __future__ import annotations

import json
from importlib import import_module

import pytest
import torch
from families import build, downstream
from mutants import dies
from test_attribution import divergence, pair, vectors
from test_entries import BOTH, some_entries
from test_laws import THREE, all_neurons, bits, hashes, same, snapshot, some_neurons
from test_scores import batches
from torch import nn

from surgery import Checkpoint, Entries, Neurons, Trajectory, damage, rolled_back, save, strengths
from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout
from surgery.layout.slots import Layout
from surgery.masks.edits import Numbers
from surgery.reverting import writing as strength_values
from surgery.reverting.provenance import CARD, RECORD, STRENGTH
from surgery.units import Units

operators = import_module("surgery.reverting.rollback")
strength_search = import_module("surgery.selectors.strengths")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PARTS = (0.0, 0.25, 1.0, 1.75)


def some_strengths(layout: Layout, seed: int = 0) -> Neurons:
    """Neurons that stay, that go some of the way, all of it, and beyond."""
    random = torch.Generator().manual_seed(seed)
    sizes = layout.sizes.items()
    return Neurons({name: torch.tensor(PARTS)[torch.randint(0, 4, (size,), generator=random)] for name, size in sizes})


def expected(later: dict, earlier: dict, layout: Layout, mask: Neurons | Entries, strength: Neurons) -> dict:
    """Number by number: kept, copied, or blended in float64 and rounded; by masks over the slots' views."""
    result = {name: tensor.clone() for name, tensor in later.items()}
    for block in layout.blocks:
        for slot in block.slots:
            there, source = slot.view(result[slot.tensor]), slot.view(earlier[slot.tensor])
            rows = there.reshape(slot.neurons, -1)
            how_far = strength[block.name][slot.start : slot.stop, None].expand(rows.shape)
            if isinstance(mask, Entries):
                chosen = torch.zeros(block.neurons * slot.width, dtype=torch.bool)
                chosen[mask[f"{block.name}/{slot.part}"]] = True
                chosen = chosen.reshape(block.neurons, -1)[slot.start : slot.stop]
            else:
                chosen = mask[block.name][slot.start : slot.stop, None].expand(rows.shape)
            how_far = (how_far * chosen).reshape(there.shape)
            blend = (there.double() + how_far.double() * (source.double() - there.double())).to(there.dtype)
            there.copy_(torch.where(how_far == 1, source, torch.where(how_far == 0, there, blend)))
    return result


def law_each(later: nn.Module, earlier: nn.Module, mask: Neurons | Entries, units: Units = "mlp") -> None:
    """Each neuron goes as far as it was told; kept and copied ones to the bit; undone to the bit; live = copy."""
    before, old, layout = snapshot(later), dict(State(earlier)), find_layout(later, units=units)
    strength = some_strengths(layout)
    want = expected(before, old, layout, mask, strength)
    with operators.rollback(later, to=earlier, mask=mask, strength=strength) as done:
        now = snapshot(later)
    assert same(snapshot(later), before)
    view = rolled_back(State(later), to=State(earlier), mask=mask, strength=strength)
    assert same({name: view[name] for name in view}, now)
    marks = [{name: torch.full(t.shape, float(end)) for name, t in before.items()} for end in (0, 1)]
    for name, far in expected(*marks, layout, mask, strength).items():  # how far each number went
        kept_or_copied = (far == 0) | (far == 1)
        assert bits(now[name][kept_or_copied]).equal(bits(want[name][kept_or_copied])), name
        if now[name].is_floating_point():
            eps = float(torch.finfo(now[name].dtype).eps)
            assert torch.allclose(now[name].double(), want[name].double(), rtol=2 * eps, atol=1e-6), name
    assert done.changed > 0
    assert set(done.strength) == {"least", "mean", "most", "beyond", "unmoved"}
    assert (done.strength["least"], done.strength["most"]) == (0, 1.75)
    assert f"{done.strength['beyond']} {done.noun} went beyond the earlier values" in str(done)
    if isinstance(mask, Neurons):
        assert done.strength["beyond"] == sum(int((strength[n][mask[n]] > 1).sum()) for n in mask)
        assert done.strength["unmoved"] == sum(int((strength[n][mask[n]] == 0).sum()) for n in mask)
    assert f"{done.strength['unmoved']} of them 0, which stay as they are" in str(
        done
    )  # strengths of another mask, say


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.bfloat16) for f in downstream()), *((f, d) for f in THREE for d in DTYPES)],
    ids=str,
)
def test_each_neuron_goes_as_far_as_it_was_told(family, dtype):
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    with torch.no_grad():  # zeros of either sign, which a blend by 0 would not keep
        for parameter in later.parameters():
            parameter.flatten()[::7] = -0.0
    law_each(later, earlier, some_neurons(find_layout(later)))


@pytest.mark.parametrize("units", ["kv_group", ("mlp", "value_channel")], ids=str)
def test_units_of_attention_go_as_far_as_they_were_told(units):
    earlier, later = build("qwen3", torch.bfloat16, 1), build("qwen3", torch.bfloat16, 2)
    law_each(later, earlier, all_neurons(find_layout(later, units=units)), units)


@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral", "qwen3_moe"])
def test_of_single_weights_those_of_a_neuron_go_equally_far(family):
    earlier, later = build(family, seed=1), build(family, seed=2)
    law_each(later, earlier, some_entries(find_layout(later)))


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("part", [0.0, 0.3, 1.0, 2.5])
def test_one_number_is_that_of_every_neuron(family, part):
    earlier, later = build(family, torch.bfloat16, 1), build(family, torch.bfloat16, 2)
    layout = find_layout(later)
    mask = some_neurons(layout)
    alike = Neurons({name: torch.full((size,), part) for name, size in layout.sizes.items()})
    with operators.rollback(later, to=earlier, mask=mask, strength=part) as done:
        one = snapshot(later)
        assert ("beyond" in str(done)) == (part > 1)
    with operators.rollback(later, to=earlier, mask=mask, strength=alike):
        assert same(snapshot(later), one)


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_moe"])
def test_a_folder_and_its_papers(family, tmp_path):
    models = dict(zip(("earlier", "later"), (build(family, torch.bfloat16, seed) for seed in (1, 2)), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="24KB")
    layout = find_layout(models["later"])
    mask, strength = some_neurons(layout), some_strengths(layout)
    before = {name: hashes(tmp_path / name) for name in models}
    view = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask, strength=strength)
    out = save(view, tmp_path / "out")
    assert {name: hashes(tmp_path / name) for name in models} == before
    with operators.rollback(models["later"], to=tmp_path / "earlier", mask=mask, strength=strength) as done:
        models["later"].save_pretrained(tmp_path / "live", max_shard_size="24KB")
    ours, theirs = dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "live"))
    assert same(ours, {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()})
    assert Neurons.load(out / STRENGTH).equal(strength)
    assert json.loads((out / RECORD).read_text())["strength"] == done.strength
    past = f"{done.strength['beyond']} of them past the earlier values"
    assert f"strengths from 0 to 1.75, {done.strength['mean']:.3g} on average, {past}" in (out / CARD).read_text()
    assert "strengths from 0 to 1.75" in repr(view)


def test_what_a_strength_is_refused_for():
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    layout = find_layout(later)
    mask, fine = all_neurons(layout), some_strengths(layout)
    name = next(iter(fine))
    for strength, message in (
        (Neurons({**fine, name: fine[name] - 1}), r"holds -1: expected numbers in \[0, 3\]"),
        (Neurons({**fine, name: fine[name] + 2}), r"holds 3.75: expected numbers in \[0, 3\]"),
        (mask, "holds a mask"),
        (Neurons({name: fine[name]}), "different models"),
        (some_strengths(find_layout(build("gpt2"))), "different models"),
        (True, "expected a number"),
    ):
        for act in (operators.rollback, rolled_back):
            with pytest.raises(ValueError, match=message):
                act(later, to=earlier, mask=mask, strength=strength)


def test_numbers_that_leave_the_dtype_are_told():
    earlier, later = build("llama", torch.float16, 1), build("llama", torch.float16, 2)
    with torch.no_grad():
        for parameter in earlier.parameters():
            parameter.fill_(40_000)
    before = snapshot(later)
    with pytest.raises(ValueError, match="leave the range of their dtype"):
        operators.rollback(later, to=earlier, mask=all_neurons(find_layout(later)), strength=2)
    assert same(snapshot(later), before)


# Strengths that are found.


@pytest.mark.parametrize("family", downstream())
def test_the_slope_is_that_of_the_loss(family):
    """At the later model the slope is −D; half way back it is what D is there, for the whole of δB."""
    earlier, later = pair(family)
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    mask = some_neurons(find_layout(later))
    batch, loss = strength_search.answered(run, data, "kl")
    along = strength_search._Along(later, run, mask, batch, loss)
    for part in (0.0, 0.5):
        value, slope = along.at(part * along.touched.double())
        with operators.rollback(later, to=earlier, mask=mask, strength=part):
            there = damage(run, data, loss="kl")
            assert value == pytest.approx(float(divergence(earlier, later, data).detach()), rel=1e-3, abs=1e-7)
        for name, found in along.split(slope).items():
            want = -there[name] * mask[name] / (1 - part)
            torch.testing.assert_close(found.float(), want, rtol=2e-3, atol=1e-7 + 1e-3 * float(want.abs().max()))


class Bowl:
    """A quadratic loss on the neurons' weights, ½‖θ − c‖² + ½ w (r·(θ − c))²: its optimum can be solved for."""

    def __init__(self, later: nn.Module, mask: Neurons, earlier: nn.Module, centre: float, coupling: float) -> None:
        layout, random = find_layout(later), torch.Generator().manual_seed(2)
        self.names = sorted({slot.tensor for block in layout.blocks for slot in block.slots})
        now, old = dict(later.named_parameters()), dict(earlier.named_parameters())
        self.centre = {n: (now[n] + centre * (old[n] - now[n])).detach() for n in self.names}
        noise = {n: 0.02 * torch.randn(now[n].shape, generator=random) for n in self.names}
        self.centre = {n: self.centre[n] + noise[n] for n in self.names}
        self.along = {n: torch.randn(now[n].shape, generator=random) for n in self.names}
        self.coupling = coupling
        steps, away, across = [], [], []
        tensors = {n: now[n].detach() - old[n].detach() for n in self.names}
        here = {n: now[n].detach() - self.centre[n] for n in self.names}
        for name, block in layout.items():
            at = mask.indices(name)
            steps.append(vectors(tensors, block)[at])
            away.append(vectors(here, block)[at])
            across.append(vectors(self.along, block)[at])
        step, off, line = (torch.cat(one) for one in (steps, away, across))
        sideways = sum(float((self.along[n] * here[n]).double().sum()) for n in self.names)
        slopes = (step * line).sum(1)
        self.matrix = torch.diag((step * step).sum(1)) + coupling * slopes[:, None] * slopes[None, :]
        self.right = (step * off).sum(1) + coupling * slopes * sideways  # the optimum without bounds: matrix⁻¹ right

    def __call__(self, model: nn.Module, batch: dict) -> torch.Tensor:
        now = dict(model.named_parameters())
        off = {n: now[n] - self.centre[n] for n in self.names}
        sideways = sum((self.along[n] * off[n]).sum() for n in self.names)
        return sum((o * o).sum() for o in off.values()) / 2 + self.coupling * sideways**2 / 2


@pytest.mark.parametrize("centre", [0.6, 1.6, 1.2])
@pytest.mark.parametrize("family", ["llama", "gpt2", "mixtral"])
def test_the_optimum_of_a_quadratic_is_found(family, centre):
    """Against the linear system where no bound is met, and by its conditions of optimality where some are."""
    earlier, later = pair(family)
    before = snapshot(later)
    mask = some_neurons(find_layout(later), density=0.1)
    bowl = Bowl(later, mask, earlier, centre, coupling=1e-3)
    run = Trajectory(earlier=earlier, later=later)
    for most in (3.0, centre):
        found = strengths(run, batches(labels=True), mask, loss=bowl, most=most, passes=60)
        assert same(snapshot(later), before)
        s = torch.cat([found[name][mask[name]] for name in mask]).double()
        assert not any(bool(found[name][~mask[name]].any()) for name in mask)
        free = torch.linalg.solve(bowl.matrix, bowl.right)
        if most == 3.0:
            assert float(free.min()) > 0 < 3 - float(free.max())
            torch.testing.assert_close(s, free, rtol=0, atol=2e-2)
        else:
            slope = bowl.matrix @ s - bowl.right
            scale = float(bowl.right.abs().max())
            inside, top = (s > 1e-4) & (s < most - 1e-4), s >= most - 1e-4
            assert int(top.sum()) > 0
            assert float(s.max()) <= most + 1e-6
            assert float(slope[inside].abs().max() if bool(inside.any()) else 0) < 2e-2 * scale
            assert float(slope[top].max()) < 1e-2 * scale


@pytest.mark.parametrize("family", ["qwen3", "gpt2", "mixtral", "qwen3_moe"])
def test_never_a_greater_loss_than_by_going_all_the_way_or_not_at_all(family):
    earlier, later = pair(family)
    run, data = Trajectory(earlier=earlier, later=later), batches(labels=True)
    both = some_neurons(find_layout(later, units=BOTH)) if family == "qwen3" else some_neurons(find_layout(later), 1)
    for mask in (some_neurons(find_layout(later)), some_entries(find_layout(later)), both):
        found = strengths(run, data, mask, passes=8, loss="kl")
        told = found.made_by["strengths"]
        assert told["least"] == min(told["loss"]) <= min(told["loss"][:2])
        for part, at in ((0.0, 0), (1.0, 1)):
            with torch.no_grad(), operators.rollback(later, to=earlier, mask=mask, strength=part):
                assert told["loss"][at] == pytest.approx(float(divergence(earlier, later, data)), rel=1e-3, abs=1e-7)
        with torch.no_grad(), operators.rollback(later, to=earlier, mask=mask, strength=found):
            assert told["least"] == pytest.approx(float(divergence(earlier, later, data)), rel=1e-3, abs=1e-7)


def test_what_the_search_needs():
    earlier, later = pair("llama")
    run, data, mask = Trajectory(earlier=earlier, later=later), batches(labels=True), some_neurons(find_layout(later))
    for settings, message in (
        ({"most": 0}, "most=0"),
        ({"most": 3.5}, "most=3.5"),
        ({"passes": 1}, "passes=1"),
        ({"passes": True}, "passes="),
    ):
        with pytest.raises(ValueError, match=message):
            strengths(run, data, mask, **settings)
    with pytest.raises(ValueError, match="selects nothing"):
        strengths(run, data, mask & ~mask)
    narrow = Trajectory(earlier=earlier.bfloat16(), later=later.bfloat16())
    with pytest.raises(ValueError, match=r"load the model in float32, run.load\(dtype=torch.float32\)"):
        strengths(narrow, data, mask)


# Mutants.


def blended_ends(patch: pytest.MonkeyPatch) -> None:
    """No copying of bits: also 0 and 1 are computed."""
    patch.setattr(strength_values.torch, "where", lambda chosen, a, b: b if b.is_floating_point() else a)


def of_the_first_neurons(patch: pytest.MonkeyPatch) -> None:
    def mutant(edit, strength, rows):
        return strength[edit.block.name][: len(edit.index)].reshape(-1, *[1] * (rows.ndim - 1))

    patch.setattr(strength_values, "_each", mutant)


def within_the_slot(patch: pytest.MonkeyPatch) -> None:
    def mutant(edit, strength, rows):
        at = edit.neurons - edit.slot.start
        return strength[edit.block.name][at].reshape(-1, *[1] * (rows.ndim - 1))

    patch.setattr(strength_values, "_each", mutant)


def by_position(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Numbers, "neurons", property(lambda self: self.index % self.slot.neurons))


def uphill(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, s, original=strength_search._Along.at):
        value, slope = original(self, s)
        return value, -slope

    patch.setattr(strength_search._Along, "at", mutant)


def never_moved(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, s, original=strength_search._Along.at):
        return original(self, torch.zeros_like(s))

    patch.setattr(strength_search._Along, "at", mutant)


def last_point(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(strength_search, "min", lambda seen, key: seen[-1], raising=False)


def no_bound(patch: pytest.MonkeyPatch) -> None:
    def mutant(along, most, passes, original=strength_search._search):
        return original(along, 3.0, passes)

    patch.setattr(strength_search, "_search", mutant)


def not_divided(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, *args, original=strength_search._Along.__init__):
        original(self, *args)
        self.tokens = 1

    patch.setattr(strength_search._Along, "__init__", mutant)


MUTANTS = (
    blended_ends, of_the_first_neurons, within_the_slot, by_position, uphill, never_moved, last_point, no_bound,
    not_divided,
)  # fmt: skip


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_die(mutant, tmp_path):
    dies(mutant, lambda: _every_law(tmp_path))


def test_without_a_mutant_the_laws_hold(tmp_path):
    _every_law(tmp_path)


def _every_law(place) -> None:
    test_each_neuron_goes_as_far_as_it_was_told("llama", torch.float32)
    test_of_single_weights_those_of_a_neuron_go_equally_far("llama")
    test_a_folder_and_its_papers("qwen3_moe", place)
    test_the_slope_is_that_of_the_loss("llama")
    test_the_optimum_of_a_quadratic_is_found("llama", 1.2)
    with pytest.MonkeyPatch.context() as patch:  # a search that ends on a worse point than it has seen
        patch.setattr(strength_search, "_search", _overshooting)
        test_never_a_greater_loss_than_by_going_all_the_way_or_not_at_all("qwen3")


def _overshooting(along, most, passes, original=strength_search._search):
    return [*original(along, most, passes), (lambda s: (along.at(s)[0], s))(0.01 * along.touched.double())]
