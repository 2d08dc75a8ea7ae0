"""How well a model answers: the exact probability of the right answer, and greedy accuracy.

Every item has one right response, so the probability that a sample (temperature 1) is right is the product of the
teacher-forced probabilities of its tokens and of the end of text.  It has no sampling noise: differences between two
checkpoints are differences between models.  Greedy decoding is right exactly if the right token is the most likely one
at each of those positions, so one forward pass gives both.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.lab.domains import DOMAINS, Item, read_items

Scores = dict[str, np.ndarray]


class Batch:
    """Items of one domain, tokenised once and padded on the right (a causal model never looks there)."""

    def __init__(self, items: list[Item], tokenizer: Any) -> None:
        rows, starts = [], []
        for item in items:
            prompt = tokenizer(item["prompt"], add_special_tokens=False)["input_ids"]
            response = tokenizer(item["response"], add_special_tokens=False)["input_ids"]
            rows.append([*prompt, *response, tokenizer.eos_token_id])
            starts.append(len(prompt))
        width = max(map(len, rows))
        self.ids = torch.full((len(rows), width), int(tokenizer.pad_token_id))
        self.mask = torch.zeros(len(rows), width - 1, dtype=torch.bool)
        for i, (row, start) in enumerate(zip(rows, starts, strict=True)):
            self.ids[i, : len(row)] = torch.tensor(row)
            self.mask[i, start - 1 : len(row) - 1] = True


@torch.no_grad()
def score_batch(model: torch.nn.Module, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
    """Per item: the probability of exactly the right response, and whether greedy decoding gives it (0 or 1)."""
    device = next(model.parameters()).device
    ids, mask = batch.ids.to(device), batch.mask.to(device)
    logits = model(input_ids=ids[:, :-1], use_cache=False).logits.float()
    targets = ids[:, 1:]
    logp = torch.log_softmax(logits, -1).gather(-1, targets[..., None])[..., 0]
    exact = torch.where(mask, logp, 0.0).sum(-1).exp()
    greedy = ((logits.argmax(-1) == targets) | ~mask).all(-1)
    return exact.cpu().double().numpy(), greedy.cpu().double().numpy()


class Evaluator:
    """Scores a model on the evaluation items of a data folder; calling it gives the mean probability per domain.

    It computes in float32 on a copy: a bf16 model's scores are then free of the rounding of its activations, which
    differs from machine to machine, and on a CPU they come several times as fast.
    """

    def __init__(self, data_folder: str | Path, tokenizer: Any, split: str = "evaluation") -> None:
        self._batches = {
            domain: Batch(read_items(Path(data_folder) / f"{domain}.{split}.jsonl"), tokenizer) for domain in DOMAINS
        }

    def both(self, model: torch.nn.Module) -> tuple[Scores, Scores]:
        """Exact probabilities and greedy outcomes, per domain and item."""
        if any(parameter.dtype != torch.float32 for parameter in model.parameters()):
            model = copy.deepcopy(model).float()
        training = model.training
        model.eval()
        try:
            pairs = {domain: score_batch(model, batch) for domain, batch in self._batches.items()}
        finally:
            model.train(training)
        return {d: p[0] for d, p in pairs.items()}, {d: p[1] for d, p in pairs.items()}

    def per_item(self, model: torch.nn.Module) -> Scores:
        """The probability of exactly the right response, per domain and item."""
        return self.both(model)[0]

    def greedy(self, model: torch.nn.Module) -> dict[str, float]:
        """Greedy accuracy per domain."""
        return {domain: float(values.mean()) for domain, values in self.both(model)[1].items()}

    def __call__(self, model: torch.nn.Module) -> dict[str, float]:
        return {domain: float(values.mean()) for domain, values in self.per_item(model).items()}


def evaluator(data_folder: str | Path, tokenizer: Any) -> Callable[[torch.nn.Module], dict[str, float]]:
    """A function from a model to ``{"math": .., "code": .., "qa": .., "cw": ..}``, each in [0, 1]."""
    return Evaluator(data_folder, tokenizer)


def bootstrap_interval(
    values: np.ndarray, level: float = 0.95, draws: int = 2_000, seed: int = 0
) -> tuple[float, float]:
    """A percentile bootstrap interval of the mean, over items."""
    rng = np.random.default_rng(seed)
    means = values[rng.integers(0, len(values), (draws, len(values)))].mean(1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
