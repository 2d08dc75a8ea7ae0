"""Where the time goes on the device: launches, copies, waits and kernels of a rollback and of D."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.scores import answered
from benchmarks.gpu.shapes import QWEN3_4B, TINY, model, some_neurons
from surgery import DamageSelector, Trajectory, activation, damage, rollback

NAME = "Where the time goes"
ROLLBACK = "rollback of 2 % of the neurons"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")


def run(device: torch.device, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Profiles of a rollback, its undo, A, and D of units and of single weights, on few prompts."""
    shape = TINY if rehearse else QWEN3_4B
    earlier, later = model(shape, device, seed=0), model(shape, device, seed=1)
    mask = some_neurons(later, 0.02)
    data = answered(shape, device, count=4, tokens=16 if rehearse else 512, answer=8 if rehearse else 64)
    weights = DamageSelector(4e-5, units="weight")  # what two rounds take
    done, before = [], [parameter.clone() for parameter in later.parameters()]
    profiles: dict[str, dict[str, Any]] = {}
    checks: dict[str, bool] = {}
    found = {"profiles": profiles, "checks": checks}

    def there() -> None:
        done.append(rollback(later, to=earlier, mask=mask))

    def back() -> None:
        done.pop().undo()

    profiles[ROLLBACK] = profiled(there, device, back)
    if device.type == "cuda":
        checks["a rollback is at most 12 kernels"] = 1 <= profiles[ROLLBACK]["kernels"] <= 12
    yield found
    there()
    profiles["its undo"] = profiled(back, device, there)
    back()
    checks["the model is bit for bit as it was"] = all(map(torch.equal, before, later.parameters()))
    yield found
    profiles["A"] = profiled(lambda: activation(later, data), device)
    yield found

    def anew() -> Trajectory:  # it remembers what was measured with it
        return Trajectory(earlier=earlier, later=later)

    profiles["D of units, and the earlier model's answers"] = profiled(lambda: damage(anew(), data), device)
    yield found
    name = "D of single weights, 2 rounds, and the earlier model's answers"
    profiles[name] = profiled(lambda: weights.select(anew(), data), device)
    yield found


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
    nothing, seen = (events(work, wait, gpu) for work in (lambda: None, function))
    again()
    home = "CUDA" if gpu else "CPU"
    here = [event for event in seen if event.device_type.name == home]
    busy = {event.key: (event.self_device_time_total if gpu else event.self_cpu_time_total) / 1e3 for event in here}
    moved = {event.key: event.count for event in seen if event.key.startswith("Memcpy")}
    kernels = sum(event.count for event in here if not event.key.startswith(("Memcpy", "Memset")))
    return {
        "wall": wall,
        "busy": sum(busy.values()),
        "kernels": kernels if gpu else 0,
        "copies": {key: moved[key] for key in sorted(moved)},
        "waits": waits(seen) - waits(nothing),
        "most": sorted(busy.items(), key=lambda item: -item[1])[:6],
    }


def events(work: Callable[[], object], wait: Callable[[], object], gpu: bool) -> list[Any]:
    """What a call did, by name."""
    with profile(activities=[ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if gpu else [])]) as seen:
        work()
        wait()
    return list(seen.key_averages())


def waits(seen: list[Any]) -> int:
    """How often the CPU waited for the device; the profiler itself waits, too."""
    return sum(event.count for event in seen if event.key in WAITS)


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
