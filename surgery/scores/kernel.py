"""The Triton kernels of D, which read every number once. Imported only where there is Triton."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def _at(a, first, second, count, TWO: tl.constexpr):
    """Offsets of places that are counted through two axes, or along the second one alone."""
    if TWO:
        return (a // count).to(tl.int64) * first + (a % count).to(tl.int64) * second
    return a.to(tl.int64) * second


@triton.jit
def products(
    gradient, now, then,  # tensors of any dtype and strides
    found,  # float32 [part, row]
    rows, inner, width, across,  # rows, of which ``inner`` in a block; numbers of one, ``across`` in a block
    g0, g1, g2, g3, n0, n1, n2, n3, t0, t1, t2, t3,  # strides: block and row, block and number
    STACKED: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr, STEPS: tl.constexpr,
):  # fmt: skip
    """Σ gradient · (now − then) over a part of each row's numbers, LANES · STEPS of them, in float32."""
    r = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    part = tl.program_id(1)
    g = gradient + _at(r, g0, g1, inner, STACKED)[:, None]
    n = now + _at(r, n0, n1, inner, STACKED)[:, None]
    t = then + _at(r, t0, t1, inner, STACKED)[:, None]
    total = tl.zeros([ROWS, LANES], dtype=tl.float32)
    for step in range(STEPS):
        c = (part * STEPS + step) * LANES + tl.arange(0, LANES)
        inside = (r < rows)[:, None] & (c < width)[None, :]
        a = tl.load(g + _at(c, g2, g3, across, FOLDED)[None, :], mask=inside, other=0).to(tl.float32)
        b = tl.load(n + _at(c, n2, n3, across, FOLDED)[None, :], mask=inside, other=0).to(tl.float32)
        d = tl.load(t + _at(c, t2, t3, across, FOLDED)[None, :], mask=inside, other=0).to(tl.float32)
        total += a * (b - d)
    tl.store(found + part * rows + r, tl.sum(total, 1), mask=r < rows)


@triton.jit(do_not_specialize=["room", "tensor", "start"])
def above(
    gradient, now, then,  # tensors of any dtype and strides
    bars, where, gains, steps, counts, room,  # two bars; ``Room``, and how many fit
    tensor, start, scale, p2, p3,  # how far the places of the next fold and of the next number in it are
    rows, inner, width, across,
    g0, g1, g2, g3, n0, n1, n2, n3, t0, t1, t2, t3,
    STACKED: tl.constexpr, FOLDED: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """Keep the places, gains and steps of a tile's numbers whose gain lies between the bars, in no order."""
    beside = tl.cdiv(width, LANES)  # tiles; the second axis of a grid has room for 65,535
    r = tl.program_id(0) // beside * ROWS + tl.arange(0, ROWS)
    c = tl.program_id(0) % beside * LANES + tl.arange(0, LANES)
    inside = (r < rows)[:, None] & (c < width)[None, :]
    g = gradient + _at(r, g0, g1, inner, STACKED)[:, None] + _at(c, g2, g3, across, FOLDED)[None, :]
    n = now + _at(r, n0, n1, inner, STACKED)[:, None] + _at(c, n2, n3, across, FOLDED)[None, :]
    t = then + _at(r, t0, t1, inner, STACKED)[:, None] + _at(c, t2, t3, across, FOLDED)[None, :]
    a = tl.load(g, mask=inside, other=0).to(tl.float32)
    step = tl.load(n, mask=inside, other=0).to(tl.float32) - tl.load(t, mask=inside, other=0).to(tl.float32)
    gain = step * scale * a
    wild = tl.reshape(((gain != gain) | (tl.abs(gain) == float("inf"))).to(tl.int32), [ROWS * LANES])
    if tl.sum(wild, 0) > 0:
        tl.store(counts + 1 + tensor, 1)
    between = (gain > tl.load(bars)) & (gain <= tl.load(bars + 1))
    flags = tl.reshape((inside & between).to(tl.int32), [ROWS * LANES])
    count = tl.sum(flags, 0)
    if count > 0:
        at = tl.atomic_add(counts, count.to(tl.int64), sem="relaxed") + tl.cumsum(flags, 0) - 1
        kept = (flags > 0) & (at < room)
        place = start + r.to(tl.int64)[:, None] * width + _at(c, p2, p3, across, FOLDED)[None, :]
        tl.store(where + at, tl.reshape(place, [ROWS * LANES]), mask=kept)
        tl.store(gains + at, tl.reshape(gain, [ROWS * LANES]), mask=kept)
        tl.store(steps + at, tl.reshape(step, [ROWS * LANES]), mask=kept)
