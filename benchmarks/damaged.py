"""Math, which QA training damaged: what most questions are asked about.

What ``benchmarks.pareto`` has measured is taken from its rows, so that no two reports differ by a last bit.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from torch import nn
from transformers import AutoTokenizer

from benchmarks.lab.domains import DOMAINS
from benchmarks.lab.evaluate import Evaluator
from benchmarks.pareto.comparison import Store, pairs
from benchmarks.seeds import RESULTS
from surgery import Trajectory, load_prompts, rollback
from surgery.live.prompts import Batch
from surgery.masks.mask import Mask
from surgery.measure.rows import EARLIER, LATER

METRIC, PAIR = "math", pairs()[0].name
OTHERS = tuple(domain for domain in DOMAINS if domain != METRIC)
Judged = tuple[float, dict[str, float]]


@dataclass(frozen=True)
class Damaged:
    """One seed: the run Code → Math → QA, calibration prompts by domain, the scores before any edit."""

    run: Trajectory
    data: Mapping[str, list[Batch]]
    score: Evaluator
    later: Mapping[str, float]
    earlier: Mapping[str, float]
    stored: Mapping[tuple[str, float], Judged]

    @classmethod
    def of(cls, folder: Path) -> Damaged:
        run = Trajectory(folder / "code", folder / "math", folder / "qa")
        score = Evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
        data = {
            domain: load_prompts(folder / "data" / f"{domain}.calibration.jsonl", folder / "qa") for domain in DOMAINS
        }
        scores = score(run.load()), score(Trajectory(later=run.earlier).load())
        return cls(run, data, score, *scores, stored(folder.name))

    @property
    def model(self) -> nn.Module:
        return self.run.load()

    def judged(self, mask: Mask) -> Judged:
        """With the mask reverted: the recovery of Math, and Δ of every other domain."""
        with rollback(self.model, to=self.run.tensors("earlier"), mask=mask):
            now = self.score(self.model)
        recovery = (now[METRIC] - self.later[METRIC]) / (self.earlier[METRIC] - self.later[METRIC])
        return recovery, {domain: now[domain] - self.later[domain] for domain in OTHERS}


def stored(seed: str) -> dict[tuple[str, float], Judged]:
    """(method, value) → what the rows of ``benchmarks.pareto`` say of Math after QA; of methods that draw nothing."""
    runs = Store(RESULTS / "pareto.json.gz").runs
    rows = [row for run in runs if (run["seed"], run["pair"]["name"]) == (seed, PAIR) for row in run["rows"]]
    score = {row["method"]: row["metrics"][METRIC] for row in rows if row["method"] in (EARLIER, LATER)}
    drawn = {row["method"] for row in rows if row["draw"]}
    return {
        (row["method"], row["value"]): (
            (row["metrics"][METRIC] - score[LATER]) / (score[EARLIER] - score[LATER]),
            {domain: row["delta"][domain][0] for domain in OTHERS},
        )
        for row in rows
        if row["method"] not in drawn
    }
