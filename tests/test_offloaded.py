"""Weights that accelerate keeps on the CPU are rolled back where they lie; what lies elsewhere is refused by name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from families import build, pair
from torch import nn

from surgery import DamageSelector, RandomSelector, Trajectory, activation, rollback

FAMILIES = ("llama", "phi3", "qwen3_moe")
TOKENS = torch.arange(16).reshape(2, 8) + 3


def offloaded(model: nn.Module) -> nn.Module:
    from accelerate import cpu_offload

    found: nn.Module = cpu_offload(copy.deepcopy(model), execution_device=torch.device("cpu"))
    assert all(parameter.is_meta for parameter in found.model.layers.parameters())
    return found


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("kind", ["mlp", "mlp,value_channel", "weight"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_rolled_back_as_a_whole_model_is(family: str, kind: str) -> None:
    earlier, later = pair(family)
    lazy = offloaded(later)
    units = "weight" if kind == "weight" else tuple(kind.split(","))
    if family == "phi3" and "value" in kind:
        units = ("mlp",)
    mask = RandomSelector(0.3, units=units).select(Trajectory(earlier=earlier, later=later))
    before = logits(lazy)
    with rollback(lazy, to=earlier, mask=mask) as report, rollback(later, to=earlier, mask=mask) as whole:
        assert report.changed == whole.changed > 0
        assert torch.equal(logits(lazy), logits(later))
        assert not torch.equal(logits(lazy), before)
    assert torch.equal(logits(lazy), before)


@pytest.mark.parametrize("family", FAMILIES)
def test_its_activations_are_those_of_the_whole_model(family: str) -> None:
    model, data = build(family), [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS)}]
    lazy, whole = activation(offloaded(model), data), activation(model, data)
    assert all(torch.equal(lazy[name], whole[name]) for name in whole)


def test_a_gradient_is_refused_by_name() -> None:
    earlier, later = pair("llama")
    data = [{"input_ids": TOKENS, "attention_mask": torch.ones_like(TOKENS), "labels": TOKENS}]
    with pytest.raises(ValueError, match="on the meta device: its weights are offloaded, and take no gradient there"):
        DamageSelector(0.1).select(Trajectory(earlier=earlier, later=offloaded(later)), data)


def test_what_is_on_the_disk_is_refused_by_name(tmp_path: Path) -> None:
    from accelerate import disk_offload

    earlier, later = pair("llama")
    mask = RandomSelector(0.3).select(Trajectory(earlier=earlier, later=later))
    lazy = disk_offload(copy.deepcopy(later), tmp_path, execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match="is on the meta device: its weights are offloaded, and an edit would be lost"):
        rollback(lazy, to=earlier, mask=mask)


def test_two_devices_of_accelerate() -> None:
    """Modules with hooks and no offloading are as any other: here both devices are the CPU."""
    from accelerate import dispatch_model

    earlier, later = pair("llama")
    places = {name: "cpu" for name, _ in later.named_children() if name != "model"}
    places |= {f"model.{name}": "cpu" for name, _ in later.model.named_children()}
    spread = dispatch_model(copy.deepcopy(later), places, main_device="cpu", force_hooks=True)
    mask = RandomSelector(0.3).select(Trajectory(earlier=earlier, later=later))
    with rollback(spread, to=earlier, mask=mask), rollback(later, to=earlier, mask=mask):
        assert torch.equal(logits(spread), logits(later))
