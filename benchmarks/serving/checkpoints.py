"""python -m benchmarks.serving.checkpoints FOLDER   two stages of a tiny model that vLLM can serve, and their rollback

Runs in the project's environment; ``benchmarks/serving/engine.py`` goes on in one that has vLLM. The lab's own model is
trained in the same way and has heads of 24, which no attention of vLLM's has; here they have 32.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from benchmarks.hardware import statement
from benchmarks.lab.domains import generate
from benchmarks.lab.tokenizer import build_tokenizer
from benchmarks.lab.train import answer_loss, noisy_batch
from surgery import DamageSelector, Trajectory, load_prompts, repair, rolled_back, save, save_patch

PROMPTS, NEW = 64, 6  # of each domain; tokens generated
STEPS = {"earlier": ("cw", 500), "later": ("qa", 120)}


def train(folder: Path) -> None:
    """The earlier stage learns one domain; the later one learns another, and forgets."""
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=len(tokenizer), hidden_size=128, intermediate_size=384, num_hidden_layers=4,
            num_attention_heads=4, num_key_value_heads=2, head_dim=32, max_position_embeddings=64,
            tie_word_embeddings=True, initializer_range=0.08, pad_token_id=0, eos_token_id=1, bos_token_id=None,
        )
    )  # fmt: skip
    for stage, (domain, steps) in STEPS.items():
        data, rng = generate(domain, 0), random.Random(stage)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3 if stage == "earlier" else 1e-3, betas=(0.9, 0.98))
        for _ in range(steps):
            answer_loss(model, noisy_batch(data, 64, 0.0, rng, tokenizer)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        model.bfloat16().save_pretrained(folder / stage)
        tokenizer.save_pretrained(folder / stage)
        model.float()
        for split in ("calibration", "evaluation"):
            lines = [json.dumps(item) + "\n" for item in data[split]]
            (folder / f"{domain}.{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def answers(folder: Path, prompts: list[list[int]]) -> list[list[int]]:
    """What transformers answers greedily, one prompt at a time (no padding), in float32: nothing hangs on rounding."""
    model: Any = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = []
    with torch.inference_mode():
        for prompt in prompts:
            ids = torch.tensor([prompt])
            for _ in range(NEW):  # past the end of the answer too, as vLLM is asked to
                ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], 1)
            found.append(ids[0, len(prompt) :].tolist())
    return found


def main() -> None:
    """Train, repair, roll back, write the patches, and answer."""
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    if not (folder / "later").exists():
        train(folder)
    run = Trajectory(earlier=folder / "earlier", later=folder / "later")
    lost = load_prompts(folder / "cw.calibration.jsonl", folder / "later", batch_size=32)
    kept = load_prompts(folder / "qa.calibration.jsonl", folder / "later", batch_size=32)
    mask = DamageSelector(0.05, units="weight").select(run, lost)
    view = rolled_back(run.later, to=run.earlier, mask=mask)
    save(view, folder / "rolled-back")
    save_patch(view, folder / "patch", format="vllm")
    save_patch(view, folder / "patch-back", format="vllm", reverse=True)
    done = repair(run, lost, keep={"qa": kept}, limit=0.05, recovery=0.5)
    print(done)
    done.save(folder / "repaired")
    prompts = []
    tokenizer = build_tokenizer()
    for domain, _ in STEPS.values():
        lines = (folder / f"{domain}.evaluation.jsonl").read_text(encoding="utf-8").splitlines()[:PROMPTS]
        prompts += [tokenizer(json.loads(line)["prompt"])["input_ids"] for line in lines]
    folders = ("later", "rolled-back", "repaired")
    told = {"prompts": prompts, "new": NEW, "answers": {name: answers(folder / name, prompts) for name in folders}}
    (folder / "transformers.json").write_text(json.dumps({**told, "statement": statement()}), encoding="utf-8")


if __name__ == "__main__":
    main()
