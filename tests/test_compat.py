"""Canaries: one for each private name in surgery/compat.py. Each says what to do when a new version breaks it."""

from __future__ import annotations

import sys

import pytest
import torch
from families import build
from test_scores import batches
from torch import nn

from surgery import compat


def test_tensor_parallel_plan() -> None:
    """``_tp_plan``."""
    plan = compat.tensor_parallel_plan(build("llama"))
    assert any(path.endswith("mlp.down_proj") and style.startswith("rowwise") for path, style in plan.items()), (
        "find where PreTrainedModel has its plan now (config.base_model_tp_plan has it, relative to the base model). "
        "Without it square MLPs are refused, and a wrong guess of the shapes is no longer noticed"
    )
    assert compat.tensor_parallel_plan(nn.Linear(1, 1)) == {}


def test_wrapper_of(tmp_path) -> None:
    """``_orig_mod``, ``module``, ``base_layer`` and the like."""
    from peft import LoraConfig, get_peft_model
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper

    def names(model: nn.Module) -> list[str]:
        return [name for name, _ in model.named_parameters()]

    model = build("llama")
    assert compat.wrapper_of(names(model)) is None
    wrapped = {
        "torch.compile": torch.compile(model),
        "DataParallel": nn.DataParallel(model),
        "activation checkpointing": nn.Sequential(checkpoint_wrapper(model)),
        "peft": get_peft_model(build("llama"), LoraConfig(target_modules=["up_proj"])),
    }
    for what, one in wrapped.items():
        found = compat.wrapper_of(names(one))
        assert found is not None, f"look how {what} holds its module now, and what the tensors in it are called"
        assert what in found[1]


@pytest.mark.parametrize("family", ["llama", "qwen3_moe", "gpt2", "gpt_oss"])
def test_what_is_inside_a_model(family) -> None:
    """``_modules``, ``_parameters``, ``_buffers``, ``_non_persistent_buffers_set``."""
    model: nn.Module = nn.ModuleDict({"first": build(family), "twice": nn.Linear(2, 2)})
    model["again"] = model["twice"]
    model["twice"].register_buffer("passing", torch.zeros(1), persistent=False)
    model["twice"].register_parameter("none", None)
    said = "read torch.nn.Module: named_parameters, named_buffers, state_dict and modules give the same, more slowly"
    assert compat.inside(model) == list(model.modules()), said
    named = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    assert list(compat.named_tensors(model)) == list(named), said
    assert all(compat.named_tensors(model)[name] is tensor for name, tensor in named.items()), said
    held = {id(one) for one in model.state_dict(keep_vars=True).values()}
    assert {id(one) for one in compat.saved_by(model)} == held, said


def test_uncompiled() -> None:
    """``_orig_mod`` and ``_compiled_call_impl``."""
    model = build("llama")
    names = {name: p.data_ptr() for name, p in model.named_parameters()}
    assert compat.uncompiled(model) is model
    assert compat.uncompiled(torch.compile(model, backend="eager")) is model, "look how torch.compile holds a module"
    model.model.layers[0] = torch.compile(model.model.layers[0], backend="eager")
    model.model.layers[1].compile(backend="eager")
    plain = compat.uncompiled(model)
    assert {name: p.data_ptr() for name, p in plain.named_parameters()} == names
    assert plain is compat.uncompiled(model)
    calls = []
    plain.model.layers[1].mlp.register_forward_hook(lambda *_: calls.append(1))
    plain(input_ids=torch.tensor([[3, 4]]))
    assert calls, "look how Module.compile marks a module now: a hook of a compiled one is not called"
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4]]))
    assert len(calls) == 1


def test_as_loaded() -> None:
    """``get_model_conversion_mapping`` and ``rename_source_key``, against what ``from_pretrained`` reads."""
    model = build("mixtral")
    saved = compat.as_saved(model, dict(model.state_dict()))
    names = compat.as_loaded(model, saved)
    held = {*names.whole.values(), *(name for parts in names.parts.values() for name in parts.values())}
    assert held == saved.keys()
    assert names.whole.keys() | names.parts.keys() == model.state_dict().keys(), (
        "look how convert_and_load_state_dict_in_model finds the names in memory now. Until that is known, folders "
        "with other names on disk than in memory have to be refused"
    )


def test_auto_class() -> None:
    """``_model_mapping``."""
    from transformers import LlavaConfig, PreTrainedConfig

    told = "find another way to ask an auto class whether it builds a configuration: from_config raises ValueError"
    assert compat.auto_class(build("llama").config) == "AutoModelForCausalLM", told
    assert compat.auto_class(LlavaConfig()) == "AutoModelForImageTextToText", told
    assert compat.auto_class(PreTrainedConfig()) is None, told


def test_is_left_out() -> None:
    """``_keys_to_ignore_on_load_unexpected``."""
    model = build("qwen3_next")
    assert compat.is_left_out(model, "mtp.layers.0.weight"), (
        "find where PreTrainedModel keeps what it ignores at loading. Without it users are told of tensors nobody reads"
    )
    assert not compat.is_left_out(model, "model.layers.0.mlp.up_proj.weight")


