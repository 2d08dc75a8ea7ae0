"""What choosing costs on the real model: ``python -m benchmarks.real.price [--lab FOLDER] [--out FOLDER]``.

With ``--small`` on the small lab's model, whose checkpoints are in the repository. Beside one bare forward and backward
pass over the same prompts (gradients of all matrices of the layers, freed one by one), all in one process, in CPU
seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import nn

from benchmarks.hardware import statement
from benchmarks.pareto import comparison
from benchmarks.pareto.changes import Setting
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS, setting_of
from benchmarks.seeds import write
from benchmarks.speed.memory import peak
from surgery import AMCSelector, DamageSelector, repair, rollback
from surgery.live.hooks import collecting_from
from surgery.live.losses import cross_entropy
from surgery.live.prompts import Batch
from surgery.measure import likelihood
from surgery.measure.rows import Evaluate

SMALL = Path(__file__).parents[1] / "lab" / "seed0"


def priced(do: Callable[[], Any]) -> tuple[float, float, Any]:
    """CPU seconds, the peak of anonymous memory above what it was before (MB), and what it returned."""
    start = time.process_time()
    with peak() as most:
        found = do()
    return time.process_time() - start, most[0], found


def repaired(setting: Setting, evaluate: Evaluate, selector: DamageSelector | None = None) -> Callable[[], Any]:
    """``repair`` with that selector, measured by ``evaluate``, which tells what the evaluations took."""
    return lambda: repair(setting.run, setting.data, selector=selector, evaluate=evaluate, metric=setting.metric)


class Timed:
    """The likelihood of the damaged skill's calibration prompts, and the CPU seconds that measuring it took."""

    def __init__(self, setting: Setting) -> None:
        self.evaluate, self.spent, self.calls = likelihood({setting.metric: setting.data}), 0.0, 0

    def __call__(self, model: nn.Module) -> Any:
        start = time.process_time()
        found = self.evaluate(model)
        self.spent += time.process_time() - start
        self.calls += 1
        return found


def choices(setting: Setting) -> tuple[list[str], float, Any]:
    """A line for each way of choosing, the CPU seconds of the bare pass, and the last mask."""
    run, data, model = setting.run, setting.data, setting.model
    matrices = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}

    def bare() -> None:
        with collecting_from(model, matrices, lambda *_: None):
            for batch in data:
                cross_entropy(model, batch).backward()

    rows: dict[str, Callable[[], Any]] = {
        "one forward and backward pass": bare,
        "D of units": lambda: DamageSelector(0.02).select(run, data),
        "A×M×C of neurons": lambda: AMCSelector(0.02).select(run, data),
        "D of single weights, 0.1 %": lambda: DamageSelector(0.001, units="weight").select(run, data),
        "from there to 0.25 %": lambda: DamageSelector(0.0025, units="weight").select(run, data),
        "all of 0.25 %, rounds=8": lambda: DamageSelector(0.0025, units="weight", rounds=8).select(run, data),
    }
    bare()  # what is slow only once
    lines, first, found = [], 0.0, None
    for name, do in rows.items():
        spent, memory, found = priced(do)
        first = first or spent
        places = 1 if first > 1 else 2
        lines.append(f"| {name} | {spent:.{places}f} | {spent / first:.2f} | {memory:.0f} |")
        print(lines[-1], flush=True)
    return lines, first, found


def main() -> None:
    """Measure on Math by QA, seed 0, and write the table."""
    parser = command(__doc__)
    parser.add_argument("--small", action="store_true", help="the small lab's model instead, and its choices alone")
    asked = parser.parse_args()
    if asked.small:
        setting = comparison.setting_of(SMALL, comparison.pairs()[0])
        lines, _, _ = choices(setting)
        write(asked.out, "small-price", page("the small lab's model", "float32", " --small", setting, lines))
        return
    setting = setting_of(asked.lab, 0, PAIRS[0])
    lines, first, found = choices(setting)
    spent, memory, done = priced(lambda: rollback(setting.model, to=setting.run.tensors("earlier"), mask=found))
    undone, _, _ = priced(done.undo)
    lines.append(f"| rollback of {done.changed} weights; undo | {spent:.2f}; {undone:.2f} | – | {memory:.0f} |")
    for name, selector in (("single weights", None), ("units", DamageSelector(0.01))):
        fresh, timed = setting_of(asked.lab, 0, PAIRS[0]), Timed(setting)
        spent, memory, result = priced(repaired(fresh, timed, selector))
        told = f"{timed.calls} evaluations: {timed.spent:.1f} more; {result.outcome}"
        lines.append(
            f"| repair by {name} ({told}) | {spent - timed.spent:.1f} | {(spent - timed.spent) / first:.2f} "
            f"| {memory:.0f} |"
        )
        print(lines[-1], flush=True)
    write(asked.out, "real-price", page("SmolLM2-135M", "bf16", "", setting, lines))


def page(model: str, dtype: str, how: str, setting: Setting, lines: list[str]) -> str:
    """The table and what was measured."""
    data = setting.data
    prompts, tokens = (sum(int(count(batch)) for batch in data) for count in (_prompts, _tokens))
    return (
        f"# What choosing costs on {model}\n\nMath by QA, seed 0: {len(data)} batches, {tokens} tokens of {prompts} "
        f"prompts, {dtype}. `python -m benchmarks.real.price{how}`. {statement()}\n\n"
        f"| | CPU s | × the bare pass | peak, MB above the model |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )


def _prompts(batch: Batch) -> int:
    return len(batch["input_ids"])


def _tokens(batch: Batch) -> int:
    return int(batch["attention_mask"].sum())


if __name__ == "__main__":
    main()
