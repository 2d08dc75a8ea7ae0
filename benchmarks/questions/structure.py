"""The structural evidence of the lab: ``python -m benchmarks.questions.structure SEED_FOLDER... [--out FOLDER]``

How far each stage moved the parameters, which neurons the domains change and use together, and whether the updates
point the same way, beside chance. The figures are of the first seed.
"""

from __future__ import annotations

from pathlib import Path

from benchmarks.hardware import statement
from benchmarks.seeds import asked_for, write
from surgery import Trajectory, activation, load_prompts, magnitude
from surgery.evidence import Changes, Directions, Overlap, changes, directions, overlap
from surgery.tables import Table

STAGES = ("base", "code", "math", "qa", "cw")


def evidence(seed: Path) -> tuple[Changes, Overlap, Overlap, Directions, Directions]:
    """Change, overlap of changed and of active neurons, directions (whole model, and top share of every layer)."""
    run = Trajectory.through({name: seed / name for name in STAGES})
    model = run.load()
    active = {
        name: activation(model, load_prompts(seed / f"data/{name}.calibration.jsonl", seed / name))
        for name in STAGES[1:]
    }
    return (
        changes(run),
        overlap({name: magnitude(step) for name, step in run.steps().items()}, top=0.10),
        overlap(active, top=0.05),
        directions(run),
        directions(run, how="uniform"),
    )


def markdown(table: Table) -> str:
    """A table as Markdown."""
    rows = [table.head, ["---"] * len(table.head), *table.texts]
    return "\n".join([f"**{table.title}**", "", *("| " + " | ".join(row) + " |" for row in rows), ""])


def draw(folder: Path, moved: Changes, changed: Overlap, active: Overlap, along: Directions) -> None:
    """The figures of one seed."""
    from matplotlib.figure import Figure

    from surgery.plots import evidence as plots

    figure = Figure(figsize=(12, 8), dpi=100, layout="constrained")
    for row, what in zip(figure.subplots(2, 2), ("absolute", "relative"), strict=True):
        for ax, against in zip(row, ("base", "before"), strict=True):
            plots.change_histogram(moved, what, against, ax)
    figure.savefig(folder / "evidence-changes.png")
    figure = Figure(figsize=(9, 4), dpi=120, layout="constrained")
    for ax, (title, one) in zip(figure.subplots(1, 2), (("changed", changed), ("active", active)), strict=True):
        plots.overlap_matrix(one, ax, title)
    figure.savefig(folder / "evidence-overlap.png")
    plots.directional_cosine(along).figure.savefig(folder / "evidence-directions.png")


def section(seed: Path, found: tuple[Changes, Overlap, Overlap, Directions, Directions]) -> str:
    """One seed's tables."""
    moved, changed, active, along, uniform = found
    per_layer = [table for table in uniform.tables() if "math–qa" in table.title or "top" in table.title]
    parts = [
        f"## {seed.name}\n",
        markdown(moved.tables()[0]),
        f"Changed neurons: mean Jaccard {changed.mean:.3f}\n",
        markdown(changed.tables()[0]),
        f"Active neurons in the last checkpoint: mean Jaccard {active.mean:.3f}\n",
        markdown(active.tables()[0]),
        "Directions on the most changed neurons of the whole model, then of every layer:\n",
        markdown(along.tables()[0]),
        *map(markdown, per_layer),
    ]
    return "\n".join(parts)


def main() -> None:
    """Measure every seed, write the tables, draw the first seed's figures."""
    seeds, out = asked_for(__doc__)
    found = [evidence(seed) for seed in seeds]
    head = "# The structural evidence in the lab\n\n`python -m benchmarks.questions.structure SEED...`"
    figures = (
        "![changes](evidence-changes.png)\n![overlap](evidence-overlap.png)\n![directions](evidence-directions.png)"
    )
    note = f"Pictures of {seeds[0].name}:\n\n{figures}\n"
    write(out, "evidence", "\n".join([f"{head}. {statement()}\n", note, *map(section, seeds, found)]))
    moved, changed, active, _, uniform = found[0]
    draw(out, moved, changed, active, uniform)


if __name__ == "__main__":
    main()
