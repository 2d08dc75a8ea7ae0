"""How well a model does, item by item: the probability of the right answer, greedy exact match, and what else moved.

One forward pass with the right answers gives both: the probability that a sample (temperature 1) is exactly right is
the product of its tokens' probabilities, and greedy decoding is exactly right where each of them is the most likely.
Of ``text`` it gives the perplexity's logarithm per item, of ``chat`` KL(base ‖ model) per token of the base's answers.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from benchmarks.real.domains import read
from surgery.live import respond

Scores = dict[str, list[float]]
Encoded = tuple[list[int], list[int]]  # what is given, what is predicted


class Items:
    """Token rows sorted by length into batches; scores come back in the rows' own order."""

    def __init__(self, rows: list[Encoded], pad: int, batch_size: int = 64) -> None:
        self.order = sorted(range(len(rows)), key=lambda at: len(rows[at][0]) + len(rows[at][1]))
        self.batches = [
            padded([rows[at] for at in self.order[start : start + batch_size]], pad)
            for start in range(0, len(rows), batch_size)
        ]

    @torch.inference_mode()
    def scores(self, model: Any, references: Iterable[Tensor] | None = None) -> dict[str, np.ndarray]:
        """Per row: log p of what is predicted, whether greedy decoding gives it, and its mean per token.

        With ``references``, log-probabilities per batch: the mean KL from them as well.
        """
        found: dict[str, list[Tensor]] = {"logp": [], "greedy": [], "mean": [], "kl": []}
        other = iter(references or ())
        for ids, mask in self.batches:
            logits, targets, rows = predicted(model, ids, mask)
            count = torch.bincount(rows, minlength=len(ids)).double()
            right, whole = logits.gather(-1, targets[:, None])[:, 0].float(), logits.float().logsumexp(-1)
            total = summed(right - whole, rows, len(ids))
            found["logp"].append(total)
            found["mean"].append(total / count)
            found["greedy"].append((summed(logits.argmax(-1) == targets, rows, len(ids)) == count).double())
            if references is not None:
                base, logp = next(other).float(), logits.float() - whole[:, None]
                found["kl"].append(summed((base.exp() * (base - logp)).sum(-1), rows, len(ids)) / count)
        back = np.empty(len(self.order), dtype=int)
        back[self.order] = np.arange(len(self.order))
        return {name: torch.cat(parts).numpy()[back] for name, parts in found.items() if parts}


def summed(values: Tensor, rows: Tensor, count: int) -> Tensor:
    """Sums per row, float64, on the CPU."""
    return torch.zeros(count, dtype=torch.float64).index_add_(0, rows.cpu(), values.double().cpu())


def padded(rows: list[Encoded], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids ``[row, token]`` padded on the right, and which positions predict what counts ``[row, token − 1]``."""
    width = max(len(given) + len(said) for given, said in rows)
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
    for at, (given, said) in enumerate(rows):
        ids[at, : len(given) + len(said)] = torch.tensor(given + said)
        mask[at, max(len(given), 1) - 1 : len(given) + len(said) - 1] = True
    return ids, mask


def predicted(model: Any, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The logits at the positions that count, their targets, and which row each belongs to."""
    device = next(model.parameters()).device
    ids, mask = ids.to(device), mask.to(device)
    hidden = model.model(input_ids=ids[:, :-1], use_cache=False).last_hidden_state[mask]
    return model.lm_head(hidden), ids[:, 1:][mask], mask.nonzero()[:, 0]


def encoded(path: Path, tokenizer: Any, limit: int | None = None) -> list[Encoded]:
    """Prompt and response (with its end of turn) of each item as tokens; of plain text all tokens are predicted."""
    rows: list[Encoded] = []
    for item in read(path)[:limit]:
        if "text" in item:
            rows.append(([], tokenizer(item["text"])["input_ids"]))
        else:
            said = tokenizer(item["response"])["input_ids"] + [tokenizer.eos_token_id]
            rows.append((tokenizer(item["prompt"])["input_ids"], said))
    return rows


class Evaluator:
    """model → scores per item, in a form that ``surgery.sweep`` takes as ``evaluate``.

    ``DOMAIN``: exact probability. ``DOMAIN, greedy``: exact match, 0 or 1. ``text``: log-likelihood per token, so that
    more is better. ``chat``: −KL(base ‖ model) per token of the base's own answers (if ``base`` is given).
    """

    def __init__(
        self, data: Path, tokenizer: Any, domains: Iterable[str], limit: int | None = None, chat: bool = True
    ) -> None:
        pad = int(tokenizer.pad_token_id)
        self.items = {
            name: Items(encoded(data / f"{name}.evaluation.jsonl", tokenizer, limit), pad) for name in domains
        }
        self.text = Items(encoded(data / "text.evaluation.jsonl", tokenizer), pad, 8)
        answers = data / "chat.answers.safetensors"
        self.chat: tuple[Items, list[Tensor]] | None = None
        if chat and answers.exists():
            kept = load_file(answers)
            rows = [
                (row[: int(start)].tolist(), row[int(start) : int(end)].tolist())
                for row, start, end in zip(kept["ids"], kept["starts"], kept["ends"], strict=True)
            ]
            items = Items(rows, pad, 8)
            self.chat = items, [kept[f"logp.{at}"] for at in range(len(items.batches))]

    def __call__(self, model: nn.Module) -> Scores:
        return {name: values.tolist() for name, values in self.arrays(model).items()}

    def arrays(self, model: nn.Module) -> dict[str, np.ndarray]:
        """The same as arrays."""
        model.eval()
        found: dict[str, np.ndarray] = {}
        for name, items in self.items.items():
            scores = items.scores(model)
            found[name] = np.exp(scores["logp"])
            found[f"{name}, greedy"] = scores["greedy"]
        found["text"] = self.text.scores(model)["mean"]
        if self.chat is not None:
            items, references = self.chat
            found["chat"] = -items.scores(model, references)["kl"]
        return found


def keep_chat(base: nn.Module, data: Path, tokenizer: Any, tokens: int = 32) -> None:
    """Let the base answer the chat prompts greedily, and keep its log-probabilities there (bf16)."""
    pad = int(tokenizer.pad_token_id)
    prompts = [tokenizer(item["prompt"])["input_ids"] for item in read(data / "chat.evaluation.jsonl")]
    width = max(map(len, prompts))
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in prompts])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts])
    (answered,) = respond(base, [{"input_ids": ids, "attention_mask": mask}], max_new_tokens=tokens, temperature=0)
    rows: list[Encoded] = []
    for given, row, attended in zip(prompts, answered["input_ids"], answered["attention_mask"], strict=True):
        whole = row[attended.bool()].tolist()
        rows.append((given, whole[len(given) :]))
    items = Items(rows, pad, 8)
    kept = {
        "ids": padded(rows, pad)[0],
        "starts": torch.tensor([len(given) for given, _ in rows]),
        "ends": torch.tensor([len(given) + len(said) for given, said in rows]),
    }
    with torch.inference_mode():
        for at, (batch, where) in enumerate(items.batches):
            kept[f"logp.{at}"] = predicted(base, batch, where)[0].float().log_softmax(-1).bfloat16()
    save_file(kept, data / "chat.answers.safetensors")
