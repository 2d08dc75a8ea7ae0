"""The laws of rolling back, over architectures, dtypes and selectors; and the mutants that they have to kill."""

from __future__ import annotations

import hashlib
import os
import signal
from contextlib import suppress
from dataclasses import replace
from functools import cache
from importlib import import_module
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from families import build, downstream
from hypothesis import given, settings
from hypothesis import strategies as st
from interrupts import at_every_line
from safetensors.torch import load_file, save_file
from torch import nn

from surgery import AMCSelector, Checkpoint, Neurons, RandomSelector, Trajectory, rolled_back, save
from surgery.checkpoints.checkpoint import State, in_force
from surgery.layout import find_layout
from surgery.layout.on_disk import folder_layout
from surgery.layout.slots import Layout, Slot
from surgery.masks import budget

operators = import_module("surgery.reverting.rollback")
writing = import_module("surgery.reverting.writing")


DTYPES = (torch.float32, torch.bfloat16, torch.float16)
THREE = ("llama", "gpt2", "mixtral")
Tensors = dict[str, torch.Tensor]


def data() -> list[Tensors]:
    """One batch with padding, the same at every call."""
    ids = torch.randint(3, 64, (3, 12), generator=torch.Generator().manual_seed(3))
    attended = torch.ones_like(ids)
    attended[0, 8:] = 0
    return [{"input_ids": ids, "attention_mask": attended}]


def snapshot(model: nn.Module) -> Tensors:
    return {name: tensor.clone() for name, tensor in State(model).items()}


def same(a: Tensors, b: Tensors) -> bool:
    """Bit for bit (0 and -0 differ)."""
    return a.keys() == b.keys() and all(bits(a[name]).equal(bits(b[name])) for name in a)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.contiguous().flatten().view(torch.uint8)


def some_neurons(layout: Layout, seed: int = 0, density: float = 0.3) -> Neurons:
    random = torch.Generator().manual_seed(seed)
    return Neurons({name: torch.rand(size, generator=random) < density for name, size in layout.sizes.items()})


def all_neurons(layout: Layout) -> Neurons:
    return Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in layout.sizes.items()})


def expected(later: Tensors, earlier: Tensors, layout: Layout, mask: Neurons) -> Tensors:
    """What a rollback has to give, by boolean masks over the slots' views (no index, no ``take``, no ``put``)."""
    result = {name: tensor.clone() for name, tensor in later.items()}
    for block in layout.blocks:
        for slot in block.slots:
            mine = mask[block.name][slot.start : slot.stop]
            there, source = slot.view(result[slot.tensor]), slot.view(earlier[slot.tensor])
            chosen = mine.reshape(there.shape[: 1 + slot.stacked])
            there[chosen] = source[chosen]
    return result


# The laws: each is given a later model, an earlier one and a mask, and leaves the later model as it was.


def law_undo(later: nn.Module, earlier: nn.Module, mask: Neurons) -> None:
    """undo ∘ rollback = identity; undoing twice = once; a ``with`` block undoes, also when its body raises."""
    before = snapshot(later)
    done = operators.rollback(later, to=earlier, mask=mask)
    assert not same(snapshot(later), before)
    done.undo()
    assert same(snapshot(later), before)
    done.undo()
    assert same(snapshot(later), before)
    with suppress(ZeroDivisionError), operators.rollback(later, to=earlier, mask=mask):
        assert not same(snapshot(later), before)
        raise ZeroDivisionError
    assert same(snapshot(later), before)


def law_slices(later: nn.Module, earlier: nn.Module, mask: Neurons) -> None:
    """Exactly the masked slices are earlier's, all else is later's, and the report counts what changed."""
    before = snapshot(later)
    layout = find_layout(later)
    want = expected(before, dict(State(earlier)), layout, mask)
    with operators.rollback(later, to=earlier, mask=mask) as done:
        assert same(snapshot(later), want)
        assert done.neurons == mask.count()
        assert done.parameters == {name: n * layout[name].width for name, n in mask.count().items()}
        view = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        whole = {name: view[tensor.element_size()] for name, tensor in before.items()}
        moved = sum(int((before[n].view(t) != want[n].view(t)).sum()) for n, t in whole.items())
        assert done.changed == moved


