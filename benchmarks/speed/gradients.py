"""What comparing gradients costs, beside plain backward passes: ``python -m benchmarks.speed.gradients [--layers N]``.

Two domains of one batch each on a Qwen3-0.6B shape (random weights, bfloat16; ``--layers`` shrinks it); then a real
training, watched and not watched in turn. Memory is the peak of anonymous memory above what it was before.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import PrinterCallback, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from benchmarks.hardware import statement
from benchmarks.speed import checkpoints
from benchmarks.speed.memory import peak
from surgery.evidence import gradients
from surgery.live.losses import cross_entropy
from surgery.training import GradientCosines

Batch = dict[str, torch.Tensor]


def measured(function: Callable[[], object]) -> tuple[float, float, float]:
    """CPU seconds, wall seconds, megabytes of one run."""
    with peak() as memory:
        wall, used = time.perf_counter(), time.process_time()
        function()
        seconds = time.process_time() - used, time.perf_counter() - wall
    return *seconds, memory[0]


def batch(tokens: int, seed: int) -> Batch:
    """Four rows of random tokens, all of them responses."""
    ids = torch.randint(1000, (4, tokens // 4), generator=torch.Generator().manual_seed(seed))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def beside_plain_passes(layers: int, tokens: int) -> str:
    """``gradients`` beside the same backward passes, one full gradient in memory at a time and none compared."""
    model = checkpoints.model(layers)
    data = {"math": [batch(tokens, 1)], "qa": [batch(tokens, 2)]}

    def plain() -> None:
        for batches in data.values():
            cross_entropy(model, batches[0]).backward()
            model.zero_grad(set_to_none=True)

    gradients(model, {name: [batch(16, 3)] for name in data})  # what is loaded late
    rows = {}
    for name, function in (
        ("plain backward passes", plain),
        ("`gradients`", lambda: gradients(model, data)),
    ):
        rows[name] = measured(function)
    base, numbers = rows["plain backward passes"], sum(p.numel() for p in model.parameters())
    lines = [
        f"Qwen3-0.6B shape with {layers} layers, {numbers / 1e6:.0f} M parameters, bfloat16; two domains of {tokens} "
        f"tokens each\n",
        "| | CPU s | wall s | CPU, ratio | peak anonymous MB above the model |",
        "|---|---|---|---|---|",
    ]
    for name, (used, wall, memory) in rows.items():
        lines.append(f"| {name} | {used:.1f} | {wall:.1f} | {used / base[0]:.2f} | {memory:,.0f} |")
    lines.append(f"\nOn disk meanwhile: {2 * 4 * numbers / 1e9:.1f} GB.")
    return "\n".join(lines)


def in_training(steps: int, rounds: int) -> str:
    """The wall seconds of one real training with the callback and without it, in turn."""
    config = Qwen3Config(
        hidden_size=128, intermediate_size=384, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=32, vocab_size=1000,
    )  # fmt: skip
    rows = torch.randint(1000, (1024, 32), generator=torch.Generator().manual_seed(0))
    data = [{"input_ids": row, "attention_mask": torch.ones_like(row), "labels": row} for row in rows]
    domains = {"math": [batch(64, 1)], "qa": [batch(64, 2)]}

    def once(watched: bool) -> tuple[float, GradientCosines | None]:
        torch.manual_seed(0)
        with tempfile.TemporaryDirectory() as place:
            arguments: Any = TrainingArguments(
                output_dir=place, max_steps=steps, per_device_train_batch_size=4, use_cpu=True, report_to="none",
                save_strategy="no", disable_tqdm=True, logging_steps=50,
            )  # fmt: skip
            trainer = Trainer(model=Qwen3ForCausalLM(config), args=arguments, train_dataset=data)
            trainer.remove_callback(PrinterCallback)
            callback = GradientCosines(trainer, domains) if watched else None
            if callback is not None:
                trainer.add_callback(callback)
            used = time.process_time()
            trainer.train()
            return time.process_time() - used, callback

    once(False)
    bare, watched, times = [], [], 0
    for _ in range(rounds):
        bare.append(once(False)[0])
        used, callback = once(True)
        assert callback is not None
        watched.append(used)
        times = len(callback.measured)
    pairs = ", ".join(f"{100 * (one / other - 1):+.1f}" for one, other in zip(watched, bare, strict=True))
    return (
        f"A training of {steps} steps, watched (`every=100`) and not, in turn, {rounds} times. Least CPU seconds: "
        f"{min(watched):.2f} watched, {min(bare):.2f} not, {100 * (min(watched) / min(bare) - 1):+.1f} %; pair by pair "
        f"{pairs} %, for {times} measurements."
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=150)
    asked = parser.parse_args()
    print(f"{statement()}\n\n## Beside plain backward passes\n")
    print(beside_plain_passes(asked.layers, asked.tokens), flush=True)
    print(f"\n## While training\n\n{in_training(asked.steps, 5)}")


if __name__ == "__main__":
    main()
