"""What a team would train instead of a rollback, and the bound that no repair passes: joint training.

A refresh starts from the later checkpoint and sees the damaged domain's calibration prompts: ``distilled`` by KL to the
earlier model's predictions, ``reinforced`` by GRPO with the reward 1 for the right answer. Both train float32 copies of
all parameters and give new tensors, rounded as a saved checkpoint is; the live model is as it was. The same steps give
the same numbers again on the same machine. Joint training of both domains from the start is the bound.
"""

from __future__ import annotations

import copy
import os
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.pareto.changes import TRAINED, Change, Method, Setting, prepared
from benchmarks.real.domains import Item, read, right
from benchmarks.real.evaluate import Encoded, padded, predicted
from benchmarks.real.stages import Stage
from surgery import Trajectory
from surgery.live import Distillation, distillation, earlier_model
from surgery.training import refresh

KL_RATE, GRPO_RATE = 1e-5, 3e-5
KL_STEP, GRPO_STEP = 3.0, 7.0  # CPU seconds of a step of 16 prompts of 135 M parameters, one thread of a Xeon with AMX
CHOICE = 24.0  # CPU seconds of D of units there
PROMPTS, SAMPLES, TOKENS = 16, 4, 8  # of a GRPO step: prompts, answers to each, tokens of an answer


def refreshes() -> list[Method]:
    """Both refreshes, at about 1, 4 and 16 times the price of a rollback's choice, and joint training."""

    def by_kl(setting: Setting, value: float, draw: int) -> Change:
        return distilled(setting, int(value))

    def by_grpo(setting: Setting, value: float, draw: int) -> Change:
        lab = setting.folder.parent
        tokenizer = AutoTokenizer.from_pretrained(lab / "form")
        items = read(lab / "data" / f"{setting.metric}.calibration.jsonl")
        return reinforced(setting.model, tokenizer, setting.metric, items, int(value))

    def joint(setting: Setting, value: float, draw: int) -> Change:
        (trained,) = Trajectory(later=setting.folder / "joint").weights("later")
        return {name: trained.read(name) for name in setting.later}

    return [
        Method("refresh by KL", TRAINED, "steps", steps_for(CHOICE, KL_STEP), by_kl),
        Method("refresh by GRPO", TRAINED, "steps", steps_for(CHOICE, GRPO_STEP), by_grpo),
        Method("joint training", TRAINED, "", (0.0,), joint),
    ]


def steps_for(seconds: float, step: float, times: tuple[int, ...] = (1, 4, 16)) -> tuple[float, ...]:
    """How many steps of ``step`` CPU seconds each cost 1, 4 and 16 times ``seconds``, at least one."""
    return tuple(float(max(1, round(factor * seconds / step))) for factor in times)


def reinforce(stage: Stage, start: Path, out: Path, data: Path, seed: int, say: Any = print) -> None:
    """Train a stage by GRPO from a folder into another, as ``stages.train`` does by examples."""
    model = AutoModelForCausalLM.from_pretrained(start, dtype=torch.bfloat16)
    tokenizer, (domain,) = AutoTokenizer.from_pretrained(start), stage.domains
    items = read(data / f"{domain}.train.jsonl")
    new = reinforced(model, tokenizer, domain, items, stage.steps, stage.rate, seed, say)
    model.load_state_dict(new, strict=False)
    part = out.with_name(out.name + ".part")
    model.save_pretrained(part)
    tokenizer.save_pretrained(part)
    os.rename(part, out)


def distilled(setting: Setting, steps: int, rate: float = KL_RATE) -> dict[str, Tensor]:
    """Adam steps on KL(p_earlier ‖ p) at the response tokens, a batch of calibration prompts each."""
    with refresh(setting.model, prepared(setting, predictions), setting.data, steps, rate):
        return {name: parameter.detach().clone() for name, parameter in setting.model.named_parameters()}


