"""The paper's structural evidence in the lab, on every seed: ``python -m benchmarks.figures SEED_FOLDER...``

How far parameters moved (Figures 2, and the absolute and relative changes of Appendix B), which neurons stages change
and domains use (Figure 3), which way two updates point where they meet (Figure 4), and how the domains' gradients lie
to each other, module by module and over the stages (Figures 5 to 8). One table for each, a column per seed, and
the figures of the first seed.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path

from transformers.utils import logging as transformers_logging

from benchmarks.hardware import statement
from surgery import (
    Changes,
    Directions,
    Overlap,
    Trajectory,
    activation,
    changes,
    directions,
    gradients_along,
    load_prompts,
    magnitude,
    overlap,
)
from surgery.evidence_plots import change_histogram, directional_cosine, overlap_matrix
from surgery.geometry import GradientSeries
from surgery.gradient_plots import gradient_courses, gradient_extremes, gradient_heatmap

STAGES = ("base", "code", "math", "qa", "cw")
DOMAINS = STAGES[1:]
PAIRS = tuple(combinations(DOMAINS, 2))


class Seed:
    """Everything that is measured of one seed."""

    def __init__(self, folder: Path) -> None:
        self.name = folder.name
        run = Trajectory.through({stage: str(folder / stage) for stage in STAGES})
        last = folder / STAGES[-1]
        data = {d: load_prompts(folder / "data" / f"{d}.calibration.jsonl", last) for d in DOMAINS}
        model = run.load()
        self.changes: Changes = changes(run)
        self.changed: Overlap = overlap({name: magnitude(step) for name, step in run.steps().items()}, top=0.10)
        self.active: Overlap = overlap({d: activation(model, batches) for d, batches in data.items()}, top=0.05)
        self.directions: Directions = directions(run, top=0.10, how="uniform")
        self.gradients: GradientSeries = gradients_along(run, data)


Column = Callable[[Seed], float | None]


def table(title: str, rows: list[tuple[str, Column]], seeds: list[Seed], digits: int = 3) -> str:
    """A row per quantity, a column per seed, and their mean."""
    lines = [
        f"### {title}\n",
        f"| | {' | '.join(seed.name for seed in seeds)} | mean |",
        "|---" * (len(seeds) + 2) + "|",
    ]
    for name, of in rows:
        values = [of(seed) for seed in seeds]
        known = [value for value in values if value is not None]
        cells = ["none" if value is None else f"{value:.{digits}f}" for value in values]
        lines.append(f"| {name} | {' | '.join(cells)} | {sum(known) / len(known) if known else 0:.{digits}f} |")
    return "\n".join(lines) + "\n"


def tables(seeds: list[Seed]) -> Iterator[str]:
    """All tables."""
    kinds = (("against the base model", "cumulative"), ("against the checkpoint before", "incremental"))
    for title, kind in kinds:
        rows: list[tuple[str, Column]] = []
        for at, stage in enumerate(DOMAINS):
            rows += [
                (f"{stage}: unchanged (%)", lambda s, a=at, k=kind: _share(s, k, a, "unchanged")),  # type: ignore[misc]
                (f"{stage}: abs(Δ) < 1e-7 (%)", lambda s, a=at, k=kind: _share(s, k, a, "near_absolute")),  # type: ignore[misc]
                (f"{stage}: ‖Δ‖/‖θ‖ (%)", lambda s, a=at, k=kind: 100 * getattr(s.changes, k)[a].whole.relative_norm),  # type: ignore[misc]
            ]
        yield table(f"How far parameters moved, {title}", rows, seeds, 2)
    for title, which in (
        ("Jaccard of the 10 % most changed neurons", "changed"),
        ("... of the 5 % most active", "active"),
    ):
        rows = [(f"{a}–{b}", lambda s, a=a, b=b, w=which: getattr(s, w).of(a, b)) for a, b in PAIRS]  # type: ignore[misc]
        rows.append(("by chance (mean)", lambda s, w=which: _chance(getattr(s, w))))  # type: ignore[misc]
        yield table(title, rows, seeds)
    rows = []
    for a, b in PAIRS:
        rows.append((f"{a}–{b}: mean cosine", lambda s, a=a, b=b: s.directions.of(a, b).whole.mean))  # type: ignore[misc]
        rows.append((f"{a}–{b}: p", lambda s, a=a, b=b: s.directions.of(a, b).whole.p))  # type: ignore[misc]
    yield table("Direction of two updates on the neurons both changed most", rows, seeds)
    for stage in ("math", "cw"):
        rows = [(f"{a}–{b}", lambda s, a=a, b=b, t=stage: s.gradients.stages[t].whole.cosines[a][b]) for a, b in PAIRS]  # type: ignore[misc]
        yield table(f"Cosine of the gradients, whole model, after {stage}", rows, seeds)
    rows = []
    for layer in range(len(seeds[0].gradients.stages["math"].layers)):
        for kind in ("attention", "mlp"):
            rows.append((f"layer {layer} {kind}", lambda s, n=layer, k=kind: _module(s, n, k, "math", "qa")))  # type: ignore[misc]
    yield table("Cosine of Math's and QA's gradients by module, after math", rows, seeds)


def _share(seed: Seed, kind: str, at: int, name: str) -> float:
    whole = getattr(seed.changes, kind)[at].whole
    return 100 * whole.share(getattr(whole, name))


def _chance(found: Overlap) -> float:
    places = [(found.domains.index(a), found.domains.index(b)) for a, b in found.pairs()]
    return sum(found.chance[i][j] for i, j in places) / len(places)


def _module(seed: Seed, layer: int, kind: str, a: str, b: str) -> float | None:
    parts = seed.gradients.stages["math"].modules
    return next(part.cosines[a][b] for part in parts if part.layer == layer and part.kind == kind)


def draw(seed: Seed, folder: Path) -> None:
    """The figures of one seed."""
    folder.mkdir(parents=True, exist_ok=True)
    after = seed.gradients.stages["math"]
    found = {
        "changes-absolute": change_histogram(seed.changes, "absolute", "base"),
        "changes-relative": change_histogram(seed.changes, "relative", "before"),
        "changed-neurons": overlap_matrix(seed.changed, title="changed"),
        "active-neurons": overlap_matrix(seed.active, title="active"),
        "directional-cosine": directional_cosine(seed.directions),
        "gradients-attention": gradient_heatmap(after, "attention"),
        "gradients-mlp": gradient_heatmap(after, "mlp"),
        "gradients-extremes": gradient_extremes(after),
        "gradients-over-stages": gradient_courses(seed.gradients),
    }
    for name, ax in found.items():
        ax.figure.savefig(folder / f"{name}.png")  # type: ignore[union-attr]


def main() -> None:
    """Measure every seed, write the tables and the first seed's figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    transformers_logging.disable_progress_bar()
    seeds = [Seed(folder) for folder in asked.seeds]
    text = "\n".join([f"# The paper's structural evidence, in the lab\n\n{statement()}\n", *tables(seeds)])
    (asked.out / "figures.md").write_text(text, encoding="utf-8")
    draw(seeds[0], asked.out / "figures")
    print(text)


if __name__ == "__main__":
    main()
