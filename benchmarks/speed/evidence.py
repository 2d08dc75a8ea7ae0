"""What the structural evidence costs, beside reading the files: ``python -m benchmarks.speed.evidence``.

Three checkpoints of a Qwen3-0.6B shape (random weights, bfloat16; ``--layers`` shrinks them) are made in a temporary
folder: two stages, three comparisons. Every analysis is a process of its own; CPU seconds are of user and system
together, after the imports; memory is the peak of anonymous memory above what the imports took. "One subtraction" is
the least arithmetic that a norm of every change needs: the checkpoints in float32, each difference and its norm, chunk
by chunk.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from benchmarks.speed.checkpoints import made

CHILD = """
import sys, threading, time
import torch
from surgery import Checkpoint, Trajectory, magnitude
from surgery.evidence import changes, directions, overlap

names = ("base", "earlier", "later")
stages = {name: f"{sys.argv[1]}/{name}" for name in names}
run = Trajectory.through(stages)

def reading():
    buffer = bytearray(1 << 24)
    for folder in stages.values():
        with open(f"{folder}/model.safetensors", "rb", buffering=0) as file:
            while file.readinto(buffer):
                pass

def subtraction():
    held, wide, step = [Checkpoint(folder) for folder in stages.values()], torch.empty(3, 1 << 18), torch.empty(1 << 18)
    for name in held[0]:
        flat = [one[name].reshape(-1) for one in held]
        for at in range(0, len(flat[0]), 1 << 18):
            size = min(1 << 18, len(flat[0]) - at)
            some = [room[:size].copy_(one[at : at + size]) for room, one in zip(wide, flat)]
            for i, j in ((0, 1), (0, 2), (1, 2)):
                torch.linalg.vector_norm(torch.sub(some[j], some[i], out=step[:size]))

def one_of_all():
    changes(run)

def shared():
    overlap({name: magnitude(step) for name, step in run.steps().items()}, 0.1)

def directional():
    directions(run)

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

work = {"read": reading, "subtract": subtraction, "changes": one_of_all, "overlap": shared, "directions": directional}
work = work[sys.argv[2]]
run.weights("later")  # what is imported late, and the layout
start, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch, daemon=True).start()
least = 1e9
for _ in range(3):
    used = time.process_time()
    work()
    least = min(least, time.process_time() - used)
done.set()
print(least, max(peak[0] - start, 0))
"""


def child(folder: Path, what: str) -> tuple[float, float]:
    """CPU seconds and megabytes of one analysis."""
    command = (sys.executable, "-c", CHILD, str(folder), what)
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(printed[-2]), float(printed[-1])


def main() -> None:
    """Make the checkpoints, run everything, print one table."""
    with made(__doc__) as (folder, about):
        found = {what: child(folder, what) for what in ("read", "subtract", "changes", "overlap", "directions")}
    print(about)
    print("| | CPU s | × reading the files | × one subtraction | MB of anonymous memory |\n|---|---|---|---|---|")
    words = {
        "read": "reading the three files (page cache)",
        "subtract": "one subtraction and norm per comparison",
        "changes": "`changes`, three comparisons of every parameter",
        "overlap": "`overlap` of `magnitude`, two stages",
        "directions": "`directions`, one pair of stages, 1000 permutations",
    }
    least, plain = found["read"][0], found["subtract"][0]
    for what, label in words.items():
        seconds, megabytes = found[what]
        print(f"| {label} | {seconds:.2f} | {seconds / least:.1f} | {seconds / plain:.1f} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
