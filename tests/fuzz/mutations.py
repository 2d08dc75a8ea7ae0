"""Damage to files: the same random number always does the same damage."""

from __future__ import annotations

import copy
import json
import struct
from pathlib import PurePath
from random import Random
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

DEEP = '{"a":' * 100 + "1" + "}" * 100
# What stands in the place of a value, as JSON text: some of it no JSON, and some that only looks like the right thing.
FRAGMENTS = (
    *(
        "null",
        "true",
        "false",
        "0",
        "-0",
        "-1",
        "1",
        "2",
        "1.0",
        "1.5",
        "1e99",
        "1e400",
        "NaN",
        "-Infinity",
        "[]",
        "{}",
    ),
    *(
        "9" * 400,
        "-" + "9" * 400,
        "9" * 5000,
        str(2**31),
        str(2**63),
        str(2**64),
        '""',
        '"x"',
        '"\\ud800"',
        '"\\u0000"',
    ),
    *(
        '"a\\nb"',
        '"../x"',
        '"/etc/passwd"',
        "[null]",
        "[1.5]",
        "[2, 3]",
        "[[1]]",
        '["a"]',
        '{"a": 1}',
        '{"": []}',
        DEEP,
    ),
    *(
        "[" * 200 + "]" * 200,
        "[" * 100_000,
        f'"{"x" * 10_000}"',
        f"[{'1, ' * 20_000}1]",
        "10000",
        "10000000",
        "{",
        "nul",
    ),
)


def damaged(random: Random, name: str, raw: bytes) -> bytes:
    """The bytes of a file with one to three things changed, mostly of what its kind is made of."""
    kind = PurePath(name).suffix if random.random() < 0.8 else ""
    for _ in range(random.choice((1, 1, 2, 3))):
        how = {".json": in_json, ".jsonl": in_lines, ".safetensors": in_tensors}.get(kind, in_bytes)
        if name.endswith("adapter_model.safetensors") and random.random() < 0.6:
            how = in_factors
        raw = how(random, raw)
    return raw


