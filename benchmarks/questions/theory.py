"""Where does the theory's picture hold in the lab?

``python -m benchmarks.questions.theory SEED_FOLDER... [--out FOLDER]``

Math was damaged by QA. The terms of Propositions 1 and 2, the damage in few dimensions, the constants, and Theorem 1's
contraction, on the calibration prompts with their right answers as responses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.hardware import statement
from benchmarks.seeds import asked_for, write
from surgery import Neurons, Trajectory, activation, allocate, damage, load_prompts, magnitude, top
from surgery.layout import find_layout
from surgery.plots.theory import contracting_distance, damage_curve, expansion
from surgery.tables import Table
from surgery.theory import (
    Contraction,
    CurvatureBounds,
    DamageSpectrum,
    DamageSplit,
    DamageTerms,
    Landscape,
    contraction,
    curvature_bounds,
    damage_spectrum,
    damage_split,
    damage_terms,
    eigenspace,
)

ACTIVE, CHANGED, DIMENSIONS, FEW = 0.05, 0.10, 16, 4
OTHERS = ("qa", "code", "cw")


@dataclass(frozen=True)
class Found:
    """What one seed gave."""

    terms: DamageTerms
    splits: dict[str, DamageSplit]
    spectra: dict[str, DamageSpectrum]
    bounds: dict[str, CurvatureBounds]
    contractions: dict[float, Contraction]


def best(scores: Neurons, fraction: float) -> Neurons:
    """The best neurons of each layer."""
    return top(scores, allocate(scores, fraction, how="uniform"))


def measure(folder: Path) -> Found:
    """Everything on one seed."""
    run = Trajectory(earlier=folder / "math", later=folder / "qa")
    data = {
        domain: load_prompts(folder / "data" / f"{domain}.calibration.jsonl", folder / "qa", batch_size=64)
        for domain in ("math", *OTHERS)
    }
    land = Landscape.around(run, data["math"])
    active = best(activation(land.model, data["math"]), ACTIVE) & best(activation(land.model, data["qa"]), ACTIVE)
    units = {kind: find_layout(land.model, units=kind).sizes for kind in ("mlp", "kv_group")}
    every = {
        kind: Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in sizes.items()})
        for kind, sizes in units.items()
    }
    whole = eigenspace(land, DIMENSIONS, steps=60)
    routes = eigenspace(land, DIMENSIONS, mask=active, steps=60)
    few = eigenspace(land, FEW, steps=60)
    d = damage(run, data["math"], loss="kl")  # as L_A
    parts = {
        f"the {FEW} directions of largest curvature": damage_split(land, few),
        f"the {DIMENSIONS} directions of largest curvature": damage_split(land, whole),
        f"neurons active in both ({ACTIVE:.0%} of each)": damage_split(land, active),
        f"most changed neurons ({CHANGED:.0%})": damage_split(land, best(magnitude(run), CHANGED)),
        f"best neurons by D ({CHANGED:.0%})": damage_split(land, top(d, allocate(d, CHANGED, how="global"))),
        "all MLP neurons": damage_split(land, every["mlp"]),
        "all attention": damage_split(land, every["kv_group"]),
    }
    spectra = {
        "all parameters": damage_spectrum(land, whole, ranked={"D": d}),
        "active in both": damage_spectrum(land, routes),
    }
    bounds = {
        "all parameters": curvature_bounds(land, few),
        "neurons active in both": curvature_bounds(land, routes, steps=8),
    }
    others = {domain: data[domain] for domain in OTHERS}
    paths = {
        start: contraction(land, few, steps=20, start=start, bounds=bounds["all parameters"], others=domains)
        for start, domains in ((1.0, others), (0.5, None), (0.25, None))
    }
    return Found(damage_terms(land), parts, spectra, bounds, paths)


def block(*tables: object) -> str:
    """Tables as a code block."""
    return "```text\n" + "\n\n".join(map(str, tables)) + "\n```\n"


def splits_of(found: dict[str, dict[str, DamageSplit]]) -> Table:
    """Proposition 2 over several subspaces: shares of the quadratic damage in %, one seed after the other."""
    rows = []
    for name, one in next(iter(found.values())).items():
        every = [seed[name] for seed in found.values()]
        rows.append(
            (
                name,
                f"{one.dimension:,}",
                *(
                    ", ".join(f"{100 * part(split):.3g}" for split in every)
                    for part in (
                        lambda split: split.motion,
                        lambda split: split.inside / split.total,
                        lambda split: split.leakage / split.total,
                        lambda split: split.outside / split.total,
                    )
                ),
            )
        )
    title = f"Shares of ½ δBᵀHδB in % on {', '.join(found)}"
    return Table(title, ("S", "dimensions", "‖δB‖² in S", "inside", "leakage", "outside"), tuple(rows))


def page(found: dict[str, Found]) -> str:
    """The results as markdown: Propositions 1 and 2 of every seed, the rest too, seed by seed."""
    parts = [
        f"# The theory, measured in the lab\n\nMath damaged by QA; L_A = KL(p_math ‖ p) on Math's 128 calibration "
        f"prompts, in float32. `python -m benchmarks.questions.theory SEED...`. {statement()}\n",
        "## Proposition 1\n",
        *(f"{name}\n\n{block(one.terms)}" for name, one in found.items()),
        "![terms](theory-terms.png)\n\n## Proposition 2\n",
        block(splits_of({name: one.splits for name, one in found.items()})),
        "## In how few dimensions\n\n![damage against dimensions](theory-dimensions.png)\n",
        *(
            f"{name}, directions among {where}\n\n{block(*spectrum.tables())}"
            for name, one in found.items()
            for where, spectrum in one.spectra.items()
        ),
        "## Constants\n",
        *(
            f"{name}, S among {where}\n\n{block(bounds)}"
            for name, one in found.items()
            for where, bounds in one.bounds.items()
        ),
        "## Theorem 1\n\n![contraction](theory-contraction.png)\n",
        *(
            f"{name}, from θA + {start:g} δB\n\n{block(one.tables()[0], *one.tables()[2:])}"
            for name, seed in found.items()
            for start, one in seed.contractions.items()
        ),
    ]
    return "\n".join(parts)


def main() -> None:
    """Measure every seed, write the page and the figures."""
    seeds, out = asked_for(__doc__)
    found = {folder.resolve().name: measure(folder) for folder in seeds}
    write(out, "theory", page(found))
    first = next(iter(found.values()))
    expansion(first.terms).figure.savefig(out / "theory-terms.png")
    damage_curve(first.spectra["all parameters"]).figure.savefig(out / "theory-dimensions.png")
    contracting_distance(first.contractions[0.5]).figure.savefig(out / "theory-contraction.png")


if __name__ == "__main__":
    main()
