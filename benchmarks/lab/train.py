"""Train one seed of the lab end to end: ``python -m benchmarks.lab.train --seed 0 --out benchmarks/lab/runs/seed0``.

The base model is supervised on a mixture with noisy answers, so that its greedy answers are mostly right and its
samples often wrong.  Stages of GRPO with verifiable rewards follow (by default Code, Math, QA, CW), and after each a
bf16 folder is written.  Training is in float32, and each stage starts from the float32 weights the last one ended with
(kept in ``float32/`` so that an interrupted run resumes at its stage).
"""

from __future__ import annotations

import argparse
import copy
import math
import os
import random
import shutil
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from benchmarks.lab.domains import DOMAINS, Splits, generate, write_data
from benchmarks.lab.evaluate import Batch, Evaluator
from benchmarks.lab.tokenizer import build_tokenizer

STAGES = ("code", "math", "qa", "cw")


@dataclass(frozen=True)
class Base:
    """The supervised mixture.  Math is the hardest to learn: more of it, and fewer wrong answers."""

    steps: int = 2_000
    learning_rate: float = 2e-3
    batch: tuple[tuple[str, int], ...] = (("math", 96), ("code", 24), ("qa", 40), ("cw", 20))
    wrong: tuple[tuple[str, float], ...] = (("math", 0.1), ("code", 0.4), ("qa", 0.4), ("cw", 0.4))


@dataclass(frozen=True)
class Stage:
    """One GRPO stage."""

    steps: int = 50
    learning_rate: float = 3e-4
    prompts: int = 32
    samples: int = 8


# The third stage is trained harder than the others: it is the one that overwrites what came before it.
GRPO = {"code": Stage(), "math": Stage(steps=25), "qa": Stage(), "cw": Stage()}
THIRD = Stage(steps=60, learning_rate=8e-4)


class Log:
    """Lines to the terminal and to ``train.log``, with the seconds since the start."""

    def __init__(self, path: Path) -> None:
        self._path, self._start = path, time.perf_counter()

    def __call__(self, text: str) -> None:
        line = f"{time.perf_counter() - self._start:7.1f} s  {text}"
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def seed_everything(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def build_model(tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """About half a million parameters in four layers.

    With the default initial scale (0.02) so narrow a model does not learn to add in thousands of steps.
    """
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=96,
        intermediate_size=288,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=24,
        max_position_embeddings=64,
        tie_word_embeddings=True,
        initializer_range=0.08,
        rope_theta=10_000.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
    )
    return Qwen3ForCausalLM(config)


def noisy_batch(splits: Splits, count: int, wrong: float, rng: random.Random, tokenizer: Any) -> Batch:
    """Random training items, a share of them with the answer of another item."""
    items = []
    for item in rng.choices(splits["train"], k=count):
        answer = rng.choice(splits["train"])["response"] if rng.random() < wrong else item["response"]
        items.append({"prompt": item["prompt"], "response": answer})
    return Batch(items, tokenizer)


def answer_loss(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """Cross entropy of the answers' tokens, summed over tokens and averaged over items."""
    logits = model(input_ids=batch.ids[:, :-1], use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(logits.transpose(1, 2), batch.ids[:, 1:], reduction="none")
    return (losses * batch.mask).sum() / len(batch.ids)


def train_base(
    model: Qwen3ForCausalLM, data: dict[str, Splits], tokenizer: Any, seed: int, scores: Evaluator, log: Log
) -> None:
    """Supervised training on the noisy mixture, with a linear warm-up and a cosine decay."""
    plan, rng = Base(), random.Random(f"base-{seed}")
    wrong = dict(plan.wrong)
    optimizer = torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, betas=(0.9, 0.98), weight_decay=0.01)
    model.train()
    for step in range(plan.steps):
        rate = min(1.0, (step + 1) / 100) * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / plan.steps)))
        for group in optimizer.param_groups:
            group["lr"] = plan.learning_rate * rate
        total = sum(size for _, size in plan.batch)
        for domain, size in plan.batch:
            batch = noisy_batch(data[domain], size, wrong[domain], rng, tokenizer)
            (answer_loss(model, batch) * (size / total)).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 200 == 0:
            log(f"base step {step + 1}: {show(scores(model))}")


