"""Everything that ``benchmarks.pareto`` compares: each method, its knob, and what it does to the later model."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.lab.domains import read_items
from benchmarks.lab.refresh import STEPS, refreshed, training_items
from benchmarks.pareto import activations, baselines, gradients, spectral
from benchmarks.pareto.changes import (
    BASELINE,
    BUDGETS,
    CONTROL,
    LIBRARY,
    REFERENCE,
    TRAINED,
    Change,
    Method,
    Reversal,
    Setting,
    prepared,
    wide,
)
from benchmarks.pareto.variants import variants
from surgery import AMCSelector, DamageSelector, RandomSelector, allocate, magnitude, strengths, top
from surgery.measure.rows import EARLIER, LATER, ceiling_of
from surgery.units import single

GROUPS, CHANNELS = ("mlp", "kv_group"), ("mlp", "value_channel")
PAPER = (
    RandomSelector(0.01),
    AMCSelector(0.01, "AM", "AM"),
    AMCSelector(0.01, "AC", "AC"),
    AMCSelector(0.01, "MC", "MC"),
    AMCSelector(0.01, "AMC", "AMC"),
    AMCSelector(0.01, "A", "AMC"),
    AMCSelector(0.01, "A", "A"),
)
WEIGHTS = (0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.04)
FRACTIONS = (0.001, 0.01, 0.02, 0.04, 0.08, 0.16, 0.32, 0.64)
ALPHAS = (0.05, 0.1, 0.15, 0.2, 0.25, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
DENSITIES = (0.99, 0.95, 0.9, 0.8, 0.6, 0.4, 0.2, 0.1, 0.05, 0.01)
PROBABILITIES = (0.01, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8, 0.9)
FIRST = (0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3, 0.2, 0.1, 0.0)  # LiNeS' own grid
SHARES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)
CRANE = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
RATIOS = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
FACTORS = (0.25, 0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 3.0)
DRAWS = 3
FURTHEST = 2.0  # of the strengths


def untrained(setting: Setting) -> list[Method]:
    """All curves but the trained ones, in the order of the tables."""
    layers = tuple(map(float, range(len(baselines.layers_by_displacement(setting.later, setting.earlier)))))
    return [
        Method(LATER, REFERENCE, "", (0.0,), _nothing),
        Method(EARLIER, REFERENCE, "", (1.0,), _interpolated),
        *map(ceiling, (("mlp",), GROUPS, CHANNELS)),
        *map(of_selector, selectors(setting)),
        *map(going_further, (DamageSelector(0.01, loss="kl", units=units) for units in ("mlp", CHANNELS, GROUPS))),
        *map(going_further, (DamageSelector(0.01, units=units) for units in ("mlp", CHANNELS))),
        *variants(),
        Method("WiSE-FT", BASELINE, "α", ALPHAS, _interpolated),
        Method("LiNeS", BASELINE, "α", FIRST, _layer_scaled),
        Method("most-changed entries", BASELINE, "entries", FRACTIONS, _entries),
        Method("most-changed neurons", BASELINE, "β", BUDGETS, _neurons),
        Method("layers, most changed first", BASELINE, "layers", tuple(one + 1 for one in layers), _layers),
        Method("one layer", BASELINE, "layer", layers, _layer),
        Method("TIES trim", BASELINE, "density", DENSITIES, _trimmed),
        Method("DARE", BASELINE, "p", PROBABILITIES, _dropped, DRAWS),
        Method("spectral (DG-Hard)", BASELINE, "factor", FACTORS, _thresholded),
        Method("SAR", BASELINE, "rank", SHARES, _core),
        Method("SAR, the whole space", BASELINE, "rank", SHARES, _core_of_all),
        Method("CRANE's gate, entries", BASELINE, "entries", WEIGHTS, gradients.gated),
        Method("CRANE", BASELINE, "α", CRANE, gradients.crane),
        Method("least squares", BASELINE, "λ", RATIOS, activations.regression),
        Method("RegMean", BASELINE, "λ", RATIOS, activations.regmean),
        Method("random entries", CONTROL, "entries", FRACTIONS, _random_entries, DRAWS),
    ]


def methods(setting: Setting) -> list[Method]:
    """All curves, in the order of the tables."""
    return [*untrained(setting), *refreshes(setting)]


def refreshes(setting: Setting) -> list[Method]:
    """The trained references; where the training prompts can't be generated again only one, and a line says so."""
    items = {"calibration": read_items(setting.folder / "data" / f"{setting.metric}.calibration.jsonl")}
    try:
        items["training"] = training_items(setting.folder, setting.metric)
    except LookupError as error:
        print(f"no refresh on training prompts: {error}")
    return [
        Method(f"GRPO, {kind} prompts", TRAINED, "steps", tuple(map(float, STEPS)), partial(_refreshed, prompts))
        for kind, prompts in items.items()
    ]


