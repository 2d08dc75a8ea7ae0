"""Thirty layers and long names: no legend lies on the axes, no tick label runs into the next one."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from mutants import dies

from surgery import Neurons, plots
from surgery.evidence.changes import Change, Changes, Histogram, Step
from surgery.evidence.directions import Cosines, Directions, Pair
from surgery.evidence.gradients import Gradients, GradientSeries
from surgery.evidence.overlap import overlap, profile
from surgery.evidence.products import Part, pulls
from surgery.measure.history import History
from surgery.measure.rows import CEILING, EARLIER, LATER, Row, Sweep
from surgery.measure.stability import Agreement, Stability
from surgery.theory.contraction import Contraction
from surgery.theory.damage import DamageSpectrum, DamageTerms

pytest.importorskip("matplotlib")
from matplotlib.backends.backend_agg import FigureCanvasAgg

LAYERS = 30
STAGES = ("instruct-form", "mathematics", "mathematics-facts", "mathematics-facts-format")


def wave(at: int, more: float = 0.0) -> float:
    return 0.3 * math.sin(0.7 * at + more)


def sweep() -> Sweep:
    rows = [Row(name, 0.01 * 2**at, 9, {"a": 1.0, "b": 1.0}, 0.1, 0.1 * at, {"b": -0.01 * at}, interval=(0.0, 0.2 * at))
            for name in ("D", "A×M×C", "random", "the given mask") for at in range(6)]  # fmt: skip
    both = {"a": 1.0, "b": 1.0}
    ceiling = Row(CEILING, 1.0, 99, both, 0.1, 0.8, {"b": -0.1})
    return Sweep("a", (Row(EARLIER, 0, 0, both, 0.1), Row(LATER, 0, 0, {"a": 0.5, "b": 1.0}, 0.1), ceiling, *rows))


def changes() -> Changes:
    def step(one: str, other: str) -> Step:
        held = Histogram(1e-7, 0, tuple(range(20)))
        return Step(one, other, Change(None, None, 999, 400, 0, 0, 0, 1.0, 9.0, held, held), (), (), ())

    steps = tuple(step(one, STAGES[0]) for one in STAGES[1:])
    return Changes(1e-7, 1e-3, steps, steps)


def directions() -> Directions:
    blocks = tuple(Cosines(f"layers.{at}", 5, wave(at), null=(-0.1, 0.0, 0.1), p=0.5) for at in range(LAYERS))
    names = [(STAGES[1], STAGES[2]), (STAGES[1], STAGES[3]), (STAGES[2], STAGES[3])]
    return Directions(0.1, 9, 0, {}, tuple(Pair(*pair, 1.0, blocks[0], blocks) for pair in names))


def gradients() -> Gradients:
    domains = ("mathematics", "facts-of-countries", "formats")
    pairs = tuple((a, b) for at, a in enumerate(domains) for b in domains[at + 1 :])

    def part(layer: int, kind: str) -> Part:
        cosines: Any = {a: {b: wave(layer, len(a) + len(b)) for b in domains} for a in domains}
        return Part(f"model.layers.{layer}.{kind}", layer, kind, dict.fromkeys(domains, 1.0), cosines)

    modules = tuple(part(layer, kind) for layer in range(LAYERS) for kind in ("attention", "mlp"))
    return Gradients(domains, {}, {}, modules[0], (), (), modules, *pulls([modules], pairs, 6), {}, {}, 1, 0)


def scores(seed: int) -> Neurons:
    draw = torch.Generator().manual_seed(seed)
    return Neurons({f"model.layers.{at}.mlp": torch.rand(20, generator=draw) for at in range(LAYERS)})


def terms() -> DamageTerms:
    at = (0.25, 0.5, 1.0)
    return DamageTerms(at, at, (0.0,) * 3, at, (0.0,) * 3, (), 1.0, 1.0, 9)


HISTORY = History(STAGES, {name: tuple(wave(at, len(name)) for at in range(4)) for name in STAGES[1:]}, ())
DRAWN: dict[str, Callable[[], Any]] = {
    "change_histogram": lambda: plots.change_histogram(changes()),
    "contracting_distance": lambda: plots.contracting_distance(_contraction()),
    "damage_curve": lambda: plots.damage_curve(_spectrum()),
    "directional_cosine": lambda: plots.directional_cosine(directions()),
    "dose_response": lambda: plots.dose_response(sweep()),
    "expansion": lambda: plots.expansion(terms()),
    "gradient_courses": lambda: plots.gradient_courses(GradientSeries.over(dict.fromkeys(STAGES, gradients()))),
    "gradient_extremes": lambda: plots.gradient_extremes(gradients()),
    "gradient_heatmap": lambda: plots.gradient_heatmap(gradients()),
    "layer_budgets": lambda: plots.layer_budgets({n: {f"{at}": at for at in range(LAYERS)} for n in ("D", "A×M×C")}),
    "layer_lines": lambda: plots.layer_lines({n: [*map(wave, range(LAYERS))] for n in STAGES[1:]}, "change (%)"),
    "overlap_matrix": lambda: plots.overlap_matrix(overlap({n: scores(len(n)) for n in STAGES}, 0.1), title="changed"),
    "pareto_front": lambda: plots.pareto_front(sweep()),
    "profile_bars": lambda: plots.profile_bars(profile(scores(0))),
    "prompt_stability": lambda: plots.prompt_stability(_stability()),
    "recovery_at_cost": lambda: plots.recovery_at_cost({"refresh": [(100, 0.2), (2e4, 0.5)], "rollback": [(64, 0.4)]}),
    "refresh_dynamics": lambda: plots.refresh_dynamics({n: {0: 0.1, 9: 0.9} for n in ("math", "qa", "code")}),
    "score_lines": lambda: plots.score_lines(HISTORY),
}


def _contraction() -> Contraction:
    some = tuple(0.9**at for at in range(31))
    return made(Contraction, inside=some, bound=some, coupled=some)


def _spectrum() -> DamageSpectrum:
    return made(DamageSpectrum, home=1.0, cumulative=(0.5, 0.7), random=((0.1, 0.2), (0.3, 0.4)), sizes=(1, 100),
                ranked={"D": ((1, 0.1), (100, 0.2)), "A×M×C": ((1, 0.1), (100, 0.2))}, dimension=1000)  # fmt: skip


def _stability() -> Stability:
    draws = tuple(made(Agreement, size=size, jaccard=(0.5, 0.7), to_all=(0.6, 0.8), recovery=()) for size in (4, 8, 16))
    return made(Stability, agreements=draws, chance=0.1, prompts=64, recovery=None, selector="D", metric="math")


def made(kind: type, **fields: Any) -> Any:
    """A result with those fields alone: as much as the figure reads."""
    found = object.__new__(kind)
    for name, value in fields.items():
        object.__setattr__(found, name, value)
    return found


def has_room(name: str) -> None:
    ax = DRAWN[name]()
    canvas = FigureCanvasAgg(ax.figure)
    canvas.draw()
    inside, whole = ax.get_window_extent(), ax.figure.bbox
    if (legend := ax.get_legend()) is not None:
        box = legend.get_window_extent()
        apart = box.x0 >= inside.x1 or box.x1 <= inside.x0 or box.y0 >= inside.y1 - 1 or box.y1 <= inside.y0
        assert apart, "the legend lies on the axes"
        assert max(box.x1 - whole.x1, box.y1 - whole.y1, -box.y0) <= 1, "the legend leaves the figure"
    assert inside.width > 0.38 * whole.width, "little is left for the axes"
    for labels, end, start in ((ax.get_xticklabels(), "x1", "x0"), (ax.get_yticklabels(), "y1", "y0")):
        boxes = [one.get_window_extent() for one in labels if one.get_text() and not one.get_rotation()]
        boxes = sorted((b for b in boxes if b.width), key=lambda b: getattr(b, start))
        assert all(getattr(a, end) <= getattr(b, start) + 1 for a, b in pairwise(boxes)), "tick labels run together"


def test_every_figure_is_here():
    assert set(DRAWN) == set(plots.__all__)


@pytest.mark.parametrize("name", DRAWN)
def test_every_figure_has_room(name):
    has_room(name)


def test_mutants_die():
    from matplotlib.axes import Axes

    real = Axes.legend

    def on_the_lines(patch: pytest.MonkeyPatch) -> None:
        patch.setattr(Axes, "legend", lambda ax, **how: real(ax, loc="best"))

    def every_layer(patch: pytest.MonkeyPatch) -> None:
        patch.setattr("surgery.plots.sweeps.number_blocks", lambda ax: ax.set_xticks(range(LAYERS)))

    dies(on_the_lines, lambda: has_room("refresh_dynamics"))
    dies(every_layer, lambda: has_room("layer_budgets"))
