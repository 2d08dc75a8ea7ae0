"""Strengths of units, fitted on the prompts of one skill or of both: ``python -m benchmarks.real.fits [--pairs 0,1]``.

D chooses the units, and ``strengths`` says how far back each goes. On the damaged skill's prompts the loss is the
distance from the earlier model; on the kept skill's, where ``kept`` is not 0, that times the distance from the later
one (Hellinger both). Least squares on both domains' activations sees the same prompts, and is what this is to beat.
256 evaluation items; strengths are found in float32 and written in the model's own dtype.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor, nn

from benchmarks.hardware import statement
from benchmarks.pareto.changes import Setting, wide
from benchmarks.real import ideas
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS
from benchmarks.seeds import write
from surgery import DamageSelector, Neurons, rollback, strengths
from surgery.live import distillation, earlier_model
from surgery.live.prompts import Batch
from surgery.masks import Mask


@dataclass(frozen=True)
class Fit:
    """One way; see the module's text. ``passes`` is how often the prompts are gone through."""

    most: float
    kept: float
    passes: int = 8


FITS = {
    "as D chose them": None,
    "strengths ≤ 2, 8 passes": Fit(2.0, 0.0),
    "strengths ≤ 2, both skills, 8 passes": Fit(2.0, 1.0),
    "strengths ≤ 1, both skills, 8 passes": Fit(1.0, 1.0),
    "strengths ≤ 2, both skills, 16 passes": Fit(2.0, 1.0, 16),
}


def fitted(setting: Setting, mask: Mask, fit: Fit, kept: str) -> Neurons:
    """How far each unit of the mask goes back."""
    run, other = wide(setting), setting.others[kept] if fit.kept else []
    with earlier_model(run) as earlier:
        far = distillation(earlier, setting.data, divergence="hellinger")
    near = distillation(run.load(), other, divergence="hellinger") if other else far

    def both(model: nn.Module, batch: Batch) -> Tensor:
        return far(model, batch) if far.path(batch).exists() else fit.kept * near(model, batch)

    return strengths(run, [*setting.data, *other], mask, most=fit.most, passes=fit.passes, loss=both)


def rows_of(bench: ideas.Bench, names: list[str], budgets: list[float]) -> Iterator[str]:
    """The lines of the table: the way, the budget, what ``judged`` says, CPU seconds."""
    setting = bench.setting
    for budget in budgets:
        start = time.process_time()
        mask = DamageSelector(budget, units=("mlp", "value_channel")).select(setting.run, setting.data)
        chosen = time.process_time() - start
        for name in names:
            start, fit = time.process_time(), FITS[name]
            far = 1.0 if fit is None else fitted(setting, mask, fit, bench.pair.kept)
            spent = chosen + time.process_time() - start
            with rollback(setting.model, to=setting.run.tensors("earlier"), mask=mask, strength=far):
                yield f"| {name} | {100 * budget:g} % | {bench.judged()} | {spent:.0f} |"


def main() -> None:
    """Try every way on every pair and seed that is asked for, and write a table."""
    parser = command(__doc__)
    parser.add_argument("names", nargs="*", default=list(FITS))
    parser.add_argument("--pairs", type=lambda text: [PAIRS[int(one)] for one in text.split(",")], default=[*PAIRS[:2]])
    parser.add_argument("--seeds", type=lambda text: [int(one) for one in text.split(",")], default=[0])
    parser.add_argument("--budgets", type=lambda text: [float(one) for one in text.split(",")], default=[0.02, 0.08])
    asked = parser.parse_args()
    head = "| units | budget | recovery | by greedy | kept, points | CPU s |\n" + "|---" * 6 + "|"
    told = [
        "# How far back units go, fitted on prompts of one skill or of both\n\n`python -m benchmarks.real.fits`; what "
        f"the ways are, its text says. {ideas.ITEMS} evaluation items. {statement()}"
    ]
    for pair in asked.pairs:
        for seed in asked.seeds:
            told += [f"## {pair.name}, seed {seed}", head]
            for row in rows_of(ideas.Bench(Path(asked.lab), pair, seed), asked.names, asked.budgets):
                told[-1] += f"\n{row}"
                write(asked.out, "real-fits", "\n\n".join(told) + "\n")


if __name__ == "__main__":
    main()
