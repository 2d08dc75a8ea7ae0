"""``make demo``: the command line repairs the lab's Math, which QA training cost, and shows what came back.

Everything that it prints is computed here from the checkpoints in ``benchmarks/lab/seed0``; it types the commands that
a user would type, all in one process, since for a model this small most of a command's time is importing torch.
"""

from __future__ import annotations

import os
import runpy
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LAB = Path("benchmarks/lab/seed0")
OUT = Path("demo-output")


def score(model: Any) -> dict[str, float]:
    """The lab's evaluation as ``surgery sweep --evaluate`` wants it: the probability of the right answer per domain."""
    from transformers import AutoTokenizer

    from benchmarks.lab.evaluate import evaluator

    return evaluator(ROOT / LAB / "data", AutoTokenizer.from_pretrained(ROOT / LAB / "qa"))(model)


def shell(command: str) -> None:
    """Print a command and run it."""
    print(f"\n$ {command}", flush=True)
    sys.argv = shlex.split(command.removeprefix("python -m "))
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
    except SystemExit as end:
        if end.code:
            raise
    sys.stdout.flush()


def main() -> None:
    """Repair; then the same by hand, selectors beside each other, a picture, and the page about all stages."""
    os.chdir(ROOT)
    os.environ["TRANSFORMERS_VERBOSITY"] = "error"
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    three = f"{LAB}/code {LAB}/math {LAB}/qa"
    data = f"--data {LAB}/data/math.calibration.jsonl"
    print("Three checkpoints of one model in training order: code, math, qa. Training on QA cost some of its Math.")
    print("The main job: measure the loss, find the smallest rollback that repairs it, and spare QA.")
    shell(f"surgery repair {LAB}/math {LAB}/qa {data} --keep qa={LAB}/data/qa.calibration.jsonl -o {OUT}/qa-repaired")
    print("\nThe same by hand, with whole neurons and value channels: choose some, then roll a folder back.")
    shell(f"surgery select {three} {data} --budget 0.02 -o {OUT}/mask.safetensors")
    shell(f"surgery rollback {LAB}/qa --to {LAB}/math --mask {OUT}/mask.safetensors -o {OUT}/qa-rolled-back")
    print("\nWhich selector finds the right units? A score is the mean probability of the right answer, per domain.")
    print("Recovery: the part of Math's loss that is back. Δ: the change of another domain from later; in brackets the")
    print("scores of the references. The ceiling is what all of them give back together.")
    shell(
        f"surgery sweep {three} {data} --evaluate benchmarks.demo:score --metric math "
        f"--units mlp,value_channel --selectors random,AMC,D:kl,D --budgets 0.02,0.08,0.32 -o {OUT}/sweep.jsonl"
    )
    shell(f"python -m benchmarks.draw {OUT}/sweep.jsonl {OUT}/dose-response.png --metric math")
    stages = " ".join(f"{LAB}/{name}" for name in ("base", "code", "math", "qa", "cw"))
    files = " ".join(f"--data {name}={LAB}/data/{name}.calibration.jsonl" for name in ("math", "code", "qa"))
    print("\nNow every stage, up to the last one, cw. The score here is how likely the right answers are, and half of")
    print("the prompts measure what the other half chose, so these numbers differ from those of the table above.")
    shell(f"surgery analyse {stages} {files} --skip terms --budgets 0.02,0.16 -o {OUT}/report")
    print(f"\nThe repaired checkpoint is {OUT}/qa-repaired (mask, provenance and model card beside the weights),")
    print(f"the table's rows are {OUT}/sweep.jsonl, the picture is {OUT}/dose-response.png,")
    print(f"and {OUT}/report/index.html is the page about all five checkpoints.")


if __name__ == "__main__":
    main()
