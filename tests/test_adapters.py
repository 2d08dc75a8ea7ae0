"""An adapter's folder is the model that peft's merge makes of it: read, scored, rolled back and loaded again."""

from __future__ import annotations

from pathlib import Path

import adapted
import pytest
import torch
from adapted import DORA, KINDS, Kind

from surgery import Checkpoint, Trajectory


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
