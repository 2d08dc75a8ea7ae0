"""A model in a wrapper, and tensors saved from one: the message names the wrapper and the way out."""

from __future__ import annotations

import copy
import re
from functools import partial
from typing import Any

import pytest
import torch
from families import pair
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from test_scores import batches
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

from surgery import (
    DamageSelector,
    RandomSelector,
    Trajectory,
    activation,
    damage,
    magnitude,
    rollback,
    rolled_back,
    sweep,
)
from surgery.layout import find_layout
from surgery.live import probe, respond
from surgery.live.earlier import earlier_model
from surgery.scores import reversal_cost
from surgery.training import Masked


def layered(wrap: Any) -> Any:
    def wrapped(model: Any) -> Any:
        model.model.layers[1] = wrap(model.model.layers[1])
        return model

    return wrapped


def adapted(model: Any) -> Any:
    model.add_adapter(LoraConfig(target_modules=["up_proj"]))
    return model


# what wraps a live model, and what the message calls it and its way out
WRAPPERS: dict[str, tuple[Any, str]] = {
    "DataParallel": (nn.DataParallel, r"DataParallel, DDP or DeepSpeed: .* model\.module,"),
    "compiled in DataParallel": (lambda model: nn.DataParallel(torch.compile(model)), r"model\.module,"),
    "checkpointed": (layered(checkpoint_wrapper), "activation checkpointing"),
    "value head": (lambda model: nn.ModuleDict({"pretrained_model": model, "v_head": nn.Linear(1, 1)}), "trl's value"),
}


@pytest.mark.parametrize("name", WRAPPERS)
def test_a_wrapped_live_model_is_told(name, tmp_path):
    earlier, later = pair("qwen3")
    earlier.save_pretrained(tmp_path)
    mask = RandomSelector(0.1).select(Trajectory(earlier=tmp_path, later=later))
    wrap, told = WRAPPERS[name]
    wrapped = wrap(later)
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    run = Trajectory(earlier=tmp_path, later=wrapped)
    acts = [
        lambda: rollback(wrapped, to=tmp_path, mask=mask),
        lambda: rolled_back(tmp_path, to=wrapped, mask=mask),
        lambda: magnitude(run),
        lambda: DamageSelector(0.1).select(run, batches(labels=True)),
        lambda: sweep(run, None, selectors=[], budgets=[], evaluate=lambda _: {"score": 0.0}),
        lambda: earlier_model(run).__enter__(),
    ]
    for act in acts:
        with pytest.raises(ValueError, match=told):
            act()
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())


@pytest.mark.parametrize("wrap", [lambda model: get_peft_model(model, LoraConfig(target_modules=["up_proj"])), adapted])
def test_a_live_adapter_is_measured_and_its_weights_are_no_checkpoint(wrap, tmp_path):
    earlier, later = pair("qwen3")
    earlier.save_pretrained(tmp_path)
    plain = Trajectory(earlier=tmp_path, later=copy.deepcopy(later))
    mask = DamageSelector(0.1).select(plain, batches(labels=True))
    wrapped = wrap(later)  # a new adapter changes nothing
    assert DamageSelector(0.1).select(Trajectory(earlier=tmp_path, later=wrapped), batches(labels=True)).equal(mask)
    before = {name: tensor.clone() for name, tensor in wrapped.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"an adapter of peft: .*model\.merge_and_unload\(\).*model\.merge_adapter\(\)"
    ):
        rolled_back(tmp_path, to=wrapped, mask=mask)
    with pytest.raises(ValueError, match=r"is not the base of the live|has no single adapter of peft"):
        rollback(wrapped, to=tmp_path, mask=mask)
    assert all(torch.equal(tensor, before[name]) for name, tensor in wrapped.state_dict().items())


@pytest.mark.parametrize("place", ["mapping", "folder"])
@pytest.mark.parametrize(
    "rename",
    [
        "module.{}", "_orig_mod.{}", "module._orig_mod.{}", "base_model.model.{}", "pretrained_model.{}",
        "_fsdp_wrapped_module.{}",
    ],
)  # fmt: skip
def test_tensors_saved_from_a_wrapper_are_told(rename, place, tmp_path):
    earlier, later = pair("qwen3")
    later.save_pretrained(tmp_path / "later")
    earlier.save_pretrained(tmp_path / "earlier")
    mask = RandomSelector(0.1).select(Trajectory(earlier=tmp_path / "earlier", later=later))
    held = {rename.format(name): tensor for name, tensor in earlier.state_dict().items()}
    save_file(held, tmp_path / "earlier" / "model.safetensors", {"format": "pt"})
    source: Any = held if place == "mapping" else tmp_path / "earlier"
    prefix = re.escape(rename.split("{")[0])
    for act in (
        lambda: rollback(later, to=source, mask=mask),
        lambda: rolled_back(tmp_path / "later", to=source, mask=mask),
        lambda: magnitude(Trajectory(earlier=source, later=tmp_path / "later")),
    ):
        with pytest.raises(ValueError, match=rf"is wrapped by .*'{prefix}\w.*or what that model saves"):
            act()


