"""An adapter's folder is the model that peft's merge makes of it: read, scored, rolled back and loaded again."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import adapted
import pytest
import torch
from adapted import DORA, KINDS, Kind
from torch import Tensor

from surgery import Checkpoint, Neurons, Trajectory, rolled_back, save
from surgery.checkpoints.opening import open_weights

UNITS = ("mlp", "value_channel")


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder for what is made once a kind."""
    return tmp_path_factory.mktemp("adapters")


def made(shelf: Path, kind: Kind) -> tuple[Path, Path, Path]:
    """The base, an adapter on it, and the merged model of both."""
    place = shelf / str(abs(hash(repr(kind))))
    if not place.exists():
        base = adapted.base(kind, place / "base")
        adapted.merged(base, adapted.adapter(kind, base, place / "adapter"), place / "merged")
    return place / "base", place / "adapter", place / "merged"


@pytest.mark.parametrize("kind", [*KINDS.values(), DORA], ids=[*KINDS, "DoRA"])
def test_an_adapter_is_read_as_the_merged_model(shelf, kind):
    base, folder, merged = made(shelf, kind)
    ours, theirs = Checkpoint(folder), Checkpoint(merged)
    assert ours.keys() == theirs.keys() == Checkpoint(base).keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert any(not torch.equal(ours[name], tensor) for name, tensor in Checkpoint(base).items())
    model = Trajectory(later=folder).load()
    assert torch.equal(adapted.logits(model), adapted.logits(adapted.loaded(merged)))


def masked(kind: Kind, folder: Path, share: float = 0.3) -> Neurons:
    """Some units of every kind that the family has."""
    weights = open_weights(Checkpoint(folder), units="mlp" if "moe" in kind.family or "gpt" in kind.family else UNITS)
    torch.manual_seed(5)
    return Neurons({name: torch.rand(size) < share for name, size in weights.layout.sizes.items()})


def rolled(later: Path, to: Path, mask: Neurons) -> dict[str, Tensor]:
    return dict(rolled_back(later, to=to, mask=mask))


def same(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> list[str]:
    """The tensors that differ."""
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_is_rolled_back_to_its_base(shelf, tmp_path, kind):
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    expected = rolled(merged, base, mask)
    view = rolled_back(folder, to=base, mask=mask)
    assert same(view, expected) == []
    assert same(expected, Checkpoint(merged)) != []
    out = save(view, tmp_path / "out")
    assert same(Checkpoint(out), expected) == []
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(again), expected) == []
    runs_alike(base, out, again)


def runs_alike(base: Path, out: Path, merged: Path) -> None:
    """What peft computes with the adapter beside the weights is what the merged model computes, but for rounding."""
    one, other = adapted.logits(adapted.with_peft(base, out)), adapted.logits(adapted.loaded(merged))
    near = 1e-4 if one.dtype == torch.float32 else 0.1
    assert (one - other).abs().max() <= near * other.abs().max()


@pytest.mark.parametrize("kind", KINDS.values(), ids=KINDS)
def test_an_adapter_is_rolled_back_to_another(shelf, tmp_path, kind):
    base, folder, merged = made(shelf, kind)
    mask = masked(kind, base)
    rank = {} if "rank_pattern" in kind.settings else dict(r=2, lora_alpha=4)  # the same scale
    earlier = adapted.adapter(kind, base, tmp_path / "earlier", seed=2, **rank)
    expected = rolled(merged, adapted.merged(base, earlier, tmp_path / "merged"), mask)
    view = rolled_back(folder, to=earlier, mask=mask)
    assert same(view, expected) == []
    out = save(view, tmp_path / "out")
    assert same(Checkpoint(out), expected) == []
    again = adapted.merged(base, out, tmp_path / "again")
    assert same(Checkpoint(again), expected) == []
    runs_alike(base, out, again)
