"""What choosing costs on the real model: ``python -m benchmarks.real.price [--lab FOLDER] [--out FOLDER]``.

Beside one bare forward and backward pass over the same prompts (gradients of all matrices of the layers, freed one by
one), all in one process, in CPU seconds.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from torch import nn

from benchmarks.hardware import statement
from benchmarks.pareto.changes import Setting
from benchmarks.real.command import command
from benchmarks.real.comparison import PAIRS, setting_of
from benchmarks.seeds import write
from benchmarks.speed.memory import peak
from surgery import AMCSelector, DamageSelector, repair, rollback
from surgery.live.hooks import collecting_from
from surgery.live.losses import cross_entropy
from surgery.measure import likelihood
from surgery.measure.rows import Evaluate


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


def main() -> None:
    """Measure on Math by QA, seed 0, and write the table."""
    asked = command(__doc__).parse_args()
    setting = setting_of(asked.lab, 0, PAIRS[0])
    run, data, model = setting.run, setting.data, setting.model
    matrices = {n: p for n, p in model.named_parameters() if ".layers." in n and p.ndim == 2}
    tokens = sum(int(batch["attention_mask"].sum()) for batch in data)

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
    lines, first = [], 0.0
    for name, do in rows.items():
        spent, memory, found = priced(do)
        first = first or spent
        lines.append(f"| {name} | {spent:.1f} | {spent / first:.2f} | {memory:.0f} |")
        print(lines[-1], flush=True)
    spent, memory, done = priced(lambda: rollback(model, to=run.tensors("earlier"), mask=found))
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
    text = (
        f"# What choosing costs on SmolLM2-135M\n\nMath by QA, seed 0: {len(data)} batches, {tokens} tokens of 128 "
        f"prompts, bf16. `python -m benchmarks.real.price`. {statement()}\n\n"
        f"| | CPU s | × the bare pass | peak, MB above the model |\n|---|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    write(asked.out, "real-price", text)


if __name__ == "__main__":
    main()
