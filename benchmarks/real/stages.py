"""Training one stage: supervised, with float32 masters and a bf16 forward pass; saved in bf16 beside the masters.

A stage is a name, what it starts from, and what it trains on. They make the pairs of the lab:

    base → form ─┬→ math ────→ math-qa ──→ math-qa-format
                 ├→ qa ──────→ qa-math
                 │   └───────→ qa-math-grpo (by reward)
                 └→ joint                   (both domains at once: the bound that no repair passes)
    base → math-r8 → math-qa-r8             (adapters of rank 8, on the packaged base itself)

``form`` teaches to answer with the answer alone, on a few items of every domain, since the base answers in sentences
and scores 0 by exact match. It is the ``base`` of every run, and the same for every seed.
"""

from __future__ import annotations

import json
import math
import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.real.domains import DOMAINS
from benchmarks.real.evaluate import Encoded, Evaluator, encoded, padded, predicted


@dataclass(frozen=True)
class Stage:
    """What a stage trains, from where, and how long."""

    start: str
    domains: tuple[str, ...]
    steps: int
    rate: float = 1e-4
    items: int = 24  # a step
    rank: int = 0  # of adapters on the layers' matrices, which are trained instead of the weights and merged then
    reward: bool = False  # trained by GRPO (``refreshes.reinforce``) and not by examples


STAGES = {
    "form": Stage("base", DOMAINS, 30),
    "math": Stage("form", ("math",), 100),
    "math-qa": Stage("math", ("qa",), 70),
    "qa": Stage("form", ("qa",), 100),
    "qa-math": Stage("qa", ("math",), 50),
    "math-qa-format": Stage("math-qa", ("format",), 40),
    "qa-math-grpo": Stage("qa", ("math",), 60, 3e-5, 16, reward=True),
    "joint": Stage("form", ("math", "qa"), 170),
    "math-r8": Stage("base", ("math",), 130, 1e-3, rank=8),
    "math-qa-r8": Stage("math-r8", ("qa",), 70, 1e-3, rank=8),
}
MATRICES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SHARED = ("base", "form")
FIRST_ONLY = ("qa-math-grpo", "joint", "math-r8", "math-qa-r8")  # of seed 0 alone
MASTERS = "float32.safetensors"


def place(lab: Path, stage: str, seed: int) -> Path:
    """Where a stage's folder lies: those that every seed starts from are shared."""
    return lab / stage if stage in SHARED else lab / f"seed{seed}" / stage


def loss_of(model: nn.Module, rows: list[Encoded], pad: int) -> torch.Tensor:
    """Cross entropy of the responses: summed over tokens, mean over items."""
    ids, mask = padded(rows, pad)
    with torch.autocast(next(model.parameters()).device.type, torch.bfloat16):
        logits, targets, _ = predicted(model, ids, mask)
    return nn.functional.cross_entropy(logits.float(), targets, reduction="sum") / len(rows)


def _adapted(model: nn.Module, rank: int) -> Any:
    """Adapters on all matrices of the layers, put into the model itself, whose other weights take no gradient then."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=MATRICES))


def train(stage: Stage, start: Path, out: Path, data: Path, seed: int, device: str = "cpu", say: Any = print) -> None:
    """Train a stage from a folder into another; the folder appears once it is whole."""
    random.seed(seed)
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(start)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
    if (start / MASTERS).exists():
        model.load_state_dict(load_file(start / MASTERS), strict=False)  # the tied head is not in the file
        model.tie_weights()
    adapted = _adapted(model, stage.rank) if stage.rank else None
    model.to(device).train()
    rng = random.Random(seed)
    pools = [encoded(data / f"{domain}.train.jsonl", tokenizer) for domain in stage.domains]
    evaluate = Evaluator(data, tokenizer, ("math", "qa"), 64, chat=False)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=stage.rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    order: list[Encoded] = []
    began = time.perf_counter()
    losses: list[float] = []
    for step in range(stage.steps):
        if len(order) < stage.items:
            order = [row for pool in pools for row in rng.sample(pool, min(map(len, pools)))]
            rng.shuffle(order)
        rows, order = order[: stage.items], order[stage.items :]
        shape = 0.5 * (1 + math.cos(math.pi * step / stage.steps))
        for group in optimizer.param_groups:
            group["lr"] = stage.rate * min(1.0, (step + 1) / 10) * max(shape, 0.02)
        loss = loss_of(model, rows, int(tokenizer.pad_token_id))
        loss.backward()
        losses.append(float(loss.detach()))
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if (step + 1) % 10 == 0:
            each = (time.perf_counter() - began) / (step + 1)
            left = each * (stage.steps - step - 1)
            loss_now = sum(losses[-10:]) / 10
            say(f"  step {step + 1} of {stage.steps}, loss {loss_now:.3f}, {each:.1f} s each, {left:.0f} s left")
    part = out.with_name(out.name + ".part")
    part.mkdir(parents=True, exist_ok=True)
    if adapted:
        for parameter in trained:
            parameter.data.copy_(parameter.data.bfloat16())  # what is merged is what is saved
        adapted.save_pretrained(part / "adapter")
        file = part / "adapter" / "adapter_model.safetensors"
        save_file({name: value.bfloat16() for name, value in load_file(file).items()}, file, {"format": "pt"})
        model = adapted.merge_and_unload()
    else:
        masters = {name: value.contiguous() for name, value in model.state_dict().items() if name != "lm_head.weight"}
        save_file(masters, part / MASTERS)
    model.to(torch.bfloat16).save_pretrained(part)
    tokenizer.save_pretrained(part)
    scores = {name: sum(values) / len(values) for name, values in evaluate(model).items()}
    say(f"  {out.name}: " + ", ".join(f"{name} {value:.3f}" for name, value in scores.items()))
    told = {"stage": out.name, "seed": seed, "seconds": round(time.perf_counter() - began, 1), "losses": losses}
    (part / "training.json").write_text(json.dumps(told | {"scores": scores}), encoding="utf-8")
    os.rename(part, out)