def law_twice(later: nn.Module, earlier: nn.Module, mask: Neurons) -> None:
    """Rolling back twice = once; undone in reverse order both are undone."""
    before = snapshot(later)
    first = operators.rollback(later, to=earlier, mask=mask)
    once = snapshot(later)
    second = operators.rollback(later, to=earlier, mask=mask)
    assert second.changed == 0
    assert same(snapshot(later), once)
    second.undo()
    assert same(snapshot(later), once)
    first.undo()
    assert same(snapshot(later), before)


def law_ends(later: nn.Module, earlier: nn.Module, _: Neurons) -> None:
    """Budget 0 is the later model; budget 1 is the earlier one's MLP, whole tensors of it, and all else later's."""
    before, old, layout = snapshot(later), dict(State(earlier)), find_layout(later)
    mlp = {slot.tensor for block in layout.blocks for slot in block.slots}
    with operators.rollback(later, to=earlier, mask=~all_neurons(layout)) as done:
        assert done.changed == 0
        assert same(snapshot(later), before)
    with operators.rollback(later, to=earlier, mask=all_neurons(layout)):
        now = snapshot(later)
    assert same({name: now[name] for name in mlp}, {name: old[name] for name in mlp})
    assert same({n: t for n, t in now.items() if n not in mlp}, {n: t for n, t in before.items() if n not in mlp})
    assert same(snapshot(later), before)


def law_copies(later: nn.Module, earlier: nn.Module, mask: Neurons) -> None:
    """``rolled_back`` is what ``rollback`` makes, and writes to neither of the mappings that it reads."""
    ours, theirs = snapshot(later), snapshot(earlier)
    view = rolled_back(State(later), to=State(earlier), mask=mask)
    found = {name: view[name] for name in view}
    assert same(snapshot(later), ours)
    assert same(snapshot(earlier), theirs)
    assert same(found, expected(ours, theirs, find_layout(later), mask))
    for tensor in (found[name] for name in view._edits):
        tensor.zero_()
    assert same(snapshot(later), ours)


def law_selected(later: nn.Module, earlier: nn.Module, _: Neurons) -> None:
    """A selector takes exactly round(β·N) neurons, the ones of the highest score in each layer, by the layer's mean."""
    from surgery import allocate, magnitude, top

    run = Trajectory(earlier=earlier, later=later)
    scores = Neurons({name: value.double() / value.double().mean() for name, value in magnitude(run).items()})
    for how in ("proportional", "global", "uniform"):
        for fraction in (0.06, 0.25, 0.777):
            mask = AMCSelector(fraction, rank="M", allocate="M", how=how).select(run)
            assert sum(mask.count().values()) == round(fraction * scores.total)
            assert mask.equal(top(scores, allocate(scores, fraction, how=how)))
            for name, value in scores.items():
                inside, outside = value[mask[name]], value[~mask[name]]
                assert not len(inside) or not len(outside) or inside.min() >= outside.max()


def law_contained(later: nn.Module, earlier: nn.Module, _: Neurons) -> None:
    """A bigger budget contains the smaller: with global allocation, and at random with one seed."""
    run = Trajectory(earlier=earlier, later=later)
    kinds = [
        AMCSelector(0.0, rank="M", allocate="M", how="global"),
        RandomSelector(0.0, seed=1),
        RandomSelector(0.0, seed=2),
    ]
    for kind in kinds:
        masks = [replace(kind, budget=fraction).select(run) for fraction in (0.0, 0.03, 0.1, 0.5, 1.0)]
        assert all((small & big).equal(small) for small, big in pairwise(masks))
        assert [sum(mask.count().values()) for mask in masks] == sorted({sum(m.count().values()) for m in masks})
    one, other = (kind.select(run) for kind in (RandomSelector(0.3, seed=1), RandomSelector(0.3, seed=2)))
    assert not one.equal(other)


LAWS = (law_undo, law_slices, law_twice, law_ends, law_copies)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", downstream())
def test_live_laws(family, dtype):
    """Every law of a live rollback, for every architecture in every dtype."""
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    mask = some_neurons(find_layout(later))
    for law in LAWS:
        law(later, earlier, mask)