def selectors(setting: Setting) -> list[Any]:
    """The paper's selectors; D by KL, split by layers, guarded, over units of attention, of weights; D."""
    by_kl: list[dict[str, Any]] = [
        {},
        {"how": "proportional"},
        {"protect": setting.others},
        *({"units": units} for units in ("value_channel", CHANNELS, GROUPS)),
    ]
    return [
        *PAPER,
        *(DamageSelector(0.01, loss="kl", **{"units": "mlp", **given}) for given in by_kl),
        RandomSelector(0.01, units=GROUPS),
        AMCSelector(0.01, units=GROUPS),
        DamageSelector(0.01, loss="kl", units="weight"),
        AMCSelector(0.01, "M", "M", "global", "weight"),
        *(DamageSelector(0.01, units=units) for units in ("mlp", CHANNELS, GROUPS, "weight")),
    ]


def of_selector(selector: Any) -> Method:
    """A selector's curve over the budgets; the random one is drawn several times.

    The budgets of single weights are smaller, and fractions of the weights that may be taken.
    """
    drawn = isinstance(selector, RandomSelector)

    def change(setting: Setting, value: float, draw: int) -> Change:
        one = replace(selector, budget=value, **({"seed": draw} if drawn else {}))
        return Reversal(one.select(setting.run, setting.data))

    if drawn:
        name = f"{selector.name} neurons" if selector.units == "mlp" else selector.name
        return Method(name, CONTROL, "β", BUDGETS, change, DRAWS)
    weights = single(selector.units)
    return Method(selector.name, LIBRARY, "entries" if weights else "β", WEIGHTS if weights else BUDGETS, change)


def ceiling(units: tuple[str, ...]) -> Method:
    """Every unit of those kinds."""

    def change(setting: Setting, value: float, draw: int) -> Change:
        return Reversal(RandomSelector(1.0, units=units).select(setting.run))

    return Method(ceiling_of(units), LIBRARY, "β", (1.0,), change)


def going_further(selector: DamageSelector) -> Method:
    """The same masks as the selector's own curve, each unit as far back as the calibration prompts say."""

    def change(setting: Setting, value: float, draw: int) -> Change:
        mask = replace(selector, budget=value).select(setting.run, setting.data)
        return Reversal(mask, strengths(wide(setting), setting.data, mask, most=FURTHEST, loss=selector.loss))

    return Method(f"{selector.name}, strengths ≤ {FURTHEST:g}", LIBRARY, "β", BUDGETS, change)


def _nothing(setting: Setting, value: float, draw: int) -> Change:
    return {}


def _interpolated(setting: Setting, value: float, draw: int) -> Change:
    return baselines.interpolated(setting.later, setting.earlier, value)


def _layer_scaled(setting: Setting, value: float, draw: int) -> Change:
    return baselines.layer_scaled(setting.later, setting.earlier, value)


def _entries(setting: Setting, value: float, draw: int) -> Change:
    scores = baselines.relative_change(setting.later, setting.earlier)
    return baselines.entries_restored(setting.later, setting.earlier, scores, value)


def _random_entries(setting: Setting, value: float, draw: int) -> Change:
    scores = baselines.random_scores(setting.later, draw)
    return baselines.entries_restored(setting.later, setting.earlier, scores, value)


def _neurons(setting: Setting, value: float, draw: int) -> Change:
    norms = magnitude(setting.run)
    return Reversal(top(norms, allocate(norms, value, how="global")))


def _layers(setting: Setting, value: float, draw: int) -> Change:
    order = baselines.layers_by_displacement(setting.later, setting.earlier)
    return baselines.layers_restored(setting.later, setting.earlier, order[: int(value)])


def _layer(setting: Setting, value: float, draw: int) -> Change:
    return baselines.layers_restored(setting.later, setting.earlier, [int(value)])


def _trimmed(setting: Setting, value: float, draw: int) -> Change:
    return baselines.trimmed(setting.later, setting.earlier, value)


def _dropped(setting: Setting, value: float, draw: int) -> Change:
    return baselines.dropped(setting.later, setting.earlier, value, draw)


def _thresholded(setting: Setting, value: float, draw: int) -> Change:
    return spectral.thresholded(setting.later, setting.earlier, value, prepared(setting, _spectra))


def _spectra(setting: Setting) -> dict[str, spectral.Spectrum]:
    return spectral.spectra(setting.later, setting.earlier)


def _core(setting: Setting, value: float, draw: int) -> Change:
    return spectral.core(setting.later, setting.earlier, value, prepared(setting, _bases))


def _core_of_all(setting: Setting, value: float, draw: int) -> Change:
    return spectral.core(setting.later, setting.earlier, value, prepared(setting, _bases), whole=True)


def _bases(setting: Setting) -> spectral.Bases:
    return spectral.bases(setting.later, setting.earlier)


def _refreshed(items: list[dict[str, str]], setting: Setting, value: float, draw: int) -> Change:
    return refreshed(setting.model, setting.folder, setting.metric, items, int(value))
