"""Refreshes in the lab: ``python -m benchmarks.questions.refreshes SEED_FOLDER... [--out FOLDER]``

Three questions (the paper's Figure 9, its Appendix D.2, and one of ours):

1. Re-Math: a refresh of Math after Code → Math → QA → CW, all domains over steps.
2. Refresh against rollback against rollback-then-refresh, at equal cost: Math damaged by QA.
3. Re-Code: Code trained again after Code → Math, for longer than it needs.

Writes ``refresh.json`` (every curve), ``refresh.md`` and pictures. Curves of the same checkpoints and prompts that
``refresh.json`` holds are not measured again (``--fresh`` measures all). GRPO needs ``surgery[lab]``; without it the
curves of GRPO that are not stored are left out, and a line says so. All is computed in float32, from the bf16
checkpoints.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoTokenizer
from transformers.utils import logging as transformers_logging

from benchmarks.hardware import statement
from benchmarks.lab.domains import Item, read_items
from benchmarks.lab.evaluate import Evaluator
from benchmarks.lab.refresh import grpo, training_items
from benchmarks.lab.train import GRPO, Stage
from benchmarks.questions.refresh_report import draw, markdown
from benchmarks.seeds import RESULTS
from benchmarks.seeds import write as report
from surgery import DamageSelector, Neurons, RandomSelector, Trajectory, load_prompts, refresh, rollback
from surgery.live import distillation, respond
from surgery.live.losses import Distillation
from surgery.live.prompts import Batch
from surgery.training.leaves import Leaves

BATCH = 32
BUDGETS, CHANNELS = (0.02, 0.16), ("mlp", "value_channel")
# chosen on seed 0 among 1e-4, 3e-4, 1e-3 and 3e-3: the fewer parameters are trained, the faster
RATES = {("KL", None): 1e-4, ("GRPO", None): 3e-4, **{(kind, 0.02): 1e-3 for kind in ("KL", "GRPO")},
         **{(kind, 0.16): 3e-4 for kind in ("KL", "GRPO")}}  # fmt: skip
# one unit = one sequence (a prompt with its answer) once through the model; a backward pass counts two forward ones,
# and writing an answer counts one
CALIBRATION = 128
ANSWERS = 2 * CALIBRATION  # the earlier model answers the calibration prompts, and its logits are kept
CHOICE = 3 * CALIBRATION  # D: forward and backward over the answered prompts
STEP = {"KL": 3 * BATCH, "KL, fresh prompts": 5 * BATCH, "GRPO": 4 * 32 * 8}
LENGTH = {"KL": 32, "KL, fresh prompts": 32, "GRPO": 16}
SEEN = (1, 2, 4, 8, 16, 32)


@dataclass
class Point:
    """One evaluated model: ``scores`` per domain, ``cost`` in sequences."""

    step: int
    scores: dict[str, float]
    cost: int = 0


@dataclass
class Curve:
    """One run of one method on one seed."""

    question: str
    seed: str
    method: str
    start: str  # which checkpoints and prompts
    points: list[Point] = field(default_factory=list)


@dataclass
class Desk:
    """One seed's folder, with one model in memory that every run starts from and is put back to."""

    folder: Path
    earlier: str
    later: str
    domain: str
    _masks: dict[Any, Neurons] = field(default_factory=dict)

    @cached_property
    def run(self) -> Trajectory:
        run = Trajectory(earlier=self.folder / self.earlier, later=self.folder / self.later)
        run.load(dtype=torch.float32)
        return run

    @property
    def model(self) -> nn.Module:
        return self.run.load()

    @cached_property
    def evaluate(self) -> Evaluator:
        return Evaluator(self.folder / "data", AutoTokenizer.from_pretrained(self.folder / self.later))

    @cached_property
    def items(self) -> list[Item]:
        return training_items(self.folder, self.domain)

    @cached_property
    def answered(self) -> tuple[list[Batch], Distillation]:
        """The calibration prompts with the earlier model's own answers, and its logits."""
        return self._answered(read_items(self.folder / "data" / f"{self.domain}.calibration.jsonl"))

    @cached_property
    def fresh(self) -> tuple[list[Batch], Distillation]:
        """The same for as many training prompts as a run of fresh prompts takes."""
        return self._answered(self.items[: BATCH * LENGTH["KL, fresh prompts"]])

    def _answered(self, items: list[Item]) -> tuple[list[Batch], Distillation]:
        earlier = Trajectory(later=self.run.earlier).load(dtype=torch.float32)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "prompts.jsonl"
            path.write_text("".join(json.dumps({"prompt": item["prompt"]}) + "\n" for item in items), encoding="utf-8")
            prompts = load_prompts(path, self.folder / self.later, batch_size=BATCH)
        data = respond(earlier, prompts)
        return data, distillation(earlier, data)

    def mask(self, budget: float, units: Any) -> Neurons:
        """What D chooses on the calibration prompts."""
        if (budget, units) not in self._masks:
            data, _ = self.answered
            self._masks[budget, units] = DamageSelector(budget, units=units).select(self.run, data)
        return self._masks[budget, units]


