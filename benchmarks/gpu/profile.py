"""Where the time goes on the device: launches, copies, waits and kernels of a rollback and of D."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.shapes import QWEN3_4B, TINY, model, prompts, some_neurons
from surgery import DamageSelector, Trajectory, activation, damage, rollback

NAME = "Where the time goes"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(device: torch.device, rehearse: bool) -> dict[str, Any]:
    """Profiles of a rollback, its undo, A, and D of units and of single weights."""
    shape = TINY if rehearse else QWEN3_4B
    earlier, later = model(shape, device, seed=0), model(shape, device, seed=1)
    mask = some_neurons(later, 0.02)
    trajectory = Trajectory(earlier=earlier, later=later)
    data = prompts(shape, device, count=4 if rehearse else 16, tokens=16 if rehearse else 512)
    weights = DamageSelector(1e-4, units="weight", rounds=2)
    done, before = [], [parameter.clone() for parameter in later.parameters()]
    found = {
        "rollback of 2 % of the neurons": profiled(
            lambda: done.append(rollback(later, to=earlier, mask=mask)), device, lambda: done.pop().undo()
        )
    }
    done.append(rollback(later, to=earlier, mask=mask))
    found["its undo"] = profiled(
        lambda: done.pop().undo(), device, lambda: done.append(rollback(later, to=earlier, mask=mask))
    )
    done.pop().undo()
    found["A"] = profiled(lambda: activation(later, data), device)
    found["D of units"] = profiled(lambda: damage(trajectory, data), device)
    found["D of single weights, 2 rounds"] = profiled(lambda: weights.select(trajectory, data), device)
    few = found["rollback of 2 % of the neurons"]
    unchanged = all(map(torch.equal, before, later.parameters()))
    checks = {"the model is bit for bit as it was": unchanged}
    if device.type == "cuda":
        checks["a rollback is at most 12 kernels"] = few["kernels"] <= 12
    return {"profiles": found, "checks": checks}


def profiled(
    function: Callable[[], object], device: torch.device, again: Callable[[], object] = lambda: None
) -> dict[str, Any]:
    """What one call does, once it is warm: ``again`` makes it possible to call it once more."""
    function()
    again()
    gpu = device.type == "cuda"
    wait = torch.cuda.synchronize if gpu else lambda: None
    wait()
    start = time.perf_counter()
    function()
    wait()
    wall = 1e3 * (time.perf_counter() - start)
    again()
    wait()
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        function()
        wait()
    again()
    events = [event for event in seen.key_averages() if event.device_type.name == ("CUDA" if gpu else "CPU")]
    busy = {event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3 for event in events}
    counts = {event.key: event.count for event in seen.key_averages()}
    moved = {key: count for key, count in counts.items() if key.startswith("Memcpy")}
    kernels = sum(event.count for event in events if not event.key.startswith(("Memcpy", "Memset")))
    return {
        "wall": wall,
        "busy": sum(busy.values()),
        "kernels": kernels if gpu else 0,
        "copies": {key: moved[key] for key in sorted(moved)},
        "waits": sum(counts.get(name, 0) for name in WAITS),
        "most": sorted(busy.items(), key=lambda item: -item[1])[:6],
    }


def table(found: dict[str, Any]) -> str:
    """What each did, and its longest kernels."""
    lines = [
        "| what | wall, ms | device busy, ms | kernels | copies | waits |",
        "|---|---|---|---|---|---|",
    ]
    for name, one in found["profiles"].items():
        copies = ", ".join(f"{count} {key.removeprefix('Memcpy ')}" for key, count in one["copies"].items()) or "0"
        lines.append(
            f"| {name} | {one['wall']:.2f} | {one['busy']:.2f} | {one['kernels']} | {copies} | {one['waits']} |"
        )
    lines += ["", "The longest on the device, in ms:", ""]
    for name, one in found["profiles"].items():
        listed = "; ".join(f"`{key[:60]}` {value:.2f}" for key, value in one["most"])
        lines.append(f"- {name}: {listed}")
    return "\n".join(lines)