def predictions(setting: Setting) -> Distillation:
    """The earlier model's predictions on the damaged domain's calibration prompts, as a loss."""
    with earlier_model(setting.run) as earlier:
        return distillation(earlier, setting.data)


def reinforced(
    model: nn.Module,
    tokenizer: Any,
    domain: str,
    items: list[Item],
    steps: int,
    rate: float = GRPO_RATE,
    seed: int = 0,
    say: Any = None,
) -> dict[str, Tensor]:
    """GRPO steps without a KL term: advantages are rewards less their prompt's mean, over its standard deviation.

    One update a batch of samples, so importance ratios are 1 and nothing is clipped. Written out because a step of 16
    prompts × 4 samples of 8 tokens takes TRL's ``GRPOTrainer`` 25 CPU seconds and 6.3 GB here, and this 7 and 3.9: only
    answers that have a gradient are run backwards.

    Source: Shao et al., DeepSeekMath (arXiv 2402.03300).
    """
    trained, pad = copy.deepcopy(model).float(), int(tokenizer.pad_token_id)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    rng, order = random.Random(seed), list[Item]()
    torch.manual_seed(seed)
    start = time.process_time()
    for step in range(steps):
        if len(order) < PROMPTS:
            order = rng.sample(items, len(items))
        chosen, order = order[:PROMPTS], order[PROMPTS:]
        said = answers(trained, tokenizer, [item["prompt"] for item in chosen])
        texts = tokenizer.batch_decode([one for _, one in said], skip_special_tokens=True)
        rewards = torch.tensor([right(domain, chosen[at // SAMPLES], text) for at, text in enumerate(texts)]).float()
        advantages = advantage(rewards.view(-1, SAMPLES)).flatten()
        kept = advantages.nonzero()[:, 0].tolist()  # the others have no gradient
        if kept:
            ids, mask = padded([said[at] for at in kept], pad)
            with torch.autocast(ids.device.type, torch.bfloat16):
                logits, targets, rows = predicted(trained, ids, mask)
            losses = nn.functional.cross_entropy(logits.float(), targets, reduction="none")
            each = losses / torch.bincount(rows)[rows]  # the mean over an answer's tokens
            (each * advantages[kept][rows]).sum().div(len(said)).backward()
            nn.utils.clip_grad_norm_(trained.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        if say and (step + 1) % 10 == 0:
            each = (time.process_time() - start) / (step + 1)
            say(f"  step {step + 1} of {steps}, reward {float(rewards.mean()):.2f}, {each:.1f} CPU s each")
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    return {name: parameter.detach().to(dtypes[name]) for name, parameter in trained.named_parameters()}


def advantage(rewards: Tensor) -> Tensor:
    """Rewards ``[prompt, sample]`` less their prompt's mean, over its standard deviation; 0 where all are alike."""
    apart = rewards - rewards.mean(1, keepdim=True)
    return apart / (rewards.std(1, keepdim=True) + 1e-4)


@torch.no_grad()
def answers(model: Any, tokenizer: Any, prompts: list[str]) -> list[Encoded]:
    """``SAMPLES`` answers to each prompt at temperature 1: the prompt's tokens, and the answer's up to its end."""
    given = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    width, pad, end = max(map(len, given)), int(tokenizer.pad_token_id), int(tokenizer.eos_token_id)
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in given])
    attended = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in given])
    with torch.autocast(ids.device.type, torch.bfloat16):
        made = model.generate(
            input_ids=ids, attention_mask=attended, do_sample=True, temperature=1.0, top_k=0, top_p=1.0,
            max_new_tokens=TOKENS, num_return_sequences=SAMPLES, pad_token_id=pad, eos_token_id=end,
        )[:, width:].tolist()  # fmt: skip
    cut = [row[: row.index(end) + 1] if end in row else row for row in made]
    return [(given[at // SAMPLES], row) for at, row in enumerate(cut)]