def train_stage(
    model: Qwen3ForCausalLM,
    domain: str,
    plan: Stage,
    splits: Splits,
    tokenizer: Any,
    seed: int,
    scores: Evaluator,
    log: Log,
    callbacks: Sequence[Any] = (),
    optimizer: torch.optim.Optimizer | None = None,
    save_steps: int | None = None,
) -> None:
    """GRPO on one domain: the reward is 1 if the completion is the right answer and 0 if not.

    ``callbacks``, ``optimizer`` (default: TRL's own) and ``save_steps`` (for what callbacks do then) are the trainer's.
    """
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    def reward(completions: list[str], response: list[str], **_: Any) -> list[float]:
        return [float(said == right) for said, right in zip(completions, response, strict=True)]

    class Progress(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step % 10 == 0:
                log(f"{domain} step {state.global_step}: {show(scores(model))}")

    rows = random.Random(f"{domain}-{seed}").choices(splits["train"], k=plan.steps * plan.prompts)
    longest = max(len(item["response"]) for item in splits["train"]) + 1
    with tempfile.TemporaryDirectory() as scratch:
        arguments = GRPOConfig(
            output_dir=scratch,
            seed=seed,
            max_steps=plan.steps,
            learning_rate=plan.learning_rate,
            lr_scheduler_type="constant",
            per_device_train_batch_size=plan.prompts * plan.samples,
            num_generations=plan.samples,
            max_completion_length=longest,
            beta=0.0,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            save_strategy="steps" if save_steps else "no",
            save_steps=save_steps or 500,
            save_total_limit=1,
            report_to="none",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=reward,
            args=arguments,
            train_dataset=Dataset.from_list(rows),
            processing_class=tokenizer,
            callbacks=[Progress(), *callbacks],
            optimizers=(optimizer, None),
        )
        trainer.train()


def show(scores: dict[str, float]) -> str:
    return "  ".join(f"{domain} {scores[domain]:.3f}" for domain in DOMAINS)


def save(model: Qwen3ForCausalLM, tokenizer: Any, out: Path, name: str) -> None:
    """Keep the float32 weights for a resumed run, then write the bf16 folder in one rename."""
    weights = {key: value.detach().clone().contiguous() for key, value in model.named_parameters()}
    (out / "float32").mkdir(exist_ok=True)
    save_file(weights, out / "float32" / f"{name}.safetensors")
    temporary = out / f".{name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    half = Qwen3ForCausalLM(copy.deepcopy(model.config))
    half.config.use_cache = True  # TRL switches it off
    half.load_state_dict(weights, strict=False)
    half.tie_weights()
    half.to(torch.bfloat16).save_pretrained(temporary)
    tokenizer.save_pretrained(temporary)
    (temporary / "model.safetensors").chmod(0o644)
    os.replace(temporary, out / name)


def restore(model: Qwen3ForCausalLM, out: Path, name: str) -> None:
    """The float32 weights a finished stage ended with."""
    model.load_state_dict(load_file(out / "float32" / f"{name}.safetensors"), strict=False)
    model.tie_weights()


def train_seed(seed: int, out: Path, stages: Sequence[str] = STAGES) -> None:
    """Base and all stages; what is already in ``out`` is not trained again."""
    out.mkdir(parents=True, exist_ok=True)
    log = Log(out / "train.log")
    write_data(out / "data", seed)
    data = {domain: generate(domain, seed) for domain in DOMAINS}
    tokenizer = build_tokenizer()
    scores = Evaluator(out / "data", tokenizer)
    seed_everything(seed)
    model = build_model(tokenizer)
    log(f"seed {seed}: {sum(p.numel() for p in model.parameters()):,} parameters")
    for number, name in enumerate(("base", *stages)):
        if (out / name).is_dir():
            restore(model, out, name)
            log(f"{name}: already there")
            continue
        seed_everything(1_000 * seed + number)
        if name == "base":
            train_base(model, data, tokenizer, seed, scores, log)
        else:
            plan = THIRD if number == 3 else GRPO[name]
            train_stage(model, name, plan, data[name], tokenizer, seed, scores, log)
        save(model, tokenizer, out, name)
        log(f"{name} done: {show(scores(model))}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Train one seed of the lab end to end.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--stages", nargs="+", choices=DOMAINS, default=STAGES, help="in this order (default: %(default)s)"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    train_seed(arguments.seed, arguments.out, arguments.stages)


if __name__ == "__main__":
    main()
