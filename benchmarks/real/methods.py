"""What the real lab compares: the methods of ``benchmarks.pareto`` at fewer values (an evaluation takes half a minute).

Math by QA has every method on seed 0, at several values of its knob. Everything else has the main ones, at the values
that say who wins.
"""

from __future__ import annotations

from dataclasses import replace

from benchmarks.pareto.changes import Method, Setting
from benchmarks.pareto.methods import untrained

UNITS = "units (neurons and value channels)"
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
}


def methods(setting: Setting) -> list[Method]:
    """The methods of one seed and pair, the references first."""
    asked = FIRST if (setting.folder.name, setting.metric) == ("seed0", "math") else EVERY
    known = {method.name: method for method in untrained(setting)}
    order = [*EVERY, *(name for name in asked if name not in EVERY)]
    return [replace(known[name], values=asked[name], draws=1) for name in order]
