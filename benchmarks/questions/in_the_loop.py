"""A stage that is judged and repaired while it trains.

``python -m benchmarks.questions.in_the_loop SEED_FOLDER [--out FOLDER]``.

The lab's QA is trained with GRPO on top of Math, from the stored bf16 checkpoint, three times from the same start:
watched only, repaired at the end, and repaired at every save. Math's and Code's prompts are watched, QA's are kept.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import statement
from benchmarks.lab.domains import DOMAINS, generate
from benchmarks.lab.evaluate import Evaluator
from benchmarks.lab.tokenizer import build_tokenizer
from benchmarks.lab.train import THIRD, seed_everything, train_stage
from benchmarks.seeds import asked_for, write
from surgery import Trajectory, load_prompts
from surgery.measure import Stage
from surgery.training import RollbackCallback

SAVE = 15
WAYS: dict[str, dict[str, Any]] = {
    "watched at every save": {"when": "save"},
    "repaired at the end": {"when": "end", "repair": True},
    "repaired at every save": {"when": "save", "repair": True},
}


def trained(folder: Path, seed: int, **how: Any) -> tuple[dict[str, float], dict[int, Stage]]:
    """Accuracies after the stage, and what the callback measured."""
    tokenizer = build_tokenizer()
    model: Any = Trajectory(later=folder / "math").load(dtype=torch.float32)
    prompts = {name: load_prompts(folder / "data" / f"{name}.calibration.jsonl", tokenizer) for name in DOMAINS}
    callback = RollbackCallback(
        {name: prompts[name] for name in ("math", "code")}, earlier=folder / "math", keep={"qa": prompts["qa"]}, **how
    )
    scores = Evaluator(folder / "data", tokenizer)
    seed_everything(1_000 * seed + 3)
    data = generate("qa", seed)
    train_stage(model, "qa", replace(THIRD), data, tokenizer, seed, scores, print, [callback], save_steps=SAVE)
    return scores(model), callback.measured


def page(folder: Path, seed: int) -> str:
    """Accuracies of the three ways, and what was seen of the stage at each save."""
    before = Evaluator(folder / "data", build_tokenizer())(Trajectory(later=folder / "math").load())
    lines = ["| the stage was | " + " | ".join(DOMAINS) + " |", "|---|" + "---|" * len(DOMAINS)]
    lines.append("| not trained yet | " + " | ".join(f"{100 * before[name]:.1f}" for name in DOMAINS) + " |")
    seen: dict[str, dict[int, Stage]] = {}
    for way, how in WAYS.items():
        after, seen[way] = trained(folder, seed, **how)
        lines.append(f"| {way} | " + " | ".join(f"{100 * after[name]:.1f}" for name in DOMAINS) + " |")
    course = ["| step | Math lost [95 %] | Code lost [95 %] | hurt | weights to revert |", "|---|---|---|---|---|"]
    for step, found in seen["watched at every save"].items():
        lost = [found.earlier.paired[name] for name in ("math", "code")]
        cells = [f"{one.gain:.3f} [{one.interval[0]:.3f}, {one.interval[1]:.3f}]" for one in lost]
        count = 0 if found.mask is None else sum(found.mask.count().values())
        course.append(f"| {step} | {cells[0]} | {cells[1]} | {', '.join(found.hurt) or 'none'} | {count} |")
    verdicts = [f"step {step}: {found.verdict}" for step, found in seen["repaired at the end"].items()]
    return f"""# A stage that is judged and repaired while it trains

`python -m benchmarks.questions.in_the_loop SEED`. {statement()}

QA is trained with GRPO (TRL's `GRPOTrainer`, {THIRD.steps} steps) on top of Math, from the stored checkpoint in
float32. `RollbackCallback` watches Math and Code, with 128 prompts each (half choose, half measure), and keeps QA.
Accuracies on the lab's evaluation items, in percent:

{chr(10).join(lines)}

What the watching callback saw, in nats per response token of the measuring half:

{chr(10).join(course)}

What it said when it repaired at the end:

```text
{chr(10).join(verdicts)}
```
"""


def main() -> None:
    """Train one seed's stage three times and write the tables."""
    (folder, *_), out = asked_for(__doc__)
    write(out, "in-the-loop", page(folder, int(folder.name.removeprefix("seed"))))


if __name__ == "__main__":
    main()