@pytest.mark.parametrize("family", downstream())
def test_selection_laws(family):
    """Budgets add up, the highest are taken, bigger budgets contain smaller ones, for every architecture."""
    earlier, later = build(family, torch.bfloat16, 1), build(family, torch.bfloat16, 2)
    law_selected(later, earlier, Neurons({}))
    law_contained(later, earlier, Neurons({}))


def hashes(folder: Path) -> dict[str, str]:
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


OTHERS = [(family, dtype) for family in THREE for dtype in DTYPES if dtype != torch.bfloat16]


@pytest.mark.parametrize(("family", "dtype"), [*((f, torch.bfloat16) for f in downstream()), *OTHERS], ids=str)
def test_live_and_folder_agree(family, dtype, tmp_path):
    """One mask from both, one result of both, bit for bit, also where names and shapes differ; no input is written."""
    models = dict(zip(("base", "earlier", "later"), (build(family, dtype, seed) for seed in range(3)), strict=True))
    for name, model in models.items():
        model.save_pretrained(tmp_path / name, max_shard_size="24KB")
    folder = Trajectory(**{name: str(tmp_path / name) for name in models})
    models["later"] = folder.load()  # as a user has it: ``build`` rounds the rotary frequencies too, loading doesn't
    live = Trajectory(**models)
    before = {name: hashes(tmp_path / name) for name in models}
    assert any(len(files) > 4 for files in before.values())  # shards and an index

    mask = AMCSelector(0.1).select(live, data())
    assert AMCSelector(0.1).select(folder, data()).equal(mask)

    view = rolled_back(folder.later, to=folder.earlier, mask=mask)
    out = save(view, tmp_path / "out")
    assert {name: hashes(tmp_path / name) for name in models} == before
    kept = {name: value for name, value in before["later"].items() if not name.startswith("model-")}
    assert kept.items() <= hashes(out).items()

    with operators.rollback(models["later"], to=folder.earlier, mask=mask) as done:
        assert done.changed
        models["later"].save_pretrained(tmp_path / "live", max_shard_size="24KB")
    ours, theirs = dict(Checkpoint(out)), dict(Checkpoint(tmp_path / "live"))
    # transformers loads a router's correction bias in float32 whatever its dtype on disk, and saves it so
    assert same(ours, {name: tensor.to(ours[name].dtype) for name, tensor in theirs.items()})
    assert same(ours, dict(view))
    assert not same(ours, dict(Checkpoint(tmp_path / "later")))


@cache
def pair(family: str) -> tuple[nn.Module, nn.Module]:
    return build(family, torch.bfloat16, 1), build(family, torch.bfloat16, 2)


@settings(deadline=None, max_examples=25)
@given(st.sampled_from(["llama", "phi3", "gpt2", "mixtral", "gpt_oss"]), st.sets(st.integers(0, 95)), st.booleans())
def test_any_mask_reverts_its_neurons_and_nothing_else(family, chosen, inverted):
    """Random masks, few and most: the report, the weights and the undo are right."""
    earlier, later = pair(family)
    mask, at = {}, 0
    for name, size in find_layout(later).sizes.items():
        mask[name] = torch.tensor([(at + i) in chosen for i in range(size)]) ^ inverted
        at += size
    law_slices(later, earlier, Neurons(mask))
    law_copies(later, earlier, Neurons(mask))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An earlier and a later folder of a MoE, whose experts lie in one tensor each on disk."""
    home = tmp_path_factory.mktemp("folders")
    for name, seed in (("earlier", 1), ("later", 2)):
        build("mixtral", torch.bfloat16, seed).save_pretrained(home / name)
    return home


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 1000), fraction=st.floats(0, 1))
def test_any_budget_of_a_folder(folders, seed, fraction):
    """Each neuron's slices on disk are earlier's where the mask says so and later's elsewhere, tensor by tensor."""
    earlier, later = Checkpoint(folders / "earlier"), Checkpoint(folders / "later")
    mask = RandomSelector(fraction, seed).select(Trajectory(earlier=earlier, later=later))
    layout = folder_layout(folders / "later", later.shapes)
    assert max(slot.start for block in layout.blocks for slot in block.slots) > 0
    want = expected(dict(later), dict(earlier), layout, mask)
    assert same(dict(rolled_back(later, to=earlier, mask=mask)), want)


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strength(family, dtype):
    """0 changes nothing, 1 copies bits, between them lies the blend, computed in float32 and rounded once."""
    earlier, later = build(family, dtype, 1), build(family, dtype, 2)
    layout, before, old = find_layout(later), snapshot(later), dict(State(earlier))
    mask = some_neurons(layout)
    blend = {name: tensor.float().lerp(old[name].float(), 0.5).to(dtype) for name, tensor in before.items()}
    for strength, source in ((0, before), (0.5, blend), (1, old)):
        want = expected(before, source, layout, mask)
        with operators.rollback(later, to=earlier, mask=mask, strength=strength) as done:
            assert same(snapshot(later), want)
            view = rolled_back(State(earlier), to=State(earlier), mask=mask, strength=strength)
            assert same(dict(view), dict(State(earlier)))
        assert same(snapshot(later), before)
        assert same(dict(rolled_back(State(later), to=earlier, mask=mask, strength=strength)), want)
        moved = done.changed / sum(done.parameters.values())
        assert (f"{moved:.1%} of the entries moved" in str(done)) == (strength == 0.5)
        assert (moved == 0) == (strength == 0)
    for name in (slot.tensor for block in layout.blocks for slot in block.slots):  # an independent blend, in float64
        half = (before[name].double() + old[name].double()) / 2
        torch.testing.assert_close(blend[name].double(), half, rtol=float(torch.finfo(dtype).eps), atol=1e-7)