def in_factors(random: Random, raw: bytes) -> bytes:
    """Another adapter in a sound file: a matrix lost, renamed, doubled, turned, cut, swapped, or of other numbers."""
    try:
        tensors = load(raw)
        name, other = random.choice(sorted(tensors)), random.choice(sorted(tensors))
    except (SafetensorError, IndexError, KeyError, ValueError, RuntimeError):
        return in_bytes(random, raw)
    if not tensors[name].numel():
        return in_bytes(random, raw)
    one, dtypes = tensors.pop(name), (torch.bfloat16, torch.float16, torch.float64, torch.int8, torch.bool)
    turned, at = one.permute(*reversed(range(one.ndim))).contiguous(), one.numel() // 2
    numbers = torch.tensor(random.choice((float("nan"), float("inf"), -1e38, -0.0, 65504.0)))
    tensors |= random.choice(
        (
            {},
            {random.choice((name.replace("_A", "_B"), name.replace("0", "1"), f"{name}x", name[17:])): one},
            {name: one, f"{name[:-7]}.default.weight": one.clone()},
            {name: turned},
            {name: one[: len(one) // 2].clone()},
            {name: torch.cat([one, one])},
            {name: tensors.get(other, turned).clone(), other: one},
            {name: one.to(random.choice(dtypes))},
            {name: one.float().flatten().index_fill(0, torch.tensor([at]), numbers).view(one.shape)},
            {name: torch.zeros(0, *one.shape[1:])},
        )
    )
    return save(tensors)


def in_bytes(random: Random, raw: bytes) -> bytes:
    at, other = (random.randrange(len(raw) + 1) for _ in range(2))
    low, high = sorted((at, other)) if random.random() < 0.3 else (at, min(len(raw), at + random.randint(1, 8)))
    some = random.choice((b"", random.randbytes(high - low), bytes(high - low), raw[low:high] * 2, b"\xff\xfe", b"\n"))
    return raw[:at] if random.random() < 0.1 else raw[:low] + some + raw[high:]


def in_json(random: Random, raw: bytes) -> bytes:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return in_bytes(random, raw)
    hole, fragment = "a hole of its own", random.choice(FRAGMENTS)
    try:
        return json.dumps(_changed(random, value, hole)).replace(json.dumps(hole), fragment).encode()
    except RecursionError:
        return raw


def _changed(random: Random, value: Any, hole: Any) -> Any:
    """The value with something at a random place deep in it replaced by the hole, doubled, moved or left out."""
    holder, inner = [value], 0
    home: Any = holder
    key: Any = inner
    while isinstance(home[key], dict | list) and home[key] and random.random() < 0.85:
        home = home[key]
        key = random.choice(list(home) if isinstance(home, dict) else range(len(home)))
    number = isinstance(home[key], int | float) and not isinstance(home[key], bool)
    how = random.choice(("hole", "hole", "hole", "gone", "more", "number" if number else "hole", "key"))
    if how == "hole":
        home[key] = hole
    elif how == "gone":
        del home[key]
    elif how == "number":
        home[key] = random.choice((home[key] + 1, home[key] - 1, home[key] * 2, -home[key], home[key] // 2, 0.5, 0))
    elif isinstance(home, list):
        home.insert(key, hole if how == "more" else copy.deepcopy(home[key]))
    elif how == "more":
        home["more"] = hole
    else:
        home[random.choice(("", "x", "../x", "__metadata__", key * 2))] = home.pop(key)
    return holder[0] if holder else hole


def in_lines(random: Random, raw: bytes) -> bytes:
    lines = raw.split(b"\n")
    at, other = (random.randrange(len(lines)) for _ in range(2))
    how = random.random()
    if how < 0.7:
        lines[at] = in_json(random, lines[at])
    elif how < 0.8:
        lines[at], lines[other] = lines[other], lines[at]
    elif how < 0.9:
        del lines[at]
    else:
        lines.insert(at, random.choice((lines[other], b"", b" ", b"{}", b"[]")))
    return b"\n".join(lines)


def in_tensors(random: Random, raw: bytes) -> bytes:
    """Damage to the header of a safetensors file, to JSON inside its metadata, or to its numbers."""
    size = struct.unpack("<Q", raw[:8].ljust(8, b"\0"))[0]
    head, data = raw[8 : 8 + size], raw[8 + size :]
    how = random.random()
    try:
        header = json.loads(head)
        told = header.get("__metadata__") or {}
        if how < 0.4 and told:
            name = random.choice(list(told))
            told[name] = in_json(random, told[name].encode()).decode(errors="replace")
            head = json.dumps(header).encode()
        elif how < 0.6:
            name = random.choice([one for one in header if one != "__metadata__"])
            header[name] |= _reshaped(random, header[name])
            head = json.dumps(header).encode()
        else:
            head, data = (in_json(random, head), data) if how < 0.8 else (head, in_bytes(random, data))
    except (ValueError, TypeError, AttributeError, IndexError, KeyError, RecursionError, ArithmeticError):
        return in_bytes(random, raw)
    return struct.pack("<Q", len(head)) + head + data


def _reshaped(random: Random, entry: dict[str, Any]) -> dict[str, Any]:
    """Another shape or dtype of as many bytes, so that only their meaning is another."""
    bits = {
        "BOOL": 1,
        "U8": 1,
        "I8": 1,
        "F16": 2,
        "BF16": 2,
        "I16": 2,
        "F32": 4,
        "I32": 4,
        "I64": 8,
        "F64": 8,
        "F4": 0.5,
    }
    begin, end = entry["data_offsets"]
    dtype = random.choice([entry["dtype"], *bits])
    count = int((end - begin) / bits[dtype])
    shape = random.choice(
        ([count], [1, count], [count, 1], [1] * random.choice((0, 3, 65, 1000)) + [count], [1, count, 1])
    )
    return {"dtype": dtype, "shape": shape}
