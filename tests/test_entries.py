"""Single weights: the laws of the mask, of the rollback and of the choice; and the mutants that they have to kill."""

from __future__ import annotations

import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from families import build, downstream, fewer
from hypothesis import given, settings
from hypothesis import strategies as st
from mutants import dies
from test_attribution import divergence, pair
from test_laws import all_neurons, hashes, same, snapshot
from test_scores import batches
from torch import nn

from surgery import Checkpoint, DamageSelector, Entries, Neurons, Trajectory, damage, rolled_back, save, sweep
from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout
from surgery.layout.slots import Block, Layout, Slot
from surgery.live import hooks as gradient_hooks
from surgery.live import prompts as prompts_of
from surgery.live.losses import cross_entropy
from surgery.live.prompts import padded
from surgery.masks import entries
from surgery.masks.entries import shapes_of
from surgery.masks.mask import load_mask
from surgery.measure import jaccard
from surgery.reverting.provenance import CARD, MASK, RECORD
from surgery.scores import weight_places
from surgery.scores import weights as weight_damage
from surgery.scores import weights as weight_ranking
from surgery.scores.weights import Gains, entry_gains
from surgery.selectors import rounds as weight_selection
from surgery.selectors.rounds import by_damage
from surgery.selectors.settings import units_asked

operators = import_module("surgery.reverting.rollback")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# separate, Conv1D with biases, fused, fused by group, renamed on disk, interleaved experts, experts with a dense layer
SEVEN = ("llama", "gpt2", "phi3", "gpt_neox", "mixtral", "gpt_oss", "qwen3_moe")
BOTH = ("mlp", "kv_group")


def finest(model: nn.Module) -> Layout:
    """MLPs and KV groups, or MLPs alone where the attention can't be told."""
    try:
        return find_layout(model, units=BOTH)
    except ValueError:
        return find_layout(model)


def some_entries(layout: Layout, density: float = 0.1, seed: int = 0) -> Entries:
    random = torch.Generator().manual_seed(seed)
    shapes = shapes_of(layout)
    chosen = {
        part: (torch.rand(n * d, generator=random) < density).nonzero().flatten() for part, (n, d) in shapes.items()
    }
    return Entries(chosen, shapes=shapes)


def all_entries(layout: Layout) -> Entries:
    shapes = shapes_of(layout)
    return Entries({part: torch.arange(n * d) for part, (n, d) in shapes.items()}, shapes=shapes)


def expected(later: dict, earlier: dict, layout: Layout, mask: Entries) -> dict:
    """What a rollback has to give, by boolean masks of the rows (no coordinate, no ``take``, no ``put``)."""
    result = {name: tensor.clone() for name, tensor in later.items()}
    for block in layout.blocks:
        for slot in block.slots:
            chosen = torch.zeros(block.neurons * slot.width, dtype=torch.bool)
            chosen[mask[f"{block.name}/{slot.part}"]] = True
            mine = chosen.reshape(block.neurons, slot.width)[slot.start : slot.stop]
            there, source = slot.view(result[slot.tensor]), slot.view(earlier[slot.tensor])
            there[mine.reshape(there.shape)] = source[mine.reshape(there.shape)]
    return result


# The laws of rolling back: each leaves the later model as it was.


def law_exact(later: nn.Module, earlier: nn.Module, mask: Entries) -> None:
    """Exactly those numbers are earlier's; undo ∘ rollback = identity; the report counts; the copy is the same."""
    before, layout = snapshot(later), find_layout(later, units=mask.units)
    want = expected(before, dict(State(earlier)), layout, mask)
    with operators.rollback(later, to=earlier, mask=mask) as done:
        assert same(snapshot(later), want)
        assert not same(want, before)
        assert done.neurons == mask.count()
        assert sum(done.parameters.values()) == sum(mask.count().values())
        assert "weights in" in str(done)
    assert same(snapshot(later), before)
    view = rolled_back(State(later), to=State(earlier), mask=mask)
    assert same({name: view[name] for name in view}, want)
    assert view.parameters == sum(mask.count().values())
    assert same(snapshot(later), before)


