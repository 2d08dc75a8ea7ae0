"""Rollback and undo in place: milliseconds, bytes and sectors, beside what else one could do.

The models are MLPs alone, with random numbers. Times of the device are by CUDA events, with a cold cache: before each,
2 GB are overwritten ten times, which keeps the device busy until the host has launched what is measured. Wall times are
of the whole verb, from the call to the last write.
"""

from __future__ import annotations

import gc
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks.gpu.shapes import QWEN3_4B, QWEN3_30B_A3B
from surgery import Checkpoint, Entries, Neurons, rollback
from surgery.checkpoints.checkpoint import State
from surgery.devices import by_kernel
from surgery.layout.slots import Block, Layout, Slot
from surgery.masks.entries import shapes_of
from surgery.reverting import kernel
from surgery.reverting.exchange import planned
from surgery.reverting.plan import Plan
from surgery.reverting.successive import Successive

NAME = "Rollback, undo, a sweep's step"
Row = dict[str, Any]


@dataclass(frozen=True)
class Shape:
    """A stack of MLPs; ``experts`` of them a layer, stacked as transformers holds them, or 0."""

    name: str
    layers: int
    hidden: int
    neurons: int
    experts: int = 0

    @property
    def numbers(self) -> int:
        """In one layer."""
        return 3 * self.hidden * self.neurons * max(self.experts, 1)


DENSE = Shape("Qwen3-4B", *(QWEN3_4B[one] for one in ("num_hidden_layers", "hidden_size", "intermediate_size")))
SPARSE = Shape(
    "Qwen3-30B-A3B",
    *(QWEN3_30B_A3B[one] for one in ("num_hidden_layers", "hidden_size", "moe_intermediate_size", "num_experts")),
)
TINY = (Shape("tiny dense", 2, 48, 40), Shape("tiny experts", 2, 32, 16, 4))
FRACTIONS = (0.002, 0.02, 0.08, 0.32)
WEIGHTS = 0.01
TIMES = 7
OVER = 10  # times that 2 GB are overwritten: some 4 ms, in which the host launches a few hundred operations


def shapes(device: torch.device, rehearse: bool) -> Sequence[Shape]:
    """The dense shape, and as many layers of the experts' as two copies find room for."""
    if rehearse:
        return TINY
    room = torch.cuda.mem_get_info(device)[0] * 0.85 - 6e9  # beside buffers
    return DENSE, replace(SPARSE, layers=min(SPARSE.layers, int(room / (4 * SPARSE.numbers))))


class Mlps(nn.Module):
    """The weights of a shape, drawn anew, as a live model; ``layout`` says where its neurons lie."""

    def __init__(self, shape: Shape, device: torch.device, dtype: torch.dtype, seed: int) -> None:
        super().__init__()
        draw, blocks = torch.Generator(device).manual_seed(seed), []
        h, n, e = shape.hidden, shape.neurons, shape.experts
        sizes = {"gate_up": (e, 2 * n, h), "down": (e, h, n)} if e else {"gate": (n, h), "up": (n, h), "down": (h, n)}
        for at in range(shape.layers):
            layer = nn.Module()
            for name, size in sizes.items():
                drawn = torch.empty(size, device=device, dtype=dtype).normal_(0, 0.02, generator=draw)
                layer.register_parameter(name, nn.Parameter(drawn, requires_grad=False))
            self.add_module(str(at), layer)
            if e:
                fused = "e (g n) d -> (e n) g d"
                slots = [
                    Slot(part, f"{at}.gate_up", fused, (e, 2 * n, h), g, 2) for g, part in enumerate(("gate", "up"))
                ]
                slots.append(Slot("down", f"{at}.down", "e d n -> (e n) d", (e, h, n)))
            else:
                slots = [Slot(part, f"{at}.{part}", "n d -> n d", (n, h)) for part in ("gate", "up")]
                slots.append(Slot("down", f"{at}.down", "d n -> n d", (h, n)))
            blocks.append(Block(f"{at}", n * max(e, 1), tuple(slots), f"{at}", e))
        self.layout = Layout(tuple(blocks))


