"""Rolling back rank files of FSDP, beside copying them and beside the same rollback of a plain folder.

python -m benchmarks.speed.training_checkpoints [--layers LAYERS]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import time
import warnings
from collections.abc import Callable
from pathlib import Path

from benchmarks.speed.checkpoints import made
from surgery import AMCSelector, Trajectory, rolled_back, save
from tests.training_folders import as_ranks

RESULTS = Path(__file__).parents[1] / "results" / "training-checkpoints.md"
WORLD, ROUNDS = 4, 3


def cpu() -> float:
    return sum(os.times()[:4])  # of the children, too


def seconds(work: Callable[[], object], clear: Callable[[], object]) -> tuple[float, float]:
    """Wall and CPU seconds, the fastest of some rounds."""
    found = []
    for _ in range(ROUNDS):
        clear()
        wall, used = time.perf_counter(), cpu()
        work()
        found.append((time.perf_counter() - wall, cpu() - used))
    return min(found)


def main() -> None:
    with made(__doc__) as (folder, about):
        for stage in ("earlier", "later"):
            as_ranks(folder / stage, folder / f"{stage}-ranks", WORLD)
        run = Trajectory(earlier=folder / "earlier", later=folder / "later")
        mask = AMCSelector(0.02, "M", "M").select(run)
        out = folder / "out"

        def clear() -> None:
            shutil.rmtree(out, ignore_errors=True)

        def heal(kind: str, reset: bool = False) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                view = rolled_back(folder / f"later{kind}", to=folder / f"earlier{kind}", mask=mask)
                save(view, out, reset_optimizer=reset)

        rows = {
            "`cp -r` of the plain folder": seconds(
                lambda: subprocess.run(["cp", "-r", folder / "later", out], check=True), clear
            ),
            "rollback of the plain folder": seconds(lambda: heal(""), clear),
            "`cp -r` of the rank files": seconds(
                lambda: subprocess.run(["cp", "-r", folder / "later-ranks", out], check=True), clear
            ),
            "rollback of the rank files": seconds(lambda: heal("-ranks"), clear),
            "the same, and the optimizer's moments": seconds(lambda: heal("-ranks", reset=True), clear),
        }
        sizes = [
            sum(path.stat().st_size for path in (folder / one).rglob("*")) / 1e9 for one in ("later", "later-ranks")
        ]
    base = {"plain": rows["`cp -r` of the plain folder"], "rank": rows["`cp -r` of the rank files"]}
    lines = [
        "# Rolling back a training checkpoint",
        f"Made by `python -m benchmarks.speed.training_checkpoints`. {about}",
        f"2 % of the neurons, chosen by M. The plain folder has {sizes[0]:.2f} GB, that of {WORLD} ranks with the "
        f"optimizer's two moments {sizes[1]:.2f} GB. The fastest of {ROUNDS} rounds; files are in the page cache.",
        "| | wall s | CPU s | CPU, of copying the same folder |\n|---|---:|---:|---:|\n"
        + "\n".join(
            f"| {what} | {wall:.2f} | {used:.2f} | {used / base['plain' if 'plain' in what else 'rank'][1]:.2f} |"
            for what, (wall, used) in rows.items()
        ),
    ]
    RESULTS.write_text("\n\n".join(lines) + "\n", encoding="utf-8")
    print(RESULTS.read_text(encoding="utf-8"))


if __name__ == "__main__":
    main()
