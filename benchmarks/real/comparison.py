"""The rows of the real lab: each method at each value of its knob, applied to the later model, evaluated, taken back.

Rows are kept in ``real.json.gz`` in the form of ``benchmarks.pareto``'s, so the same points, intervals and contests are
read from them. A row says besides how many answers are right by greedy decoding, the perplexity of text that nobody
trains on, and how far the model has moved from the base's own chat answers. Seconds are CPU seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.evaluate import Scores
from benchmarks.pareto import comparison
from benchmarks.pareto.changes import REFERENCE, Method, Setting, forget
from benchmarks.pareto.comparison import Store
from benchmarks.pareto.points import Seed
from benchmarks.real.evaluate import Evaluator
from benchmarks.real.stages import place
from surgery import Trajectory, load_prompts
from surgery.checkpoints.opening import fingerprint
from surgery.scores.memory import remembered


@dataclass(frozen=True)
class Pair(comparison.Pair):
    """A damaged domain, the stages around it, and the later stage's own domain, which is to be kept.

    ``also``: the domain of a stage before both, which is to be kept, too.
    """

    kept: str
    also: str = ""

    @property
    def domains(self) -> tuple[str, ...]:
        return tuple(one for one in (self.metric, self.kept, self.also) if one)


PAIRS = (
    Pair("Math by QA", "form", "math", "math-qa", "math", "qa"),
    Pair("QA by Math", "form", "qa", "qa-math", "qa", "math"),
    Pair("QA by Format, after Math", "math", "math-qa", "math-qa-format", "qa", "format", "math"),
    Pair("QA by Math (GRPO)", "form", "qa", "qa-math-grpo", "qa", "math"),
    Pair("Math by QA (adapters)", "base", "math-r8", "math-qa-r8", "math", "qa"),
)
MAIN = PAIRS[:2]  # what README and the defaults are chosen by


@dataclass(frozen=True)
class Row(comparison.Row):
    """One evaluated model, as in ``benchmarks.pareto``; ``greedy``: exact match of the damaged domain, per item."""

    greedy: list[int]


def setting_of(lab: Path, seed: int, pair: Pair) -> Setting:
    """The checkpoints and calibration prompts of one pair, with the later model live in its own dtype."""
    run = Trajectory(*(place(lab, stage, seed) for stage in (pair.base, pair.earlier, pair.later)))
    files = {domain: lab / "data" / f"{domain}.calibration.jsonl" for domain in pair.domains}
    data = {domain: load_prompts(file, run.later) for domain, file in files.items()}
    return comparison.opened(lab / f"seed{seed}", run, pair.metric, data)


def measure(setting: Setting, method: Method, value: float, draw: int, evaluate: Evaluator, before: Scores) -> Row:
    """Apply one method at one value, evaluate, take it back."""
    row, found = comparison.scored(setting, method, value, draw, evaluate.arrays, before, time.process_time)
    return Row(**vars(row), greedy=found[f"{setting.metric}, greedy"].astype(int).tolist())


def measure_pair(
    lab: Path,
    seed: int,
    pair: Pair,
    methods: Callable[[Setting, Pair], Sequence[Method]],
    store: Store,
    say: Callable[[str], None] = print,
) -> dict[str, Any]:
    """All rows of one seed and pair; those that the store holds are taken from it."""
    folders = {stage: place(lab, stage, seed) for stage in (pair.base, pair.earlier, pair.later)}
    weights = Trajectory(*folders.values()).weights("base", "earlier", "later")
    run = store.run(f"seed{seed}", pair, {name: fingerprint(one) for name, one in zip(folders, weights, strict=True)})
    done = {(row["method"], row["value"], row["draw"]): row for row in run["rows"]}
    setting = setting_of(lab, seed, pair)
    evaluate = Evaluator(lab / "data", AutoTokenizer.from_pretrained(folders[pair.later]), pair.domains)
    every = methods(setting, pair)
    missing = {one.name: [v for v in one.values if (one.name, v, 0) not in done] for one in every}
    left = count = sum(map(len, missing.values()))
    before: Scores = {}  # of the later model, whose row is the first to be measured
    began = time.perf_counter()
    for method in every:
        if missing[method.name] and method.kind != REFERENCE and not Seed({**run, "rows": [*done.values()]}).damaged:
            say(f"{run['seed']}, {pair.name}: no significant loss, so there is nothing to recover")
            break
        with remembered():
            for value in missing[method.name]:
                before = before or evaluate.arrays(setting.model)
                row = measure(setting, method, value, 0, evaluate, before)
                done[method.name, value, 0] = asdict(row)
                run["rows"] = list(done.values())
                run["measured"] = list(dict.fromkeys([*run["measured"], statement()]))
                store.write()
                left -= 1
                minutes = (time.perf_counter() - began) / (count - left) * left / 60
                say(
                    f"{run['seed']}, {pair.name}: {method.name} {value:g}: {_told(row, run, pair)}; "
                    f"{row.seconds:.0f} CPU s; {count - left} of {count}, about {minutes:.0f} min left"
                )
        forget()
    return run


def _told(row: Row, run: dict[str, Any], pair: Pair) -> str:
    """A row in a few words: recovery once the references are there, else the score."""
    scores = {one["method"]: one["metrics"][pair.metric] for one in run["rows"] if one["kind"] == REFERENCE}
    if len(scores) < 2:
        return f"{pair.metric} {100 * row.metrics[pair.metric]:.1f}"
    later, earlier = scores["later"], scores["earlier"]
    share = (row.metrics[pair.metric] - later) / (earlier - later)
    return f"{100 * share:.1f} % back, {pair.kept} {100 * row.delta[pair.kept][0]:+.2f}, {row.touched / 1e6:.2f} M"
