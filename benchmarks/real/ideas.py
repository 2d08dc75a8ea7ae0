"""Ways of choosing single weights that were tried: ``python -m benchmarks.real.ideas PAIR [NAME...] [--lab FOLDER]``.

One pair of seed 0 (0: Math by QA, 1: QA by Math), 256 evaluation items, recovery along the way. What lost is here, and
not in the library. Every way takes 0.25 % of the weights of MLPs and attention (without biases), in ``steps``. A step
measures the gains of ``prompts`` calibration prompts, drawn anew, with all taken weights reverted. ``lots``: the
prompts of a step are divided so, and a weight's gain is the lowest of its gains on each. ``memory``: gains are averaged
over steps with this weight of the past. ``growing``: each step takes a quarter more than the last. ``pool``: so many
prompts to draw from; beyond 128 they are training prompts.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.hardware import statement
from benchmarks.real.comparison import PAIRS, Pair
from benchmarks.real.evaluate import Encoded, Evaluator, Scores, encoded, padded, predicted
from benchmarks.real.stages import place
from benchmarks.seeds import RESULTS

SHARE, NOISE, ITEMS = 0.0025, 0.01, 256


@dataclass(frozen=True)
class Idea:
    """One way; see the module's text."""

    steps: int = 16
    prompts: int = 32
    lots: int = 1
    memory: float = 0.0
    growing: bool = False
    pool: int = 128
    marks: tuple[int, ...] = (4, 8, 16)


IDEAS = {
    "8 equal steps, all prompts": Idea(8, 128, marks=(1, 4, 8)),
    "16 equal steps, 32 prompts": Idea(),
    "16 growing steps, 64 prompts": Idea(prompts=64, growing=True),
    "32 equal steps, 16 prompts": Idea(32, 16, marks=(8, 16, 32)),
    "16 equal steps, 2 lots of 16": Idea(lots=2),
    "12 growing steps, 4 lots of 16": Idea(12, 64, lots=4, growing=True, marks=(6, 9, 12)),
    "16 equal steps, 2 lots of 16 out of 512": Idea(lots=2, pool=512, marks=(8, 16)),
    "16 equal steps, 32 prompts, memory 0.7": Idea(memory=0.7, marks=(8, 16)),
}


class Bench:
    """The live later model, the earlier one, and flat gains over all matrices of the layers."""

    def __init__(self, lab: Path, pair: Pair) -> None:
        earlier, later = (place(lab, stage, 0) for stage in (pair.earlier, pair.later))
        self.pair, self.tokenizer = pair, AutoTokenizer.from_pretrained(later)
        self.model: Any = AutoModelForCausalLM.from_pretrained(later, dtype=torch.bfloat16).eval()
        self.parent: Any = AutoModelForCausalLM.from_pretrained(earlier, dtype=torch.bfloat16).eval()
        self.weights = {n: p for n, p in self.model.named_parameters() if ".layers." in n and p.ndim == 2}
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in self.weights)
        theirs = dict(self.parent.named_parameters())
        self.before = {name: theirs[name].detach() for name in self.weights}
        self.after = {name: parameter.detach().clone() for name, parameter in self.weights.items()}
        sizes = torch.tensor([0, *(p.numel() for p in self.weights.values())])
        self.starts = dict(zip(self.weights, sizes.cumsum(0).tolist(), strict=False))
        self.count = int(sizes.sum())
        data = lab / "data"
        self.rows: list[Encoded] = encoded(data / f"{pair.metric}.calibration.jsonl", self.tokenizer)
        self.rows += encoded(data / f"{pair.metric}.train.jsonl", self.tokenizer, 3000)[::4]
        self.evaluate = Evaluator(data, self.tokenizer, (pair.metric, pair.kept), ITEMS, chat=False)
        with torch.no_grad():
            self.ends = self.evaluate(self.parent), self.evaluate(self.model)

    def gains(self, asked: list[int]) -> tuple[Tensor, float]:
        """Every weight's gain on those prompts, by the Hellinger distance per token, and the distance itself."""
        ids, mask = padded([self.rows[at] for at in asked], int(self.tokenizer.pad_token_id))
        with torch.no_grad():
            root = (predicted(self.parent, ids, mask)[0].float().log_softmax(-1) / 2).exp()
        mine = (predicted(self.model, ids, mask)[0].float().log_softmax(-1) / 2).exp()
        loss = (((mine - root).square().sum(-1) / 2 + NOISE**2).sqrt() - NOISE).mean()
        loss.backward()
        found = torch.empty(self.count)
        for name, parameter in self.weights.items():
            change = parameter.detach().float() - self.before[name].float()
            assert parameter.grad is not None
            found[self.starts[name] :][: parameter.numel()] = (parameter.grad.float() * change).flatten()
            parameter.grad = None
        return found, float(loss.detach())

    def revert(self, chosen: Tensor) -> None:
        """Copy the earlier values of weights, given by their places among all."""
        for name, parameter in self.weights.items():
            at = chosen[(chosen >= self.starts[name]) & (chosen < self.starts[name] + parameter.numel())]
            parameter.data.view(-1)[at - self.starts[name]] = self.before[name].view(-1)[at - self.starts[name]]

    def reset(self) -> None:
        for name, parameter in self.weights.items():
            parameter.data.copy_(self.after[name])

    def judged(self) -> dict[str, float]:
        """Recovery, by probability and exact match, and the change of the kept skill."""
        now: Scores = self.evaluate(self.model)

        def mean(scores: Scores, name: str) -> float:
            return float(np.mean(scores[name]))

        def back(name: str) -> float:
            earlier, later = (mean(scores, name) for scores in self.ends)
            return (mean(now, name) - later) / (earlier - later) if earlier != later else float("nan")

        metric, kept = self.pair.metric, self.pair.kept
        return {
            "recovery": back(metric),
            "greedy": back(f"{metric}, greedy"),
            "kept": mean(now, kept) - mean(self.ends[1], kept),
        }


