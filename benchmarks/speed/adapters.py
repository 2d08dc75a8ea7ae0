"""Rolling back an adapter as an adapter, beside merging both stages and rolling back the merged folder.

python -m benchmarks.speed.adapters [--layers LAYERS]
"""

from __future__ import annotations

import os
import shutil
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from benchmarks.speed.checkpoints import made
from surgery import Checkpoint, RandomSelector, Trajectory, rolled_back, save

RESULTS = Path(__file__).parents[1] / "results" / "adapters-speed.md"
ROUNDS, RANK = 3, 8


def seconds(work: Callable[[], object], out: Path) -> tuple[float, float, int]:
    """CPU and wall seconds, of the round that took the least CPU, and the bytes that are written."""
    found = []
    for _ in range(ROUNDS):
        shutil.rmtree(out, ignore_errors=True)
        wall, used = time.perf_counter(), sum(os.times()[:2])
        work()
        found.append((sum(os.times()[:2]) - used, time.perf_counter() - wall))
    size = sum(path.stat().st_size for path in out.rglob("*") if path.is_file())
    return *min(found), size


def train(base: Path, out: Path, seed: int) -> None:
    """An adapter of all linear layers with random matrices, as if it had been trained."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_pretrained(base)
    settings = LoraConfig(r=RANK, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    get_peft_model(model, settings).save_pretrained(out)


def merge(base: Path, adapter: Path, out: Path) -> None:
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter).merge_and_unload().save_pretrained(
        out
    )


def main() -> None:
    with made(__doc__) as (folder, about):
        base, one, two = folder / "base", folder / "one", folder / "two"
        for seed, place in enumerate((one, two)):
            train(base, place, seed)
        out, merged = folder / "out", [folder / f"{place.name}-merged" for place in (one, two)]
        for place, there in zip((one, two), merged, strict=True):
            merge(base, place, there)
        mask = RandomSelector(0.02).select(Trajectory(earlier=merged[0], later=merged[1]))

        def heal(later: Path | Checkpoint, to: Path | Checkpoint) -> None:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                save(rolled_back(later, to=to, mask=mask), out)

        rows = {
            "the adapter back to its base": seconds(lambda: heal(Checkpoint(two, base), Checkpoint(base)), out),
            "the adapter back to another adapter": seconds(
                lambda: heal(Checkpoint(two, base), Checkpoint(one, base)), out
            ),
            "merging one adapter (peft)": seconds(lambda: merge(base, two, out), out),
            "the merged folder back to the other merged folder": seconds(lambda: heal(merged[1], merged[0]), out),
        }
    least = rows["the adapter back to its base"]
    table = "\n".join(
        f"| {what} | {cpu:.2f} | {wall:.2f} | {cpu / least[0]:.1f} | {size / 1e6:,.1f} |"
        for what, (cpu, wall, size) in rows.items()
    )
    text = f"""# Rolling back an adapter

Made by `python -m benchmarks.speed.adapters`. {about}
Two adapters of rank {RANK} on all linear layers, random; 2 % of the neurons at random. Of {ROUNDS} rounds the one of
least CPU. Without the form of an adapter, both stages are merged first, and the merged folder is rolled back.

| | CPU s | wall s | CPU, of the first row | MB written |
|---|---:|---:|---:|---:|
{table}
"""
    RESULTS.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
