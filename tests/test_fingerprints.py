"""What tells one checkpoint from another: every tensor counts, and dtype, device and strides do not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, downstream

from surgery import RandomSelector, Trajectory, sweep
from surgery.checkpoints import opening
from surgery.checkpoints.opening import known, open_weights, sampled


@pytest.mark.parametrize("family", downstream())
def test_one_changed_tensor_makes_another_model(family: str) -> None:
    model = build(family)
    before = sampled(model.parameters())
    assert before == sampled(build(family).parameters())
    for parameter in model.parameters():
        kept = parameter.detach().clone()
        with torch.no_grad():
            parameter.add_(0.5 * torch.randn_like(parameter) + 0.1)
        assert sampled(model.parameters()) != before
        with torch.no_grad():
            parameter.copy_(kept)
    assert sampled(model.parameters()) == before


def test_dtype_and_strides_do_not_count_and_shapes_do() -> None:
    torch.manual_seed(0)
    some = torch.randn(60, 90, dtype=torch.bfloat16)
    assert sampled([some]) == sampled([some.float()]) == sampled([some.double()]) == sampled([some.T.contiguous().T])
    assert sampled([some]) != sampled([some.reshape(90, 60)])
    assert sampled([some, some]) != sampled([some])
    assert sampled([torch.zeros(0, 3), torch.tensor(2.0)]) != sampled([torch.zeros(0, 3), torch.tensor(3.0)])
    assert sampled([torch.empty(4, device="meta")]) == sampled([torch.empty(4, device="meta")])


def test_sparse_changes_are_seen() -> None:
    """A stage of RL moves few of the bf16 values: one in fifty, in tensors larger than the sample, is enough."""
    torch.manual_seed(0)
    tensors = [torch.randn(300, 200) for _ in range(4)]
    moved = [one + (torch.rand_like(one) < 0.02) * 0.1 for one in tensors]
    assert sampled(tensors) != sampled(moved)


def test_folders_have_hashes_and_live_models_samples(tmp_path) -> None:
    model = build("qwen3")
    model.save_pretrained(tmp_path / "one")
    assert {"sha256", "sampled"} & set(known(open_weights(tmp_path / "one"))) == {"sha256"}
    assert {"sha256", "sampled"} & set(known(open_weights(model))) == {"sampled"}


def test_a_sweep_of_live_models_does_not_go_on_with_others(tmp_path) -> None:
    """Before, names were all that a file knew of them, and models of one architecture have one name."""
    earlier, later, other = (build("qwen3", seed=seed) for seed in (1, 2, 3))
    arguments = dict(
        selectors=[RandomSelector(0.1)], budgets=[0.1], evaluate=lambda model: {"x": 0.5}, path=tmp_path / "sweep.jsonl"
    )
    first = sweep(Trajectory(earlier=earlier, later=later), None, **arguments)
    assert sweep(Trajectory(earlier=earlier, later=later), None, **arguments) == first
    with pytest.raises(ValueError, match="other checkpoints"):
        sweep(Trajectory(earlier=other, later=later), None, **arguments)


def test_a_file_is_hashed_once_for_as_long_as_it_stays_as_it_is(tmp_path, monkeypatch) -> None:
    build("qwen3").save_pretrained(tmp_path)
    opened: list[str] = []

    def counting(path: Path, mode: str) -> Any:
        opened.append(path.name)
        return path.open(mode)

    monkeypatch.setattr(opening, "open", counting, raising=False)
    first = known(open_weights(tmp_path))["sha256"]
    assert opened == ["model.safetensors"]
    assert (known(open_weights(tmp_path))["sha256"], len(opened)) == (first, 1)
    build("qwen3", seed=7).save_pretrained(tmp_path)
    assert known(open_weights(tmp_path))["sha256"] != first
    assert len(opened) == 2
