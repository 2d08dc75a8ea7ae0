"""What choosing costs on the real model: ``python -m benchmarks.real.price [--lab FOLDER] [--out FOLDER]``.

Beside one bare forward and backward pass over the same prompts (gradients of all matrices of the layers, freed one by
one), all in one process, in CPU seconds.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.hardware import statement
from benchmarks.real.comparison import PAIRS, setting_of
from benchmarks.seeds import RESULTS, write
from surgery import AMCSelector, DamageSelector, rollback
from surgery.live.hooks import collecting_from
from surgery.live.losses import cross_entropy


def priced(do: Callable[[], Any]) -> tuple[float, Any]:
    """CPU seconds, and what it returned."""
    start = time.process_time()
    found = do()
    return time.process_time() - start, found


def main() -> None:
    """Measure on Math by QA, seed 0, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, default=Path("runs/real"))
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
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
        spent, found = priced(do)
        first = first or spent
        lines.append(f"| {name} | {spent:.1f} | {spent / first:.2f} |")
        print(lines[-1], flush=True)
    mask = found
    spent, memory, done = priced(lambda: rollback(model, to=run.earlier, mask=mask))
    undone, _, _ = priced(done.undo)
    lines.append(
        f"| rollback of {done.changed} weights in place; undo | {spent:.2f}; {undone:.2f} | – | {memory:.2f} |"
    )
    text = (
        f"# What choosing costs on SmolLM2-135M\n\nMath by QA, seed 0: {len(data)} batches, {tokens} tokens of 128 "
        f"prompts, bf16. `python -m benchmarks.real.price`. {statement()}\n\n"
        f"| | CPU s | × the bare pass |\n|---|---|---|\n" + "\n".join(lines) + "\n"
    )
    write(asked.out, "real-price", text)


if __name__ == "__main__":
    main()
