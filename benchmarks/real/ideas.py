"""Ways of choosing single weights that were tried: ``python -m benchmarks.real.ideas PAIR [NAME...] [--lab FOLDER]``.

One pair of seed 0 (0: Math by QA, 1: QA by Math), 256 evaluation items, recovery along the way. What lost is here, and
not in the library. Every way takes 0.25 % of the weights of MLPs and attention, in ``steps``. A step measures the gains
of ``prompts`` calibration prompts, drawn anew, with all taken weights reverted. ``lots``: the prompts of a step are
divided so, and a weight's gain is the lowest of its gains on each. ``first``: they are divided into so many and all
others. ``memory``: gains are averaged over steps with this
weight of the past. ``growing``: each step takes a quarter more than the last. ``pool``: so many prompts to draw from;
beyond 128 they are training prompts. ``gated``: a weight is only taken where reverting it lowers the cross entropy of
as many of the kept skill's calibration prompts, too (the sign of CRANE's gate). ``share``: of the weights, in the end.
``strengths``: how far the weights of the last mark go besides, 1 being their earlier values.
"""

from __future__ import annotations

import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import Scores
from benchmarks.pareto.changes import Setting
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS, Pair, setting_of
from benchmarks.real.evaluate import Evaluator, encoded
from benchmarks.real.stages import place
from benchmarks.seeds import write
from surgery import Trajectory, rollback
from surgery.live import distillation, earlier_model
from surgery.live.losses import Loss, cross_entropy
from surgery.live.prompts import Batch, padded
from surgery.masks.entries import shapes_of
from surgery.reverting import Rollback
from surgery.scores.weights import Gains, entries_of, entry_gains

ITEMS, UNITS = 256, ("mlp", "kv_group")


@dataclass(frozen=True)
class Idea:
    """One way; see the module's text."""

    steps: int = 16
    prompts: int = 32
    lots: int = 1
    first: int = 0
    memory: float = 0.0
    growing: bool = False
    pool: int = 128
    gated: bool = False
    share: float = 0.0025
    strengths: tuple[float, ...] = ()
    marks: tuple[int, ...] = (4, 8, 16)


IDEAS = {
    "8 equal steps, all prompts": Idea(8, 128, marks=(1, 4, 8)),
    "16 equal steps, 32 prompts": Idea(),
    "16 growing steps, 64 prompts": Idea(prompts=64, growing=True),
    "32 equal steps, 16 prompts": Idea(32, 16, marks=(8, 16, 32)),
    "16 equal steps, 2 lots of 16": Idea(lots=2),
    "12 growing steps, 4 lots of 16": Idea(12, 64, lots=4, growing=True, marks=(6, 9, 12)),
    "16 growing steps, 2 lots of 16": Idea(lots=2, growing=True, strengths=(1.25, 1.5), marks=(8, 12, 16)),
    "16 growing steps, lots of 4 and 28": Idea(first=4, growing=True, marks=(8, 12, 16)),
    "16 growing steps, lots of 2 and 30": Idea(first=2, growing=True, marks=(8, 12, 16)),
    "16 growing steps, 2 lots of 16 out of 512": Idea(lots=2, growing=True, pool=512, marks=(8, 12, 16)),
    "16 growing steps, 2 lots of 64 out of 512": Idea(prompts=128, lots=2, growing=True, pool=512, marks=(8, 12, 16)),
    "16 growing steps, 2 lots of 16, gated": Idea(lots=2, growing=True, gated=True, marks=(8, 12, 16)),
    "24 growing steps to 1 %, 2 lots of 16 out of 512": Idea(
        24, lots=2, growing=True, pool=512, share=0.01, marks=(12, 18, 21, 24)
    ),
    "16 equal steps, 32 prompts, memory 0.7": Idea(memory=0.7, marks=(8, 16)),
}


class Bench:
    """The pair's setting, prompts to draw from, and the scores of the earlier and the later model."""

    def __init__(self, lab: Path, pair: Pair, seed: int = 0) -> None:
        self.pair, self.setting = pair, setting_of(lab, seed, pair)
        data, tokenizer = lab / "data", AutoTokenizer.from_pretrained(place(lab, pair.later, seed))
        self.rows = encoded(data / f"{pair.metric}.calibration.jsonl", tokenizer)
        self.rows += encoded(data / f"{pair.metric}.train.jsonl", tokenizer, 3000)[::4]
        self.kept = encoded(data / f"{pair.kept}.calibration.jsonl", tokenizer)
        self.pad = int(tokenizer.pad_token_id)
        self.evaluate = Evaluator(data, tokenizer, (pair.metric, pair.kept), ITEMS, chat=False)
        self.later = self.evaluate.arrays(self.setting.model)
        with earlier_model(self.setting.run) as earlier:
            self.earlier = self.evaluate.arrays(earlier)

    def judged(self) -> str:
        """Recovery by probability and by exact match, and the change of the kept skill, as the cells of a table."""
        now: Scores = self.evaluate.arrays(self.setting.model)

        def back(name: str) -> float:
            lost = float(self.earlier[name].mean() - self.later[name].mean())
            return 100 * float(now[name].mean() - self.later[name].mean()) / lost if lost else float("nan")

        kept = 100 * float(now[self.pair.kept].mean() - self.later[self.pair.kept].mean())
        return f"{back(self.pair.metric):.0f} % | {back(f'{self.pair.metric}, greedy'):.0f} % | {kept:+.2f}"


