"""What the paper shows of its models, on this one: ``python -m benchmarks.real.paper [--lab FOLDER] [--out FOLDER]``.

Seed 0, both pairs. How far the stages moved the parameters, which neurons they changed and used, and whether the two
updates point the same way; which layers each score takes its neurons from (Figures 12 and 13); and the terms of
Propositions 1 and 2. The recoveries of Table 6 are rows of ``real.md``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.hardware import statement
from benchmarks.pareto.changes import Setting
from benchmarks.questions.structure import markdown
from benchmarks.questions.theory import best, block, splits_of
from benchmarks.real.command import command
from benchmarks.real.comparison import MAIN, Pair, setting_of
from benchmarks.seeds import write
from surgery import AMCSelector, DamageSelector, Neurons, activation, damage, magnitude
from surgery.evidence import changes, directions, overlap, profile
from surgery.theory import Landscape, damage_split, damage_terms
from surgery.units import kind_of

BUDGET, ACTIVE, CHANGED, PROMPTS = 0.04, 0.05, 0.10, 32
LETTERS = ("A", "M", "AM", "AC", "MC", "AMC")


def shares(mask: Neurons) -> Tensor:
    """The share of a mask's MLP neurons that lie in each layer, in the model's order."""
    return torch.tensor([one.amount for one in profile(mask).blocks if kind_of(one.block) == "mlp"])


def layers(setting: Setting) -> dict[str, Tensor]:
    """Neurons taken from each layer at one budget, by what chooses them."""
    run, data = setting.run, setting.data
    found = {"×".join(one): shares(AMCSelector(BUDGET, one, one).select(run, data)) for one in LETTERS}
    found["D"] = shares(DamageSelector(BUDGET, units="mlp").select(run, data))
    return found


def thirds(taken: Tensor) -> str:
    """What the first, the middle and the last third of the layers give, as cells of a table."""
    parts = torch.tensor([float(part.sum()) for part in taken.tensor_split(3)])
    return " | ".join(f"{share:.1f} %" for share in (100 * parts / parts.sum()).tolist())


def section(pair: Pair, setting: Setting, found: dict[str, Tensor]) -> str:
    """One pair's tables."""
    run, data = setting.run, setting.data
    kept = [batch for batches in setting.others.values() for batch in batches]
    active = {"damaged": activation(setting.model, data), "kept": activation(setting.model, kept)}
    steps = {name: magnitude(step) for name, step in run.steps().items()}
    changed = overlap(steps, top=CHANGED)
    few = list(data[: max(1, PROMPTS // len(data[0]["input_ids"]))])
    land = Landscape.around(run, few)
    moved = magnitude(run)
    parts = {
        f"neurons active in both ({ACTIVE:.0%} of each)": best(active["damaged"], ACTIVE)
        & best(active["kept"], ACTIVE),
        f"most changed neurons ({CHANGED:.0%})": best(moved, CHANGED),
        f"best neurons by D ({CHANGED:.0%})": best(damage(run, data, loss="kl"), CHANGED),
        "all MLP neurons": Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in moved.sizes.items()}),
    }
    split = {name: damage_split(land, mask) for name, mask in parts.items()}
    lines = ["| score | first ten layers | middle ten | last ten |", "|---" * 4 + "|"]
    lines += [f"| {name} | {thirds(taken)} |" for name, taken in found.items()]
    return "\n".join(
        [
            f"## {pair.name}\n",
            "### Structure\n",
            markdown(changes(run).tables()[0]),
            f"Changed neurons (top {CHANGED:.0%}) of both stages: mean Jaccard {changed.mean:.3f}\n",
            markdown(changed.tables()[0]),
            markdown(overlap(active, top=ACTIVE).tables()[0]),
            markdown(directions(run).tables()[0]),
            f"### Which layers are taken from, at {BUDGET:.0%} of the neurons\n",
            *lines,
            "\n### Proposition 1\n",
            block(damage_terms(land)),
            "### Proposition 2\n",
            block(splits_of({pair.name: split})),
        ]
    )


def main() -> None:
    """Measure both pairs, write the page and the picture."""
    asked = command(__doc__).parse_args()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), dpi=150, layout="constrained")
    texts = []
    for ax, pair in zip(figure.subplots(1, len(MAIN), sharey=True), MAIN, strict=True):
        setting = setting_of(asked.lab, 0, pair)
        found = layers(setting)
        for name in ("A", "A×M", "A×M×C", "D"):
            taken = found[name]
            ax.plot(100 * taken / taken.sum(), label=name, linewidth=1.2)
        ax.set_title(pair.name, fontsize="medium")
        ax.set_xlabel("layer")
        texts.append(section(pair, setting, found))
    figure.axes[0].set_ylim(bottom=0)
    figure.axes[0].set_ylabel(f"share of the neurons taken at {BUDGET:.0%} (%)")
    figure.axes[0].legend(frameon=False, fontsize="small")
    asked.out.mkdir(parents=True, exist_ok=True)
    figure.savefig(asked.out / "real-layers.png")
    head = (
        f"# The paper's evidence on SmolLM2-135M\n\n`python -m benchmarks.real.paper`; seed 0. Propositions: L_A = "
        f"KL(p_earlier ‖ p) on {PROMPTS} calibration prompts of the damaged skill, in float32. {statement()}\n\n"
        f"![layers](real-layers.png)\n"
    )
    write(asked.out, "real-paper", "\n".join([head, *texts]))


if __name__ == "__main__":
    main()
