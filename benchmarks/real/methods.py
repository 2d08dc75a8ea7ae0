"""What the real lab compares: the methods of ``benchmarks.pareto`` at fewer values (an evaluation takes half a minute).

Math by QA has every method on seed 0, at several values of its knob. Everything else has the main ones, at the values
that say who wins. The three stages and what is trained otherwise have the fewest.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

from benchmarks.pareto.changes import Change, Method, Setting, prepared
from benchmarks.pareto.methods import of_selector, untrained
from benchmarks.real.comparison import MAIN, Pair
from benchmarks.real.domains import read, write
from benchmarks.real.refreshes import CHOICE, GRPO_STEP, KL_STEP, refreshes, steps_for
from surgery import DamageSelector, load_prompts
from surgery.live.prompts import Batch

UNITS = "units (neurons and value channels)"
UNLABELLED = "64 prompts without answers"
EVERY: dict[str, tuple[float, ...]] = {
    "later": (0.0,),
    "earlier": (1.0,),
    "D of single weights": (0.001, 0.0025),
    f"D of {UNITS}": (0.02, 0.08),
    "WiSE-FT": (0.4, 0.5),
    "A×M×C": (0.04,),
    "least squares": (1.0, 10.0),
    "CRANE's gate, entries": (0.001,),
    "spectral (DG-Hard)": (1.0,),
    f"D of {UNITS}, {UNLABELLED}": (0.08,),
    f"D of single weights, {UNLABELLED}": (0.0025,),
}
FEW: dict[str, tuple[float, ...]] = {
    "later": (0.0,),
    "earlier": (1.0,),
    "D of single weights": (0.001, 0.0025),
    f"D of {UNITS}": (0.02, 0.08),
    "WiSE-FT": (0.5,),
    "A×M×C": (0.04,),
    "least squares": (1.0,),
}
FIRST: dict[str, tuple[float, ...]] = EVERY | {
    "D of single weights": (0.00025, 0.0005, 0.001, 0.0025, 0.005),
    f"D of {UNITS}": (0.01, 0.02, 0.04, 0.08, 0.16),
    "WiSE-FT": (0.2, 0.4, 0.5, 0.6),
    "least squares": (0.1, 1.0, 10.0),
    "CRANE's gate, entries": (0.001, 0.01, 0.04),
    "spectral (DG-Hard)": (0.5, 1.0, 1.5),
    "A×M×C": (0.01, 0.02, 0.04, 0.16),
    "ceiling (all MLP neurons)": (1.0,),
    "ceiling (all units (neurons and KV groups))": (1.0,),
    "D": (0.04, 0.16),
    f"D (KL) of {UNITS}": (0.02, 0.08),
    "D of units (neurons and KV groups)": (0.08,),
    "LiNeS": (0.8, 0.5, 0.2),
    "SAR": (0.05, 0.2, 0.5),
    "CRANE": (0.1, 0.3),
    "most-changed entries": (0.08, 0.32),
    "M of single weights": (0.04,),
    "A×M": (0.04,),
    "A×C": (0.04,),
    "M×C": (0.04,),
    "rank A, budgets A×M×C": (0.04,),
    "A": (0.04,),
    "random neurons": (0.04,),
    "RegMean": (1.0,),
    f"D of {UNITS}, protect": (0.02, 0.08),
    f"D of {UNITS}, strengths ≤ 2": (0.02, 0.08),
    "joint training": (0.0,),
    "refresh by KL": steps_for(CHOICE, KL_STEP),
    "refresh by GRPO": steps_for(CHOICE, GRPO_STEP),
}


def methods(setting: Setting, pair: Pair) -> list[Method]:
    """The methods of one seed and pair, the references first."""
    asked = FEW if pair not in MAIN else FIRST if (setting.folder.name, pair) == ("seed0", MAIN[0]) else EVERY
    known = {method.name: method for method in [*untrained(setting), *ours(setting), *refreshes()]}
    return [replace(known[name], values=values, draws=1) for name, values in asked.items()]


def ours(setting: Setting) -> list[Method]:
    """D with the kept skill protected, and on prompts whose answers the earlier model gives."""
    units, weights = DamageSelector(0.01, units=("mlp", "value_channel")), DamageSelector(0.01, units="weight")
    found = [replace(of_selector(replace(units, protect=setting.others)), name=f"D of {UNITS}, protect")]
    for selector, name in ((units, UNITS), (weights, "single weights")):
        method = of_selector(selector)

        def change(setting: Setting, value: float, draw: int, method: Method = method) -> Change:
            return method.change(replace(setting, data=prepared(setting, unlabelled)), value, draw)

        found.append(replace(method, name=f"D of {name}, {UNLABELLED}", change=change))
    return found


def unlabelled(setting: Setting) -> list[Batch]:
    """The first 64 calibration prompts of the damaged domain, without their answers."""
    items = read(setting.folder.parent / "data" / f"{setting.metric}.calibration.jsonl")
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "prompts.jsonl"
        write(({"prompt": item["prompt"]} for item in items[:64]), file)
        return load_prompts(file, setting.run.later)
