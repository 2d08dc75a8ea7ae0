"""What the curves of ``benchmarks.questions.refreshes`` say: tables that a person reads, and pictures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.hardware import statement
from benchmarks.lab.domains import DOMAINS

CURVES = Sequence[Mapping[str, Any]]
COSTS = (640, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000)
NAMES = {"math": "Math", "code": "Code", "qa": "QA", "cw": "CW"}

HEAD = """# Refreshes: a few training steps on the damaged domain

Written by `python -m benchmarks.questions.refreshes SEED...`. {statement}

Scores: the probability of exactly the right answer on 256 items a domain, in %, mean ± standard deviation over the
seeds ({seeds}; where a curve was measured on fewer, its name says on which). GRPO has the lab's own settings (32
training prompts × 8 samples a step, reward 1 for the right answer, 3e-4). KL: distillation from the checkpoint before
the damage, on the 128 calibration prompts as it answers them itself (no label and no reward), 32 a step; Adam. D is by
the Hellinger distance on the same answers. All is in float32: [pareto](pareto.md) has the right answers and the
checkpoints' bf16, so its recoveries differ a little. Rates under a mask (1e-3 on 2 % of the units, 3e-4 on 16 %) and
KL's (1e-4 on all parameters) were chosen on seed 0.
"""

COST = """## Refresh, rollback, and rollback then refresh, at equal cost

Math damaged by QA (Code → Math → QA). Recovery of Math in %: 0 is the later model, 100 the earlier one. In brackets:
the worst change on another domain against the later model, in points.

Cost is counted in sequences: a prompt with its answer once through the model is 1, a backward pass 2, writing an answer
1. So the earlier model's answers and logits on the calibration prompts cost 256, choosing by D another 384 (a rollback:
640 in all), a step of KL 96, of KL on fresh training prompts 160 (they have to be answered as well), and a step of GRPO
1024 (256 samples written and trained on). A cell is the last evaluated step that costs no more than the column; "–":
none does, and a quotation mark: the same as before it.
"""


def percent(values: Sequence[float]) -> str:
    """Mean ± standard deviation over seeds, in %."""
    spread = f" ± {100 * np.std(values):.1f}" if len(values) > 1 else ""
    return f"{100 * np.mean(values):.1f}{spread}"


def of(found: Mapping[str, Any], question: str, method: str | None = None) -> list[Mapping[str, Any]]:
    """The curves of a question, or of one of its methods: one a seed."""
    curves: CURVES = found["curves"]
    return [one for one in curves if one["question"] == question and method in (None, one["method"])]


def named(found: Mapping[str, Any], question: str, method: str) -> str:
    """A method's name, with its seeds where not all have it."""
    every = {one["seed"] for one in of(found, question)}
    seeds = [one["seed"] for one in of(found, question, method)]
    return method if set(seeds) == every else f"{method} ({', '.join(seeds)})"


def methods(found: Mapping[str, Any], question: str) -> list[str]:
    return list(dict.fromkeys(one["method"] for one in of(found, question)))


def scores(curves: CURVES, domain: str) -> dict[int, list[float]]:
    """Step → the score of every seed."""
    steps: dict[int, list[float]] = {}
    for curve in curves:
        for point in curve["points"]:
            steps.setdefault(point["step"], []).append(point["scores"][domain])
    return steps


def over_steps(found: Mapping[str, Any], question: str, method: str, at: Sequence[int]) -> str:
    """Every domain at some steps."""
    curves = of(found, question, method)
    head = "| step | " + " | ".join(NAMES[d] for d in DOMAINS) + " | mean of the four |\n|---|" + "---|" * 5
    lines = []
    for step in at:
        every = {domain: scores(curves, domain).get(step, []) for domain in DOMAINS}
        if not all(every.values()):
            continue
        mean = [float(np.mean(values)) for values in zip(*every.values(), strict=True)]
        lines.append(f"| {step} | " + " | ".join(percent(every[d]) for d in DOMAINS) + f" | {percent(mean)} |")
    return "\n".join([f"{head}", *lines]) + "\n"