def test_passing_buffers() -> None:
    """``_non_persistent_buffers_set``."""

    class Held(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("kept", torch.zeros(1))
            self.register_buffer("passing", torch.zeros(1), persistent=False)

    model = nn.Sequential(Held())
    assert compat.passing_buffers(model) == {"0.passing"}, (
        "take the names of named_buffers() that state_dict() lacks; that builds the state_dict, a pass over all modules"
    )


def test_as_saved() -> None:
    """``transformers.core_model_loading.revert_weight_conversion``."""
    model = build("mixtral")
    name = next(name for name, _ in model.named_parameters() if name.endswith("experts.down_proj"))
    stacked = model.get_parameter(name)
    found = compat.as_saved(model, {name: stacked})
    assert len(found) == len(stacked), (
        "look what PreTrainedModel.save_pretrained calls to split stacked experts now. Until that is known, folders of "
        "such models have to be refused"
    )
    assert all(torch.equal(found[other], one) for other, one in zip(sorted(found), stacked, strict=True))


def test_as_saved_is_refused_where_transformers_has_no_such_function(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers.core_model_loading", None)
    with pytest.raises(ValueError, match=r"does not give the names on disk .*layout="):
        compat.as_saved(build("llama"), {})


@pytest.mark.parametrize(
    ("family", "says"),
    [
        ("qwen3_moe", compat.Declared(gated=True, transposed=False, concatenated=True)),
        ("gpt_oss", compat.Declared(gated=True, transposed=True, concatenated=False)),
    ],
)
def test_declared(family, says) -> None:
    """``has_gate``, ``is_transposed``, ``is_concatenated``."""
    assert compat.declared(experts(build(family))) == says, (
        "look what transformers.integrations.moe.use_experts_implementation sets on an expert module now. Without it "
        "gpt_oss's alternating gate and up are read as if they followed each other: refuse until it is known"
    )
    assert compat.declared(nn.Linear(1, 1)) is None


def test_switches_experts() -> None:
    """``_apply_gate`` tells transformers' own experts from a family's own."""
    assert compat.switches_experts(experts(build("qwen3_moe"))), "see test_gated_by"
    assert not compat.switches_experts(build("llama").get_submodule("model.layers.0.mlp"))


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
def test_gated_by(implementation) -> None:
    """``_apply_gate`` is called with every row, and what takes its place counts."""
    model = build("qwen3_moe")
    model.set_experts_implementation(implementation)
    batch, seen = batches(labels=False)[0], []
    with torch.no_grad():
        before = model(**batch, use_cache=False).logits
        with compat.gated_by(experts(model), lambda h: seen.append(h) or 0 * h):
            within = model(**batch, use_cache=False).logits
        after = model(**batch, use_cache=False).logits
    assert [h.shape[0] for h in seen] == [batch["input_ids"].numel() * 2], (
        "look how transformers.integrations.moe computes gated experts now, and listen to its activation there "
        "(act_fn's output times up); activation and damage need every routed row once"
    )
    assert not torch.equal(within, before)
    assert torch.equal(after, before)


def test_experts_implementation() -> None:
    """``config._experts_implementation``."""
    model = build("qwen3_moe")
    for name in ("eager", "batched_mm", "grouped_mm"):
        model.set_experts_implementation(name)
        assert compat.experts_implementation(experts(model)) == name, (
            "ask the model's get_experts_implementation() and hand it to the module; the order of rows depends on it"
        )


def test_can_set_experts_implementation() -> None:
    """``_can_set_experts_implementation``."""
    told = [compat.can_set_experts_implementation(build(family)) for family in ("qwen3_moe", "llama")]
    assert told == [True, False], (
        "set_experts_implementation may have become a call that any model takes: then call it, and drop this"
    )
    assert not compat.can_set_experts_implementation(nn.Linear(1, 1))


def test_writes_to() -> None:
    """``_version``."""
    tensor = torch.zeros(2)
    before = compat.writes_to(tensor)
    tensor.add_(1)
    assert compat.writes_to(tensor) == before + 1, (
        "compare surgery.checkpoints.opening.sampled before and after instead: it costs a little reading per tensor"
    )


def test_along_first() -> None:
    """``_StridedShard``."""
    from torch.distributed.tensor import Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    strided = compat.along_first(_StridedShard(1, split_factor=2))
    assert (strided.dim, strided.split_factor) == (0, 2), "ask the new class for its dimension and its split factor"
    assert compat.along_first(Shard(2)) == Shard(0)


def experts(model: nn.Module) -> nn.Module:
    """The first module of stacked experts."""
    return next(module for path, module in model.named_modules() if path.endswith("mlp.experts"))


def test_model_class() -> None:
    """``_model_mapping``, asked for a class."""
    config = build("llama").config
    assert compat.model_class("AutoModelForCausalLM", config).__name__ == "LlamaForCausalLM", (
        "find how an auto class maps a configuration to a model now. Without it a training checkpoint has no live model"
    )


def test_saved_tensor(tmp_path) -> None:
    """``FakeTensorMode``, ``_checkpoint_offset``."""
    tensor = torch.arange(6.0).reshape(2, 3)
    torch.save(tensor, tmp_path / "file")
    with open(tmp_path / "file", "rb") as file:
        told, at = compat.saved_tensor(file)
    stored = (tmp_path / "file").read_bytes()[at:][:24]
    assert (told.shape, told.dtype, stored) == (tensor.shape, tensor.dtype, tensor.numpy().tobytes()), (
        "find where torch.save puts a tensor's numbers now (an archive's data/0, not compressed). Without it "
        "distributed checkpoints can't be read in place"
    )


def test_offloaded_weights_and_runs_on() -> None:
    """``_hf_hook``, its ``weights_map`` and ``execution_device``."""
    from accelerate import cpu_offload

    model = build("llama")
    held = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    assert compat.offloaded_weights(model) == {}
    lazy = cpu_offload(model, execution_device=torch.device("cpu"))
    found = compat.offloaded_weights(lazy)
    assert found.keys() == held.keys(), "find where accelerate keeps offloaded weights now; else they are refused"
    assert all(torch.equal(found[name], held[name]) for name in held)
    assert compat.runs_on(lazy) == torch.device("cpu")
