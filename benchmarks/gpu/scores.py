"""What choosing costs on the device: A, D of units and D of single weights, each beside its bare passes.

A bare pass is the same forward (and backward) pass over the same prompts, with every gradient dropped as it comes.
"""

from __future__ import annotations

import gc
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.shapes import QWEN3_4B, TINY, Shape, model, prompts
from surgery import Trajectory, activation, damage
from surgery.devices import by_kernel
from surgery.live import distillation
from surgery.live.hooks import only_these
from surgery.live.losses import Loss, mean_loss, summed
from surgery.live.prompts import IGNORED, Batch, halved, on_cpu, passes
from surgery.scores import entry_gains, lots
from surgery.scores.weights import best
from surgery.selectors import rounds

NAME = "What choosing costs"
UNITS = ("mlp", "kv_group")
ROUNDS = 2
FEW = 2  # batches on which copies are counted
TARGETS = {"D of units": 1.3, "D of single weights": 1.5}


def run(device: torch.device, rehearse: bool) -> Iterator[dict[str, Any]]:
    """Times, memory and copies of each score and of its passes; whether the device chooses what all gains choose."""
    shape, count, tokens, answer = (TINY, 16, 24, 8) if rehearse else (QWEN3_4B, 64, 512, 64)
    found: dict[str, Any] = {"prompts": count, "tokens": tokens, "answer": answer, "rows": {}}
    found["checks"] = same_choice(device)
    yield found
    with by_kernel(True) if rehearse else nullcontext():
        earlier, later = pair(shape, device, torch.bfloat16)
        data = answered(shape, device, count, tokens, answer)
        with tempfile.TemporaryDirectory() as place:
            earlier.save_pretrained(place)
            for one in rows(earlier, later, place, data, device):
                found["rows"] |= one
                yield found


def pair(shape: Shape, device: torch.device, dtype: torch.dtype) -> tuple[nn.Module, nn.Module]:
    """Two models, the second one a small step from the first."""
    earlier, later = (model(shape, device, seed=0).to(dtype) for _ in range(2))
    with torch.no_grad():
        for parameter in later.parameters():
            parameter.mul_(1 + 0.02 * torch.randn(parameter.shape[:1] + (1,) * (parameter.ndim - 1), device=device))
    return earlier, later


def answered(shape: Shape, device: torch.device, count: int, tokens: int, answer: int) -> list[Batch]:
    """Prompts of random tokens, the last of which are the answer, in batches as a pass takes them."""
    found = on_cpu(prompts(shape, device, count, tokens))
    for batch in found:
        batch["labels"] = batch["labels"].clone()
        batch["labels"][:, :-answer] = IGNORED
    return passes(found)[0]


Work = Callable[[], object]


def rows(
    earlier: nn.Module, later: nn.Module, place: str, data: list[Batch], device: torch.device
) -> Iterator[dict[str, dict[str, Any]]]:
    """Each score and its passes; copies are counted on two batches, since a profile of all takes minutes to read."""
    whole, little = (workload(earlier, later, place, some) for some in (data, data[:FEW]))
    for (bare, scores), (few, counted) in zip(whole, little, strict=True):
        passes_alone = measured(bare, few, "bare", device)
        for name, score in scores.items():
            yield {name: passes_alone | measured(score, counted[name], "score", device)}


def workload(earlier: nn.Module, later: nn.Module, place: str, data: list[Batch]) -> list[tuple[Work, dict[str, Work]]]:
    """Passes, and the scores that make them, on some prompts; the earlier model is also in a folder."""
    trajectory, on_disk = Trajectory(earlier=earlier, later=later), Trajectory(earlier=place, later=later)
    far = distillation(earlier, data, divergence="hellinger")
    held = {slot.tensor for one in trajectory.live(units=UNITS) for b in one.layout.blocks for slot in b.slots}
    drop: dict[nn.Parameter, Callable[[Tensor], None]] = {
        p: lambda _: None for name, p in later.named_parameters() if name in held
    }
    path = rounds._path(trajectory, data, loss="hellinger", rounds=rounds.ROUNDS, units=UNITS)
    lot = [path._drawn(at) for at in range(ROUNDS)]

    def chosen() -> None:  # anew: a path that was gone is not measured again
        fresh = replace(path, taken=path.taken[:0], ends=[], ended=False, begin=None, losses={})
        fresh.to(fresh._end(ROUNDS), stop=False)

    def its_passes() -> None:
        mean_loss(path.loss, later, path.held)
        for at in range(ROUNDS):
            for some in lot[at]:
                backward(later, path.loss, some, drop)
        mean_loss(path.loss, later, path.held)

    def by_operations(score: Work) -> None:
        with by_kernel(False):
            score()

    of_units = partial(damage, trajectory, data, loss=far, units=UNITS)
    units: dict[str, Work] = {
        "D of units": of_units,
        "D of units, by torch's operations": partial(by_operations, of_units),
        # its weights cross the bus once, where there is room
        "D of units, earlier in a folder": partial(damage, on_disk, data, loss=far, units=UNITS),
    }
    weights: dict[str, Work] = {
        "D of single weights": chosen,
        "D of single weights, by torch's operations": partial(by_operations, chosen),
    }
    return [
        (partial(backward, later, far, data, drop), units),
        (its_passes, weights),
        (partial(forward, later, data), {"A": partial(activation, later, data, units=UNITS)}),
    ]


