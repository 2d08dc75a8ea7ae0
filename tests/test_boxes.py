"""Rank files are read and written where their numbers lie: no tensor that several ranks hold is put together."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from mutants import dies
from training_folders import KINDS, as_ranks, model_of

from surgery import Checkpoint, Neurons, Trajectory, conflict, damage, magnitude, rollback, rolled_back, save
from surgery.checkpoints import opening, trajectory
from surgery.checkpoints.opening import open_weights
from surgery.formats.stored import Stored
from surgery.layout import boxes
from surgery.layout.boxes import Boxes
from surgery.masks.entries import Entries, shapes_of
from surgery.scores import entry_gains

UNITS = ("mlp", "kv_group", "value_channel")
STAGES = ("earlier", "later")


@pytest.fixture(scope="module", params=KINDS)
def home(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A plain folder of each stage, and the same as the rank files of FSDP (3 ranks) and of HSDP (2 × 2)."""
    folder = tmp_path_factory.mktemp(request.param)
    for stage in STAGES:
        model_of(request.param, stage).save_pretrained(folder / stage)
        as_ranks(folder / stage, folder / f"{stage}-3", world=3)
        as_ranks(folder / stage, folder / f"{stage}-2x2", world=4, copies=2)
    return folder


def some(sizes: dict[str, int], share: float = 0.3) -> Neurons:
    draw = torch.Generator().manual_seed(0)
    return Neurons({name: torch.rand(size, generator=draw) < share for name, size in sizes.items()})


