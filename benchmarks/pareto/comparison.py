"""Every selector beside everything people use today: ``python -m benchmarks.pareto [SEED_FOLDER...] [--out FOLDER]``.

For every seed folder and every damaged pair each method is applied to the later model, evaluated and taken back, at
each value of its knob. Writes ``pareto.json.gz`` (all rows), ``pareto.md`` (tables) and two pictures. Rows of the same
checkpoints and data that ``pareto.json.gz`` already holds are not measured again: after a change of a selector say
``--fresh``, which measures all. Without a seed folder tables and pictures are drawn from the rows alone.

Seeds of another order of training: ``SEED_FOLDER:code,qa,math`` (the third stage does the damage).
"""

from __future__ import annotations

import argparse
import gzip
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.hardware import statement
from benchmarks.lab.domains import DOMAINS
from benchmarks.lab.evaluate import Evaluator, Scores, bootstrap_interval
from benchmarks.pareto.baselines import differing
from benchmarks.pareto.changes import REFERENCE, Method, Setting, applied, forget
from benchmarks.pareto.front import against_loss, against_size
from benchmarks.pareto.methods import methods
from benchmarks.pareto.points import SCALE, Seed, points
from benchmarks.pareto.report import markdown
from surgery import Trajectory, load_prompts
from surgery.checkpoints.opening import fingerprint
from surgery.live.prompts import Batch

ORDER = ("code", "math", "qa")


@dataclass(frozen=True)
class Pair:
    """A damaged domain and the checkpoints around it: the folders' names, and the metric that fell."""

    name: str
    base: str
    earlier: str
    later: str
    metric: str


def pairs(order: tuple[str, ...] = ORDER) -> tuple[Pair, ...]:
    """What the third stage of a curriculum damaged: the second stage's domain, and the first's."""
    first, second, third = order[:3]
    after = " → ".join(map(written, order[:3]))
    return (
        Pair(f"{written(second)} by {written(third)} ({after})", first, second, third, second),
        Pair(f"{written(first)} by {written(third)} ({after})", "base", second, third, first),
    )


def written(domain: str) -> str:
    """A domain's name in a title: Math, Code, QA, CW."""
    return domain.capitalize() if len(domain) > 2 else domain.upper()


@dataclass(frozen=True)
class Row:
    """One evaluated model.

    ``touched``: entries whose bits differ from the later model's, of ``entries``. ``metrics``: mean probability of the
    right answer per domain. ``delta``: for every other domain Δ = score − later and its 95 % interval (paired bootstrap
    over items). ``seconds``: choosing and writing, without the evaluation. ``items``: the damaged domain's probability
    per item, in units of 1/SCALE (for intervals of the recovery).
    """

    method: str
    kind: str
    knob: str
    value: float
    draw: int
    touched: int
    entries: int
    metrics: dict[str, float]
    delta: dict[str, tuple[float, float, float]]
    seconds: float
    items: list[int]


def setting_of(folder: Path, pair: Pair) -> Setting:
    """The checkpoints and calibration prompts of one pair, with the later model live in its own dtype."""
    run = Trajectory(folder / pair.base, folder / pair.earlier, folder / pair.later)
    files = {domain: folder / "data" / f"{domain}.calibration.jsonl" for domain in DOMAINS}
    return opened(folder, run, pair.metric, {domain: load_prompts(file, run.later) for domain, file in files.items()})


def opened(folder: Path, run: Trajectory, metric: str, data: dict[str, list[Batch]]) -> Setting:
    """A setting of calibration prompts by domain, with the run's later model live and a copy of its weights."""
    later = {name: parameter.detach().clone() for name, parameter in run.load().named_parameters()}
    (earlier,) = run.weights("earlier")
    own, others = data[metric], {domain: batches for domain, batches in data.items() if domain != metric}
    return Setting(folder, metric, run, own, others, later, {name: earlier.tensors[name] for name in later})


def measure(setting: Setting, method: Method, value: float, draw: int, evaluate: Evaluator, before: Scores) -> Row:
    """Apply one method at one value, evaluate, take it back."""
    return scored(setting, method, value, draw, evaluate.per_item, before, time.perf_counter)[0]


def scored(
    setting: Setting,
    method: Method,
    value: float,
    draw: int,
    scores: Callable[[nn.Module], Scores],
    before: Scores,
    clock: Callable[[], float],
) -> tuple[Row, Scores]:
    """The row of one method at one value, and every score behind it; the model is as it was afterwards."""
    start = clock()
    change = method.change(setting, value, draw)
    with applied(setting, change):
        seconds = clock() - start
        now = {name: parameter.detach() for name, parameter in setting.model.named_parameters()}
        touched = differing(setting.later, now)
        found = scores(setting.model)
    others = {domain: found[domain] - before[domain] for domain in setting.others}
    row = Row(
        method.name,
        method.kind,
        method.knob,
        value,
        draw,
        touched,
        sum(tensor.numel() for tensor in setting.later.values()),
        {domain: float(values.mean()) for domain, values in found.items()},
        {domain: (float(change.mean()), *bootstrap_interval(change)) for domain, change in others.items()},
        seconds,
        np.rint(found[setting.metric] * SCALE).astype(int).tolist(),
    )
    return row, found


