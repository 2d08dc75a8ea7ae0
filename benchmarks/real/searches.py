"""What the searches for single weights look at, and in how much memory: ``python -m benchmarks.real.searches``.

Two short pairs of stages of its own, trained in float32 in some ten minutes from the real lab's base model (which is
made if it is not there): Math, then QA; and QA, then Math. Then the rounds up to a share of the weights, without a
stop. Of each search: how many weights were asked for, for how many there was room, how many exceeded the bar, and how
often each lot was measured. Memory: the most bytes of tensors, counted, beyond those of the same passes whose gradients
are dropped as they come.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.real.__main__ import prepare, say
from benchmarks.real.command import command
from benchmarks.real.evaluate import encoded, padded, predicted
from benchmarks.seeds import write
from benchmarks.speed.allocations import most
from surgery import Trajectory, load_prompts
from surgery.live.hooks import only_these
from surgery.live.losses import summed
from surgery.live.prompts import Batch
from surgery.scores import lots
from surgery.scores.above import Above
from surgery.scores.lots import Best, best_of_lots
from surgery.selectors import rounds

STAGES = {"math": ("", 50), "math-qa": ("math", 30), "qa": ("", 50), "qa-math": ("qa", 25)}
PAIRS = {"Math by QA": ("math", "math-qa"), "QA by Math": ("qa", "qa-math")}
UNITS = ("mlp", "kv_group")


def train(start: Path, out: Path, data: Path, steps: int) -> None:
    """A short stage: 12 items a step."""
    drawn, tokenizer = random.Random(0), AutoTokenizer.from_pretrained(start)
    model: Any = AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32).train()
    rows = encoded(data / f"{out.name.split('-')[-1]}.train.jsonl", tokenizer)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, betas=(0.9, 0.98), weight_decay=0.0, fused=True)
    for step in range(steps):
        ids, mask = padded(drawn.sample(rows, 12), int(tokenizer.pad_token_id))
        logits, targets, _ = predicted(model, ids, mask)
        (nn.functional.cross_entropy(logits, targets, reduction="sum") / 12).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        shape = max(0.5 * (1 + math.cos(math.pi * step / steps)), 0.02)
        for group in optimizer.param_groups:
            group["lr"] = 1e-4 * min(1.0, (step + 1) / 10) * shape
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


@dataclass
class Search:
    """What one search did, in weights; how often the first lot was measured, and all of them."""

    asked: int
    rooms: list[int] = field(default_factory=list)
    came: list[int] = field(default_factory=list)
    bands: int = 0
    seconds: float = 0.0
    beyond: float = math.nan  # bytes


def watched(search: Search, work: Callable[[], Best]) -> Best:
    """The search, noting what it does."""
    made, told, best = Above.__init__, Above.told, lots._Few.best

    def init(self: Any, *given: Any) -> None:
        made(self, *given)
        search.rooms.append(self.size)

    def tell(self: Any) -> tuple[int, float]:
        found = told(self)
        search.came.append(found[0])
        return found

    def judge(self: Any, *given: Any) -> Any:
        search.bands += 1
        return best(self, *given)

    Above.__init__, Above.told, lots._Few.best = init, tell, judge  # type: ignore[method-assign, assignment]
    try:
        return work()
    finally:
        Above.__init__, Above.told, lots._Few.best = made, told, best  # type: ignore[method-assign]


def searches(run: Trajectory, data: Any, budget: float, counted: bool) -> tuple[list[Search], int]:
    """Every search on the way to a budget, and how many weights are candidates."""
    found: list[Search] = []

    def instead(run: Trajectory, some: list[list[Batch]], count: int, **how: Any) -> Best:
        search, best = Search(count), list[Best]()

        def work() -> None:
            best.append(watched(search, lambda: best_of_lots(run, some, count, **how)))

        began = time.process_time()
        if counted:
            search.beyond = most(work) - most(lambda: bare(run, some, how["loss"]))
        else:
            work()
        search.seconds = time.process_time() - began
        found.append(search)
        say(f"{search}")
        return best[0]

    real, rounds.best_of_lots = rounds.best_of_lots, instead
    try:
        mask = rounds.by_damage(run, data, budget, units=UNITS, stop=False)
    finally:
        rounds.best_of_lots = real
    return found, sum(neurons * width for neurons, width in mask.shapes.values())


def bare(run: Trajectory, some: list[list[Batch]], loss: Any) -> None:
    """The passes of a search, and nothing else."""
    model, (live,) = run.load(), run.live(units=UNITS)
    held = {slot.tensor for block in live.layout.blocks for slot in block.slots}
    drop: dict[nn.Parameter, Callable[[Tensor], None]] = {
        one: lambda _: None for name, one in model.named_parameters() if name in held
    }
    with only_these(drop, model):
        for batch in (batch for lot in some for batch in lot):
            summed(loss, model, batch).backward()


def table(found: list[Search], total: int) -> str:
    """Each search, its weights in percent of all."""
    lines = [
        "| round | asked for, % | room, % | above the bar, % | first lot, times | all lots, times | "
        "memory beyond the passes, bytes a weight |",
        "|---|---|---|---|---|---|---|",
    ]
    for at, one in enumerate(found):
        share = [f"{100 * number / total:.4f}" for number in (one.asked, max(one.rooms), one.came[-1])]
        beyond = f"{one.beyond / total:.3f}" if one.beyond == one.beyond else ""
        lines.append(f"| {at + 1} | {' | '.join(share)} | {len(one.came)} | {one.bands} | {beyond} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is missing, search, write the page."""
    parser = command(__doc__)
    parser.add_argument("--budget", type=float, default=0.01)
    parser.add_argument("--pairs", default=",".join(PAIRS), help="which pairs")
    parser.add_argument("--memory", action=argparse.BooleanOptionalAction, default=True, help="count bytes, too")
    asked = parser.parse_args()
    prepare(asked.lab)
    home, data = asked.lab / "short", asked.lab / "data"
    text = [
        "# What the searches for single weights look at\n\n",
        f"Written by `python -m benchmarks.real.searches`. {statement()}\n\n",
        f"SmolLM2-135M-Instruct in float32, two short stages each. Rounds up to {100 * asked.budget:g} % of the weights"
        " of MLPs and attention, without a stop; 16 of the calibration prompts in a lot.\n",
    ]
    for name, (start, steps) in STAGES.items():
        if not (home / name / "config.json").exists():
            say(f"stage {name}, {steps} steps")
            train(home / start if start else asked.lab / "base", home / name, data, steps)
    for pair in asked.pairs.split(","):
        earlier, later = (home / name for name in PAIRS[pair])
        run = Trajectory(earlier=earlier, later=later)
        prompts = load_prompts(data / f"{earlier.name}.calibration.jsonl", later)
        found, total = searches(run, prompts, asked.budget, asked.memory)
        model, (live,) = run.load(), run.live(units=UNITS)
        names = {slot.tensor for block in live.layout.blocks for slot in block.slots}
        largest = max(one.nbytes for name, one in model.named_parameters() if name in names)
        text.append(f"\n## {pair}\n\n{table(found, total)}\n\nThe gradient of one tensor takes up to ")
        text.append(f"{largest / total:.3f} bytes a weight.\n")
    write(asked.out, "real-searches", "".join(text))


if __name__ == "__main__":
    main()