def test_a_module_of_ones_own_may_have_such_names():
    """A layer called module is no wrapper where there is more beside it."""

    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Embedding(8, 4)
            self.module = nn.ModuleList(nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 4)) for _ in range(2))

    assert sum(magnitude(Trajectory(earlier=Own(), later=Own()))[f"module.{at}"].numel() for at in (0, 1)) == 12


def test_what_is_inside_a_wrapper_shares_its_weights():
    earlier, later = pair("qwen3")
    wrapped = nn.DataParallel(later)
    mask = RandomSelector(0.5).select(Trajectory(earlier=earlier, later=later))
    before = wrapped.module.model.layers[0].mlp.up_proj.weight.clone()
    with rollback(wrapped.module, to=earlier, mask=mask):
        assert not torch.equal(wrapped.module.model.layers[0].mlp.up_proj.weight, before)


# Compiled models: nothing is told, since the model inside has the same tensors.


def in_place(model: Any) -> Any:
    model.compile(backend="eager")
    return model


def layer_in_place(model: Any) -> Any:
    model.model.layers[0].compile(backend="eager")
    return model


eager = partial(torch.compile, backend="eager")
COMPILED: dict[str, Any] = {
    "a model": eager,
    "a model in place": in_place,
    "a layer in place": layer_in_place,
    "a layer in a model": lambda model: eager(layered(eager)(model)),
}


@pytest.mark.parametrize("name", COMPILED)
def test_a_compiled_model_has_the_scores_and_bits_of_the_model_inside(name):
    earlier, later = pair("qwen3")
    plain, data = copy.deepcopy(later), batches(labels=True)
    wrapped = COMPILED[name](later)
    with torch.no_grad():
        wrapped(input_ids=data[0]["input_ids"])  # compiled now, before any hook
    run, alone = Trajectory(earlier=earlier, later=wrapped), Trajectory(earlier=earlier, later=plain)
    assert find_layout(wrapped) == find_layout(plain)
    for one, other in (
        (activation(wrapped, data), activation(plain, data)),
        *((score(run, data), score(alone, data)) for score in (damage, reversal_cost)),
        (magnitude(run), magnitude(alone)),
    ):
        assert one.sizes == other.sizes
        assert all(torch.equal(value, other[block]) for block, value in one.items())
    for units in ("mlp", "weight"):
        mask = DamageSelector(0.02, units=units).select(run, data)
        assert mask.equal(DamageSelector(0.02, units=units).select(alone, data))
        before = [p.clone() for p in plain.parameters()]
        with rollback(wrapped, to=earlier, mask=mask) as done, rollback(plain, to=earlier, mask=mask) as wanted:
            assert done.changed == wanted.changed > 0
            assert all(map(torch.equal, wrapped.parameters(), plain.parameters()))
            with torch.no_grad():
                assert torch.allclose(*(one(input_ids=data[0]["input_ids"]).logits for one in (wrapped, plain)))
        assert all(map(torch.equal, wrapped.parameters(), before))
    assert not probe(wrapped, find_layout(wrapped), find_layout(wrapped).blocks[0], neurons=1)
    mask = RandomSelector(0.1).select(run)
    with Masked(wrapped, mask) as one, Masked(plain, mask) as other:
        assert len(one.leaves) == len(other.leaves) > 0
    there = Trajectory(earlier=COMPILED[name](copy.deepcopy(earlier)), later=plain)
    assert all(torch.equal(value, damage(there, data)[block]) for block, value in damage(alone, data).items())
    ids = {"input_ids": data[0]["input_ids"][:1, :3]}
    assert all(
        torch.equal(one["input_ids"], other["input_ids"])
        for one, other in zip(*(respond(m, [ids], max_new_tokens=3) for m in (wrapped, plain)), strict=True)
    )