def law_ends(later: nn.Module, earlier: nn.Module, _: Entries) -> None:
    """No weight is the later model; every weight is every unit."""
    before, layout = snapshot(later), finest(later)
    with operators.rollback(later, to=earlier, mask=Entries({}, shapes=shapes_of(layout))) as done:
        assert done.changed == 0
        assert same(snapshot(later), before)
    with operators.rollback(later, to=earlier, mask=all_neurons(layout)):
        units = snapshot(later)
    with operators.rollback(later, to=earlier, mask=all_entries(layout)):
        assert same(snapshot(later), units)
    assert same(snapshot(later), before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", downstream())
def test_live_laws(family, dtype):
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    mask = some_entries(finest(later))
    law_exact(later, earlier, mask)
    law_ends(later, earlier, mask)


def test_an_error_on_the_way_puts_the_old_weights_back(monkeypatch):
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    before, calls, real = snapshot(later), [], Slot.put_entries

    def put(self, *args):
        calls.append(self)
        if len(calls) == 9:
            raise OSError("disk")
        real(self, *args)

    monkeypatch.setattr(Slot, "put_entries", put)
    with pytest.raises(OSError, match="disk"):
        operators.rollback(later, to=earlier, mask=some_entries(finest(later)))
    assert len(calls) > 9
    assert same(snapshot(later), before)


def test_a_partial_step_blends():
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    before, old = snapshot(later), dict(State(earlier))
    mask = some_entries(finest(later))
    whole = expected(before, old, finest(later), mask)
    with operators.rollback(later, to=earlier, mask=mask, strength=0.25):
        for name, tensor in State(later).items():
            assert torch.allclose(tensor, before[name].lerp(whole[name], 0.25))


@pytest.mark.parametrize("family", downstream())
def test_live_and_folder_agree(family, tmp_path):
    """One mask from both, one result of both, bit for bit, also where names and shapes differ; no input is written."""
    models = dict(zip(("earlier", "later"), (build(family, torch.bfloat16, seed) for seed in (1, 2)), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="24KB")
    before = {name: hashes(tmp_path / name) for name in models}
    mask = some_entries(finest(models["later"]))
    view = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask)
    out = save(view, tmp_path / "out")
    assert {name: hashes(tmp_path / name) for name in models} == before
    kept = {name: value for name, value in before["later"].items() if not name.startswith("model-")}
    assert kept.items() <= hashes(out).items()
    assert load_mask(out / MASK).equal(mask)
    assert json.loads((out / RECORD).read_text())["weights"]["reverted"] == sum(mask.count().values())
    assert "weights of" in (out / CARD).read_text()

    with operators.rollback(models["later"], to=tmp_path / "earlier", mask=mask) as done:
        assert done.changed
        models["later"].save_pretrained(tmp_path / "live", max_shard_size="24KB")
    ours, theirs = dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "live"))
    assert same(ours, {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()})
    assert same(ours, dict(view))
    different = sum(int((ours[n] != t).sum()) for n, t in Checkpoint(tmp_path / "later").items())
    assert different == done.changed


# The laws of choosing.


def small_pair(family: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, nn.Module, Trajectory]:
    earlier, later = pair(family, dtype)
    return earlier, later, Trajectory(earlier=earlier, later=later)


def in_parts(found: Gains) -> dict[str, torch.Tensor]:
    sizes = [n * d for n, d in found.shapes.values()]
    return dict(zip(found.shapes, found.flat.split(sizes), strict=True))


@pytest.mark.parametrize("family", downstream())
def test_gains_add_up_to_the_damage_of_each_neuron(family):
    _, later, run = small_pair(family)
    data, units = batches(labels=True), finest(later).units
    whole, parts = damage(run, data, units=units), in_parts(entry_gains(run, data, units=units))
    for name, block in finest(later).items():
        rows = [parts[f"{name}/{part}"].reshape(block.neurons, -1).double().sum(1) for part in block.parts]
        total = torch.stack(rows).sum(0).float()
        torch.testing.assert_close(total, whole[name], rtol=1e-4, atol=1e-7 + 1e-4 * float(whole[name].abs().max()))


@pytest.mark.parametrize("family", SEVEN)
def test_a_gain_is_the_gradient_times_what_changed(family):
    earlier, later, run = small_pair(family)
    data = batches(labels=True)
    found = in_parts(entry_gains(run, data, units=BOTH, loss="kl"))
    divergence(earlier, later, data).backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in later.named_parameters()}
    change = {n: p.detach() - dict(earlier.named_parameters())[n].detach() for n, p in later.named_parameters()}
    for name, block in finest(later).items():
        for slot in block.slots:
            want = (slot.view(grads[slot.tensor]) * slot.view(change[slot.tensor])).reshape(-1)
            ours = found[f"{name}/{slot.part}"][slot.span[0] : slot.span[1]]
            torch.testing.assert_close(ours, want, rtol=2e-3, atol=1e-8 + 1e-3 * float(want.abs().max()))