@pytest.fixture
def apart(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Nothing is put together; how many numbers each reading took."""
    whole, part, read = Stored.read, Boxes.__getitem__, []

    def refused(self, name, views):
        assert len({piece.start for piece in self.pieces[name]}) == 1, f"{name} is put together"
        return whole(self, name, views)

    def counted(self, at):
        found = part(self, at)
        read.append(found.numel())
        return found

    monkeypatch.setattr(Stored, "read", refused)
    monkeypatch.setattr(Boxes, "__getitem__", counted)
    monkeypatch.setattr(
        opening, "_some_neurons", lambda weights: ""
    )  # by which a fingerprint knows a model: a few rows
    return read


@pytest.mark.parametrize("form", ["3", "2x2"])
@pytest.mark.parametrize("units", UNITS)
def test_rows_and_single_numbers_are_those_of_the_whole_tensor(home: Path, units: str, form: str) -> None:
    plain = open_weights(home / "later", units=units)
    ranks = open_weights(Checkpoint(home / f"later-{form}"), like=plain)
    for name, block in plain.layout.items():
        for part in block.parts:
            index = torch.arange(0, block.neurons, 2)
            width = block.of(part)[0].width
            offsets = torch.arange(0, width, 2)
            spots = torch.arange(0, block.neurons * width, 3)
            there = ranks.layout[name]
            for asked in ((index,), (index, offsets)):
                assert torch.equal(there.rows(ranks.tensors, part, *asked), block.rows(plain.tensors, part, *asked))
            assert torch.equal(there.entries(ranks.tensors, part, spots), block.entries(plain.tensors, part, spots))


@pytest.mark.parametrize("form", ["3", "2x2"])
def test_a_rollback_reads_what_it_writes(home: Path, apart: list[int], form: str) -> None:
    model, alone = (trajectory.loaded(Checkpoint(home / "later")) for _ in range(2))
    sizes = open_weights(model, units=("mlp", "value_channel")).layout.sizes
    shapes = shapes_of(open_weights(model, units="mlp").layout)
    weights = Entries({part: torch.arange(0, n * width, 7) for part, (n, width) in shapes.items()}, shapes=shapes)
    for mask in (some(sizes), weights):
        apart.clear()
        done = rollback(model, to=home / f"earlier-{form}", mask=mask)
        rollback(alone, to=home / "earlier", mask=mask)
        assert all(torch.equal(one, other) for one, other in zip(model.parameters(), alone.parameters(), strict=True))
        assert sum(apart) == sum(done.parameters.values())


def loss(model: torch.nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    """One for which the earlier model need not predict anything: then all of it would be read, a tensor at a time."""
    return model(input_ids=batch["input_ids"], labels=batch["labels"]).loss


@pytest.mark.parametrize("form", ["3", "2x2"])
def test_scores_read_chunk_by_chunk(home: Path, apart: list[int], form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trajectory.pieces, "__defaults__", (400,))
    monkeypatch.setattr("surgery.live.hooks.CHUNK", 100)
    alone = Trajectory(home / "earlier", home / "earlier", home / "later")
    run = Trajectory(home / "earlier", home / f"earlier-{form}", home / f"later-{form}")
    live = Trajectory(earlier=home / f"earlier-{form}", later=alone.load())
    tokens = torch.arange(24).reshape(2, 12) % 60 + 3
    data = [{"input_ids": tokens, "attention_mask": torch.ones_like(tokens), "labels": tokens}]
    widest = max(slot.width for block in run.opened()["later"].layout.blocks for slot in block.slots)
    apart.clear()
    for one, other in ((magnitude(run), magnitude(alone)), (conflict(run), conflict(alone))):
        assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert max(apart) <= max(100, widest)
    apart.clear()
    found, wanted = damage(live, data, loss=loss), damage(alone, data, loss=loss)
    assert all(torch.equal(value, wanted[name]) for name, value in found.items())
    assert torch.equal(entry_gains(live, data, loss=loss).flat, entry_gains(alone, data, loss=loss).flat)
    expert = max(
        slot.width * (slot.shape[-2] if slot.stacked else 1) for b in live.live()[0].layout.blocks for slot in b.slots
    )
    assert max(apart) <= max(100, expert)


@pytest.mark.parametrize("form", ["3", "2x2"])
def test_a_folder_is_patched_where_its_numbers_lie(home: Path, apart: list[int], form: str, tmp_path: Path) -> None:
    later = home / f"later-{form}"
    mask = some(open_weights(home / "later", units=("mlp", "value_channel")).layout.sizes)
    view = rolled_back(later, to=home / f"earlier-{form}", mask=mask)
    save(view, tmp_path / "out", reset_optimizer=True)
    assert sum(apart) == 4 * view.parameters  # what is there and what comes, and as much of each of the two moments
    plain = rolled_back(home / "later", to=home / "earlier", mask=mask)
    found = Checkpoint(tmp_path / "out")
    for name in plain:
        whole = torch.empty(found.shapes[name])
        for piece in found.stored.pieces[name]:  # every copy
            part = found.stored.views(found.folder / piece.file, piece.file, False)[piece.key]
            piece.of(whole).copy_(part)
            assert torch.equal(part, piece.of(plain[name]))


def neighbours(patch: pytest.MonkeyPatch) -> None:
    """A box is taken to begin one row later."""
    held = boxes._held
    patch.setattr(
        boxes,
        "_held",
        lambda found, at: ((box, here, (*(one.roll(1, 0) for one in place),)) for box, here, place in held(found, at)),
    )


def last_copy_alone(patch: pytest.MonkeyPatch) -> None:
    """Of several copies one is written."""
    put = Boxes.__setitem__
    patch.setattr(
        Boxes, "__setitem__", lambda self, at, rows: put(Boxes(self.shape, tuple(dict(self.boxes).items())), at, rows)
    )


def test_mutants_die(home: Path, tmp_path: Path) -> None:
    dies(neighbours, lambda: test_rows_and_single_numbers_are_those_of_the_whole_tensor(home, "mlp", "3"))

    def patched() -> None:
        with pytest.MonkeyPatch.context() as patch:
            test_a_folder_is_patched_where_its_numbers_lie(home, apart.__wrapped__(patch), "2x2", tmp_path)

    dies(last_copy_alone, patched)
