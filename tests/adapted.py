"""Adapters of every kind that peft writes, over the tiny families: what they are read and rolled back against."""

from __future__ import annotations

import copy
import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from families import build
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn


@dataclass(frozen=True)
class Kind:
    """A kind of adapter: the family, and what its configuration says."""

    family: str
    settings: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32  # of the base


_MLP = ["gate_proj", "up_proj", "down_proj"]
_FUSED = dict(target_modules=["q_proj"], target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"])
_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", *_MLP]
KINDS = {
    "dense": Kind("qwen3", dict(target_modules="all-linear")),
    "in bf16": Kind("qwen3", dict(target_modules=_ALL), torch.bfloat16),
    "biased": Kind("llama", dict(target_modules=_ALL, bias="all")),
    "biased, of adapted layers": Kind("llama", dict(target_modules=_MLP, bias="lora_only"), torch.bfloat16),
    "biased factors": Kind("llama", dict(target_modules=_MLP, lora_bias=True)),
    "fused gate and up": Kind(
        "phi3", dict(target_modules=["qkv_proj", "o_proj", "gate_up_proj", "down_proj"])
    ),
    "transposed": Kind("gpt2", dict(target_modules=["c_fc", "c_proj"], fan_in_fan_out=True)),
    "patterns": Kind(
        "qwen3",
        dict(
            target_modules=_MLP, rank_pattern={r"layers\.1\.mlp\.down_proj": 2, r"mlp.(down|up)_proj": 3},
            alpha_pattern={"down": 99, "ate_proj": 98, r"model\.layers\.0\.mlp\.up_proj": 1, "up_proj": 7},
            use_rslora=True,
        ),
    ),
    "saved whole": Kind("qwen3", dict(target_modules=["up_proj"], modules_to_save=["lm_head", "down_proj"])),
    "some layers": Kind("qwen3", dict(target_modules=_MLP, layers_to_transform=[1])),
    "experts on disk one by one": Kind("qwen3_moe", _FUSED),
    "experts in bf16": Kind("qwen2_moe", _FUSED, torch.bfloat16),
    "experts, one parameter": Kind(
        "qwen3_moe", dict(target_modules=["q_proj"], target_parameters=["experts.down_proj"])
    ),
    "experts of different ranks": Kind("mixtral", dict(_FUSED, rank_pattern={"experts.down_proj": 2})),
    "experts transposed": Kind("gpt_oss", _FUSED),
    "experts transposed, undeclared": Kind(
        "llama4_text",
        dict(target_modules=["q_proj"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
    ),
    "experts in modules": Kind(
        "jetmoe",
        dict(target_modules=[], target_parameters=["mlp.input_linear.weight", "mlp.output_linear.weight"]),
    ),
    "a matrix by its name": Kind(
        "qwen3", dict(target_modules=[], target_parameters=["up_proj.weight"]), torch.bfloat16
    ),
}  # fmt: skip
DORA = Kind("qwen3", dict(target_modules=_MLP, use_dora=True))


def base(kind: Kind, folder: Path) -> Path:
    """The base's folder, made once."""
    if not folder.exists():
        build(kind.family, kind.dtype).save_pretrained(folder)
    return folder


def adapter(kind: Kind, base: Path, folder: Path, seed: int = 1, **settings: Any) -> Path:
    """An adapter on a base's folder, all of its numbers random."""
    torch.manual_seed(seed)
    given = {"r": 4, "lora_alpha": 8, **kind.settings, **settings}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = get_peft_model(loaded(base), LoraConfig(**given, init_lora_weights=False, task_type="CAUSAL_LM"))
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.05 * torch.randn(parameter.shape).to(parameter.dtype))
        model.save_pretrained(folder)
    return folder


def loaded(base: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(base, dtype="auto").eval()


def with_peft(base: Path, folder: Path) -> PeftModel:
    """The adapter on its base, as peft loads both."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return PeftModel.from_pretrained(loaded(base), str(folder)).eval()


def merged(base: Path, folder: Path, out: Path) -> Path:
    """What a user does without us: the merged model's folder."""
    with_peft(base, folder).merge_and_unload().save_pretrained(out)
    return out


def settings(folder: Path, **values: Any) -> None:
    """Write settings into an adapter's configuration."""
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return copy.copy(model(input_ids=torch.arange(3, 19)[None]).logits)