@pytest.mark.parametrize(
    ("family", "dtype"),
    [*((f, torch.float32) for f in SEVEN), *((f, d) for f in fewer(("llama",), SEVEN) for d in DTYPES[1:])],
    ids=str,
)
def test_what_is_taken_gains_and_budgets_are_nested(family, dtype):
    earlier, later, run = small_pair(family, dtype)
    with torch.no_grad():  # some weights that training left alone
        for mine, theirs in zip(later.parameters(), earlier.parameters(), strict=True):
            mine.flatten()[::3] = theirs.flatten()[::3]
    data, before = batches(labels=True), snapshot(later)
    budgets, units = (0.0, 0.001, 0.01, 0.1, 1.0), units_asked(run, "weight")
    masks = [by_damage(run, data, budget, units=units, stop=False, rounds=2) for budget in budgets]
    assert same(snapshot(later), before)
    counts = [sum(mask.count().values()) for mask in masks]
    assert counts[:3] == [round(budget * masks[0].total) for budget in budgets[:3]]
    assert all((small & big).equal(small) for small, big in pairwise(masks))
    assert masks[-1].made_by["entries"]["positive"] == counts[-1] < masks[0].total
    assert "positive" not in masks[1].made_by["entries"]
    changed = {name: tensor != dict(State(earlier))[name] for name, tensor in before.items()}
    with operators.rollback(later, to=earlier, mask=masks[-1]):
        moved = sum(int((tensor != before[name]).sum()) for name, tensor in State(later).items())
        assert all(bool((tensor == before[name])[~changed[name]].all()) for name, tensor in State(later).items())
    assert moved == counts[-1]  # every weight that is taken differs between the checkpoints


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_folders_and_live_models_choose_the_same(family, tmp_path):
    earlier, later, _ = small_pair(family, torch.bfloat16)
    earlier.save_pretrained(tmp_path / "earlier")
    later.save_pretrained(tmp_path / "later")
    folders = Trajectory(earlier=tmp_path / "earlier", later=tmp_path / "later")
    live = Trajectory(earlier=Trajectory(later=tmp_path / "earlier").load(), later=folders.load())
    data = batches(labels=True)
    one, other = (DamageSelector(0.02, units="weight").select(run, data) for run in (folders, live))
    assert one.equal(other)
    assert one.made_by["entries"] == other.made_by["entries"]
    assert one.made_by["checkpoints"]["earlier"]["sha256"]


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.sampled_from([0.0, -0.0, -1.0, 1.0, 1.0000001, 1e-45, -1e-45, 3e38, 0.5, 2.0])
        | st.floats(width=32, allow_nan=False, allow_infinity=False),
        max_size=60,
    ),
    st.integers(0, 70),
    st.integers(1, 9),
)
def test_the_best_are_those_of_a_sort(values, count, chunk):
    """Against a stable sort: exact at ties, at signed zeros and at denormals, whatever the chunk."""
    flat = torch.tensor(values, dtype=torch.float32)
    order = flat.sort(descending=True, stable=True).indices
    want = order[flat[order] > 0][:count]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weight_ranking, "CHUNK", chunk)
        assert Gains(flat, {"a/up": (len(flat), 1)}, nn.Module(), None, [], 1, 0.0).best(count).equal(want)  # type: ignore[arg-type]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 400), st.booleans())
def test_the_best_are_those_of_a_sort_where_a_sample_guesses_too(seed, count, clustered):
    """Many numbers and few wanted: also where the sample has seen none of the highest."""
    flat = torch.randn(40_000, generator=torch.Generator().manual_seed(seed))
    if clustered:
        flat[torch.arange(40_000) % 64 == 0] += 5.0  # what is looked at is far above all others
    order = flat.sort(descending=True, stable=True).indices
    found = Gains(flat, {"a/up": (len(flat), 1)}, nn.Module(), None, [], 1, 0.0)  # type: ignore[arg-type]
    assert found.best(count).equal(order[:count])


# Round by round, and where to stop.