@dataclass
class Recorder:
    """Evaluates at some steps; a step costs ``each``, and what went before ``cost``."""

    desk: Desk
    curve: Curve
    at: Callable[[int], bool]
    cost: int
    each: int

    def __call__(self, step: int, model: nn.Module) -> None:
        if self.at(step):
            self.curve.points.append(Point(step, self.desk.evaluate(model), self.cost + self.each * step))


def trained(desk: Desk, curve: Curve, domain: str, plan: Stage, mask: Neurons | None = None, every: int = 1) -> None:
    """GRPO from the later checkpoint, evaluated every so many steps."""
    recorder = Recorder(desk, curve, lambda step: step % every == 0, 0, STEP["GRPO"])
    whole = Leaves(desk.model)
    recorder(0, desk.model)
    grpo(desk.model, desk.folder, domain, training_items(desk.folder, domain), plan, mask, recorder)
    whole.back()


def re_math(folder: Path) -> Iterator[tuple[str, Callable[[Curve], None]]]:
    """Math again after CW."""
    desk = Desk(folder, "math", "cw", "math")
    plan = replace(GRPO["math"], steps=30)
    yield "GRPO", lambda curve: trained(desk, curve, "math", plan)

    def masked(curve: Curve) -> None:
        trained(desk, curve, "math", plan, desk.mask(0.16, CHANNELS))

    yield "GRPO on D 16 % neurons + value channels", masked
    yield "KL", lambda curve: costed(desk, curve, "KL", None, None, False, lambda step: True)
    yield "rollback of D 16 % neurons + value channels", partial(rolled, desk, 0.16, CHANNELS)


def re_code(folder: Path) -> Iterator[tuple[str, Callable[[Curve], None]]]:
    """Code again after Math, for longer than it needs."""
    desk = Desk(folder, "code", "math", "code")
    yield "GRPO", lambda curve: trained(desk, curve, "code", replace(GRPO["code"], steps=60), every=4)


def at_equal_cost(folder: Path) -> Iterator[tuple[str, Callable[[Curve], None]]]:
    """Math damaged by QA: everything that puts it back, from the same start."""
    desk = Desk(folder, "math", "qa", "math")
    yield "earlier", partial(reference, desk)
    for kind in ("KL", "KL, fresh prompts", "GRPO"):
        yield f"{kind}: all parameters", partial(costed, desk, kind=kind, budget=None, units=None, first=False)
    for budget in BUDGETS:
        what, given = f"D {100 * budget:g} % neurons + value channels", {"budget": budget, "units": CHANNELS}
        yield f"rollback: {what}", partial(rolled, desk, budget, CHANNELS)
        for kind in ("KL", "GRPO"):
            yield f"{kind}: {what}", partial(costed, desk, kind=kind, first=False, **given)
            whole = partial(costed, desk, kind=kind, first=True, everywhere=True, **given)
            yield f"rollback, then {kind} of all: {what}", whole
    for name, units in (("D", "mlp"), ("random", "random")):
        for kind in ("KL", "GRPO"):
            alone = partial(costed, desk, kind=kind, budget=0.02, units=units, first=False)
            yield f"{kind}: {name} 2 % neurons", alone


def reference(desk: Desk, curve: Curve) -> None:
    """The earlier model itself."""
    curve.points.append(Point(0, desk.evaluate(Trajectory(later=desk.run.earlier).load(dtype=torch.float32))))


def rolled(desk: Desk, budget: float, units: Any, curve: Curve) -> None:
    """D's rollback alone: the model before it, and after."""
    mask = desk.mask(budget, units)
    curve.points.append(Point(0, desk.evaluate(desk.model)))
    with rollback(desk.model, to=desk.run.earlier, mask=mask):
        curve.points.append(Point(1, desk.evaluate(desk.model), ANSWERS + CHOICE))


