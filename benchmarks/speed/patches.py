"""How large a patch is and what it takes, beside the whole folder: ``python -m benchmarks.speed.patches``.

Checkpoints of a Qwen3-0.6B shape (random weights, bfloat16, one file) are made; ``--layers`` shrinks them. Every weight
of the layers differs, so nothing is left out of the patch. Ratios are of one run.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.speed.checkpoints import made
from surgery import Neurons, Patch, Trajectory, rollback, rolled_back, save, save_patch
from surgery.layout import find_layout
from surgery.reverting.patch import size_of

RESULT = Path("benchmarks/results/patch-speed.md")


def timed(function: Callable[[], Any]) -> float:
    """Seconds."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def mask_of(layout: Any, share: float) -> Neurons:
    """Neurons at random."""
    draw = torch.Generator().manual_seed(0)
    return Neurons({name: torch.rand(size, generator=draw) < share for name, size in layout.sizes.items()})


def main() -> None:
    """Measure, print and write the table."""
    torch.set_num_threads(1)
    with made(__doc__) as (folder, about):
        run = Trajectory(earlier=folder / "earlier", later=folder / "later")
        model = run.load()
        layout = find_layout(model)
        view = rolled_back(run.later, to=run.earlier, mask=mask_of(layout, 0.02))
        save(view, folder / "warm")
        whole, size = timed(lambda: save(view, folder / "healed")), size_of(folder / "later")
        rows = [("the whole folder, written by `save`", size, whole)]
        for name, settings in {
            "a patch (surgery), written": {},
            "a patch (slime, xor), written": {"format": "slime"},
            "a patch (slime, overwrite), written": {"format": "slime", "encoding": "overwrite"},
            "a patch (vllm), written": {"format": "vllm"},
        }.items():
            place = folder / name
            took = timed(lambda place=place, settings=settings: save_patch(view, place, **settings))
            rows.append((name, size_of(place), took))
        patch = Patch(folder / "a patch (surgery), written")
        held: list[Any] = []
        rows.append(("the patch, verified on a folder", None, timed(lambda: held.append(patch.applied(run.later)))))
        rows.append(("what it makes, written by `save`", size, timed(lambda: save(held[0], folder / "patched"))))
        live: list[Any] = []
        rows.append(("the patch, applied to a live model", None, timed(lambda: live.append(patch.apply(model)))))
        rows.append(("undone", None, timed(live[0].undo)))
        rows.append(
            ("a live rollback", None, timed(lambda: live.append(rollback(model, to=run.earlier, mask=view.mask))))
        )
        same = (folder / "patched/model.safetensors").read_bytes() == (folder / "healed/model.safetensors").read_bytes()
    command = " ".join(["python -m benchmarks.speed.patches", *sys.argv[1:]])
    text = f"""# Patches, beside the whole folder

`{command}`, one run. The ratios are to the first row, of the same run; the machine did other work too.

{about}
2 % of the neurons, {view.parameters:,} numbers. The patched folder's weights equal the rolled-back one's: {same}.

| | bytes | of the folder | seconds | beside writing the folder |
|---|---|---|---|---|
"""
    for name, count, seconds in rows:
        share = "" if count is None else f"{count / size:.2%}"
        text += (
            f"| {name} | {'' if count is None else f'{count:,}'} | {share} | {seconds:.2f} | {seconds / whole:.2f} |\n"
        )
    RESULT.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
