"""D's kernel: the sums of products that torch's operations give, but for rounding; one launch a gradient.

Off a GPU Triton's interpreter runs it on the CPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from families import REPRESENTATIVES, build
from mutants import dies
from simulated import gpu
from test_exchange import DEVICE, pair
from test_scores import batches
from torch import Tensor

from surgery import Trajectory, damage
from surgery.devices import by_kernel
from surgery.layout import find_layout
from surgery.layout.slots import Block, Slot
from surgery.live.hooks import rows_in
from surgery.live.losses import cross_entropy
from surgery.masks.edits import Rows

pytest.importorskip("triton", reason="the kernel needs Triton: pip install triton")
inner = import_module("surgery.scores.inner_products")
kernel = import_module("surgery.scores.kernel")
KINDS = [(family, kind) for kind, families in REPRESENTATIVES.items() for family in families]
DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def exact(part: Rows, views: list[Tensor]) -> tuple[Tensor, Tensor]:
    """The sums in float64 of what float32 holds of each number, and the sums of what each term is at most."""
    g, now, then = (view.float().double() for view in views)
    cut = 1 + part.slot.stacked
    terms = (g * (now - then)).reshape(g.shape[:cut].numel(), -1)
    return terms.sum(1), terms.abs().sum(1)


def law(part: Rows, *views: Tensor) -> None:
    found, sums = [], []
    for wanted in (True, False):
        with by_kernel(wanted):
            runs = list(inner.inner(part, *views))
            assert [at for at, _ in runs] == torch.tensor([0, *(len(one) for _, one in runs)])[:-1].cumsum(0).tolist()
            found.append(torch.cat([one for _, one in runs]).cpu())
    want, most = exact(part, [view.detach().cpu() for view in views])
    for one in found:
        assert one.dtype == torch.float64
        assert bool(((one - want).abs() <= 1e-6 * most).all())
        sums.append(float(one.sum()))
    assert any(sums)


def parts(family: str, kind: str, dtype: torch.dtype = torch.float32) -> list[tuple[Rows, list[Tensor]]]:
    """Every slot of a family with three tensors that lie as the model's do."""
    model, found = build(family, dtype).to(DEVICE), []
    for block in find_layout(model, units=kind).blocks:
        for slot in block.slots:
            draw = torch.Generator(DEVICE).manual_seed(len(found))
            own = model.get_parameter(slot.tensor).detach()
            three = [torch.empty_like(own).normal_(generator=draw) for _ in range(3)]
            part = Rows(block, slot, torch.arange(slot.start, slot.stop))
            found.append((part, [rows_in(part, one) for one in three]))
    return found


@pytest.mark.parametrize(("family", "kind"), KINDS)
def test_sums_are_those_of_all_terms(family, kind):
    for part, views in parts(family, kind):
        law(part, *views)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_every_dtype(dtype):
    for part, (g, now, then) in parts("llama", "mlp", dtype)[:3]:
        law(part, g, now, then)
        law(part, g, now, then.to(torch.float32))  # where the earlier model is stored wider


def test_sums_are_float32_whatever_torch_makes_by_default():
    torch.set_default_dtype(torch.bfloat16)
    try:
        law(plain(7, 5000), *(one.float() for one in drawn(7, 5000)))
    finally:
        torch.set_default_dtype(torch.float32)


