"""Both kinds of mask answer alike: whole neurons, and the positions of all their weights, are one choice."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from families import build
from mutants import dies
from test_laws import same, snapshot
from torch import nn

from surgery import Checkpoint, Entries, Neurons, rollback, rolled_back, save
from surgery.checkpoints.checkpoint import State
from surgery.layout import find_layout
from surgery.layout.slots import Layout
from surgery.masks.edits import Numbers
from surgery.masks.entries import shapes_of
from surgery.masks.mask import Mask, checked, load_mask
from surgery.measure import jaccard
from surgery.reverting.provenance import CARD, RECORD
from surgery.reverting.writing import applied, recorded

CASES = [
    ("llama", "mlp"),
    ("gpt2", ("mlp", "kv_group")),
    ("phi3", "value_channel"),
    ("mixtral", "mlp"),
    ("gpt_oss", "mlp"),
]


def some(layout: Layout, seed: int, density: float = 0.3) -> Neurons:
    random = torch.Generator().manual_seed(seed)
    return Neurons({name: torch.rand(n, generator=random) < density for name, n in layout.sizes.items()})


def weights_of(mask: Neurons, layout: Layout) -> Entries:
    """The same weights, one by one."""
    shapes = shapes_of(layout)
    rows = {part: mask[part.rpartition("/")[0]] for part in shapes}
    found = {part: rows[part].repeat_interleave(width).nonzero().flatten() for part, (_, width) in shapes.items()}
    return Entries(found, shapes=shapes, made_by=mask.made_by)


def written(model: nn.Module, earlier: nn.Module, mask: Mask, **settings: Any) -> tuple[dict[str, torch.Tensor], int]:
    """The model's bits with a mask reverted, and how many numbers were written."""
    with rollback(model, to=earlier, mask=mask, **settings) as done:
        return snapshot(model), sum(done.parameters.values())


def law_alike(family: str, units: Any) -> None:
    earlier, later = build(family, torch.bfloat16, 1), build(family, torch.bfloat16, 2)
    layout = find_layout(later, units=units)
    one, other = some(layout, 1), some(layout, 2)
    each = Neurons({name: torch.rand(n) * 3 for name, n in layout.sizes.items()})
    for neurons in (one, other, one & other, one | other):
        entries, before = weights_of(neurons, layout), snapshot(later)
        assert entries.units == neurons.units
        numbers = sum(count * layout[name].width for name, count in neurons.count().items())
        assert sum(entries.count().values()) == numbers > 0
        for settings in ({}, {"strength": 0.3}, {"strength": each}):
            found, count = written(later, earlier, neurons, **settings)
            theirs, their_count = written(later, earlier, entries, **settings)
            assert same(found, theirs)
            assert not same(found, before)
            assert count == their_count == numbers
        views = [rolled_back(State(later), to=State(earlier), mask=mask) for mask in (neurons, entries)]
        assert same(*({name: view[name] for name in view} for view in views))
        assert views[0].parameters == views[1].parameters
        for name, block in layout.items():
            own = each[name][neurons.indices(name)]
            for part in block.parts:
                alone = Entries({f"{name}/{part}": entries[f"{name}/{part}"]}, shapes=entries.shapes)
                assert alone.strengths(each).equal(own.repeat_interleave(block.of(part)[0].width))
        assert neurons.strengths(each).equal(torch.cat([each[n][neurons.indices(n)] for n in layout]))
        assert recorded(each, neurons)["most"] == recorded(each, entries)["most"]
        assert len(applied(0.5, neurons)) == sum(neurons.count().values())
    two = weights_of(one, layout), weights_of(other, layout)
    assert (two[0] & two[1]).equal(weights_of(one & other, layout))
    assert (two[0] | two[1]).equal(weights_of(one | other, layout))
    assert one.equal(other) == two[0].equal(two[1]) is False
    if len(layout.units) == 1 and len({block.width for block in layout.blocks}) == 1:
        assert one.fraction == pytest.approx(two[0].fraction)
        assert jaccard(one, other) == pytest.approx(jaccard(*two))


@pytest.mark.parametrize(("family", "units"), CASES)
def test_whole_neurons_and_all_their_weights_are_one_choice(family, units):
    law_alike(family, units)


@pytest.mark.parametrize(("family", "units"), CASES[:3])
def test_a_mask_is_a_value_with_a_record(family, units, tmp_path):
    """Signed, saved and loaded it selects the same, and says what was said of it; words fit the counts."""
    layout = find_layout(build(family), units=units)
    neurons = some(layout, 1)
    for mask in (neurons, weights_of(neurons, layout)):
        signed = mask.signed({"by": "hand"}).signed({"for": [1, 2]})
        assert signed.equal(mask)  # type: ignore[arg-type]
        assert (signed.made_by, mask.made_by) == ({"by": "hand", "for": [1, 2]}, {})
        signed.save(tmp_path / "mask")
        read = load_mask(tmp_path / "mask")
        assert type(read) is type(mask)
        assert read == mask
        assert read.made_by == signed.made_by
        ((_, tally),) = mask.tally().items()
        assert (tally["reverted"], tally["of"]) == (sum(mask.count().values()), mask.total)
        assert mask.count() in tally.values()
        assert mask.noun in repr(mask)
        assert mask.fraction == tally["reverted"] / tally["of"]
        assert checked(mask) is mask


def test_a_saved_folder_says_what_was_selected(tmp_path):
    for name, seed in (("earlier", 1), ("later", 2)):
        build("llama", seed=seed).save_pretrained(tmp_path / name)
    layout = find_layout(build("llama"))
    neurons = some(layout, 1)
    folders = []
    for mask, kind, words in (
        (neurons, "neurons", "MLP neurons"),
        (weights_of(neurons, layout), "weights", "weights of neurons"),
    ):
        view = rolled_back(tmp_path / "later", to=tmp_path / "earlier", mask=mask)
        out = save(view, tmp_path / kind)
        record = json.loads((out / RECORD).read_text())
        assert record[kind] == mask.tally()[kind]
        assert record["parameters"] == view.parameters
        assert f"{sum(mask.count().values())} of {mask.total} {words}" in (out / CARD).read_text()
        folders.append(dict(Checkpoint(out)))
    assert same(*folders)


# Mutants.


def by_offset(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Numbers, "neurons", property(lambda self: self.index % self.slot.neurons))


def strengths_of_the_first(patch: pytest.MonkeyPatch) -> None:
    original = Neurons.strengths
    patch.setattr(
        Neurons, "strengths", lambda self, each: original(self, Neurons({n: v.roll(1) for n, v in each.items()}))
    )


def a_part_forgotten(patch: pytest.MonkeyPatch) -> None:
    original = Neurons.edits
    patch.setattr(Neurons, "edits", lambda *given: (e for e in original(*given) if not e.slot.part.startswith("up")))


def as_either(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(Entries, "__and__", Entries.__or__)


@pytest.mark.parametrize("mutant", [by_offset, strengths_of_the_first, a_part_forgotten, as_either])
def test_mutants_die(mutant):
    dies(mutant, lambda: law_alike("llama", "mlp"))
