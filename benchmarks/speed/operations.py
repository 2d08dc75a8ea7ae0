"""What the operations cost, each beside the least that could be done: ``python -m benchmarks.speed.operations``.

Checkpoints of a Qwen3-0.6B shape (random weights, bfloat16, one file) are made; ``--layers`` shrinks them.
CPU seconds are of user and system together; memory is the peak of anonymous memory above the start's.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.speed.checkpoints import made

Result = tuple[str, float, float, str]


def cpu(function: Callable[[], object], times: int = 3) -> tuple[float, float]:
    """The least CPU and wall seconds of some runs."""
    found = []
    for _ in range(times):
        wall, used = time.perf_counter(), time.process_time()
        function()
        found.append((time.process_time() - used, time.perf_counter() - wall))
    return min(c for c, _ in found), min(w for _, w in found)


IMPORTS = (
    "import torch, einops, safetensors, transformers.models.qwen3.modeling_qwen3; transformers.AutoModelForCausalLM"
)
CHILD = """
import sys
IMPORTS
from surgery import Neurons, rolled_back, save
def anonymous():
    return int(next(l for l in open('/proc/self/status') if l.startswith('RssAnon')).split()[1]) / 1024
start = anonymous()
save(rolled_back(sys.argv[1], to=sys.argv[2], mask=Neurons.load(sys.argv[3])), sys.argv[4])
print(anonymous() - start)
""".replace("IMPORTS", IMPORTS)


def child(*command: str | Path) -> tuple[float, str]:
    """CPU seconds of a whole process, and what it printed."""
    before = os.times()
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    after = os.times()
    used = after.children_user + after.children_system - before.children_user - before.children_system
    return used, printed


def folder_to_folder(folder: Path, mask: Path) -> list[Result]:
    """A folder rollback as a whole process, beside ``cp -r`` of the later folder plus a process that only imports."""
    ours, copies, imports, memory = [], [], [], 0.0
    for at in range(3):
        copies.append(child("cp", "-r", folder / "later", folder / f"copy{at}")[0])
        imports.append(child(sys.executable, "-c", IMPORTS)[0])
        paths = (folder / "later", folder / "earlier", mask, folder / f"healed{at}")
        seconds, megabytes = child(sys.executable, "-c", CHILD, *paths)
        ours.append(seconds)
        memory = max(memory, float(megabytes))
        shutil.rmtree(folder / f"copy{at}")
        shutil.rmtree(folder / f"healed{at}")
    note = f"cp alone {min(copies):.2f} s; {memory:.0f} MB anonymous memory above the imports"
    what = "folder → folder, 2 % of neurons (CPU s; beside cp -r plus imports)"
    return [(what, min(ours), min(copies) + min(imports), note)]


def live(folder: Path, mask_file: Path) -> list[Result]:
    """Rollback and undo on a live model (wall ms), and the activation score beside the bare forward pass."""
    from surgery import Neurons, Trajectory, activation, rollback
    from surgery.layout import find_layout

    model = Trajectory(later=folder / "later").load()
    mask, layout = Neurons.load(mask_file), find_layout(model)
    slices = Trajectory(later=folder / "earlier").load()
    done = [rollback(model, to=slices, mask=mask, layout=layout) for _ in range(1)]
    times, undos = [], []
    for _ in range(5):
        start = time.perf_counter()
        done.append(rollback(model, to=slices, mask=mask, layout=layout))
        times.append(time.perf_counter() - start)
        start = time.perf_counter()
        done.pop().undo()
        undos.append(time.perf_counter() - start)
    batch = {"input_ids": torch.randint(1000, (4, 128)), "attention_mask": torch.ones(4, 128, dtype=torch.long)}
    inner = model.model
    with torch.inference_mode():
        bare = cpu(lambda: inner(**batch, use_cache=False), 4)[0]
    heard = cpu(lambda: activation(model, [batch], layout=layout), 4)[0]
    done.pop().undo()
    return [
        ("live rollback from a live model, 2 % (wall ms)", 1e3 * min(times), float("nan"), ""),
        ("live undo of 2 % (wall ms)", 1e3 * min(undos), float("nan"), ""),
        (
            "activation of 512 tokens (CPU s; beside the forward pass)",
            heard,
            bare,
            f"{100 * (heard / bare - 1):+.1f} %",
        ),
    ]


def attribution(folder: Path) -> list[Result]:
    """D, the earlier model's pass included, beside one plain forward and backward pass on the same tokens."""
    from surgery import Trajectory, damage

    earlier, model = (Trajectory(later=folder / name).load() for name in ("earlier", "later"))
    ids = torch.randint(1000, (4, 128))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}
    run = Trajectory(earlier=earlier, later=model)

    def plain() -> None:
        model(**batch, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    ours, least = cpu(lambda: damage(run, [batch]), 3)[0], cpu(plain, 3)[0]
    return [("D of 512 tokens (CPU s; beside one forward and backward pass)", ours, least, "")]


def main() -> None:
    """Make the checkpoints, run everything, print one table."""
    from surgery import RandomSelector, Trajectory

    with made(__doc__) as (folder, about):
        run = Trajectory(earlier=folder / "earlier", later=folder / "later")
        RandomSelector(0.02).select(run).save(folder / "mask.safetensors")
        results = folder_to_folder(folder, folder / "mask.safetensors")
        results += live(folder, folder / "mask.safetensors")
        results += attribution(folder)
    print(about)
    print("| operation | ours | beside | ratio | |\n|---|---|---|---|---|")
    for what, ours, beside, note in results:
        ratio = f"{ours / beside:.2f}" if beside == beside else ""
        print(f"| {what} | {ours:.3f} | {'' if beside != beside else f'{beside:.3f}'} | {ratio} | {note} |")


if __name__ == "__main__":
    main()