class Costs:
    """The curves at equal cost, as recoveries."""

    def __init__(self, found: Mapping[str, Any]) -> None:
        self.found = found
        self.earlier = {one["seed"]: one["points"][0]["scores"] for one in of(found, "equal cost", "earlier")}
        self.methods = [name for name in methods(found, "equal cost") if name != "earlier"]
        starts = ((one["seed"], one["points"][0]) for one in of(found, "equal cost") if one["method"] != "earlier")
        self.later = {seed: point["scores"] for seed, point in starts if not point["cost"]}

    def recovery(self, seed: str, point: Mapping[str, Any]) -> float:
        earlier, later = self.earlier[seed]["math"], self.later[seed]["math"]
        return float((point["scores"]["math"] - later) / (earlier - later))

    def worst(self, seed: str, point: Mapping[str, Any]) -> float:
        return float(min(point["scores"][d] - self.later[seed][d] for d in DOMAINS if d != "math"))

    def within(self, method: str, cost: float) -> list[tuple[str, Mapping[str, Any]]]:
        """Per seed the last point that costs no more; empty if a seed has none."""
        chosen = []
        for curve in of(self.found, "equal cost", method):
            inside = [point for point in curve["points"] if 0 < point["cost"] <= cost]
            if not inside:
                return []
            chosen.append((curve["seed"], inside[-1]))
        return chosen

    def means(self, method: str) -> list[tuple[float, float]]:
        """(cost, mean recovery over seeds) of every step that cost something."""
        steps: dict[int, list[tuple[float, float]]] = {}
        for curve in of(self.found, "equal cost", method):
            for point in curve["points"]:
                if point["cost"]:
                    steps.setdefault(point["step"], []).append((point["cost"], self.recovery(curve["seed"], point)))
        return [(pairs[0][0], float(np.mean([r for _, r in pairs]))) for pairs in steps.values()]

    def table(self) -> str:
        head = "| | " + " | ".join(f"{cost:,}" for cost in COSTS) + " |\n|---|" + "---|" * 7
        lines = []
        for method in self.methods:
            cells, last = [], 0
            for cost in COSTS:
                found = self.within(method, cost)
                spent = sum(point["cost"] for _, point in found)
                if not found:
                    cells.append("–")
                elif spent == last:
                    cells.append('"')  # nothing new
                else:
                    recovered = percent([self.recovery(*one) for one in found])
                    cells.append(f"{recovered} [{100 * np.mean([self.worst(*one) for one in found]):+.1f}]")
                last = spent
            lines.append(f"| {named(self.found, 'equal cost', method)} | " + " | ".join(cells) + " |")
        return "\n".join([head, *lines]) + "\n"

    def best(self) -> str:
        """Per column the method of the highest mean recovery, and of the highest that loses nothing elsewhere."""
        lines = [
            "| cost up to | most recovered | most recovered with at most half a point lost elsewhere |\n|---|---|---|"
        ]
        for cost in COSTS:
            every = {method: self.within(method, cost) for method in self.methods}
            held = {method: found for method, found in every.items() if found}
            kept = {m: f for m, f in held.items() if np.mean([self.worst(*one) for one in f]) >= -0.005}
            cells = [self._best(group) for group in (held, kept)]
            lines.append(f"| {cost:,} | {cells[0]} | {cells[1]} |")
        return "\n".join(lines) + "\n"

    def _best(self, group: Mapping[str, Any]) -> str:
        if not group:
            return "–"

        def mean(method: str) -> float:
            return float(np.mean([self.recovery(*one) for one in group[method]]))

        method = max(group, key=mean)
        return f"{named(self.found, 'equal cost', method)}: {percent([self.recovery(*one) for one in group[method]])}"


def markdown(found: Mapping[str, Any]) -> str:
    """The whole report."""
    seeds = list(dict.fromkeys(one["seed"] for one in of(found, "re-math")))
    parts = [HEAD.format(statement="; ".join(found["measured"]) or statement(), seeds=", ".join(seeds))]
    parts.append("## Re-Math after Code → Math → QA → CW (the paper's Figure 9)\n")
    for method in methods(found, "re-math"):
        shown = over_steps(found, "re-math", method, (0, 1, 2, 3, 5, 10, 15, 20, 30, 32))
        parts += [f"### {named(found, 're-math', method)}\n", shown]
    parts.append("![every domain over the steps of Re-Math](refresh-math.png)\n")
    if again := of(found, "re-code", "GRPO"):
        parts.append("## Re-Code after Code → Math, for longer than it needs (the paper's Appendix D.2)\n")
        parts.append(f"GRPO on {', '.join(one['seed'] for one in again)}.\n")
        parts.append(over_steps(found, "re-code", "GRPO", (0, 4, 8, 12, 20, 28, 40, 52, 60)))
    costs = Costs(found)
    parts += [COST, costs.table(), costs.best(), "![recovery against cost](refresh-cost.png)\n"]
    return "\n".join(parts)


SHOWN = {
    "rollback: D 2 % neurons + value channels": "rollback, 2 % (neurons + value channels)",
    "rollback: D 16 % neurons + value channels": "rollback, 16 %",
    "KL: all parameters": "KL refresh, all parameters",
    "KL: D 16 % neurons + value channels": "KL refresh of those 16 %",
    "GRPO: all parameters": "GRPO refresh, all parameters",
    "rollback, then KL of all: D 16 % neurons + value channels": "rollback of those 16 %, then KL of all",
    "rollback, then GRPO of all: D 16 % neurons + value channels": "rollback of those 16 %, then GRPO of all",
}


def draw(found: Mapping[str, Any], out: Path) -> None:
    """Re-Math over steps, and recovery against cost."""
    from matplotlib.figure import Figure

    from surgery.plots.refresh import recovery_at_cost, refresh_dynamics

    figure = Figure(figsize=(10, 4), dpi=150, layout="constrained")
    shown = [name for name in ("GRPO", "KL") if of(found, "re-math", name)]
    for ax, name in zip(figure.subplots(1, len(shown), sharey=True, squeeze=False)[0], shown, strict=True):
        curves = of(found, "re-math", name)
        title = f"{named(found, 're-math', name)} on Math, all parameters"
        refresh_dynamics({NAMES[domain]: scores(curves, domain) for domain in DOMAINS}, ax).set_title(title)
    figure.savefig(out / "refresh-math.png")
    costs = Costs(found)
    suffix = {method: named(found, "equal cost", method).removeprefix(method) for method in costs.methods}
    known = {label + suffix[method]: costs.means(method) for method, label in SHOWN.items() if method in suffix}
    figure = Figure(figsize=(7.5, 5), dpi=150, layout="constrained")
    ax = recovery_at_cost(known, figure.subplots())
    ax.set_xlabel("cost (sequences through the model; a backward pass counts two)")
    ax.set_ylabel("recovery of Math (%)")
    ax.set_ylim(bottom=0)
    ax.get_legend().remove()  # seven methods: beside the lines there is no room
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(out / "refresh-cost.png")