def costed(
    desk: Desk, curve: Curve, kind: str, budget: float | None, units: Any, first: bool,
    at: Callable[[int], bool] = SEEN.__contains__, everywhere: bool = False,
) -> None:  # fmt: skip
    """A refresh by ``kind``, on D's units or on everything, maybe after a rollback of D's units (``first``)."""
    data, loss = desk.fresh if kind == "KL, fresh prompts" else desk.answered
    mask = None
    if units == "random":
        mask = RandomSelector(budget or 0, seed=0).select(desk.run)
    elif budget is not None:
        mask = desk.mask(budget, units)
    chosen = mask is not None and units != "random"
    cost = ANSWERS + CHOICE if chosen else ANSWERS if kind == "KL" else 0
    whole = Leaves(desk.model)
    if first and mask is not None:
        rollback(desk.model, to=desk.run.earlier, mask=mask)
    curve.points.append(Point(0, desk.evaluate(desk.model), cost if first else 0))
    rate = RATES[kind.split(",")[0], None if everywhere else budget]
    trains = None if everywhere else mask
    recorder = Recorder(desk, curve, at, cost, STEP[kind])
    if kind == "GRPO":
        plan = replace(GRPO[desk.domain], steps=LENGTH[kind], learning_rate=rate)
        grpo(desk.model, desk.folder, desk.domain, desk.items, plan, trains, recorder)
    else:
        refresh(desk.model, loss, data, LENGTH[kind], rate, trains, after_step=recorder)
    whole.back()


KEY = ("question", "seed", "method", "start")
QUESTIONS = {"re-math": re_math, "equal cost": at_equal_cost, "re-code": re_code}


def identity(folder: Path) -> str:
    """What a seed's curves start from: its checkpoints and prompts."""
    digest = hashlib.sha256()
    for path in sorted([*folder.glob("*/model.safetensors"), *(folder / "data").glob("*.jsonl")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def measure(folders: list[Path], path: Path, fresh: bool) -> dict[str, Any]:
    """All curves; those that the file holds are taken from it. It is written after each new one."""
    held = {"measured": [], "curves": []} if fresh or not path.exists() else json.loads(path.read_text())
    done = {tuple(one[name] for name in KEY): one for one in held["curves"]}
    asked, trains = [], importlib.util.find_spec("trl") is not None
    for question, methods in QUESTIONS.items():
        for folder in folders:
            start = identity(folder)
            for method, run in methods(folder):
                key = question, folder.name, method, start
                if key in done:
                    asked.append(key)
                elif "GRPO" in method and not trains:
                    print(f"left out, since trl is not installed: {', '.join(key[:3])}", flush=True)
                else:
                    print(*key[:3], sep=", ", flush=True)
                    curve = Curve(*key)
                    run(curve=curve)
                    done[key] = asdict(curve)
                    held["measured"] = list(dict.fromkeys([*held["measured"], statement()]))
                    asked.append(key)
                    write(path, {"measured": held["measured"], "curves": list(done.values())})
    return {"measured": held["measured"], "curves": [done[key] for key in asked]}


def write(path: Path, found: dict[str, Any]) -> None:
    """One point a line, in one rename."""
    curves = []
    for curve in found["curves"]:
        head = json.dumps({key: value for key, value in curve.items() if key != "points"}, ensure_ascii=False)
        points = ",\n".join(json.dumps(rounded(point)) for point in curve["points"])
        curves.append(f'{head[:-1]}, "points": [\n{points}\n]}}')
    text = f'{{"measured": {json.dumps(found["measured"])}, "curves": [\n' + ",\n".join(curves) + "\n]}\n"
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def rounded(point: dict[str, Any]) -> dict[str, Any]:
    """A point as it is written."""
    scores = {domain: round(score, 5) for domain, score in point["scores"].items()}
    return {"step": point["step"], "cost": point["cost"], "scores": scores}


def main() -> None:
    """Measure what is missing; write the curves, the tables and the pictures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=Path, metavar="SEED_FOLDER")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--fresh", action="store_true", help="measure all curves again")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    found = measure(asked.seeds, asked.out / "refresh.json", asked.fresh)
    write(asked.out / "refresh.json", found)
    report(asked.out, "refresh", markdown(found))
    draw(found, asked.out)


if __name__ == "__main__":
    main()
