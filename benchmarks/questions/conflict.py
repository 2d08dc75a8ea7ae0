"""Do the domains' gradients conflict? ``python -m benchmarks.questions.conflict SEED_FOLDER... [--out FOLDER]``

Gradient cosines of the four domains at every checkpoint, on the calibration prompts; each beside what two halves of the
same prompts say, since a cosine that the halves do not share is noise.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from benchmarks.hardware import statement
from benchmarks.seeds import asked_for, write
from surgery import Trajectory, load_prompts
from surgery.evidence import Gradients, GradientSeries, gradients_along

DOMAINS, STAGES = ("math", "code", "qa", "cw"), ("base", "code", "math", "qa", "cw")


def measure(folder: Path) -> tuple[GradientSeries, GradientSeries]:
    """On all prompts, and with each domain's halves as domains of their own ("math 0", "math 1")."""
    run = Trajectory.through({stage: folder / stage for stage in STAGES})
    data = {d: load_prompts(folder / "data" / f"{d}.calibration.jsonl", folder / "base") for d in DOMAINS}
    halves = {f"{d} {half}": batches[half::2] for d, batches in data.items() for half in (0, 1)}
    whole, parts = (gradients_along(run, one, dtype=torch.float32) for one in (data, halves))
    return whole, parts


def spread(values: list[float | None]) -> str:
    """The mean and the lowest and highest over seeds."""
    known = np.array([np.nan if value is None else value for value in values])
    return f"{known.mean():+.3f} ({known.min():+.3f} … {known.max():+.3f})"


def by_stage(head: str, rows: dict[str, list[str]]) -> str:
    """A table with a column for each checkpoint."""
    lines = [f"| {head} | " + " | ".join(STAGES) + " |", "|---" * (len(STAGES) + 1) + "|"]
    return "\n".join([*lines, *(f"| {name} | " + " | ".join(cells) + " |" for name, cells in rows.items())])


def strongest(seed: str, whole: GradientSeries, parts: GradientSeries) -> list[str]:
    """The strongest conflict and synergy of each checkpoint, with the same module's cosine on either half."""
    lines = []
    for stage, found in whole.stages.items():
        for what, pulls in (("conflict", found.conflicts), ("synergy", found.synergies)):
            for pull in pulls[:1]:
                part = next(one for one in parts.stages[stage].modules if one.name == pull.module)
                both = [part.cosines[f"{pull.first} {half}"][f"{pull.second} {half}"] for half in (0, 1)]
                halves = " and ".join(f"{value:+.3f}" for value in both if value is not None)
                where = f"{pull.kind} of layer {pull.layer}, {pull.first}–{pull.second}"
                lines.append(f"| {seed} | {stage} | {what} | {where} | {pull.cosine:+.3f} | {halves} |")
    return lines


def report(found: dict[str, tuple[GradientSeries, GradientSeries]]) -> str:
    """The tables, over all seeds."""
    pairs = next(iter(found.values()))[0].stages["base"].pairs

    def over(which: int, stage: str, a: str, b: str) -> str:
        seeds: list[Gradients] = [both[which].stages[stage] for both in found.values()]
        return spread([one.whole.cosines[a][b] for one in seeds])

    cosines = {f"{a}–{b}": [over(0, stage, a, b) for stage in STAGES] for a, b in pairs}
    selves = {d: [over(1, stage, f"{d} 0", f"{d} 1") for stage in STAGES] for d in DOMAINS}
    extremes = [line for seed, (whole, parts) in found.items() for line in strongest(seed, whole, parts)]
    return "\n".join(
        [
            "## Whole model\n\nMean over seeds (lowest … highest).\n",
            by_stage("cosine", cosines),
            "\n## One domain with itself: the first half of its prompts with the second\n",
            by_stage("cosine", selves),
            "\n## The strongest conflict and synergy among attention and MLP modules\n",
            "| seed | checkpoint | | module, domains | all prompts | either half |\n|---|---|---|---|---|---|",
            *extremes,
        ]
    )


def main() -> None:
    """Measure every seed and write the tables."""
    seeds, out = asked_for(__doc__)
    found = {folder.name: measure(folder) for folder in seeds}
    head = "# Do the domains' gradients conflict?\n\n`python -m benchmarks.questions.conflict SEED...`"
    write(out, "conflict", f"{head}. {statement()}\n\n{report(found)}\n")


if __name__ == "__main__":
    main()
