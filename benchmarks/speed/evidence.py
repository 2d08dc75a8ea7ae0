"""What the structural evidence costs, beside reading the files: ``python -m benchmarks.speed.evidence``.

Three checkpoints of a Qwen3-0.6B shape (random weights, bfloat16; ``--layers`` shrinks them) are made in a temporary
folder: two stages, three comparisons. Every analysis is a process of its own; CPU seconds are of user and system
together, after the imports; memory is the peak of anonymous memory above what the imports took. "One subtraction" is
the least arithmetic that a norm of every change needs: the checkpoints in float32, each difference and its norm, chunk
by chunk. "The fewest passes" are what exact histograms need besides: the ratio, the exponent of the difference and that
of the ratio, and counting both at once; what is frozen is left after its norm, and no threshold, zero or group counts.
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

def fewest():
    held, wide = [Checkpoint(folder) for folder in stages.values()], torch.empty(3, 1 << 18)
    size, step, ratio = torch.empty(3, 1 << 18)
    for name in held[0]:
        flat = [one[name].reshape(-1) for one in held]
        for at in range(0, len(flat[0]), 1 << 18):
            count = min(1 << 18, len(flat[0]) - at)
            some = [room[:count].copy_(one[at : at + count]) for room, one in zip(wide, flat)]
            for i, j in ((0, 1), (0, 2), (1, 2)):
                if (i, j) != (0, 2):  # a reference's sizes; what is 0 has no ratio
                    before = torch.abs(some[i], out=size[:count]).clamp_min_(1e-30)
                delta = torch.sub(some[j], some[i], out=step[:count]).abs_()
                if float(torch.dot(delta, delta)) == 0:
                    continue
                far = torch.div(delta, before, out=ratio[:count])
                one, other = (x.view(torch.int32).bitwise_right_shift_(23) for x in (delta, far))
                torch.bincount(other.add_(one, alpha=256), minlength=1 << 16)

def one_of_all():
    changes(run)

def shared():
    overlap({name: magnitude(step) for name, step in run.steps().items()}, 0.1)

def directional():
    directions(run)

def anonymous():
    return int(next(l for l in open("/proc/self/status") if l.startswith("RssAnon")).split()[1]) / 1024

work = {
    "read": reading, "subtract": subtraction, "fewest": fewest,
    "changes": one_of_all, "overlap": shared, "directions": directional,
}
work = work[sys.argv[2]]
run.weights("later")  # what is imported late, and the layout
start, peak, done = anonymous(), [0.0], threading.Event()

def watch():
    while not done.wait(0.02):
        peak[0] = max(peak[0], anonymous())

threading.Thread(target=watch, daemon=True).start()
least = [1e9, 1e9]
for _ in range(3):  # in turn, since other work on the machine slows both
    for at, do in enumerate((reading, work)):
        used = time.process_time()
        do()
        least[at] = min(least[at], time.process_time() - used)
done.set()
print(*least, max(peak[0] - start, 0))
"""


def child(folder: Path, what: str) -> list[float]:
    """CPU seconds of reading and of one analysis, and its megabytes."""
    command = (sys.executable, "-c", CHILD, str(folder), what)
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return [float(one) for one in printed[-3:]]


def main() -> None:
    """Make the checkpoints, run everything, print one table."""
    with made(__doc__) as (folder, about):
        found = {
            what: child(folder, what) for what in ("read", "subtract", "fewest", "changes", "overlap", "directions")
        }
    print(about)
    print("| | CPU s | × reading the files | × one subtraction | MB of anonymous memory |\n|---|---|---|---|---|")
    words = {
        "read": "reading the three files (page cache)",
        "subtract": "one subtraction and norm per comparison",
        "fewest": "the fewest passes that exact histograms need",
        "changes": "`changes`, three comparisons of every parameter",
        "overlap": "`overlap` of `magnitude`, two stages",
        "directions": "`directions`, one pair of stages, 1000 permutations",
    }
    plain = found["subtract"][1]
    for what, label in words.items():
        least, seconds, megabytes = found[what]
        print(f"| {label} | {seconds:.2f} | {seconds / least:.1f} | {seconds / plain:.1f} | {megabytes:.0f} |")


if __name__ == "__main__":
    main()