def test_a_small_step_in_16_bits_is_reported():
    """bfloat16 can't hold a step of 1/1000 of a small difference: the report says how little moved."""
    earlier, later = build("llama", torch.bfloat16, 1), build("llama", torch.bfloat16, 2)
    mask = all_neurons(find_layout(later))
    with operators.rollback(later, to=earlier, mask=mask, strength=0.001) as done:
        assert 0 < done.changed < 0.5 * sum(done.parameters.values())
        assert "rounds back" in str(done)


@pytest.mark.parametrize("strength", [-0.1, 3.1, float("nan"), "1", None])
def test_a_strength_is_a_number_from_0_to_3(strength):
    """Refused before anything is read or written."""
    earlier, later = pair("llama")
    mask = all_neurons(find_layout(later))
    for wrong in (operators.rollback, rolled_back):
        with pytest.raises(ValueError, match="strength"):
            wrong(later, to=earlier, mask=mask, strength=strength)


# Mutants: each is a plausible mistake; the law named beside it has to notice.


def truncated(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(budget, "_neurons", lambda scores, fraction: int(fraction * scores.total))


def lowest(patch: pytest.MonkeyPatch) -> None:
    def worst(name, scores, count):
        mask = torch.zeros(scores[name].numel(), dtype=torch.bool)
        mask[scores[name].sort().indices[:count]] = True
        return mask

    patch.setattr(budget, "_best", worst)


def inverted(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Neurons, "indices", lambda self, name: (~self[name]).nonzero().flatten())


def wrong_rows_saved(patch: pytest.MonkeyPatch) -> None:
    def mutant(*args, original=operators.rollback, **kwargs):
        done = original(*args, **kwargs)
        done._old = [(edit, rows.roll(1, 0)) for edit, rows in done._old]
        return done

    patch.setattr(operators, "rollback", mutant)


def new_rows_saved(patch: pytest.MonkeyPatch) -> None:
    def mutant(*args, original=operators.rollback, **kwargs):
        done = original(*args, **kwargs)
        now = State(done._model)
        done._old = [(edit, edit.take(now[edit.slot.tensor])) for edit, _ in done._old]
        return done

    patch.setattr(operators, "rollback", mutant)


def missing_clone_in_undo(patch: pytest.MonkeyPatch) -> None:
    def alias(self, tensor, index, offsets=None, original=Slot.take):
        view = self.view(tensor)
        if self.stacked or index.diff().ne(1).any():
            return original(self, tensor, index)
        return view[int(index[0]) : int(index[-1]) + 1]

    def write(tensor, edit, rows, original=writing.write):
        original(tensor, edit, rows.clone())  # else torch itself refuses to write a tensor onto itself

    patch.setattr(Slot, "take", alias)
    patch.setattr(operators, "write", write)
    patch.setattr(writing, "write", write)


def missing_clone_in_copy(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, name):
        tensor = self.later.tensors[name]
        self.edit(name, tensor)
        return tensor

    patch.setattr(operators.RolledBack, "__getitem__", mutant)


def neighbour(patch: pytest.MonkeyPatch) -> None:
    def shifted(self, tensor, index, rows, offsets=None, original=Slot.put):
        original(self, tensor, (index + 1) % self.neurons, rows)

    patch.setattr(Slot, "put", shifted)


def no_undo_on_exit(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(operators.Rollback, "__exit__", lambda *_: None)


def down_forgotten(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, layout, whose, original=Neurons.edits):
        return (edit for edit in original(self, layout, whose) if edit.slot.part != "down")

    patch.setattr(Neurons, "edits", mutant)


def blended(patch: pytest.MonkeyPatch) -> None:
    def mutant(edit, source, old, strength, original=writing.new_values):
        return original(edit, source, old, 0.999 if strength == 1 else strength)

    patch.setattr(operators, "new_values", mutant)
    patch.setattr(writing, "new_values", mutant)


def new_seed_per_budget(patch: pytest.MonkeyPatch) -> None:
    def mutant(self, run, data=None, original=RandomSelector.select):
        return original(RandomSelector(self.budget, hash((self.budget, self.seed)) % 1000), run)

    patch.setattr(RandomSelector, "select", mutant)


MUTANTS = [
    (truncated, law_selected),
    (lowest, law_selected),
    (inverted, law_slices),
    (inverted, law_ends),
    (wrong_rows_saved, law_undo),
    (new_rows_saved, law_undo),
    (missing_clone_in_undo, law_undo),
    (missing_clone_in_copy, law_copies),
    (neighbour, law_slices),
    (neighbour, law_copies),
    (no_undo_on_exit, law_undo),
    (down_forgotten, law_ends),
    (blended, law_slices),
    (new_seed_per_budget, law_contained),
]


@pytest.mark.parametrize(("mutant", "law"), MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant, law, monkeypatch):
    """Each law holds, and does not under the mistake that it is there for."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    mask = Neurons({name: torch.arange(n) < 5 for name, n in find_layout(later).sizes.items()})
    law(later, earlier, mask)
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(later, earlier, mask)


# Interruptions and what is refused.


@pytest.mark.parametrize("family", THREE)
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_interrupted_rollback_leaves_the_old_weights(family, error, monkeypatch):
    """Whichever write it is that fails, what was written before it is put back."""
    earlier, later = pair(family)
    layout, before, original = find_layout(later), snapshot(later), Slot.put
    writes = sum(len(block.slots) for block in layout.blocks)
    for last in range(writes):
        calls = iter(range(10_000))

        def failing(self, *args, calls=calls, last=last):
            if next(calls) == last:
                raise error
            original(self, *args)

        monkeypatch.setattr(Slot, "put", failing)
        with pytest.raises(error):
            operators.rollback(later, to=earlier, mask=all_neurons(layout))
        assert same(snapshot(later), before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_is_held_back_until_the_weights_are_whole(monkeypatch):
    """A real signal: during the rollback the old weights come back, during the undo the undo is completed first."""
    earlier, later = pair("llama")
    layout, before, original = find_layout(later), snapshot(later), Slot.put
    handler, sent = signal.getsignal(signal.SIGINT), []

    def signalled(self, *args):
        original(self, *args)
        if not sent:
            sent.append(1)
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Slot, "put", signalled)
    with pytest.raises(KeyboardInterrupt):
        operators.rollback(later, to=earlier, mask=all_neurons(layout))
    assert same(snapshot(later), before)

    done = operators.rollback(later, to=earlier, mask=all_neurons(layout))
    assert not same(snapshot(later), before)
    sent.clear()
    with pytest.raises(KeyboardInterrupt):
        done.undo()
    assert same(snapshot(later), before)
    assert signal.getsignal(signal.SIGINT) is handler


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("kind", ["neurons", "weights"])
def test_ctrl_c_anywhere_in_a_rollback_leaves_the_old_weights(kind):
    """At whichever line the signal comes, the wait for the checks and the report too: else nobody has the undo."""
    earlier, later = pair("llama")
    before = snapshot(later)
    mask = RandomSelector(0.1, units="weight" if kind == "weights" else "mlp").select(Trajectory(None, earlier, later))

    def check(line):
        assert same(snapshot(later), before), line
        assert in_force(later) == [], line

    rollback = operators.rollback
    at_every_line(rollback, lambda: rollback(later, to=earlier, mask=mask).undo(), check)


def test_nan_in_the_earlier_checkpoint_is_refused_before_it_stays():
    """In a masked neuron of the last layer: an error, and the layers written before are put back."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    layout, before = find_layout(later), snapshot(later)
    with torch.no_grad():
        earlier.model.layers[1].mlp.down_proj.weight[0, 7] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        operators.rollback(later, to=earlier, mask=all_neurons(layout))
    assert same(snapshot(later), before)
    without = Neurons({name: torch.arange(n) != 7 for name, n in layout.sizes.items()})
    law_slices(later, earlier, without)


def test_shared_weights_are_refused():
    """Two layers with one down projection: writing the one would change the other."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    later.model.layers[1].mlp.down_proj.weight = later.model.layers[0].mlp.down_proj.weight
    before = snapshot(later)
    with pytest.raises(ValueError, match="shares its memory"):
        operators.rollback(later, to=earlier, mask=all_neurons(find_layout(later)))
    assert same(snapshot(later), before)


def test_overlapping_views_are_refused_and_neighbours_in_one_storage_are_not():
    """A flat buffer of many parameters is fine as long as they do not overlap."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    mlp = later.model.layers[0].mlp
    gate, up = mlp.gate_proj.weight.detach(), mlp.up_proj.weight.detach()
    flat = torch.cat([gate.flatten(), up.flatten()])
    mlp.gate_proj.weight = nn.Parameter(flat[: gate.numel()].view_as(gate))
    mlp.up_proj.weight = nn.Parameter(flat[gate.numel() :].view_as(up))
    law_slices(later, earlier, all_neurons(find_layout(later)))
    mlp.up_proj.weight = nn.Parameter(flat[gate.numel() - 1 : -1].view_as(up))
    with pytest.raises(ValueError, match="shares its memory"):
        operators.rollback(later, to=earlier, mask=all_neurons(find_layout(later)))


def test_offloaded_weights_are_refused():
    """An edit of a weight on the meta device would be lost."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    mask = all_neurons(find_layout(later))
    with pytest.raises(ValueError, match=r"meta device.*rolled_back"):
        operators.rollback(later.to("meta"), to=earlier, mask=mask)


def test_quantised_weights_are_refused(tmp_path):
    """int8, in the live model and in the folder."""
    earlier, later = build("llama", seed=1), build("llama", seed=2)
    mask = all_neurons(find_layout(later))
    later.save_pretrained(tmp_path / "later")
    file = tmp_path / "later" / "model.safetensors"
    name = "model.layers.1.mlp.down_proj.weight"
    tensors = load_file(file)
    save_file({**tensors, name: tensors[name].to(torch.int8)}, file)
    with pytest.raises(ValueError, match=f"{name}.*int8.*quantised"):
        rolled_back(tmp_path / "later", to=earlier, mask=mask)
    down = later.model.layers[1].mlp.down_proj
    down.weight = nn.Parameter(down.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=f"{name}.*int8.*quantised"):
        operators.rollback(later, to=earlier, mask=mask)


def test_scores_and_masks_of_other_models_are_refused():
    """Scores for a mask, a mask of another architecture, an earlier checkpoint of another one: nothing is written."""
    earlier, later = pair("llama")
    other = pair("gpt2")[0]
    layout, before = find_layout(later), snapshot(later)
    scores = Neurons({name: torch.ones(n) for name, n in layout.sizes.items()})
    for to, mask, message in (
        (earlier, scores, "holds scores"),
        (earlier, all_neurons(find_layout(other)), "different models"),
        (other, all_neurons(layout), "different models"),
        ({}, all_neurons(layout), "lacks"),
    ):
        for verb in (operators.rollback, rolled_back):
            with pytest.raises(ValueError, match=message):
                verb(later, to=to, mask=mask)
    assert same(snapshot(later), before)