def plain(rows: int, width: int, stacked: bool = False) -> Rows:
    slot = Slot("gate", "w", "n d -> n d", (rows, width))
    if stacked:
        slot = Slot("gate", "w", "e n d -> (e n) d", (2, rows // 2, width))
    return Rows(Block("b", rows, (slot,), "b"), slot, torch.arange(rows))


def drawn(*shape: int) -> list[Tensor]:
    draw = torch.Generator(DEVICE).manual_seed(0)
    return [torch.empty(shape, device=DEVICE).normal_(generator=draw) for _ in range(3)]


def law_shapes() -> None:
    """Few and many rows, narrow and wide, whole in tiles and not; as columns, too, and with holes."""
    for rows, width in ((1, 1), (1, 5000), (7, 130), (16, 128), (300, 3), (2, 2049)):
        law(plain(rows, width), *drawn(rows, width))
        law(plain(rows, width), *(one.T for one in drawn(width, rows)))
        law(plain(rows, width), *(one[::2, 1:] for one in drawn(2 * rows, width + 1)))
        g, now, then = drawn(rows, width)
        law(plain(rows, width), g, now.T.contiguous().T, then)  # each lies as it does
    for shape in ((2, 9, 40), (2, 20, 33)):
        stack = plain(shape[0] * shape[1], shape[2], stacked=True)
        law(stack, *drawn(*shape))
        law(stack, *(one.transpose(1, 2) for one in drawn(shape[0], shape[2], shape[1])))


def test_whatever_their_shapes_and_strides():
    law_shapes()


def law_folds() -> None:
    """Numbers of a row in two axes, in any order; in three they are too many for the kernel, and summed as before."""
    for sizes, order in (((6, 5, 7), (0, 1, 2)), ((7, 6, 5), (1, 2, 0)), ((5, 7, 6), (2, 0, 1))):
        law(plain(6, 35), *(one.permute(order) for one in drawn(*sizes)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "_by_kernel", lambda *_: pytest.fail("taken"))
        views = [one.permute(3, 1, 0, 2) for one in drawn(2, 3, 4, 5)]
        law(plain(5, 24), *views)


def test_numbers_in_two_axes_and_in_three():
    law_folds()


def law_launches() -> None:
    """Each part of each matrix's gradient is one launch."""
    earlier, later = pair("llama", torch.float32)
    run, seen = Trajectory(earlier=earlier, later=later), []
    with pytest.MonkeyPatch.context() as patch, by_kernel(True):
        real = inner._by_kernel
        patch.setattr(inner, "_by_kernel", lambda *given: (seen.append(1), real(*given))[1])
        data = batches(labels=True)
        found = damage(run, data, loss=cross_entropy)
    every = [slot for block in find_layout(later, units="mlp").blocks for slot in block.slots]
    slots = sum(len(slot.shape) > 1 for slot in every)  # a bias has one number a neuron, and nothing to add up
    with by_kernel(False):
        want = damage(run, data, loss=cross_entropy)
    assert len(seen) in (slots, slots * len(data))  # prompts may go through together
    assert all(torch.allclose(found[name], want[name], rtol=1e-4, atol=1e-9) for name in want)


def test_each_gradient_is_one_launch():
    law_launches()


COMPILED = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from surgery.scores.kernel import above, products
outputs = {products: {"found": "*fp32"}, above: {"where": "*i64", "counts": "*i64", "start": "i64", "scale": "fp32"}}
for kernel, own in outputs.items():
    own |= {name: "*fp32" for name in ("bars", "gains", "steps") if name in kernel.arg_names}
    for high, lanes, beside, folded in ((16, 128, "3", False), (128, 16, "1", False), (16, 128, "3", True)):
        fixed = {"STACKED": False, "FOLDED": folded, "ROWS": high, "LANES": lanes, "STEPS": 8}
        fixed = {name: one for name, one in fixed.items() if name in kernel.arg_names}
        fixed |= {one + beside: 1 for one in "gnt"}
        names = kernel.arg_names
        kinds = dict.fromkeys(names, "i32") | dict.fromkeys(("gradient", "now", "then"), "*bf16") | own
        odd = {"tensor", "start", "scale", *fixed}
        source = ASTSource(
            kernel, kinds | dict.fromkeys(fixed, "constexpr"), fixed,
            attrs={(at,): [["tt.divisibility", 16]] for at, name in enumerate(names) if name not in odd},
        )
        text = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
        print(text.count("ld.global.v4.b32"), text.count("ld.global.b16"), text.count("st.local"))
"""


def test_compiled_for_a_gpu_they_read_16_bytes_at_a_time():
    """Both kernels, along rows, columns and folded rows: two pieces of each of three tensors a thread, none spilled."""
    environment, where = {**os.environ, "TRITON_INTERPRET": "0"}, Path(__file__).parents[1]
    done = subprocess.run(
        [sys.executable, "-c", COMPILED], env=environment, cwd=where, capture_output=True, text=True, check=False
    )
    assert done.stdout.split() == ["6", "0", "0"] * 6, done.stderr


@pytest.mark.skipif(DEVICE == "cuda", reason="there is a GPU")
def test_what_lies_elsewhere_is_brought_in_runs():
    """The earlier weights on the CPU, the gradient on a (simulated) GPU: no kernel mixes them."""
    part, views = parts("llama", "mlp")[0]
    with gpu(), by_kernel(True), pytest.MonkeyPatch.context() as patch:
        patch.setattr(inner, "_by_kernel", lambda *_: pytest.fail("taken"))
        there = [one.to("cuda") for one in views[:2]]
        sums = torch.cat([one for _, one in inner.inner(part, *there, views[2])]).cpu()
    want, most = exact(part, views)
    assert bool(((sums - want).abs() <= 1e-6 * most).all())


def test_where_triton_can_not_run_it_is_said(monkeypatch):
    device, tried = torch.device(DEVICE), inner._works.__wrapped__
    assert tried(device)
    monkeypatch.setattr(inner, "_by_kernel", lambda views, *_: torch.zeros(len(views[0]), dtype=torch.float64))
    with pytest.warns(UserWarning, match="D is summed by slower operations: it does not give the sums"):
        assert not tried(device)


def half_of_the_numbers(patch: pytest.MonkeyPatch) -> None:
    def mutant(views: Any, tiles: Any, original: Any = inner._by_kernel) -> Any:
        (folds, across), ways = tiles.numbers
        return original(views, replace(tiles, numbers=((folds, max(1, across // 2)), ways)))

    patch.setattr(inner, "_by_kernel", mutant)


def the_first_one_s_strides(patch: pytest.MonkeyPatch) -> None:
    def mutant(views: Any, tiles: Any, original: Any = inner._by_kernel) -> Any:
        return original(views, type(tiles)(*((sizes, [ways[0]] * 3) for sizes, ways in (tiles.rows, tiles.numbers))))

    patch.setattr(inner, "_by_kernel", mutant)


def counted_the_other_way(patch: pytest.MonkeyPatch) -> None:
    """The gradient's numbers are gone through with its two axes in the other order."""

    def mutant(views: Any, tiles: Any, original: Any = inner._by_kernel) -> Any:
        (folds, across), (_, *others) = tiles.numbers
        if folds == 1:
            return original(views, tiles)
        turned = views[0].transpose(-1, -2).reshape(views[0].shape)  # a copy, which lies in that order
        numbers = (folds, across), [(across, 1), *others]
        return original([turned, *views[1:]], replace(tiles, numbers=numbers))

    patch.setattr(inner, "_by_kernel", mutant)


@pytest.mark.parametrize("mutant", [half_of_the_numbers, the_first_one_s_strides, counted_the_other_way])
def test_mutants_die(mutant):
    dies(mutant, law_folds if mutant is counted_the_other_way else law_shapes)
