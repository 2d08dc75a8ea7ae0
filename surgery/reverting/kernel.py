"""The Triton kernel that walks all tensors of a mask in one launch. Imported only where Triton is installed.

A *box* is what a mask selects in one tensor: numbers at ``rows[a] + lanes[b]`` (in elements), for each a and b.
Neighbouring b are neighbouring lanes: along a neuron's row where that is contiguous, else along sorted neurons, so
that those that share a sector are asked for together. Boxes are cut into tiles, one a program; no two programs touch
the same number.
"""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl

TILE, WARPS = 2048, 4  # numbers of a program, and who moves them
FIELDS = 10  # numbers of a box in the table
SWAP, FETCH, GATHER = 0, 1, 2  # model ↔ packed; source → model → packed; model → packed


@triton.jit
def _move(
    addresses, packed, lists, row, tile, part,
    HOW: tl.constexpr, COUNT: tl.constexpr, EXPONENT: tl.constexpr, VECTOR: tl.constexpr,
    TILE: tl.constexpr, SIZE: tl.constexpr,
):  # fmt: skip
    """How many numbers of a tile's part change, and how many new ones are NaN or infinite (an exponent of ones).

    ``VECTOR``: so many neighbouring lanes are at neighbouring numbers, the first at a multiple of it. What is known of
    a value stays with the operation that makes it, so each of the two ways makes its own; their parts differ in
    ``SIZE``, so that a thread's numbers follow each other in the one, and lie beside the next thread's in the other.
    """
    rows, lanes = lists + tl.load(row), lists + tl.load(row + 1)
    height, width = tl.load(row + 2).to(tl.int32), tl.load(row + 3).to(tl.int32)
    start, down, across = tl.load(row + 4), tl.load(row + 5), tl.load(row + 6)  # its places in packed
    first, shift = tl.load(row + 7).to(tl.int32), tl.load(row + 8).to(tl.int32)  # its first tile, log2 of their width
    pointer: tl.constexpr = tl.pointer_type(packed.dtype.element_ty)
    model = tl.multiple_of(tl.load(addresses).to(pointer), 16 if VECTOR > 1 else 1)
    source = tl.multiple_of(tl.load(addresses + 1).to(pointer), 16 if VECTOR > 1 else 1)
    beside = (width + (1 << shift) - 1) >> shift
    one = part * SIZE + tl.arange(0, SIZE)
    a = ((tile - first) // beside) * (TILE >> shift) + (one >> shift)
    b = (((tile - first) % beside) << shift) + (one & ((1 << shift) - 1))
    inside = tl.max_constancy((a < height) & (b < width), VECTOR)
    at = tl.load(rows + a, mask=inside, other=0).to(tl.int64) + tl.load(lanes + b, mask=inside, other=0).to(tl.int64)
    at = tl.max_contiguous(tl.multiple_of(at, VECTOR), VECTOR)
    place = start + a.to(tl.int64) * down + b.to(tl.int64) * across
    place = tl.max_contiguous(tl.multiple_of(place, VECTOR), VECTOR)
    old = tl.load(model + at, mask=inside, other=0)
    changed, wild = 0, 0
    if HOW == 2:
        tl.store(packed + place, old, mask=inside)
    else:
        new = tl.load(source + at if HOW == 1 else packed + place, mask=inside, other=0)
        tl.debug_barrier()  # no thread writes what another has yet to read
        tl.store(model + at, new, mask=inside)
        tl.store(packed + place, old, mask=inside)
        if COUNT:
            changed = tl.sum((inside & (new != old)).to(tl.int32))
            wild = tl.sum((inside & ((new & EXPONENT) == EXPONENT)).to(tl.int32))
    return changed, wild


@triton.jit(do_not_specialize=["count"])
def walk(
    tiles,  # int32 [tile]: the box of each
    table,  # int64 [box, FIELDS]
    lists,  # int32 or int64: the offsets of every box's rows and lanes
    addresses,  # int64 [box, 3]: of the model's tensor and the source's, and whether both are multiples of 16
    packed,  # the numbers' bits, as integers
    found,  # int32 [2, tile]: how many changed; how many are not finite
    count,  # of tiles
    HOW: tl.constexpr,
    COUNT: tl.constexpr,
    EXPONENT: tl.constexpr,
    VECTOR: tl.constexpr,
    TILE: tl.constexpr,
    FIELDS: tl.constexpr,
):
    tile = tl.program_id(0)
    box = tl.load(tiles + tile).to(tl.int64)
    row, home = table + box * FIELDS, addresses + box * 3
    if (tl.load(row + 9) & tl.load(home + 2)) != 0:  # made of aligned vectors
        changed, wild = _move(home, packed, lists, row, tile, 0, HOW, COUNT, EXPONENT, VECTOR, TILE, TILE)
    else:
        changed, wild = _move(home, packed, lists, row, tile, 0, HOW, COUNT, EXPONENT, 1, TILE, TILE // 2)
        more, other = _move(home, packed, lists, row, tile, 1, HOW, COUNT, EXPONENT, 1, TILE, TILE // 2)
        changed, wild = changed + more, wild + other
    if COUNT:
        tl.store(found + tile, changed)
        tl.store(found + count + tile, wild)