def lower_gains(run: Trajectory, lots: list[list[Batch]], loss: Loss) -> Gains:
    """Of each weight the lowest of its gains on several lots."""
    first, *others = (entry_gains(run, lot, loss=loss, units=UNITS) for lot in lots)
    for other in others:
        torch.minimum(first.flat, other.flat, out=first.flat)
    return first


def tried(bench: Bench, idea: Idea) -> list[str]:
    """The share of the weights, what ``judged`` says, and CPU seconds, at each mark."""
    drawn, order, found = random.Random(0), list[int](), list[str]()
    run, taken, past, spent = bench.setting.run, torch.zeros(0, dtype=torch.int64), None, 0.0
    shares = [1.25**at if idea.growing else 1.0 for at in range(idea.steps)]
    for step in range(idea.steps):
        start = time.process_time()
        if len(order) < idea.prompts:
            order += drawn.sample(range(idea.pool), idea.pool)
        asked, order = order[: idea.prompts], order[idea.prompts :]
        parts = [asked[one :: idea.lots] for one in range(idea.lots)]
        parts = [asked[: idea.first], asked[idea.first :]] if idea.first else parts
        lots = [[padded([bench.rows[at] for at in part], bench.pad)] for part in parts]
        with earlier_model(run) as earlier:
            far = distillation(earlier, [batch for lot in lots for batch in lot], divergence="hellinger")
        with reverted(bench.setting, taken):
            gains = lower_gains(run, lots, far)
            if idea.gated:
                at = step * idea.prompts % len(bench.kept)
                lot = [padded((bench.kept + bench.kept)[at : at + idea.prompts], bench.pad)]
                gains.flat[lower_gains(run, [lot], cross_entropy).flat <= 0] = 0
        if idea.memory:
            past = (
                gains.flat.clone() if past is None else past.mul_(idea.memory).add_(gains.flat, alpha=1 - idea.memory)
            )
            gains.flat.copy_(past)
        gains.flat[taken] = 0
        best = gains.best(round(idea.share * len(gains.flat) * shares[step] / sum(shares)))
        taken = torch.cat([taken, best])
        spent += time.process_time() - start
        if step + 1 in idea.marks:
            with reverted(bench.setting, taken):
                share = 100 * len(taken) / len(gains.flat)
                found.append(f"{share:.3f} % | {bench.judged()} | {spent:.0f}")
            print(found[-1], flush=True)
    for strength in idea.strengths:
        with reverted(bench.setting, taken, strength):
            found.append(f"{100 * len(taken) / len(gains.flat):.3f} %, strength {strength:g} | {bench.judged()} | ")
        print(found[-1], flush=True)
    return found


def reverted(setting: Setting, taken: Tensor, strength: float = 1.0) -> Rollback:
    """The later model with those weights reverted, by their place among all, while a ``with`` block runs."""
    (live,) = setting.run.live(units=UNITS)
    mask = entries_of(taken, shapes_of(live.layout))
    return rollback(setting.model, to=setting.run.tensors("earlier"), mask=mask, strength=strength)


def main() -> None:
    """Try what is asked for, and write a table."""
    parser = command(__doc__)
    parser.add_argument("pair", type=lambda text: PAIRS[int(text)])
    parser.add_argument("names", nargs="*", default=list(IDEAS))
    asked = parser.parse_args()
    bench, lines = Bench(asked.lab, asked.pair), list[str]()
    for name in asked.names:
        lines += [f"| {name} | {cells} |" for cells in tried(bench, IDEAS[name])]
        write(asked.out, f"real-ideas-{PAIRS.index(asked.pair)}", page(asked.pair, lines))


def page(pair: Pair, lines: list[str]) -> str:
    """The table as a page."""
    head = "| way | share of the weights | recovery | by greedy | kept, points | CPU s |\n" + "|---" * 6 + "|"
    told = (
        f"# Ways of choosing single weights: {pair.name}\n\n`python -m benchmarks.real.ideas "
        f"{PAIRS.index(pair)}`; what the ways are, its text says. Seed 0, {ITEMS} evaluation items, no stop. "
        f"{statement()}\n"
    )
    return "\n".join([told, head, *lines, ""])


if __name__ == "__main__":
    main()