@pytest.mark.parametrize(
    ("family", "budget"), [*((f, b) for f in fewer(("llama",), SEVEN) for b in (0.02, 0.5)), *((f, 1.0) for f in SEVEN)]
)
def test_stopping_keeps_the_least_loss_that_was_measured(family, budget):
    earlier, later, run = small_pair(family)
    data, units = batches(labels=True), units_asked(run, "weight")
    before = snapshot(later)
    mask = by_damage(run, data, budget, units=units, loss="kl")
    assert same(snapshot(later), before)
    told = mask.made_by["entries"]
    curve = dict(map(tuple, told["curve"]))
    taken = sum(mask.count().values())
    assert curve[taken] == min(curve.values())
    assert list(curve) == sorted(curve)
    whole = by_damage(run, data, budget, units=units, stop=False, loss="kl")
    assert (mask & whole).equal(mask)
    held = weight_selection._path(run, data, loss="kl", rounds=16, units=units).held
    assert curve[0] == pytest.approx(float(divergence(earlier, later, held).detach()), rel=1e-3)
    with torch.no_grad(), operators.rollback(later, to=earlier, mask=mask):
        assert curve[taken] == pytest.approx(float(divergence(earlier, later, held)), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize("family", fewer(("llama", "qwen3_moe"), SEVEN))
def test_each_round_takes_the_best_by_the_lower_of_two_gains(family):
    earlier, later, run = small_pair(family)
    data, before, units = batches(labels=True), snapshot(later), units_asked(run, "weight")
    path = weight_selection._path(run, data, loss="kl", rounds=4, units=units)
    path.to(path.total // 20, stop=False)
    assert same(snapshot(later), before)
    assert len(path.ends) > 4
    assert path.ends[3] == round(0.0025 * path.total)
    taken = torch.zeros(0, dtype=torch.int64)
    for at, end in enumerate(path.ends):
        with operators.rollback(later, to=earlier, mask=weight_ranking.entries_of(taken, path.shapes)):
            one, other = (entry_gains(run, lot, loss=path.loss, units=units).flat for lot in path._drawn(at))
        lower = torch.minimum(one, other)
        lower[taken] = 0
        order = lower.sort(descending=True, stable=True)
        new = path.taken[len(taken) : end]
        assert new.equal(order.indices[: len(new)])
        assert float(order.values[len(new) - 1]) > 0
        taken = path.taken[:end]
    assert len(taken.unique()) == len(taken)
    growing = [end - start for start, end in pairwise([0, *path.ends])]
    assert growing == sorted(growing)


SIZES = [(1, 1024), (2, 1024), (3, 1024), (5, 1024), (9, 1024), (16, 1024), (40, 1024), (130, 1024), (130, 25), (7, 9)]


@pytest.mark.parametrize(("prompts", "tokens"), SIZES)
def test_lots_and_what_measures_are_made_of_all_prompts(prompts, tokens, monkeypatch):
    """From 16 prompts on a quarter measures and does not choose, and every lot is drawn before any is drawn again.

    The first lot of a round is one pass: of its gradients no sums are kept.
    """
    monkeypatch.setattr(prompts_of, "TOKENS", tokens)
    rows = [torch.tensor([[at % 60, at // 60, *[7] * (at % 6 + 2)]]) for at in range(prompts)]
    data = [{"input_ids": r, "attention_mask": torch.ones_like(r), "labels": r.clone()} for r in rows]
    _, _, run = small_pair("llama")
    path = weight_selection._path(run, data, loss=cross_entropy, rounds=4, units=units_asked(run, "weight"))

    def texts(batches):
        return sorted(
            tuple(row[seen.bool()].tolist())
            for b in batches
            for row, seen in zip(b["input_ids"], b["attention_mask"], strict=True)
        )

    every, held = [tuple(row[0].tolist()) for row in rows], texts(path.held)
    lots = texts(batch for lot in path.lots for batch in lot)
    assert set(held) | set(lots) <= set(every)
    if prompts >= 16:
        assert not set(lots) & set(held)
        assert len(held) == pytest.approx(prompts / 4, abs=max(2.0, prompts / 10))
        assert len(lots) + len(held) > 0.8 * prompts
    else:
        assert held == sorted(every)
        assert len(lots) > 0.6 * prompts
    assert all(sum(len(b["input_ids"]) for b in lot) <= 16 for lot in path.lots)
    drawn = [path._drawn(at) for at in range(len(path.lots) // 2)] or [path._drawn(0)]
    once = [id(batch) for pair in drawn for lot in pair for batch in lot]
    assert len(once) == len(set(once))
    assert all(len(first) == 1 for first, *_ in drawn)
    assert tokens < 1024 or all(len(lot) == 1 for lot in path.lots)  # what fits goes through together
    assert len(texts(b for pair in drawn for lot in pair for b in lot)) >= len(lots) - 16


@pytest.mark.parametrize("loss", ["hellinger", cross_entropy], ids=["hellinger", "own"])
@pytest.mark.parametrize("empty", [0, 3])
def test_a_prompt_without_a_response_token_is_left_out(empty, loss):
    _, _, run = small_pair("llama")
    data = [padded([([5, 6, 7 + at], [8, 9, 2])], 0) for at in range(6)]
    without, (row,) = data[:empty] + data[empty + 1 :], data[empty]["input_ids"].tolist()
    data[empty] = padded([([*row, *[9] * 9], [])], 0)  # the longest, so that it comes first
    given = [DamageSelector(0.01, units="weight", loss=loss, rounds=4).select(run, some) for some in (data, without)]
    assert sum(given[0].count().values()) > 0
    assert given[0].equal(given[1])


@pytest.mark.parametrize("units", ["weight", "mlp"])
def test_prompts_without_any_response_token_are_refused(units):
    _, _, run = small_pair("llama")
    data = [padded([([5, 6, 7], [])], 0)]
    for loss in ("hellinger", cross_entropy):
        with pytest.raises(ValueError, match="response token to predict"):
            DamageSelector(0.01, units=units, loss=loss).select(run, data)


def test_rounds_need_fewer_weights_than_one_look():
    """What they are for: at the same number of weights, less of the loss is left."""
    earlier, later, run = small_pair("qwen3")
    data = batches(labels=True)

    def left(rounds: int) -> float:
        mask = by_damage(run, data, 0.0025, units=units_asked(run, "weight"), rounds=rounds, stop=False)
        with torch.no_grad(), operators.rollback(later, to=earlier, mask=mask):
            return float(divergence(earlier, later, data))

    with torch.no_grad():
        whole = float(divergence(earlier, later, data))
    assert whole - left(16) > whole - left(1)


def test_nothing_is_taken_where_nothing_helps():
    """A loss that is least at the later model though its gradient says otherwise: sharp in every direction."""
    earlier, later, run = small_pair("llama")
    home = {name: p.detach().clone() for name, p in later.named_parameters()}
    sign = {name: torch.sign(home[name] - dict(State(earlier))[name]) for name in home}

    def loss(model, batch):
        moved = [(p - home[name], sign[name]) for name, p in model.named_parameters()]
        return sum((m * s).sum() + 1e6 * (m * m).sum() for m, s in moved)

    assert not sum(by_damage(run, batches(labels=True), 0.1, units=BOTH, loss=loss).count().values())
    assert sum(by_damage(run, batches(labels=True), 0.1, units=BOTH, loss=loss, stop=False).count().values())


# The mask itself.


def test_a_file_holds_what_was_saved(tmp_path):
    mask = some_entries(find_layout(build("qwen3"), units=BOTH), 0.01)
    mask = Entries(mask, shapes=mask.shapes, made_by={"by": "hand"})
    mask.save(tmp_path / "m")
    found = load_mask(tmp_path / "m")
    assert isinstance(found, Entries)
    assert found.equal(mask)
    assert found.made_by == {"by": "hand"}
    assert list(found) == list(mask)
    assert all(value.dtype == torch.int64 for value in found.values())
    with pytest.raises(ValueError, match=r"not one that Neurons.save wrote: use Entries.load"):
        Neurons.load(tmp_path / "m")
    all_neurons(find_layout(build("qwen3"))).save(tmp_path / "n")
    assert isinstance(load_mask(tmp_path / "n"), Neurons)
    with pytest.raises(ValueError, match=r"not one that Entries.save wrote"):
        Entries.load(tmp_path / "n")
    (tmp_path / "x").write_bytes(b"no")
    with pytest.raises(ValueError, match="not a readable safetensors file"):
        load_mask(tmp_path / "x")


@pytest.mark.parametrize(
    ("positions", "message"),
    [
        ({"b/up": torch.tensor([1])}, "no such part"),
        ({"a/up": torch.tensor([1, 6])}, "from 0 to 5"),
        ({"a/up": torch.tensor([-1, 2])}, "from 0 to 5"),
        ({"a/up": torch.tensor([2, 1])}, "ascending"),
        ({"a/up": torch.tensor([2, 2])}, "each once"),
        ({"a/up": torch.tensor([0.0])}, "as integers"),
        ({"a/up": torch.tensor([True, False])}, "as integers"),
        ({"a/up": torch.tensor([[1]])}, "in one dimension"),
    ],
)
def test_what_a_mask_refuses(positions, message):
    with pytest.raises(ValueError, match=message):
        Entries(positions, shapes={"a/up": (2, 3)})


def test_masks_combine_as_sets():
    shapes = {"a/up": (2, 3), "a/down": (2, 3)}
    one = Entries({"a/up": torch.tensor([0, 2, 5])}, shapes=shapes)
    two = Entries({"a/up": torch.tensor([2, 3]), "a/down": torch.tensor([1])}, shapes=shapes)
    assert (one & two)["a/up"].tolist() == [2]
    assert (one | two)["a/up"].tolist() == [0, 2, 3, 5]
    assert (one | two)["a/down"].tolist() == [1]
    assert jaccard(one, two) == 0.2
    assert one.fraction == 3 / 12
    assert not one.equal(two)
    with pytest.raises(ValueError, match="different models"):
        one | Entries({}, shapes={"a/up": (3, 2), "a/down": (2, 3)})


def test_a_mask_of_another_model_is_refused():
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    other = some_entries(find_layout(build("gpt2"), units=BOTH))
    with pytest.raises(ValueError, match="Make the mask again"):
        operators.rollback(later, to=earlier, mask=other)


def test_only_the_mlps_where_attention_is_unclear_or_the_layout_is_given():
    _, later, run = small_pair("llama")
    assert DamageSelector(0.1, units="weight").select(run, batches(labels=True)).units == BOTH
    _, _, run = small_pair("deepseek_v3")
    with pytest.warns(UserWarning, match="weights of attention are no candidates"):
        assert DamageSelector(0.1, units="weight").select(run, batches(labels=True)).units == ("mlp",)
    for kinds in (("mlp",), ("kv_group",)):
        layout = find_layout(later, units=kinds)
        assert units_asked(Trajectory(earlier=later, later=later, layout=layout), "weight") == kinds
    with pytest.raises(ValueError, match="found for certain"):
        DamageSelector(0.1, units=(*BOTH, "weight")).select(run, batches(labels=True))


def test_what_choosing_by_damage_needs():
    _, _, run = small_pair("llama")
    with pytest.raises(ValueError, match="D is measured on prompts"):
        by_damage(run, None, 0.1, units=BOTH)
    for rounds in (0, True, 1.5):
        with pytest.raises(ValueError, match=r"how many rounds make 0.25 %"):
            by_damage(run, batches(labels=True), 0.1, units=BOTH, rounds=rounds)


def test_sweep_measures_single_weights():
    earlier, later, run = small_pair("qwen3")
    data = batches(labels=True)
    before = snapshot(later)

    def evaluate(model):
        return {"like earlier": -float(divergence(earlier, model, data)), "other": 0.0}

    by_d, budgets = DamageSelector(0.1, units="weight"), [0.0005, 0.01]
    table = sweep(run, data, selectors=[by_d], budgets=budgets, evaluate=evaluate)
    names = [row.selector for row in table]
    assert names[2] == "ceiling (all units (neurons and KV groups))"
    assert [row.neurons for row in table["D of single weights"]] == [
        sum(replace(by_d, budget=budget).select(run, data).count().values()) for budget in budgets
    ]
    (small, large) = table["D of single weights"]
    assert 0 < (small.recovery or 0) < (large.recovery or 0)
    assert same(snapshot(later), before)


MEMORY = """
import sys, threading, torch
from pathlib import Path
from surgery.scores.weights import Gains
from surgery.scores.weights import zeros_on_disk

def anonymous():
    lines = Path("/proc/self/status").read_text().split("\\n")
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon")) / 1024

count = 1 << 26  # 256 MB; a boolean per weight would be 64
flat = zeros_on_disk(count)
for at in range(0, count, 1 << 20):
    flat[at : at + (1 << 20)] = torch.randn(1 << 20)
scores = Gains(flat, {"a/up": (count, 1)}, torch.nn.Linear(1, 1), None, [], 1, 0.0)
Gains(torch.randn(1000), {"a/up": (1000, 1)}, torch.nn.Linear(1, 1), None, [], 1, 0.0).best(10)  # what torch loads late
start, peak, done = anonymous(), [0.0], threading.Event()
def watch():
    while not done.wait(0.002):
        peak[0] = max(peak[0], anonymous())
thread = threading.Thread(target=watch); thread.start()
mask = scores.entries(scores.best(count // 1000))
done.set(); thread.join()
assert len(mask["a/up"]) == count // 1000
print(peak[0] - start)
"""


def test_anonymous_memory_is_bounded_by_a_chunk():
    """256 MB of scores: what choosing among them holds beyond the page cache is a few chunks."""
    found = subprocess.run(
        [sys.executable, "-c", MEMORY], capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1]
    )
    assert float(found.stdout) < 32, f"{found.stdout} MB"


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_long_parts_are_read_and_written_in_pieces(family, monkeypatch):
    earlier, later, run = small_pair(family)
    data, before = batches(labels=True), snapshot(later)
    whole = by_damage(run, data, 0.05, units=units_asked(run, "weight"), stop=False)
    want = expected(before, dict(State(earlier)), finest(later), whole)
    for module, name, size in ((entries, "_RUN", 50), (gradient_hooks, "CHUNK", 100), (weight_ranking, "CHUNK", 1000)):
        monkeypatch.setattr(module, name, size)
    assert by_damage(run, data, 0.05, units=units_asked(run, "weight"), stop=False).equal(whole)
    with operators.rollback(later, to=earlier, mask=whole) as done:
        assert same(snapshot(later), want)
        assert len(done._old) > sum(whole.count().values()) / 50
    assert same(snapshot(later), before)


# Mutants: each changes one thing, and one of the tests above has to fail.


def neighbour(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, tensor, positions, values, original=Slot.put_entries):
        original(self, tensor, (positions + 1) % (self.neurons * self.width), values)

    patch.setattr(Slot, "put_entries", mutant)


def undone_elsewhere(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, tensor, positions, original=Slot.take_entries):
        return original(self, tensor, positions.flip(0))

    patch.setattr(Slot, "take_entries", mutant)


def span_in_neurons(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Slot, "span", property(lambda self: (self.start, self.stop)))


def experts_mixed_up(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, tensors, part, positions, original=Block.entries):
        return original(self, tensors, part, positions).flip(0)

    patch.setattr(Block, "entries", mutant)


def first_run_only(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, layout, whose, original=Entries.edits):
        seen = set()
        for edit in original(self, layout, whose):
            if (edit.block.name, edit.slot) not in seen:
                seen.add((edit.block.name, edit.slot))
                yield edit

    patch.setattr(Entries, "edits", mutant)


def one_too_many(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_damage, "best", lambda flat, count, best=weight_damage.best: best(flat, count + 1))


def last_of_the_ties(patch: pytest.MonkeyPatch) -> None:
    def mutant(flat, count, original=weight_damage.best):
        return len(flat) - 1 - original(flat.flip(0), count)

    patch.setattr(weight_damage, "best", mutant)


def lowest_first(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Gains, "best", lambda self, count, original=Gains.best: original(self, count).flip(0))


def of_either_sign(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, count, original=Gains.best):
        return original(replace(self, flat=self.flat.abs()), count)

    patch.setattr(Gains, "best", mutant)


def gradient_alone(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_damage, "_times_change", lambda *_: None)


def parts_from_zero(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_places, "starts_of", lambda shapes: dict.fromkeys(shapes, 0))


def last_batch_only(patch: pytest.MonkeyPatch) -> None:
    def mutant(model, layout, take, original=weight_damage.collecting):
        @contextmanager
        def once():
            calls: dict = {}
            with original(model, layout, lambda b, s, g, p: calls.update({(b.name, s): (b, s, g.clone(), p)})):
                yield
            for call in calls.values():
                take(*call)

        return once()

    patch.setattr(weight_damage, "collecting", mutant)


@pytest.mark.parametrize("rounds", [1, 8, 16])
def test_a_round_takes_a_quarter_more_than_the_last_and_at_most_a_hundredth(rounds):
    path = SimpleNamespace(total=10**9, rounds=rounds)
    ends = [weight_selection._Path._end(path, at) for at in range(80)]
    takes = [later - earlier for earlier, later in pairwise(ends)]
    assert ends[0] == 0
    assert ends[rounds] == pytest.approx(0.0025 * 10**9, abs=1)
    for one, other in pairwise(takes):
        assert other == pytest.approx(min(1.25 * one, 0.01 * 10**9), abs=3)


def goes_to_the_end(patch: pytest.MonkeyPatch) -> None:
    def mutant(*given, key=None):
        return min(*given) if key is None else given[0][-1]

    patch.setattr(weight_selection, "min", mutant, raising=False)


def curve_of_the_later_model(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, count, original=weight_selection._Path._measured):
        return original(self, 0) - 1e-6 * count

    patch.setattr(weight_selection._Path, "_measured", mutant)


def never_again(patch: pytest.MonkeyPatch) -> None:
    """D is measured again at the later model itself."""
    patch.setattr(weight_selection._Path, "_reverted", lambda *_: nullcontext())


def one_lot(patch: pytest.MonkeyPatch) -> None:
    original = weight_selection.best_of_lots
    patch.setattr(weight_selection, "best_of_lots", lambda run, lots, *a, **how: original(run, lots[:1], *a, **how))


def mean_of_lots(patch: pytest.MonkeyPatch) -> None:
    def mutant(run, lots, *given, original=weight_selection.best_of_lots, **how):
        return original(run, [how["loss"].joined(batch for lot in lots for batch in lot)], *given, **how)

    patch.setattr(weight_selection, "best_of_lots", mutant)


def twice_as_far(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection, "_REACH", 0.005)


def measured_where_chosen(patch: pytest.MonkeyPatch) -> None:
    def mutant(run, data, *, original=weight_selection._path, **how):
        path = original(run, data, **how)
        path.lots[0] = path.held
        return path

    patch.setattr(weight_selection, "_path", mutant)


def what_does_not_fit_is_lost(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, at, original=weight_selection._Path._drawn):
        first, *others = original(self, at)
        return [first, *(lot[-1:] for lot in others)]

    patch.setattr(weight_selection._Path, "_drawn", mutant)


def first_lots_of_several_passes(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(weight_selection._Path, "_drawn", lambda self, at: self.lots[2 * at : 2 * at + 2])


def left_reverted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operators.Rollback, "__exit__", lambda *_: None)


def law_written() -> None:
    earlier, later = build("mixtral", torch.float32, 1), build("mixtral", torch.float32, 2)
    law_exact(later, earlier, some_entries(finest(later)))
    law_ends(later, earlier, some_entries(finest(later)))


def law_in_pieces() -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_long_parts_are_read_and_written_in_pieces("qwen3", patch)


def law_best() -> None:
    found = Gains(torch.tensor([1.0, 3.0, 3.0, -4.0, 3.0]), {"a/up": (5, 1)}, nn.Module(), None, [], 1, 0.0)  # type: ignore[arg-type]
    assert found.best(2).tolist() == [1, 2]
    assert found.best(9).tolist() == [1, 2, 4, 0]


def law_gains() -> None:
    test_gains_add_up_to_the_damage_of_each_neuron("llama")


def law_stop() -> None:
    test_stopping_keeps_the_least_loss_that_was_measured("qwen3", 1.0)


def law_rounds() -> None:
    test_each_round_takes_the_best_by_the_lower_of_two_gains("llama")


def law_lots() -> None:
    for prompts, tokens in ((40, 1024), (130, 25)):
        with pytest.MonkeyPatch.context() as patch:
            test_lots_and_what_measures_are_made_of_all_prompts(prompts, tokens, patch)


MUTANTS = (
    (neighbour, law_written), (undone_elsewhere, law_written), (span_in_neurons, law_written),
    (experts_mixed_up, law_written), (left_reverted, law_written), (first_run_only, law_in_pieces),
    (one_too_many, law_best), (last_of_the_ties, law_best), (lowest_first, law_best), (of_either_sign, law_best),
    (gradient_alone, law_gains), (parts_from_zero, law_gains), (last_batch_only, law_gains),
    (goes_to_the_end, law_stop), (curve_of_the_later_model, law_stop), (never_again, law_rounds),
    (one_lot, law_rounds), (mean_of_lots, law_rounds), (twice_as_far, law_rounds),
    (measured_where_chosen, law_lots), (what_does_not_fit_is_lost, law_lots), (first_lots_of_several_passes, law_lots),
)  # fmt: skip


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant, law):
    dies(mutant, law)


@pytest.mark.parametrize("law", sorted({law for _, law in MUTANTS}, key=lambda law: law.__name__))
def test_without_a_mutant_the_laws_hold(law):
    law()