def identity(folder: Path, pair: Pair) -> dict[str, Any]:
    """What a run's rows depend on: the three checkpoints and the prompts."""
    run = Trajectory(folder / pair.base, folder / pair.earlier, folder / pair.later)
    names = ("base", "earlier", "later")
    found = {name: fingerprint(weights) for name, weights in zip(names, run.weights(*names), strict=True)}
    digest = hashlib.sha256()
    for path in sorted((folder / "data").glob("*.jsonl")):
        digest.update(path.name.encode() + path.read_bytes())
    return {**found, "data": digest.hexdigest()}


class Store:
    """``pareto.json.gz``: runs (one seed, one pair) of rows, written whole after each method that was measured."""

    def __init__(self, path: Path, fresh: bool = False) -> None:
        self.path = path
        self.runs: list[dict[str, Any]] = []
        if path.exists() and not fresh:
            self.runs = json.loads(gzip.decompress(path.read_bytes()))["runs"]

    def run(self, seed: str, pair: Pair, checkpoints: dict[str, Any]) -> dict[str, Any]:
        """The run of that seed and pair; an empty one if it is new or was measured on other checkpoints or data.

        Checkpoints are told by their files' hashes.
        """
        checkpoints = {
            name: {key: value for key, value in one.items() if key != "neurons"} if isinstance(one, dict) else one
            for name, one in checkpoints.items()
        }
        for run in self.runs:
            if (run["seed"], run["pair"]["name"]) == (seed, pair.name):
                if run["checkpoints"] == json.loads(json.dumps(checkpoints)):
                    return run
                self.runs.remove(run)
                break
        new = {"seed": seed, "pair": asdict(pair), "checkpoints": checkpoints, "measured": [], "rows": []}
        self.runs.append(new)
        return new

    def write(self) -> None:
        """One row a line; in one rename, and the same rows are the same bytes."""
        runs = []
        for run in self.runs:
            rows = ",\n".join(json.dumps(row, separators=(",", ":"), ensure_ascii=False) for row in run["rows"])
            head = json.dumps({key: value for key, value in run.items() if key != "rows"}, ensure_ascii=False)
            runs.append(f'{head[:-1]}, "rows": [\n{rows}\n]}}')
        temporary = self.path.with_suffix(".tmp")
        text = '{"runs": [\n' + ",\n".join(runs) + "\n]}\n"
        temporary.write_bytes(gzip.compress(text.encode(), mtime=0))
        os.replace(temporary, self.path)


def measure_pair(folder: Path, pair: Pair, store: Store) -> dict[str, Any]:
    """All rows of one seed and pair; those that the store holds are taken from it.

    Where no loss is significant there is nothing to recover, and only the references are measured.
    """
    run = store.run(folder.name, pair, identity(folder, pair))
    setting = setting_of(folder, pair)
    evaluate = Evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / pair.later))
    before = evaluate.per_item(setting.model)
    done = {(row["method"], row["value"], row["draw"]): row for row in run["rows"]}
    kept: list[dict[str, Any]] = []
    for method in methods(setting):  # the references first
        if method.kind != REFERENCE and not Seed({**run, "rows": kept}).damaged:
            continue
        asked = [(method.name, value, draw) for value in method.values for draw in range(method.draws)]
        if new := [key for key in asked if key not in done]:
            print(f"{folder.name}, {pair.name}: {method.name}", flush=True)
            for name, value, draw in new:
                done[name, value, draw] = asdict(measure(setting, method, value, draw, evaluate, before))
            forget()
            run["rows"] = list(done.values())
            run["measured"] = list(dict.fromkeys([*run["measured"], statement()]))
            store.write()
        kept += [done[key] for key in asked]
    run["rows"] = kept  # in the order of the methods; what is no longer asked for goes
    store.write()
    return run


def asked_for(text: str) -> tuple[Path, tuple[str, ...]]:
    """A seed folder and the order of its stages: ``folder`` or ``folder:code,qa,math``."""
    folder, _, order = text.partition(":")
    stages = tuple(order.split(",")) if order else ORDER
    if len(stages) < 3:
        raise argparse.ArgumentTypeError(f"{text!r}: expected three stages after the colon, like :code,qa,math")
    return Path(folder), stages


def main() -> None:
    """Measure what is missing, write the rows, the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="*", type=asked_for, metavar="SEED_FOLDER[:first,second,third]")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    parser.add_argument("--fresh", action="store_true", help="measure all rows again")
    asked = parser.parse_args()
    if len({(folder.name, order) for folder, order in asked.seeds}) < len(asked.seeds):
        parser.error("two seed folders of the same order have the same name: they could not be told apart")
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    asked.out.mkdir(parents=True, exist_ok=True)
    store = Store(asked.out / "pareto.json.gz", asked.fresh)
    runs = [measure_pair(folder, pair, store) for folder, order in asked.seeds for pair in pairs(order)] or store.runs
    if not runs:
        parser.error(f"{store.path} holds no rows: say the seed folders to measure")
    named: dict[str, list[dict[str, Any]]] = {}
    for run in runs:
        named.setdefault(run["pair"]["name"], []).append(run)
    found = {name: points(group) for name, group in named.items()}
    (asked.out / "pareto.md").write_text(markdown(named, found), encoding="utf-8")
    against_loss(found).savefig(asked.out / "pareto.png")
    against_size(found).savefig(asked.out / "pareto-size.png")
    print(f"wrote pareto.json.gz, pareto.md, pareto.png and pareto-size.png to {asked.out}")


if __name__ == "__main__":
    main()
