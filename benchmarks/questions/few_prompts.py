"""From how few unlabelled prompts? ``python -m benchmarks.questions.few_prompts SEED_FOLDER... [--out FOLDER]``

Math was damaged by QA. Prompts are drawn from a pool of training prompts (none of them is an evaluation prompt), which
the lab generates again from the seed. They lose their answers, and the earlier model writes its own; then D selects 2 %
by some of them, drawn several times: how much the masks agree, and how much each recovers.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from transformers import AutoTokenizer

from benchmarks.hardware import statement
from benchmarks.lab.domains import Item
from benchmarks.lab.evaluate import evaluator
from benchmarks.lab.refresh import training_items
from benchmarks.seeds import asked_for, write
from surgery import AMCSelector, DamageSelector, Selector, Trajectory, load_prompts
from surgery.live.answers import respond
from surgery.live.earlier import earlier_model
from surgery.live.prompts import Batch
from surgery.measure.stability import Stability, stability
from surgery.plots.sweeps import prompt_stability

SIZES, DRAWS, POOL = (4, 8, 16, 32, 64, 128, 256), 5, 512
SELECTORS: dict[str, Selector] = {
    "D, neurons": DamageSelector(0.02, loss="hellinger", units="mlp"),
    "D, neurons and value channels": DamageSelector(0.02, loss="hellinger", units=("mlp", "value_channel")),
    "D by KL, neurons": DamageSelector(0.02, loss="kl", units="mlp"),
    "A×M×C, neurons": AMCSelector(0.02),
}


def unlabelled(items: Sequence[Item], tokenizer: Path) -> list[Batch]:
    """The prompts of items, without their responses."""
    with tempfile.TemporaryDirectory() as folder:
        bare = Path(folder) / "prompts.jsonl"
        bare.write_text("".join(json.dumps({"prompt": item["prompt"]}) + "\n" for item in items), encoding="utf-8")
        return load_prompts(bare, tokenizer)


def measure(folder: Path) -> list[Stability]:
    """The stability of every selector on one seed."""
    run = Trajectory(folder / "code", folder / "math", folder / "qa")
    score = evaluator(folder / "data", AutoTokenizer.from_pretrained(folder / "qa"))
    prompts = unlabelled(training_items(folder, "math")[:POOL], folder / "qa")
    with earlier_model(run) as earlier:
        data = respond(earlier, prompts, max_new_tokens=8)
    found = []
    for name, one in SELECTORS.items():
        print(f"{folder.name}: {name}", flush=True)
        found.append(stability(run, data, one, SIZES, DRAWS, evaluate=score, metric="math"))
    return found


def table(seeds: list[list[Stability]]) -> str:
    """Recovery by number of prompts: mean over seeds and draws, and the range; then the agreement of two draws."""
    lines = ["| selector | | " + " | ".join(map(str, SIZES)) + " | all |", "|---|---|" + "---|" * (len(SIZES) + 1)]
    for name, *found in zip(SELECTORS, *seeds, strict=True):
        agreements = list(zip(*(one.agreements for one in found), strict=True))
        recoveries = [100 * np.array([value for one in size for value in one.recovery]) for size in agreements]
        every = 100 * np.mean([one.recovery for one in found if one.recovery is not None])
        cells = [f"{values.mean():.1f} ({values.min():.1f} … {values.max():.1f})" for values in recoveries]
        lines.append(f"| {name} | recovery, % | " + " | ".join(cells) + f" | {every:.1f} |")
        agreed = [np.mean([value for one in size for value in one.jaccard]) for size in agreements]
        lines.append("| | Jaccard of two draws | " + " | ".join(f"{value:.2f}" for value in agreed) + " | |")
    return "\n".join(lines)


def picture(found: list[Stability]) -> Figure:
    """One seed: what each selector recovers, and below it how much its masks agree."""
    figure = Figure(figsize=(15, 6.4), dpi=120, layout="constrained")
    recoveries, agreements = figure.subplots(2, len(found))
    every = [100 * value for each in found for one in each.agreements for value in (*one.recovery, each.recovery or 0)]
    for name, one, above, below in zip(SELECTORS, found, recoveries, agreements, strict=True):
        prompt_stability(one, above, of="recovery")
        above.set_ylim(min(0, *every), 1.05 * max(every))
        above.set_title(name, fontsize="medium")
        prompt_stability(one, below)
        for ax in (above, below):
            for text in ax.get_legend().get_texts():
                text.set_text(text.get_text().partition(", ")[0])
    return figure


def main() -> None:
    """Measure every seed, write the table and the first seed's picture."""
    seeds, out = asked_for(__doc__)
    found = [measure(folder) for folder in seeds]
    text = (
        f"# From how few unlabelled prompts?\n\nRecovery of Math (damaged by QA) at a budget of 2 %, by number of "
        f"prompts without responses: mean (least … most) over {len(found)} seeds × {DRAWS} draws from a pool of {POOL} "
        f"training prompts, none of which is evaluated on (all: the whole pool). Jaccard: what two draws' masks have "
        f"in common. `python -m benchmarks.questions.few_prompts SEED...`. {statement()}\n\n{table(found)}\n\n"
        f"![{seeds[0].name}: recovery, and agreement, by number of prompts](few-prompts.png)\n"
    )
    write(out, "few-prompts", text)
    picture(found[0]).savefig(out / "few-prompts.png")


if __name__ == "__main__":
    main()
