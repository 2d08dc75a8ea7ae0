"""The kernel writes what the index path writes, bit for bit, in one launch, and undoes it; nothing else is touched.

Off a GPU Triton's interpreter runs it on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REPRESENTATIVES, build
from interrupts import at_every_line
from simulated import gpu
from torch import Tensor, nn

from surgery import Checkpoint, Entries, Neurons, RandomSelector, Trajectory, devices, rolled_back
from surgery.checkpoints.checkpoint import State, in_force, moment_of
from surgery.checkpoints.opening import Weights, open_weights
from surgery.devices import by_kernel
from surgery.layout import find_layout
from surgery.layout.on_disk import folder_layout
from surgery.masks import edits
from surgery.reverting import exchange
from surgery.reverting import plan as plans

pytest.importorskip("triton", reason="the kernel needs Triton: pip install triton")
operators = import_module("surgery.reverting.rollback")
rollback = operators.rollback
kernel = import_module("surgery.reverting.kernel")

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
KINDS = [(family, kind) for kind, families in REPRESENTATIVES.items() for family in families]
Mask = Neurons | Entries


def pair(family: str, dtype: torch.dtype = torch.bfloat16) -> tuple[nn.Module, nn.Module]:
    return build(family, dtype, 1).to(DEVICE), build(family, dtype, 2).to(DEVICE)


def some(earlier: nn.Module, later: nn.Module, units: Any = "mlp", fraction: float = 0.3) -> Mask:
    return RandomSelector(fraction, 1, units=units).select(Trajectory(earlier=earlier, later=later))


def memory(model: nn.Module) -> dict[str, Tensor]:
    """Every byte of the storages that the model's tensors lie in."""
    found = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    return {
        n: torch.tensor([], dtype=torch.uint8, device=t.device).set_(t.untyped_storage()).clone()
        for n, t in found.items()
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return all(torch.equal(held, other[name]) for name, held in one.items())


def law(later: nn.Module, to: Any, mask: Mask, **how: Any) -> None:
    """Both paths write the same bytes and report the same; the kernel's undo restores each of them."""
    before = memory(later)
    with by_kernel(False), rollback(later, to=to, mask=mask, **how) as expected:
        want = memory(later)
        rows = [taken.clone() for _, taken in expected._old]
    with by_kernel(True), rollback(later, to=to, mask=mask, **how) as done:
        got = memory(later)
        assert same(got, want)
        assert str(done) == str(expected)
        assert done.changed == expected.changed
        assert (done._exchanged is not None) == bool(sum(mask.count().values()))
        assert all(torch.equal(taken, row) for (_, taken), row in zip(done._old, rows, strict=True))
    assert same(memory(later), before)


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_every_sort_of_slot(family, kind):
    earlier, later = pair(family)
    mask = some(earlier, later, kind)
    law(later, earlier, mask)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_dtype(family, dtype):
    earlier, later = pair(family, dtype)
    law(later, earlier, some(earlier, later))


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3", "qwen2_moe", "gpt_oss"])
def test_single_weights(family):
    earlier, later = pair(family)
    law(later, earlier, some(earlier, later, "weight", 0.05))


@pytest.mark.parametrize(("family", "units"), [("gpt_oss", "mlp"), ("phi3", "weight")])
def test_strengths(family, units):
    earlier, later = pair(family)
    mask = some(earlier, later, units, 0.2)
    random = torch.Generator().manual_seed(0)
    each = {
        name: 3 * torch.rand(size, generator=random)
        for name, size in find_layout(later, units=mask.units).sizes.items()
    }
    for value in each.values():
        value[::3], value[1::5] = 1.0, 0.0
    for strength in (0.0, 1.7, Neurons(each)):
        law(later, earlier, mask, strength=strength)
    law(later, {name: tensor.double() for name, tensor in State(earlier).items()}, mask, strength=Neurons(each))


@pytest.mark.parametrize("chosen", ["none", "all", "one", "first and last"])
def test_few_and_all(chosen):
    earlier, later = pair("llama")
    sizes = find_layout(later).sizes
    flags = {name: torch.full((size,), chosen == "all") for name, size in sizes.items()}
    if chosen in ("one", "first and last"):
        list(flags.values())[-1][-1] = True
    if chosen == "first and last":
        next(iter(flags.values()))[0] = True
    law(later, earlier, Neurons(flags))


def transposed(tensor: Tensor) -> Tensor:
    return tensor.t().contiguous().t() if tensor.ndim == 2 else tensor


def apart(tensor: Tensor) -> Tensor:
    """Every second number of a buffer, from its fourth on."""
    room = torch.full((2 * tensor.numel() + 9,), 7.0, dtype=tensor.dtype, device=tensor.device)
    return room[3 : 3 + 2 * tensor.numel() : 2].view(tensor.shape).copy_(tensor)


def shifted(tensor: Tensor) -> Tensor:
    """Not at a multiple of 16 bytes, and with room around it."""
    room = torch.full((tensor.numel() + 9,), 7.0, dtype=tensor.dtype, device=tensor.device)
    return room[1 : 1 + tensor.numel()].view(tensor.shape).copy_(tensor)


def padded(tensor: Tensor) -> Tensor:
    """Rows with room between them, of a length that no vector divides."""
    room = torch.full((*tensor.shape[:-1], tensor.shape[-1] + 5), 7.0, dtype=tensor.dtype, device=tensor.device)
    return room[..., : tensor.shape[-1]].copy_(tensor)


def laid(model: nn.Module, how: Callable[[Tensor], Tensor]) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = how(parameter.data)
    return model


STRIDES = [transposed, apart, shifted, padded]


@pytest.mark.parametrize("how", STRIDES)
@pytest.mark.parametrize("family", ["llama", "gpt_oss"])
def test_every_stride(family, how):
    """In the model, in the earlier one, and in both."""
    earlier, later = pair(family)
    mask = some(earlier, later)
    law(later, laid(earlier, how), mask)
    law(laid(later, how), earlier, mask)
    law(later, pair(family)[0], mask)


def test_other_dtypes_and_places_of_the_earlier_model(tmp_path):
    """A wider dtype, several, one laid out otherwise in memory, a lazy view, a folder; beside a model in bfloat16."""
    earlier, later = pair("qwen2_moe")
    mask = some(earlier, later)
    held = dict(State(earlier))
    mixed = {name: tensor.double() if at % 2 else tensor for at, (name, tensor) in enumerate(held.items())}
    law(later, build("qwen2_moe", torch.float32, 1).to(DEVICE), mask)
    law(later, mixed, mask)
    law(later, rolled_back(held, to=dict(State(later)), mask=mask, layout=find_layout(later)), mask)
    earlier.save_pretrained(tmp_path)
    law(later, tmp_path, mask)
    law(later, tmp_path, some(earlier, later, "weight", 0.05))


@pytest.mark.parametrize("units", ["mlp", "weight"])
@pytest.mark.parametrize("family", ["qwen2_moe", "gpt_oss"])
def test_a_gather_reads_tensors_of_other_names_and_shapes(family, units, tmp_path):
    """Experts that lie in tensors of their own, all in one plan, in the order of the stacked ones."""
    earlier, later = pair(family)
    mask = some(earlier, later, units, 0.3 if units == "mlp" else 0.05)
    earlier.save_pretrained(tmp_path)
    stored = Checkpoint(tmp_path)
    there = Weights(
        {n: t.to(DEVICE) for n, t in stored.items()}, folder_layout(tmp_path, stored.shapes, units=mask.units), "there"
    )
    live = open_weights(later, units=mask.units)
    with by_kernel(True):
        plan = exchange.planned(mask, list(mask.edits(live.layout, "the model")), live.tensors)
        found = exchange._gathered(plan, there)
    assert found is not None
    for edit, rows in zip(plan.edits, plan.rows(found), strict=True):
        assert torch.equal(rows, edit.read(there))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt_oss", "jetmoe"])
def test_what_is_called_a_vector_is_one(family, dtype):
    """Sixteen bytes that begin at a multiple of 16, in the tensor and in packed: all that lies along rows."""
    earlier, later = pair(family, dtype)
    mask, tensors = some(earlier, later), State(later)
    with by_kernel(True):
        plan = exchange.planned(mask, list(mask.edits(find_layout(later), "the model")), tensors)
    size, offsets = 16 // torch.empty(0, dtype=dtype).element_size(), plan._offsets.cpu()
    for edit, (rows, lanes, height, width, start, down, across, _, shift, whole) in zip(
        plan.edits, plan._table.tolist(), strict=True
    ):
        if whole:
            at = offsets[rows : rows + height, None] + offsets[lanes : lanes + width]
            runs = at.view(height, -1, size)
            assert torch.equal(runs, runs[..., :1] + torch.arange(size))
            assert not (runs[..., 0] % size).any()
            assert (across, start % size, down % size, width % size, (1 << shift) % size) == (1, 0, 0, 0, 0)
        assert bool(whole) == edit.slot.pattern.split(" ->")[0].endswith(" d")


@pytest.mark.parametrize("whose", ["the model's", "the earlier model's", "nobody's"])
def test_tensors_that_begin_elsewhere_are_not_read_as_vectors(whose):
    earlier, later = pair("phi3")
    mask = some(earlier, later)
    earlier, later = (
        laid(one, shifted) if whose == of else one
        for of, one in (("the earlier model's", earlier), ("the model's", later))
    )
    with by_kernel(True), rollback(later, to=earlier, mask=mask) as done:
        _, sent = done._exchanged.plan._addresses
        assert set(sent[:, 2].tolist()) == {int(whose == "nobody's")}


COMPILED = """
import sys, triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from surgery.reverting.kernel import FIELDS, TILE, walk
kinds = {"tiles": "*i32", "table": "*i64", "lists": "*i32", "addresses": "*i64", "packed": "*i16", "found": "*i32"}
fixed = {"HOW": 1, "COUNT": True, "EXPONENT": 0x7F80, "VECTOR": 8, "TILE": TILE, "FIELDS": FIELDS}
source = ASTSource(
    walk, kinds | {"count": "i32"} | dict.fromkeys(fixed, "constexpr"), fixed,
    attrs={(at,): [["tt.divisibility", 16]] for at in range(6)},
)
found = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4, "enable_fp_fusion": False})
print(found.asm["ttgir"].count("convert_layout"), found.asm["ptx"].count("ld.global.v4.b32"),
      found.asm["ptx"].count("st.global.v4.b32"), found.asm["ptx"].count("ld.global.b16"))
"""


def test_compiled_for_a_gpu_rows_are_vectors_and_columns_are_not():
    """Two vectors of 8 numbers a thread, read twice and written twice; columns a number each; nothing is shuffled."""
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    where = Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, cwd=where, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["0", "4", "4", "32"], done.stderr


@pytest.fixture
def counted(monkeypatch) -> dict[str, int]:
    """How often the kernel was launched, and offsets were sent to the device."""
    found = {"launches": 0, "plans": 0}
    real = kernel.walk

    class Counting:
        def __getitem__(self, grid: Any) -> Any:
            found["launches"] += 1
            return real[grid]

    def sending(tensors: Any, device: Any, original: Any = plans.sent_together) -> Any:
        found["plans"] += len(tensors) > 1
        return original(tensors, device)

    monkeypatch.setattr(kernel, "walk", Counting())
    monkeypatch.setattr(plans, "sent_together", sending)
    return found


def test_one_launch_each_and_offsets_are_sent_once(counted):
    earlier, later = pair("gpt_oss")
    mask = some(earlier, later)
    with by_kernel(True):
        done = rollback(later, to=earlier, mask=mask)
        assert counted == {"launches": 1, "plans": 1}
        done.undo()
        assert counted == {"launches": 2, "plans": 1}
        rollback(later, to=earlier, mask=mask).undo()
        assert counted == {"launches": 4, "plans": 1}
        rollback(later, to=build("gpt_oss", torch.float32, 1).to(DEVICE), mask=mask).undo()  # a gather, too
        assert counted == {"launches": 7, "plans": 2}


def law_sent(patch: pytest.MonkeyPatch) -> None:
    """Every launch waits for all that was sent before it, since it may be on another stream than what sent it."""
    seen, now, launches = set[int](), set[int](), 0

    def sending(tensors: Any, device: Any, original: Any = plans.sent_together) -> Any:
        seen.add(len(seen))
        now.add(max(seen))  # on this stream
        return original(tensors, device)

    def after(_: Any) -> Any:
        covered = set(now)
        return lambda: now.update(covered)

    class Launching:
        def __getitem__(self, grid: Any, original: Any = kernel.walk) -> Any:
            nonlocal launches
            assert now == seen
            launches += 1
            return original[grid]

    def launching(self: Any, *given: Any, original: Any = plans.Plan._launch, **how: Any) -> Any:
        now.clear()  # it is on another stream than what came before
        return original(self, *given, **how)

    patch.setattr(plans.Plan, "_launch", launching)
    patch.setattr(plans, "sent_together", sending)
    patch.setattr(plans, "after_sending", after)
    patch.setattr(kernel, "walk", Launching())
    earlier, later = pair("llama")
    mask = some(earlier, later)
    with by_kernel(True):
        for _ in range(2):
            rollback(later, to=earlier, mask=mask).undo()
    assert launches == 4
    assert seen


def test_every_launch_waits_for_what_was_sent(monkeypatch):
    law_sent(monkeypatch)


@pytest.mark.parametrize("mutant", ["tables", "addresses"])
def test_a_launch_that_does_not_wait_is_noticed(mutant, monkeypatch):
    """The plan forgets what its tables, or its addresses, have to be waited for with."""

    def forgetting(self: Any, *given: Any, original: Any = plans.Plan._launch, **how: Any) -> Any:
        if (self._addresses is None) is (mutant == "tables"):
            self._sent = lambda: None
        return original(self, *given, **how)

    with pytest.MonkeyPatch.context() as patch:
        law_sent(patch)
    monkeypatch.setattr(plans.Plan, "_launch", forgetting)
    with pytest.raises(AssertionError):
        law_sent(monkeypatch)


def test_a_mask_that_was_written_into_gets_a_new_plan():
    earlier, later = pair("llama")
    mask = some(earlier, later)
    law(later, earlier, mask)
    for value in mask.values():
        value ^= True
    law(later, earlier, mask)
    for value in mask.values():
        value.numpy()[:] ^= True  # torch notices nothing
    law(later, earlier, mask)
    mask = some(earlier, later, "weight", 0.05)
    law(later, earlier, mask)
    for value in mask.values():
        value.copy_(torch.arange(len(value)))
    law(later, earlier, mask)


def test_a_plan_goes_with_its_mask():
    earlier, later = pair("llama")
    mask = some(earlier, later)
    with by_kernel(True):
        rollback(later, to=earlier, mask=mask).undo()
    assert id(mask) in exchange._plans
    known = id(mask)
    del mask
    assert known not in exchange._plans


def test_what_is_written_is_noticed():
    """As torch notices its own writes: else remembered scores would be taken for those of other weights."""
    earlier, later = pair("llama")
    mask, start = some(earlier, later), moment_of(later)
    with by_kernel(True):
        done = rollback(later, to=earlier, mask=mask)
        assert moment_of(later) is not start
        done.undo()
        assert moment_of(later) is start
        done = rollback(later, to=earlier, mask=mask)
        with torch.no_grad():
            later.lm_head.weight.add_(1)
        done.undo()
        assert moment_of(later) is not start


def test_nan_is_refused_by_name_and_put_back():
    earlier, later = pair("llama")
    mask = some(earlier, later)
    name = "model.layers.1.mlp.down_proj.weight"
    at = int(mask.indices("model.layers.1.mlp")[3])
    before = memory(later)
    for wrong in (float("nan"), float("inf"), float("-inf")):
        with torch.no_grad():
            earlier.get_parameter(name)[5, at] = wrong
        for how in ({}, {"strength": 0.5}):
            with by_kernel(True), pytest.raises(ValueError, match=rf"{name} of .* holds NaN or infinite"):
                rollback(later, to=earlier, mask=mask, **how)
            assert same(memory(later), before)


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_an_error_after_the_launch_restores_the_model(error, monkeypatch):
    earlier, later = pair("llama")
    mask, before = some(earlier, later), memory(later)

    def failing(_: Any) -> Any:
        assert not same(memory(later), before)
        raise error

    for name in ("read", "pairs"):
        with monkeypatch.context() as patch:
            patch.setattr(exchange.Exchanged, name, failing)
            with by_kernel(True), pytest.raises(error):
                rollback(later, to=earlier, mask=mask)
        assert same(memory(later), before)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_anywhere_leaves_the_old_weights():
    """At whichever line of a rollback the signal comes: nobody would have the undo."""
    earlier, later = pair("llama")
    sizes, before = find_layout(later).sizes, memory(later)
    mask = Neurons({name: (torch.arange(size) < 3) & name.endswith("0.mlp") for name, size in sizes.items()})

    def check(line: int) -> None:
        assert same(memory(later), before), line
        assert in_force(later) == [], line

    with by_kernel(True):
        at_every_line(rollback, lambda: rollback(later, to=earlier, mask=mask).undo(), check)


@pytest.mark.parametrize("change", [lambda model: model.float(), lambda model: laid(model, transposed)])
def test_undo_where_the_model_was_converted_or_laid_out_otherwise_since(change):
    earlier, later = pair("gpt_oss")
    mask = some(earlier, later)
    before = {name: tensor.clone() for name, tensor in later.state_dict().items()}
    with by_kernel(True):
        done = rollback(later, to=earlier, mask=mask)
        change(later)
        done.undo()
    assert all(torch.equal(tensor, before[name].to(tensor.dtype)) for name, tensor in later.state_dict().items())


def test_overlapping_rollbacks_and_what_was_there_before():
    earlier, later = pair("llama")
    layout, before = find_layout(later), memory(later)
    one, other = some(earlier, later), some(earlier, later, fraction=0.8)
    block = layout.blocks[1]
    with by_kernel(True):
        was = {slot: slot.take(State(later)[slot.tensor], one.indices(block.name)) for slot in block.slots}
        first = rollback(later, to=earlier, mask=one)
        once = memory(later)
        second = rollback(later, to=pair("llama")[0], mask=other, strength=0.5)
        assert all(torch.equal(first.before(block, slot), rows) for slot, rows in was.items())
        second.undo()
        assert same(memory(later), once)
        first.undo()
        with pytest.raises(LookupError, match="is reverted"):
            first.before(block, block.slots[0])
    assert same(memory(later), before)


def test_kept_elsewhere_shared_and_mixed_models_take_the_index_path():
    """Where the originals are to be kept off the GPU, they are not all held there first."""
    earlier, later = pair("llama")
    mask, before = some(earlier, later), memory(later)
    with by_kernel(True):
        with rollback(later, to=earlier, mask=mask, keep_on="cpu") as done:
            assert done._exchanged is None
        later.model.layers[1].mlp.double()
        with rollback(later, to=earlier, mask=mask) as done:
            assert done._exchanged is None
            assert done.changed
        later.model.layers[1].mlp.bfloat16()
    assert same(memory(later), before)


def test_a_source_that_lies_among_what_is_written_is_read_first():
    """Two layers are exchanged: what the one gets is not what it has just been given to the other."""
    _, later = pair("llama")
    layout, before = find_layout(later), memory(later)
    mask = Neurons({name: torch.ones(size, dtype=torch.bool) for name, size in layout.sizes.items()})
    names = {name: name.replace("layers.0", "layers.x").replace("layers.1", "layers.0") for name in State(later)}
    source = {new.replace("layers.x", "layers.1"): State(later)[name] for name, new in names.items()}
    want = {name: source[name].clone() for name in source}
    with by_kernel(True), rollback(later, to=source, mask=mask, layout=layout):
        for slot in (slot for block in layout.blocks for slot in block.slots):
            assert torch.equal(State(later)[slot.tensor], want[slot.tensor])
    assert same(memory(later), before)


def test_where_triton_can_not_run_it_is_said_and_the_index_path_taken(monkeypatch):
    device, tried = torch.device(DEVICE), exchange._works.__wrapped__
    assert tried(device)
    monkeypatch.setattr(plans.Plan, "swap", lambda self, tensors, packed: None)  # it runs, and does nothing
    with pytest.warns(UserWarning, match="slower path to the same bits: it does not give the bits that it should"):
        assert not tried(device)

    def uncompiled(self: Any, tensors: Any, packed: Any) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(plans.Plan, "swap", uncompiled)
    with pytest.warns(UserWarning, match="slower path to the same bits: Failed to find C compiler"):
        assert not tried(device)
    monkeypatch.setattr(devices, "find_spec", lambda name: None)
    assert not tried(device)


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_between_two_devices_nothing_is_mixed():
    """A model on a (simulated) GPU; the earlier one there, elsewhere, in another dtype."""
    earlier, later = pair("llama")
    mask = some(earlier, later)
    with gpu():
        later = later.to("cuda")
        for source in (pair("llama")[0].to("cuda"), earlier, build("llama", torch.float32, 1).to("cuda")):
            for strength in (1.0, 0.4) if source is earlier else (1.0,):
                before = {name: tensor.clone() for name, tensor in later.state_dict().items()}
                with by_kernel(False), rollback(later, to=source, mask=mask, strength=strength):
                    want = {name: tensor.clone() for name, tensor in later.state_dict().items()}
                with by_kernel(True), rollback(later, to=source, mask=mask, strength=strength) as done:
                    assert same(want, later.state_dict())
                    assert {rows.device.type for _, rows in done._old} == {"cuda"}
                assert same(before, later.state_dict())


@pytest.mark.skipif(DEVICE == "cuda", reason="on a GPU the kernel is taken")
def test_off_a_gpu_the_index_path_is_taken():
    earlier, later = pair("llama")
    assert rollback(later, to=earlier, mask=some(earlier, later))._exchanged is None


# Mutants: each is a plausible mistake that the law has to notice.


def beside(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, tensor: Tensor, original: Any = edits.Rows.spread) -> Any:
        return original(replace(self, index=(self.index + 1) % self.slot.neurons), tensor)

    patch.setattr(edits.Rows, "spread", mutant)


def vectors_everywhere(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        plans.Place,
        "rows",
        lambda self, packed, count, sizes, start=0: packed[: count * max(sizes, default=1)].view(count, -1),
    )


def not_swapped_back(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(exchange.Exchanged, "undo", lambda self, tensors: True)


def source_forgotten(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(
        exchange.Plan, "fetch", lambda self, tensors, packed, sources: self.swap(tensors, packed.zero_(), count=True)
    )


def one_axis_turned(patch: pytest.MonkeyPatch) -> None:
    def mutant(self: Any, tensor: Tensor, original: Any = edits.Rows.spread) -> Any:
        first, way, axes = original(self, tensor)
        return first, way, [(size, stride // 2 or 1) for size, stride in axes]

    patch.setattr(edits.Rows, "spread", mutant)


MUTANTS = [beside, vectors_everywhere, not_swapped_back, source_forgotten, one_axis_turned]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda one: one.__name__)
def test_mutants_die(mutant, monkeypatch):
    earlier, later = pair("llama")
    mutant(monkeypatch)
    with pytest.raises(AssertionError):
        law(later, earlier, some(earlier, later))
