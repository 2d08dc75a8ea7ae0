"""What the speed scripts measure on: checkpoints of a Qwen3-0.6B shape with random weights."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.hardware import statement


def model(layers: int) -> Qwen3ForCausalLM:
    """In bfloat16."""
    config = Qwen3Config(
        hidden_size=1024, intermediate_size=3072, num_hidden_layers=layers, num_attention_heads=16,
        num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True,
    )  # fmt: skip
    torch.manual_seed(0)
    return Qwen3ForCausalLM(config).to(torch.bfloat16).eval()


@contextmanager
def made(doc: str | None) -> Iterator[tuple[Path, str]]:
    """A folder with base/, earlier/ and later/, as many layers as ``--layers`` says, and a line about it all.

    The later two differ from the one before in every weight of the layers.
    """
    parser = argparse.ArgumentParser(description=doc)
    parser.add_argument("--layers", type=int, default=28)
    layers = parser.parse_args().layers
    with tempfile.TemporaryDirectory() as name:
        folder, held = Path(name), model(layers)
        for stage in ("base", "earlier", "later"):
            held.save_pretrained(folder / stage, max_shard_size="10GB")
            with torch.no_grad():
                for parameter in held.model.layers.parameters():
                    parameter.mul_(1 + 0.02 * torch.randn(parameter.shape[:1] + (1,) * (parameter.ndim - 1)))
        del held
        size = (folder / "later" / "model.safetensors").stat().st_size / 1e9
        about = f"Qwen3-0.6B shape with {layers} layers, bfloat16, three checkpoints of {size:.2f} GB"
        yield folder, f"{statement()}\n{about}\n"
