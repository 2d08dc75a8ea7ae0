"""What judging a stage while it trains costs, beside the training and beside a pass over the prompts.

python -m benchmarks.speed.stages
"""

from __future__ import annotations

import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from benchmarks.hardware import statement
from benchmarks.lab.tokenizer import build_tokenizer
from surgery import Trajectory, load_prompts
from surgery.training import RollbackCallback

LAB = Path(__file__).parents[1] / "lab" / "seed0"
RESULTS = Path(__file__).parents[1] / "results" / "stages-speed.md"
ROUNDS, STEPS, RATE = 3, 60, {"gentle": 1e-6, "harmful": 3e-3}


def cpu(work: Callable[[], Any]) -> float:
    """CPU seconds of the round that took the least."""
    found = []
    for _ in range(ROUNDS):
        before = sum(os.times()[:2])
        work()
        found.append(sum(os.times()[:2]) - before)
    return min(found)


def main() -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    tokenizer = build_tokenizer()
    prompts = {n: load_prompts(LAB / f"data/{n}.calibration.jsonl", tokenizer) for n in ("math", "code", "qa")}
    rows = [{n: t[at] for n, t in batch.items()} for batch in prompts["qa"] for at in range(len(batch["input_ids"]))]
    watched = {name: prompts[name] for name in ("math", "code")}
    seen: dict[str, Any] = {}

    def train(rate: float, repair: bool | None) -> None:
        model: Any = Trajectory(later=LAB / "math").load(dtype=torch.float32)
        callbacks = (
            []
            if repair is None
            else [RollbackCallback(watched, earlier=LAB / "math", repair=repair, say=lambda _: None)]
        )
        with tempfile.TemporaryDirectory() as scratch:
            arguments = TrainingArguments(
                scratch, max_steps=STEPS, learning_rate=rate, per_device_train_batch_size=16, report_to="none",
                use_cpu=True, save_strategy="no", logging_strategy="no", disable_tqdm=True,
            )  # fmt: skip
            Trainer(model=model, args=arguments, train_dataset=rows, callbacks=callbacks).train()
        for one in callbacks:
            seen["last"] = next(iter(one.measured.values()))

    def passes() -> None:
        model: Any = Trajectory(later=LAB / "math").load(dtype=torch.float32)
        for batch in (one for batches in watched.values() for one in batches):
            model(**batch).loss.backward()

    train(RATE["gentle"], True)  # imports and first calls
    alone, one = cpu(lambda: train(RATE["gentle"], None)), cpu(passes)
    lines = []
    for stage, rate in RATE.items():
        for repair in (False, True):
            with_it = cpu(lambda rate=rate, repair=repair: train(rate, repair))
            hurt = ", ".join(seen["last"].hurt) or "none"
            more = with_it - alone
            costs = f"{more:.2f} | {more / alone:.2f} | {more / one:.1f}"
            lines.append(f"| {stage} | repair={repair} | {hurt} | {costs} |")
    text = f"""# What judging a stage costs

Made by `python -m benchmarks.speed.stages`. {statement()}
The lab's Math trained on QA for {STEPS} steps of 16 prompts (no RL, {alone:.2f} CPU seconds by itself);
`RollbackCallback` looks at Math and Code at the end, 128 prompts each. One forward and backward pass over those
prompts, loading included, takes {one:.2f} CPU seconds. Of {ROUNDS} rounds the one of least CPU.

| stage | callback | hurt | more CPU s | of the training | passes over the prompts |
|---|---|---|---:|---:|---:|
{chr(10).join(lines)}

That is the price of one look: once at the end, or at every save. Where no domain was hurt it is two evaluations of all
prompts. Where two were, it is two runs of `repair`, also with `repair=False`, which writes the mask.
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
