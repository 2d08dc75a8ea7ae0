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


def test_is_compiled() -> None:
    """``_orig_mod``."""
    model = nn.Linear(1, 1)
    assert compat.is_compiled(torch.compile(model)), (
        "look how torch._dynamo.eval_frame.OptimizedModule holds its module now, and change find_layout's error, too"
    )
    assert not compat.is_compiled(model)


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


def experts(model: nn.Module) -> nn.Module:
    """The first module of stacked experts."""
    return next(module for path, module in model.named_modules() if path.endswith("mlp.experts"))
