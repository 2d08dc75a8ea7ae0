"""What D costs where the vocabulary is large, beside bare passes: ``python -m benchmarks.speed.vocabulary``.

A SmolLM2-135M or Qwen3-0.6B shape (random weights, bfloat16, tied head; ``--layers`` shrinks it) with vocabularies of
49 k and 152 k.
Prompts of 16 to 31 tokens, the last 2 to 6 of which are the response, in batches of 16, as ``load_prompts`` makes
them of short questions. Beside D, which also runs the earlier model: one forward
and one backward pass over the same tokens with gradients for all weights of the layers, the model's own
(``model(**batch).loss``, as in training) and the least that it could be, with the head on the response alone.
Memory: the peak of anonymous memory above the models; no pass keeps the gradients.
"""

from __future__ import annotations

import argparse
import gc
import random
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.hardware import statement
from benchmarks.speed.memory import peak
from benchmarks.speed.operations import cpu
from surgery import Trajectory, damage
from surgery.live.heads import positions
from surgery.live.hooks import only_these
from surgery.live.losses import tokens_in
from surgery.live.prompts import Batch, padded

SHAPES: dict[str, dict[str, int]] = {
    "SmolLM2-135M": {
        "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
        "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "Qwen3-0.6B": {
        "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
}  # fmt: skip


def model(vocabulary: int, shape: dict[str, int], seed: int = 0) -> LlamaForCausalLM:
    """In bfloat16, and in eval mode."""
    config = LlamaConfig(**shape, vocab_size=vocabulary, tie_word_embeddings=True)
    torch.manual_seed(seed)
    return LlamaForCausalLM(config).to(torch.bfloat16).eval()


def prompts(count: int, size: int = 16) -> list[Batch]:
    """Batches of random tokens, padded, with labels on the last of each prompt."""
    rng = random.Random(0)

    def some(low: int, high: int) -> list[int]:
        return [rng.randrange(1000) for _ in range(rng.randint(low, high))]

    pairs = [(some(14, 25), some(2, 6)) for _ in range(count)]
    return [padded(pairs[at : at + size], 0) for at in range(0, count, size)]


def own(live: Any, batch: Batch) -> Tensor:
    """The model's own loss."""
    found: Tensor = live(**batch, use_cache=False).loss
    return found


def least(live: Any, batch: Batch) -> Tensor:
    """The same loss, with the head on the positions that count."""
    hidden, where = live.model(batch["input_ids"], batch["attention_mask"]).last_hidden_state, positions(batch)
    return nn.functional.cross_entropy(live.lm_head(hidden[:, :-1][where]).float(), batch["labels"][:, 1:][where])


def bare(live: Any, batches: list[Batch], loss: Callable[[Any, Batch], Tensor]) -> None:
    """One forward and backward pass; a gradient is dropped when it is there, as D does."""
    with only_these({p: lambda _: None for p in live.model.layers.parameters()}, live):
        for batch in batches:
            loss(live, batch).backward()


def attended(batch: Batch) -> int:
    """How many tokens are no padding."""
    return int(batch["attention_mask"].sum())


def measured(function: Callable[[], object], times: int) -> tuple[float, float]:
    """The least CPU seconds of some runs, and the most megabytes."""
    gc.collect()
    with peak() as memory:
        return cpu(function, times)[0], memory[0]


def fresh(earlier: nn.Module, later: nn.Module, batches: list[Batch]) -> None:
    """D, by a run of its own: a run keeps what it has measured."""
    damage(Trajectory(earlier=earlier, later=later), batches)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", choices=SHAPES, default="SmolLM2-135M")
    parser.add_argument("--layers", type=int, help="fewer than the shape has")
    parser.add_argument("--prompts", type=int, default=128)
    parser.add_argument("--times", type=int, default=1)
    parser.add_argument("--vocabulary", type=int, nargs="+", default=[49_152, 151_936])
    asked = parser.parse_args()
    shape = SHAPES[asked.shape] | ({"num_hidden_layers": asked.layers} if asked.layers else {})
    batches = prompts(asked.prompts)
    tokens, wide = (sum(int(f(batch)) for batch in batches) for f in (attended, lambda one: one["input_ids"].numel()))
    print(
        f"{statement()}\n\n{asked.shape} shape with {shape['num_hidden_layers']} layers, bfloat16; "
        f"{asked.prompts} prompts, {tokens} tokens and with padding {wide}, "
        f"{tokens_in(batches)} of them in responses\n\n"
        f"| vocabulary | D, CPU s | the model's own pass, CPU s | ratio | the least pass, CPU s | ratio | D, MB | own, "
        f"MB | least, MB |\n|---|---|---|---|---|---|---|---|---|"
    )
    for vocabulary in asked.vocabulary:
        earlier, later = model(vocabulary, shape), model(vocabulary, shape)
        with torch.no_grad():
            for parameter in later.model.layers.parameters():
                parameter.mul_(1 + 0.02 * torch.randn(parameter.shape[:1] + (1,) * (parameter.ndim - 1)))
        bare(later, batches[:1], own)  # what is loaded late, and memory that is touched for the first time
        fresh(earlier, later, batches[:1])
        runs: dict[str, Callable[[], object]] = {
            "D": partial(fresh, earlier, later, batches),
            "own": partial(bare, later, batches, own),
            "least": partial(bare, later, batches, least),
        }
        (d, a), (o, b), (s, c) = (measured(run, asked.times) for run in runs.values())
        seconds = f"{d:.2f} | {o:.2f} | {d / o:.2f} | {s:.2f} | {d / s:.2f}"
        print(f"| {vocabulary:,} | {seconds} | {a:.0f} | {b:.0f} | {c:.0f} |", flush=True)


if __name__ == "__main__":
    main()
