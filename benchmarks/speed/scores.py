"""What M and C cost, beside reading the files and the passes that C needs: ``python -m benchmarks.speed.scores``.

Checkpoints of a Qwen3-0.6B shape (random weights, bfloat16, one file) are made; ``--layers`` shrinks them. CPU seconds,
the least of five rounds, in each of which everything is measured in turn.
"""

from __future__ import annotations

import math

import torch

from benchmarks.speed.checkpoints import made
from benchmarks.speed.operations import cpu
from surgery import Checkpoint, Trajectory, conflict, magnitude

CHUNK = 1 << 18  # numbers that lie in the processor's cache together with what is made of them


def main() -> None:
    """Make the checkpoints, run everything, print one table."""
    with made(__doc__) as (folder, about):
        places = [folder / name for name in ("base", "earlier", "later")]
        run, held = Trajectory(*places), [Checkpoint(place) for place in places]
        rooms, room, buffer = torch.empty(3, CHUNK), torch.empty(CHUNK), bytearray(1 << 24)

        def read() -> None:
            for place in places:
                with open(place / "model.safetensors", "rb", buffering=0) as file:
                    while file.readinto(buffer):
                        pass

        def passes() -> None:
            for name in (name for name in held[0] if ".mlp." in name):
                width = held[0][name].shape[1]
                views = [one[name].flatten().split(CHUNK // width * width) for one in held]
                for some in zip(*views, strict=True):
                    base, a, b = (one[: len(x)].copy_(x).view(-1, width) for one, x in zip(rooms, some, strict=True))
                    b -= a
                    a -= base
                    for one in (a, b):
                        torch.linalg.vector_norm(one, dim=1)
                    torch.mul(a, b, out=room[: a.numel()].view(a.shape)).sum(1)

        work = {
            "reading three folders": read,
            "M from two folders": lambda: magnitude(run),
            "C from three folders": lambda: conflict(run),
            "the passes that C needs": passes,
        }
        found = dict.fromkeys(work, math.inf)
        for _ in range(5):  # other work on the machine slows all of them
            found = {what: min(found[what], cpu(do, 1)[0]) for what, do in work.items()}
    print(about)
    print("| | CPU s | × reading three folders |\n|---|---|---|")
    least = found["reading three folders"]
    for what, seconds in found.items():
        print(f"| {what} | {seconds:.3f} | {seconds / least:.2f} |")


if __name__ == "__main__":
    main()