def backward(
    later: nn.Module, loss: Loss, data: list[Batch], drop: dict[nn.Parameter, Callable[[Tensor], None]]
) -> None:
    """Forward and backward passes alone."""
    with only_these(drop, later):
        for batch in data:
            summed(loss, later, batch).backward()


def forward(later: Any, data: list[Batch]) -> None:
    """Forward passes alone, up to the head, as A makes them."""
    with torch.inference_mode():
        for batch in data:
            later.base_model(
                input_ids=batch["input_ids"].to(later.device),
                attention_mask=batch["attention_mask"].to(later.device),
                use_cache=False,
            )


def measured(function: Work, few: Work, name: str, device: torch.device) -> dict[str, Any]:
    """Milliseconds and peak megabytes (the least of two, after one that warms up); copies to the CPU on few prompts."""
    function()
    took, most, before = min(timed(function, device) for _ in range(2))
    return {
        f"{name} ms": took, f"{name} MB": most, "weights MB": before, f"{name} copies": copies(few, device),
    }  # fmt: skip


def timed(function: Work, device: torch.device) -> tuple[float, float, float]:
    """Milliseconds from before the first kernel until after the last; the most MB beyond what was there, and that."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start), 0.0, 0.0
    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    there = torch.cuda.memory_allocated()
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    first.record()
    function()
    last.record()
    torch.cuda.synchronize()
    most = torch.cuda.max_memory_allocated() - there
    return float(first.elapsed_time(last)), most / 1e6, there / 1e6


def copies(function: Work, device: torch.device) -> int:
    """How many times something was copied to the CPU."""
    if device.type != "cuda":
        return 0
    with profile(activities=[ProfilerActivity.CUDA]) as seen:
        function()
        torch.cuda.synchronize()
    return sum(event.count for event in seen.key_averages() if "Memcpy DtoH" in event.key)


def same_choice(device: torch.device) -> dict[str, bool]:
    """On a small model: the best weights are those of all gains there, and D is the CPU's."""
    here, there = (Trajectory(None, *pair(TINY, where, torch.float32)) for where in (device, torch.device("cpu")))
    for mine, its in ((here.earlier, there.earlier), (here.later, there.later)):
        assert isinstance(mine, nn.Module)
        assert isinstance(its, nn.Module)
        its.load_state_dict({name: one.cpu() for name, one in mine.state_dict().items()})
    assert isinstance(here.earlier, nn.Module)
    data = answered(TINY, device, 16, 24, 8)
    half = [halved(data, 0), halved(data, 1)]
    far = distillation(here.earlier, half[0] + half[1], divergence="hellinger")
    checks = {}
    with by_kernel(True):
        for count in (1, 100, 5000):
            found = lots.best_of_lots(
                here, half, count, loss=far, units=UNITS, without=torch.zeros(0, dtype=torch.int64)
            )
            lowest = torch.stack([entry_gains(here, one, loss=far, units=UNITS).flat for one in half]).amin(0)
            checks[f"the best {count} single weights are those of all gains"] = found.chosen.equal(best(lowest, count))
        one = damage(here, data, units=UNITS)
    with by_kernel(False):
        own, other = (damage(run, data, units=UNITS) for run in (here, there))
    near = [torch.allclose(one[k], other[k], rtol=1e-2, atol=1e-2 * float(other[k].abs().max())) for k in one]
    same = [torch.allclose(one[k], own[k], rtol=1e-4, atol=1e-5 * float(own[k].abs().max())) for k in one]
    return checks | {"D of units is the CPU's": all(near), "D by the kernel is D by torch's operations": all(same)}


def table(found: dict[str, Any]) -> str:
    """Each score beside its passes, with the target where there is one."""
    lines = [
        f"{found['prompts']} prompts of {found['tokens']} tokens, the last {found['answer']} of each predicted; "
        f"{ROUNDS} rounds of single weights. Memory: the peak beyond both models. Copies: on {FEW} batches.",
        "",
        "| | ms | its passes, ms | ratio | target | MB | its passes, MB | with the weights, ratio (target 1.2) "
        "| copies to the CPU, few prompts | its passes' |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for name, one in found["rows"].items():
        target = TARGETS.get(name, "")
        whole = (one["weights MB"] + one["score MB"]) / max(1.0, one["weights MB"] + one["bare MB"])
        times = f"{one['score ms']:.1f} | {one['bare ms']:.1f} | {one['score ms'] / one['bare ms']:.2f} | {target}"
        memory = f"{one['score MB']:,.0f} | {one['bare MB']:,.0f} | {whole:.2f}"
        lines.append(f"| {name} | {times} | {memory} | {one['score copies']} | {one['bare copies']} |")
    return "\n".join(lines)