def neurons(layout: Layout, fraction: float) -> Neurons:
    """A fraction of all neurons at random; a smaller fraction's are among a larger one's."""
    draw = torch.Generator().manual_seed(0)
    return Neurons({name: torch.rand(size, generator=draw) < fraction for name, size in layout.sizes.items()})


def weights(layout: Layout, fraction: float, device: torch.device) -> Entries:
    """A fraction of all single weights at random."""
    draw, sizes = torch.Generator(device).manual_seed(0), shapes_of(layout)
    chosen = {
        part: (torch.rand(a * b, generator=draw, device=device) < fraction).nonzero().flatten().cpu()
        for part, (a, b) in sizes.items()
    }
    return Entries(chosen, shapes=sizes)


class Clock:
    """Milliseconds on a device; on the CPU (a rehearsal) those of the wall."""

    def __init__(self, device: torch.device, times: int) -> None:
        self.real, self.times = device.type == "cuda", times
        self._cold = torch.empty(1 << 31 if self.real else 1, dtype=torch.uint8, device=device)

    def wait(self) -> None:
        if self.real:
            torch.cuda.synchronize()

    def device(self, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        """The median of some runs, between two events; ``after`` each, what undoes it."""
        if not self.real:
            return self.wall(work, after)
        found = []
        for _ in range(self.times + 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            for _ in range(OVER):
                self._cold.zero_()
            start.record()
            work()
            end.record()
            torch.cuda.synchronize()
            found.append(start.elapsed_time(end))
            after()
        return statistics.median(found[1:])  # the first one compiles

    def wall(self, work: Callable[[], object], after: Callable[[], object] = lambda: None) -> float:
        """The same, from the call until the device has done all of it."""
        found = []
        for _ in range(self.times + 1):
            self.wait()
            start = time.perf_counter()
            work()
            self.wait()
            found.append(1e3 * (time.perf_counter() - start))
            after()
        return statistics.median(found[1:])


def copy_bandwidth(device: torch.device, clock: Clock) -> float:
    """GB/s of a copy on the device, read and written."""
    size = 1 << (31 if clock.real else 20)
    one, other = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / clock.device(lambda: other.copy_(one)) / 1e6


def sectors(plan: Plan, tensors: Any, bytes_: int) -> int:
    """The bytes of all sectors of 32 or 64 bytes that hold a number of the mask, counted one by one."""
    found = 0
    for edit in plan.edits:
        tensor = tensors[edit.slot.tensor]
        rows, _, axes = edit.spread(tensor)
        at = rows.to(tensor.device)[:, None]
        for size, stride in axes:
            at = (at[:, :, None] + torch.arange(size, device=tensor.device) * stride).flatten(1)
        size = tensor.element_size()
        found += torch.unique((tensor.data_ptr() + at.flatten() * size) // bytes_).numel()
    return bytes_ * found


class Case:
    """One shape, on one device: a later model, an earlier one as a dictionary, and a row for what is measured."""

    def __init__(self, shape: Shape, device: torch.device, rehearse: bool, rows: list[Row]) -> None:
        self.rows = rows
        self.shape, self.device, self.rehearse = shape, device, rehearse
        self.clock = Clock(device, 1 if rehearse else TIMES)
        self.copies = copy_bandwidth(device, self.clock)
        dtype = torch.bfloat16
        self.model = Mlps(shape, device, dtype, 0)
        self.earlier = dict(State(Mlps(shape, device, dtype, 1)))
        self.layout, self.live = self.model.layout, State(self.model)

    def row(self, what: str, how: str, mask: str, milliseconds: float, **more: Any) -> None:
        found = {"shape": self.shape.name, "layers": self.shape.layers, "mask": mask, "what": what, "by": how}
        found |= {"ms": milliseconds, **more}
        if "traffic" in more:
            found["share"] = more["traffic"] / milliseconds / 1e6 / self.copies
        self.rows.append(found)

    def of(self, mask: Neurons | Entries, label: str, index_path: bool = True) -> None:
        """What a mask costs."""
        edits = list(mask.edits(self.layout, "the model"))
        with by_kernel(True):
            plan = planned(mask, edits, self.live)
        assert plan is not None
        payload = sum(edit.numbers for edit in edits) * 2
        narrow, wide = (sectors(plan, self.live, size) for size in (32, 64))
        size = {"payload": payload, "sectors32": narrow, "sectors64": wide}
        sources, packed = [self.earlier[edit.slot.tensor] for edit in edits], plan.empty()
        plan.gather(self.earlier, packed)
        swapping = self.clock.device(lambda: plan.swap(self.live, packed))  # an even number of times
        plan.swap(self.live, packed) if self.clock.times % 2 == 0 else None
        moved = {**size, "traffic": 2 * wide + 2 * payload}
        self.row("from packed slices on the device; undo", "kernel, device", label, swapping, **moved)
        fetching = self.clock.device(
            lambda: plan.fetch(self.live, packed, sources), lambda: plan.swap(self.live, packed)
        )
        moved = {**size, "traffic": 3 * wide + payload}
        self.row("from the earlier model on the device", "kernel, device", label, fetching, **moved)
        for ours in (True, False) if index_path else (True,):
            held: list[Any] = []

            def there(ours: bool = ours, held: list[Any] = held) -> None:
                with by_kernel(ours):
                    held.append(rollback(self.model, to=self.earlier, mask=mask, layout=self.layout))

            def back(held: list[Any] = held) -> None:
                held.pop().undo()

            how = "kernel, whole call" if ours else "index path, whole call"
            self.row("from the earlier model on the device", how, label, self.clock.wall(there, back), **size)
            there()
            self.row("undo", how, label, self.clock.wall(back, there), **size)
            back()

    def tiles(self, mask: Neurons, label: str) -> None:
        """Other sizes of a program's share, to see whether the kernel's are good ones."""
        edits, held = list(mask.edits(self.layout, "the model")), (kernel.TILE, kernel.WARPS)
        for kernel.TILE, kernel.WARPS in ((1024, 4), (2048, 8), (4096, 4), (4096, 8)):
            plan, sources = Plan(edits, self.live), [self.earlier[edit.slot.tensor] for edit in edits]
            packed = plan.empty()
            milliseconds = self.clock.device(
                lambda plan=plan, packed=packed, sources=sources: plan.fetch(self.live, packed, sources),
                lambda plan=plan, packed=packed: plan.swap(self.live, packed),
            )
            how = f"kernel of {kernel.TILE} numbers, {kernel.WARPS} warps, device"
            self.row("from the earlier model on the device", how, label, milliseconds)
        kernel.TILE, kernel.WARPS = held

    def step(self, fractions: tuple[float, float]) -> None:
        """From one budget of a sweep to the next: what is new is written, on top of what is."""
        small, large = (neurons(self.layout, one) for one in fractions)
        mask, label = large & ~small, f"{fractions[0]:.1%} to {fractions[1]:.1%}"
        edits = list(mask.edits(self.layout, "the model"))
        with by_kernel(True):
            plan = planned(mask, edits, self.live)
            assert plan is not None
            sources, packed = [self.earlier[edit.slot.tensor] for edit in edits], plan.empty()
            whole, first = (list(one.edits(self.layout, "the model")) for one in (large, small))
            before, after = (planned(one, few, self.live) for one, few in ((small, first), (large, whole)))
            assert before is not None
            assert after is not None
            there, taken = [self.earlier[edit.slot.tensor] for edit in whole], after.empty()
            kept = before.empty()
            before.gather(self.earlier, kept)
            before.swap(self.live, kept)

            def anew() -> None:
                before.swap(self.live, kept)
                after.fetch(self.live, taken, there)

            def back() -> None:
                after.swap(self.live, taken)
                before.swap(self.live, kept)

            milliseconds = self.clock.device(anew, back)
            before.swap(self.live, kept)
            self.row("a sweep's step: undo, and the next budget", "kernel, device", label, milliseconds)
            with rollback(self.model, to=self.earlier, mask=small, layout=self.layout):
                milliseconds = self.clock.device(
                    lambda: plan.fetch(self.live, packed, sources), lambda: plan.swap(self.live, packed)
                )
        self.row("a sweep's step: the difference alone", "kernel, device", label, milliseconds)
        with by_kernel(True), Successive(self.model, to=self.earlier, layout=self.layout) as turn:
            turn.now(small)
            milliseconds = self.clock.wall(lambda: turn.now(large), lambda: turn.now(small))
        self.row("a sweep's step: the difference alone", "kernel, whole call", label, milliseconds)

    def others(self, mask: Neurons, label: str) -> None:
        """What else one could do: index_put_, torch.where, a reload."""
        edits = list(mask.edits(self.layout, "the model"))
        puts = [(edit.slot.view(self.live[edit.slot.tensor]), self._at(edit)) for edit in edits]
        rows = [edit.take(self.earlier[edit.slot.tensor]) for edit in edits]
        kept = [edit.take(self.live[edit.slot.tensor]) for edit in edits]

        def put(values: list[Tensor]) -> None:
            for (view, at), value in zip(puts, values, strict=True):
                view.index_put_(at, value)

        milliseconds = self.clock.device(lambda: put(rows), lambda: put(kept))
        self.row(f"{len(puts)} × index_put_, nothing kept", "torch, device", label, milliseconds)
        flags = {edit.slot: torch.zeros(edit.slot.view(self.live[edit.slot.tensor]).shape[: 1 + edit.slot.stacked],
                                        dtype=torch.bool, device=self.device) for edit in edits}  # fmt: skip
        for edit, (_, at) in zip(edits, puts, strict=True):
            flags[edit.slot].index_put_(at, torch.tensor(True, device=self.device))

        def where() -> None:
            for edit, (view, _) in zip(edits, puts, strict=True):
                chosen = flags[edit.slot]
                chosen = chosen.reshape(*chosen.shape, *[1] * (view.ndim - chosen.ndim))
                view.copy_(torch.where(chosen, edit.slot.view(self.earlier[edit.slot.tensor]), view))

        milliseconds = self.clock.device(where, lambda: put(kept))
        self.row("torch.where over whole tensors", "torch, device", label, milliseconds)

    def _at(self, edit: Any) -> tuple[Tensor, ...]:
        shape = edit.slot.view(self.live[edit.slot.tensor]).shape[: 1 + edit.slot.stacked]
        return torch.unravel_index((edit.index - edit.slot.start).to(self.device), shape)

    def reload(self) -> None:
        """All weights anew: from a copy on the device, and from pinned memory."""
        layer = [name for name in self.live if name.startswith("0.")]
        real = self.clock.real
        pinned = {name: torch.empty(self.live[name].shape, dtype=torch.bfloat16, pin_memory=real) for name in layer}
        target = {name: torch.empty_like(self.live[name]) for name in layer}  # the model keeps its own numbers
        for what, source in (("on the device", self.earlier), ("in pinned memory", pinned)):

            def copy(source: Any = source) -> None:
                for _ in range(self.shape.layers):
                    for name in layer:
                        target[name].copy_(source[name], non_blocking=True)

            size = 2 * self.shape.numbers * self.shape.layers
            self.row(
                f"a full reload, from a copy {what}", "torch, device", "all", self.clock.device(copy), payload=size
            )

    def folder(self, mask: Neurons, label: str) -> None:
        """From a folder whose files are in the page cache."""
        with tempfile.TemporaryDirectory() as name:
            save_file({name: tensor.cpu() for name, tensor in self.earlier.items()}, Path(name) / "model.safetensors")
            stored, held = Checkpoint(name), list[Any]()

            def there() -> None:
                with by_kernel(True):
                    held.append(rollback(self.model, to=stored, mask=mask, layout=self.layout))

            milliseconds = self.clock.wall(there, lambda: held.pop().undo())
            self.row("from a warm folder", "kernel, whole call", label, milliseconds)


def rows(shape: Shape, device: torch.device, rehearse: bool, found: list[Row]) -> Iterator[None]:
    """Everything of one shape, row by row."""
    case = Case(shape, device, rehearse, found)
    for fraction in FRACTIONS if not shape.experts else (0.02,):
        case.of(neurons(case.layout, 0.3 if rehearse else fraction), f"{fraction:.1%} of neurons", fraction < 0.1)
        yield
        if rehearse:
            break
    two = neurons(case.layout, 0.3 if rehearse else 0.02)
    if not shape.experts:
        case.tiles(two, "2.0% of neurons")
    case.step((0.1, 0.3) if rehearse else (0.02, 0.08))
    yield
    case.others(two, "2.0% of neurons")
    case.reload()
    yield
    if not shape.experts:
        case.of(weights(case.layout, WEIGHTS, device), "1% of single weights", False)
        yield
        case.folder(two, "2.0% of neurons")
        yield


def checks(device: torch.device) -> dict[str, bool]:
    """Whether the kernel writes the index path's bits, and undoes them: small models, every dtype."""
    found = {}
    for shape in (Shape("dense", 2, 520, 264), Shape("experts", 2, 136, 40, 3)) if device.type == "cuda" else TINY:
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            model, source = Mlps(shape, device, dtype, 0), dict(State(Mlps(shape, device, dtype, 1)))
            layout = model.layout
            for mask in (neurons(layout, 0.3), weights(layout, 0.05, device)):
                for strength in (1.0, 0.3):
                    name = f"{shape.name}, {dtype}, {mask.noun}, strength {strength}".replace("torch.", "")
                    found[name] = _alike(model, source, mask, strength, layout)
    return found


def _alike(model: Mlps, source: Any, mask: Neurons | Entries, strength: float, layout: Layout) -> bool:
    before = {name: tensor.clone() for name, tensor in State(model).items()}
    seen, reports = [], []
    for ours in (False, True):
        with by_kernel(ours), rollback(model, to=source, mask=mask, strength=strength, layout=layout) as done:
            seen.append({name: tensor.clone() for name, tensor in State(model).items()})
            reports.append(str(done))
        seen.append(before)
        if not all(torch.equal(tensor, before[name]) for name, tensor in State(model).items()):
            return False
    both = all(torch.equal(tensor, seen[2][name]) for name, tensor in seen[0].items())
    return both and reports[0] == reports[1] and not all(torch.equal(seen[2][name], before[name]) for name in before)


def run(device: torch.device, rehearse: bool) -> Iterator[dict[str, Any]]:
    """All rows and checks, as JSON."""
    found: dict[str, Any] = {"checks": checks(device), "rows": []}
    clock = Clock(device, 1 if rehearse else TIMES)
    found["copy_gb_s"] = copy_bandwidth(device, clock)
    del clock
    yield found
    for shape in shapes(device, rehearse):
        for _ in rows(shape, device, rehearse, found["rows"]):
            yield found
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def table(found: dict[str, Any]) -> str:
    """The rows as Markdown."""
    lines = [
        f"A copy on the device moves {found['copy_gb_s']:.0f} GB/s, read and written. The last column: the traffic in "
        "64-byte sectors as a share of that.",
        "",
        "| shape | mask | what | by | ms | payload MB | 32 B sectors MB | 64 B sectors MB | traffic GB | of a copy |",
        "|---|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for row in found["rows"]:
        sizes = [f"{row[name] / 1e6:.1f}" if name in row else "" for name in ("payload", "sectors32", "sectors64")]
        traffic = f"{row['traffic'] / 1e9:.2f}" if "traffic" in row else ""
        share = f"{row['share']:.0%}" if "share" in row else ""
        where = f"{row['shape']}, {row['layers']} layers"
        cells = [where, row["mask"], row["what"], row["by"], f"{row['ms']:.3f}", *sizes, traffic, share]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    there = torch.cuda.is_available()
    *_, last = run(torch.device("cuda" if there else "cpu"), not there)
    print(table(last))
