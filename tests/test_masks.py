"""Both kinds of mask answer alike: whole neurons, and the positions of all their weights, are one choice."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build
from mutants import dies
from safetensors import safe_open
from safetensors.torch import save_file
from test_laws import same, snapshot
from torch import nn

from surgery import Checkpoint, Entries, Neurons, rollback, rolled_back, save
from surgery.checkpoints.checkpoint import State
from surgery.formats.shards import header_of
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


# Files that others wrote.

MASK = {"layers.0.mlp": torch.tensor([True, False, True]), "layers.1.mlp": torch.tensor([False, False])}
FLAGS = {"missing:layers.0.mlp": torch.tensor([False, True, False])}
AT = {"layers.0.mlp/up": torch.tensor([1, 4])}
SHAPES = {"layers.0.mlp/up": [2, 3], "layers.0.mlp/down": [2, 3]}
NAMED = {"made_by": {"by": "hand"}, "blocks": list(MASK)}
LISTED = {"made_by": {"by": "hand"}, "shapes": SHAPES}


def mask_file(path: Path, kind: str, tensors: dict[str, torch.Tensor], told: dict[str, Any]) -> Path:
    texts = {name: value if isinstance(value, str) else json.dumps(value) for name, value in told.items()}
    save_file(tensors, path, {"format": f"surgery.{kind}", **texts})
    return path


@pytest.mark.parametrize("kind", ["Neurons", "Entries"])
def test_a_sound_file_is_read(tmp_path, kind):
    """The fixtures are: without the damage of the next tests nothing is refused."""
    given = ({**MASK, **FLAGS}, NAMED) if kind == "Neurons" else (AT, LISTED)
    read = load_mask(mask_file(tmp_path / "m", kind, *given))
    assert read.count() == ({name: int(v.sum()) for name, v in MASK.items()} if kind == "Neurons" else
                            {"layers.0.mlp/up": 2, "layers.0.mlp/down": 0})  # fmt: skip
    assert read.made_by == {"by": "hand"}


@pytest.mark.parametrize(
    "flags",
    [
        torch.tensor([[True, False, False], [False, False, True], [False, True, False]]),
        torch.tensor([True]),
        torch.tensor([[True, False, False]]),
        torch.tensor([True, False]),
        torch.tensor([True, False, False, True]),
        torch.tensor([1, 0, 0]),
        torch.tensor([1.0, 0.0, 0.0]),
        torch.tensor(True),
    ],
)
def test_marks_of_missing_neurons_are_one_bool_each(tmp_path, flags):
    """Of another shape they were broadcast over the mask, and rows were reverted that nobody had selected."""
    given = {**MASK, "missing:layers.0.mlp": flags}
    with pytest.raises(ValueError, match=r"/m(:| is damaged:) .*missing"):
        load_mask(mask_file(tmp_path / "m", "Neurons", given, NAMED))
    with pytest.raises(ValueError, match=r"missing= of 'layers\.0\.mlp' is torch"):
        Neurons(MASK, missing={"layers.0.mlp": flags})


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({**MASK, "missing:nowhere": torch.tensor([True])}, "missing= of 'nowhere'"),
        ({**MASK, "other": torch.tensor([True])}, "does not hold the blocks"),
        ({"layers.0.mlp": MASK["layers.0.mlp"]}, "does not hold the blocks"),
        ({**MASK, "layers.1.mlp": torch.tensor([[True, False]])}, "'layers.1.mlp' is stored as BOOL in 2 axes"),
        ({**MASK, "layers.1.mlp": torch.tensor(True)}, "'layers.1.mlp' is stored as BOOL in 0 axes"),
        ({**MASK, "layers.1.mlp": torch.tensor([1, 0])}, "is stored as I64 in 1 axes, expected BOOL or F32"),
        ({**MASK, "layers.1.mlp": torch.tensor([1.0, 0.0])}, "either a mask .* or scores"),
        ({n: v / v for n, v in MASK.items()}, "1 of 3 scores are NaN"),
    ],
)
def test_vectors_of_neurons_that_are_none(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=f"/m.*{message}"):
        load_mask(mask_file(tmp_path / "m", "Neurons", tensors, NAMED))


@pytest.mark.parametrize(
    ("tensors", "message"),
    [
        ({"layers.0.mlp/up": torch.tensor([1, 6])}, "expected positions from 0 to 5"),
        ({"layers.0.mlp/up": torch.tensor([-1, 4])}, "expected positions from 0 to 5"),
        ({"layers.0.mlp/up": torch.tensor([4, 1])}, "ascending, each once"),
        ({"layers.0.mlp/up": torch.tensor([1, 1])}, "ascending, each once"),
        ({"layers.0.mlp/up": torch.tensor([1.0, 4.0])}, "stored as F32 in 1 axes, expected I64"),
        ({"layers.0.mlp/up": torch.tensor([True])}, "stored as BOOL in 1 axes, expected I64"),
        ({"layers.0.mlp/up": torch.tensor([[1, 4]])}, "stored as I64 in 2 axes"),
        ({"layers.7.mlp/up": torch.tensor([1])}, "no such part"),
    ],
)
def test_positions_that_are_none(tmp_path, tensors, message):
    with pytest.raises(ValueError, match=f"/m.*{message}"):
        load_mask(mask_file(tmp_path / "m", "Entries", tensors, LISTED))


@pytest.mark.parametrize("name", ["layers.0.mlp", "missing:layers.0.mlp"])
def test_bytes_that_are_no_bools(tmp_path, name):
    """torch adds up a bool of the byte 2 as two."""
    path = mask_file(tmp_path / "m", "Neurons", MASK | FLAGS, NAMED)
    with safe_open(path, "np") as file:
        assert file.get_tensor(name).any()
    raw, header = bytearray(path.read_bytes()), header_of(path)
    start = len(raw) - max(entry["data_offsets"][1] for one, entry in header.items() if one[0] != "_")
    raw[start + header[name]["data_offsets"][0]] = 2
    path.write_bytes(raw)
    with pytest.raises(ValueError, match=f"/m is damaged: '{name}' holds bytes that are neither true nor false"):
        load_mask(path)


CHECKPOINTS = [[], 3, {"later": []}, {"later": {}}, {"later": {"name": 3}}, {"later": {"name": "a", "sha256": [1]}}]
BY = [
    "{",
    "null",
    [],
    3,
    "[" * 100_000,
    '{"a":' * 500 + "1" + "}" * 500,
    *({"checkpoints": one} for one in CHECKPOINTS),
]


@pytest.mark.parametrize("made_by", BY)
@pytest.mark.parametrize("kind", ["Neurons", "Entries"])
def test_what_made_it_is_an_object(tmp_path, kind, made_by):
    tensors, told = (MASK, NAMED) if kind == "Neurons" else (AT, LISTED)
    with pytest.raises(ValueError, match=r"/m, 'made_by' of its metadata"):
        load_mask(mask_file(tmp_path / "m", kind, tensors, {**told, "made_by": made_by}))


@pytest.mark.parametrize("blocks", [None, {}, 3, [3], [None], [], ["layers.0.mlp"], [*MASK, "layers.0.mlp"], "[["])
def test_a_list_of_blocks_that_is_none(tmp_path, blocks):
    with pytest.raises(ValueError, match=r"/m(, 'blocks'| is damaged: it does not hold)"):
        load_mask(mask_file(tmp_path / "m", "Neurons", MASK, {**NAMED, "blocks": blocks}))


@pytest.mark.parametrize("shape", [None, 3, [], [2], [2, 3, 1], [2.0, 3], [True, 3], [0, 3], [2, -3], [10**400, 1]])
def test_a_shape_of_a_part_that_is_none(tmp_path, shape):
    """A part of 2.7 neurons was one of 2."""
    with pytest.raises(ValueError, match=r"/m(, 'shapes'|.*shapes= of 'layers.0.mlp/up')"):
        load_mask(mask_file(tmp_path / "m", "Entries", AT, {**LISTED, "shapes": {"layers.0.mlp/up": shape}}))


@pytest.mark.parametrize("name", ["made_by", "blocks", "shapes"])
def test_metadata_that_is_missing(tmp_path, name):
    for kind, tensors, told in (("Neurons", MASK, NAMED), ("Entries", AT, LISTED)):
        if name in told:
            rest = {key: value for key, value in told.items() if key != name}
            with pytest.raises(ValueError, match=f"its metadata has no '{name}'"):
                load_mask(mask_file(tmp_path / "m", kind, tensors, rest))


def test_a_mask_that_is_not_there(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(LookupError, match=f"there is no file {path}"):
            load_mask(path)
