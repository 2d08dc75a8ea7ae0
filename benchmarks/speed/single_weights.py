"""What choosing single weights by D costs on the CPU: ``python -m benchmarks.speed.single_weights [--before COMMIT]``.

A Qwen3-0.6B shape (random weights, bfloat16; ``--layers`` shrinks it) and few short prompts. Beside the selector: the
passes alone, the same ones (every forward and backward pass of the rounds with its gradients dropped, and the forward
passes that measure). With ``--before`` the library of an earlier commit does the same, in turn, each in a process of
its own. Memory: the peak above the models, of what lies in no file, and of all that the process has in memory.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import statement
from benchmarks.speed.memory import peak
from benchmarks.speed.vocabulary import SHAPES, attended, model, prompts
from surgery import DamageSelector, Trajectory
from surgery.live.hooks import only_these
from surgery.live.losses import mean_loss, summed
from surgery.selectors import rounds

ROOT = Path(__file__).parents[2]
Row = dict[str, float]


def measured(function: Callable[[], int]) -> Row:
    """CPU and wall seconds, megabytes, and the rounds that were made."""
    with peak() as memory:
        wall, used = time.perf_counter(), time.process_time()
        count = function()
        row = {"cpu": time.process_time() - used, "wall": time.perf_counter() - wall, "rounds": count}
    return row | {"anonymous": memory[0], "resident": memory[1]}


def chosen(run: Trajectory, data: Any, budget: float) -> int:
    """The selector; how many rounds it took."""
    mask: Any = DamageSelector(budget, units="weight").select(run, data)
    found: int = mask.made_by["entries"]["rounds"]
    return found


def passes(run: Trajectory, data: Any, count: int) -> int:
    """The passes of that many rounds, and nothing else."""
    path = rounds._path(run, data, loss="hellinger", rounds=rounds.ROUNDS, units=("mlp", "kv_group"))
    later, held = run.load(), {slot.tensor for block in path.layout.blocks for slot in block.slots}
    takes = {p: lambda _: None for name, p in later.named_parameters() if name in held}
    mean_loss(path.loss, later, path.held)
    for at in range(count):
        with only_these(takes, later):
            for batch in (batch for lot in path._drawn(at) for batch in lot):
                summed(path.loss, later, batch).backward()
        if at % 2 or at + 1 == count:
            mean_loss(path.loss, later, path.held)
    return count


def one(asked: argparse.Namespace) -> Row:
    """One measurement, in this process."""
    shape = SHAPES["Qwen3-0.6B"] | {"num_hidden_layers": asked.layers}
    earlier, later = model(asked.vocabulary, shape), model(asked.vocabulary, shape)
    with torch.no_grad():
        for parameter in later.model.layers.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape[:1] + (1,) * (parameter.ndim - 1)))
    data, warm = prompts(asked.prompts), prompts(16)
    passes(Trajectory(earlier=earlier, later=later), warm, 1)  # what is loaded late
    run = Trajectory(earlier=earlier, later=later)
    if asked.of == "passes":
        return measured(lambda: passes(run, data, asked.rounds))
    return measured(lambda: chosen(run, data, asked.budget))


def child(of: str, asked: argparse.Namespace, home: Path, count: int = 0) -> Row:
    """The same in a process of its own, with the library that lies in a folder."""
    words = [f"--{name}={getattr(asked, name)}" for name in ("layers", "prompts", "budget", "vocabulary")]
    command = [sys.executable, "-P", __file__, f"--of={of}", f"--rounds={count}", *words]
    told = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(home)}, check=True, stdout=subprocess.PIPE)
    found: Row = json.loads(told.stdout.decode().splitlines()[-1])
    print(f"{of}, {home.name}: {found}", file=sys.stderr, flush=True)
    return found


def table(rows: dict[str, list[Row]]) -> str:
    """The least of each column, and how many times the passes that is."""
    lines = [
        "| | CPU s | wall s | CPU, of the passes' | anonymous MB | resident MB |",
        "|---|---|---|---|---|---|",
    ]
    base = min(row["cpu"] for row in rows["the passes alone"])
    for name, some in rows.items():
        cpu, wall, memory, all_of_it = (min(r[key] for r in some) for key in ("cpu", "wall", "anonymous", "resident"))
        lines.append(f"| {name} | {cpu:.1f} | {wall:.1f} | {cpu / base:.2f} | {memory:,.0f} | {all_of_it:,.0f} |")
    return "\n".join(lines)


def main() -> None:
    """Measure and print one table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--before", help="a commit whose library is measured, too")
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--budget", type=float, default=0.0001)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--times", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--of", choices=("passes", "selector"), help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.of:
        print(json.dumps(one(asked)))
        return
    rows: dict[str, list[Row]] = {"the passes alone": [], "the selector": []}
    with tempfile.TemporaryDirectory() as place:
        homes = {"the selector": ROOT}
        if asked.before:
            homes["the selector before"] = Path(place) / "before"
            git = ["git", "-C", str(ROOT), "worktree"]
            subprocess.run([*git, "add", "--quiet", "--detach", homes["the selector before"], asked.before], check=True)
            measuring = homes["the selector before"] / "benchmarks"  # by the same code, whatever it has been called
            shutil.rmtree(measuring)
            measuring.symlink_to(ROOT / "benchmarks")
        try:
            for _ in range(asked.times):
                for name, home in homes.items():
                    rows.setdefault(name, []).append(child("selector", asked, home))
                count = int(rows["the selector"][-1]["rounds"])
                rows["the passes alone"].append(child("passes", asked, ROOT, count))
        finally:
            if asked.before:
                subprocess.run([*git, "remove", "--force", homes["the selector before"]], check=True)
    tokens = sum(attended(batch) for batch in prompts(asked.prompts))
    print(
        f"{statement()}\n\nQwen3-0.6B shape with {asked.layers} layers and a vocabulary of {asked.vocabulary:,}, "
        f"bfloat16; {asked.prompts} prompts of {tokens} tokens; {count} rounds; the least of "
        f"{asked.times} runs each, in turn\n\n"
        f"{table(rows)}"
    )


if __name__ == "__main__":
    main()