def tried(bench: Bench, idea: Idea) -> list[dict[str, float]]:
    """Recovery at the marks."""
    bench.reset()
    drawn, order, taken, found = random.Random(0), [], torch.zeros(bench.count, dtype=torch.bool), []
    total, past, spent = round(SHARE * bench.count), None, 0.0
    shares = [1.25**at if idea.growing else 1.0 for at in range(idea.steps)]
    for step in range(idea.steps):
        start = time.process_time()
        if len(order) < idea.prompts:
            more = list(range(idea.pool))
            drawn.shuffle(more)
            order = order + more
        asked, order = order[: idea.prompts], order[idea.prompts :]
        gains = bench.gains(asked[:: idea.lots])[0]
        for lot in range(1, idea.lots):
            torch.minimum(gains, bench.gains(asked[lot :: idea.lots])[0], out=gains)
        if idea.memory:
            past = gains.clone() if past is None else past.mul_(idea.memory).add_(gains, alpha=1 - idea.memory)
            gains = past.clone()
        gains.masked_fill_(taken, 0)
        chosen = gains.topk(round(total * shares[step] / sum(shares))).indices
        chosen = chosen[gains[chosen] > 0]
        bench.revert(chosen)
        taken[chosen] = True
        spent += time.process_time() - start
        if step + 1 in idea.marks:
            found.append({"share": float(taken.sum()) / bench.count, **bench.judged(), "seconds": spent})
            print(json.dumps(found[-1]), flush=True)
    return found


def main() -> None:
    """Try what is asked for, and write a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pair", type=lambda text: PAIRS[int(text)])
    parser.add_argument("names", nargs="*", default=list(IDEAS))
    parser.add_argument("--lab", type=Path, default=Path("runs/real"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    bench = Bench(asked.lab, asked.pair)
    lines = [f"# Ways of choosing single weights: {asked.pair.name}\n\n{statement()}\n"]
    lines += ["| way | share of the weights | recovery | by greedy | kept, points | CPU s |", "|---" * 6 + "|"]
    for name in asked.names:
        for one in tried(bench, IDEAS[name]):
            cells = [f"{100 * one['share']:.3f} %", f"{100 * one['recovery']:.0f} %", f"{100 * one['greedy']:.0f} %"]
            lines.append(
                f"| {name} | " + " | ".join([*cells, f"{100 * one['kept']:+.2f}", f"{one['seconds']:.0f}"]) + " |"
            )
    (asked.out / f"real-ideas-{PAIRS.index(asked.pair)}.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
