"""The shapes that are measured, with random weights, made where they are needed: nothing is read."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from surgery import Neurons
from surgery.layout import find_layout
from surgery.live.prompts import Batch

Shape = dict[str, Any]
QWEN3_4B: Shape = {
    "model_type": "qwen3", "hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
    "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936,
    "tie_word_embeddings": True,
}  # fmt: skip
QWEN3_30B_A3B: Shape = {
    "model_type": "qwen3_moe", "hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768,
    "num_experts": 128, "num_experts_per_tok": 8, "num_hidden_layers": 48, "num_attention_heads": 32,
    "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "tie_word_embeddings": True,
}  # fmt: skip
TINY: Shape = QWEN3_4B | {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip
TINY_MOE: Shape = QWEN3_30B_A3B | {
    "hidden_size": 64, "moe_intermediate_size": 32, "num_experts": 4, "num_experts_per_tok": 2, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 128,
}  # fmt: skip


def model(shape: Shape, device: torch.device, seed: int) -> nn.Module:
    """A live model of that shape in bfloat16, in eval mode."""
    config = AutoConfig.for_model(**shape)
    torch.manual_seed(seed)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()


def some_neurons(of: nn.Module, share: float, seed: int = 0) -> Neurons:
    """That share of the MLP neurons, at random."""
    generator = torch.Generator().manual_seed(seed)
    sizes = find_layout(of).sizes
    return Neurons({name: torch.rand(size, generator=generator) < share for name, size in sizes.items()})


def prompts(shape: Shape, device: torch.device, count: int, tokens: int, each: int = 8) -> list[Batch]:
    """Batches of random tokens, every one of which is predicted."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for at in range(0, count, each):
        ids = torch.randint(shape["vocab_size"], (min(each, count - at), tokens), generator=generator).to(device)
        found.append({"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids})
    return found
