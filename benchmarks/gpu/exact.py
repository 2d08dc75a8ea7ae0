"""On the device the same as on the CPU: the tests that care, and the small lab's repair on both."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from surgery import AMCSelector, DamageSelector, Trajectory, load_prompts, repair, rollback
from surgery.masks import Mask
from surgery.measure.repair import Repair

NAME = "The same bits and verdicts as on the CPU"
LAB = Path("benchmarks/lab/seed0")
TESTS = ("tests/test_gpu.py", "tests/test_exchange.py")
TIME = 70  # seconds that the tests may take on a GPU
UNITS = ("mlp", "value_channel")
SELECTORS = {
    "A×M×C, 4 % of neurons": AMCSelector(0.04),
    "D, 4 % of units": DamageSelector(0.04, units=UNITS),
    "D, 0.2 % of single weights": DamageSelector(0.002, units="weight"),
}


def run(device: torch.device, rehearse: bool) -> Iterator[dict[str, Any]]:
    """What the tests say there, and the small lab's masks, rollbacks and repair beside the CPU's."""
    passed, last = tests("qwen3 and not moe" if rehearse else "")
    checks, rows = {"the tests pass": passed}, [["tests", last, ""]]
    found = {"rows": rows, "checks": checks}
    yield found
    lab = Trajectory(LAB / "code", LAB / "math", LAB / "qa")
    math = load_prompts(LAB / "data/math.calibration.jsonl", lab.later)
    qa = load_prompts(LAB / "data/qa.calibration.jsonl", lab.later)
    here, there = loaded(torch.device("cpu")), loaded(device)
    for name, selector in SELECTORS.items():
        ours, theirs = selector.select(here, math), selector.select(there, math)
        shared = common(ours, theirs)
        checks[f"{name}: at least 98 % of the choice is the CPU's"] = shared >= 0.98
        before = bits(there.load())
        bits_are = {
            "rollback": same(reverted(here, ours), reverted(there, ours)),
            "undo": same(before, bits(there.load())),
        }
        checks |= {f"{name}: the same bits after {step}": held for step, held in bits_are.items()}
        told = (f"{step}: {'the same' if held else 'OTHER'} bits" for step, held in bits_are.items())
        rows.append([name, f"{100 * shared:.2f} % of the choice is the CPU's", "; ".join(told)])
        yield found
    verdicts = []
    for where, run in (("CPU", here), (str(device), there)):
        start = time.perf_counter()
        done = repair(run, math, keep={"qa": qa})
        seconds = time.perf_counter() - start
        share = done.mask.fraction if done.mask is not None else 0.0
        verdicts.append(done)
        rows.append([f"repair on {where}", f"{done.outcome}, {100 * share:.2f} % of the weights", f"{seconds:.1f} s"])
        yield found
    checks["repair comes to the same verdict, and nearly the same mask"] = alike(*verdicts)
    yield found


def alike(one: Repair, other: Repair) -> bool:
    """Whether two repairs came to the same verdict, and to masks of which the smaller is, but for 2 %, in the larger.

    A loss that differs by rounding may be least a round earlier or later.
    """
    if one.mask is None or other.mask is None or one.outcome != other.outcome:
        return one.outcome == other.outcome and one.mask is other.mask
    small, large = sorted((one.mask, other.mask), key=lambda mask: mask.fraction)
    return common(small, large) >= 0.98 and small.fraction >= large.fraction / 2


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = ["| what | found | |", "|---|---|---|", *(f"| {' | '.join(row)} |" for row in found["rows"])]
    return "\n".join(lines)


def tests(some: str) -> tuple[bool, str]:
    """Whether the tests pass in a process of their own, and its last line."""
    files = [one for one in TESTS if Path(one).exists()]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, *(["-k", some] if some else [])]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    try:
        child = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=None if some else TIME)
    except subprocess.TimeoutExpired as late:
        last = (late.stdout or b"").decode().strip().splitlines()[-1:]
        return False, f"stopped after {TIME} s: {''.join(last)}"
    lines = child.stdout.strip().splitlines() or [child.stderr.strip()[-300:]]
    print("\n".join(lines[-40:] if child.returncode else lines[-1:]), flush=True)
    return child.returncode == 0, lines[-1].strip("= ")


def loaded(device: torch.device) -> Trajectory:
    """The small lab's stages with the later model there, in float32."""
    run = Trajectory(LAB / "code", LAB / "math", LAB / "qa")
    run.load(device=device, dtype=torch.float32)
    return run


def common(a: Mask, b: Mask) -> float:
    """The share of a choice that another has too."""
    return sum((a & b).count().values()) / max(1, sum(a.count().values()))


def reverted(run: Trajectory, mask: Mask) -> dict[str, Tensor]:
    """The model's bits while the mask is reverted."""
    with rollback(run.load(), to=run.tensors("earlier"), mask=mask):
        return bits(run.load())


def bits(model: nn.Module) -> dict[str, Tensor]:
    """A copy of all parameters, on the CPU."""
    return {name: parameter.detach().cpu().clone() for name, parameter in model.named_parameters()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    """Whether all of them are equal."""
    return all(torch.equal(a[name], b[name]) for name in a)
