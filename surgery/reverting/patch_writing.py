"""``save_patch``: a rollback as a small folder that holds only the changed numbers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from surgery.files import sync, whole_folder
from surgery.formats.patches import KIND, MANIFEST, NUMBERS, VERSION, Place, changes, digest, pack
from surgery.formats.shards import WORDS, write_tensors
from surgery.formats.slime import ENCODINGS, write_delta
from surgery.progress import steps
from surgery.reverting.contents import output_of
from surgery.reverting.rollback import RolledBack
from surgery.tables import json_text

FORMATS = ("surgery", "slime", "vllm")
PATCH = (MANIFEST, "weight_v*")  # a folder with one of these is a patch, and may be replaced


def save_patch(
    view: RolledBack,
    folder: str | Path,
    *,
    format: str = "surgery",
    reverse: bool = False,
    encoding: str = "xor",
    base_version: int = 0,
    overwrite: bool = False,
) -> Path:
    """Write a rollback as a patch: a small folder with the changed numbers only, and checksums of what it expects.

    A patch needs neither the mask nor the earlier checkpoint. Its tensors have the names of ``view``'s later
    checkpoint. Of that one tensor at a time is read; a change that leaves a number's bits as they are is no change.

    Args:
        view: a ``rolled_back`` checkpoint.
        folder: where to write; it must not exist unless ``overwrite``.
        format: "surgery" is what ``Patch`` applies and takes back. "slime": a version folder (a disk delta) for
            SGLang's servers, with zstd and xxh3-128. "vllm": flat indices and values for vLLM's
            ``CheckpointWeightPatch``.
        reverse: write the patch that leads from the rolled-back checkpoint to the later one.
        encoding: of slime's format, "xor" or "overwrite".
        base_version: of slime's format, the number of the version that the servers hold; the patch is the next one.
        overwrite: replace an existing patch.

    Returns:
        The folder's path.

    Raises:
        ValueError: an unknown format or encoding; the output exists, is no patch, or lies in an input; another process
            changed an input meanwhile; or slime's packages are missing (``surgery[patch]``).
        OSError: the disk is full or the folder can't be written; nothing is left behind.

    Source: ours; the formats of slime and vLLM are theirs.
    """
    for what, value, known in (("format", format, FORMATS), ("encoding", encoding, ENCODINGS)):
        if value not in known:
            raise ValueError(f"{what}={value!r}: expected {', '.join(known[:-1])} or {known[-1]}")
    if not 0 <= base_version < 999_999:
        raise ValueError(f"base_version={base_version}: expected a number from 0 to 999998")
    target = output_of(folder, view.parents)

    def versions() -> Iterator[tuple[str, Tensor, Tensor]]:
        for name in steps("tensors", view.edited):
            pair = view.later.tensors[name], view[name]
            yield name, *(reversed(pair) if reverse else pair)

    with whole_folder(target, PATCH, overwrite=overwrite) as new:
        new.mkdir()
        if format == "slime":
            write_delta(new, versions(), encoding, base_version)
        else:
            _write(new, versions(), view, format, reverse)
        for path in [*new.rglob("*"), new]:
            sync(path)
        if stale := [parent.folder for parent in view.parents if not parent.is_current]:
            raise ValueError(f"{stale[0]} was changed while a patch of it was being made: open the checkpoints again")
    return target


def _write(
    new: Path, versions: Iterator[tuple[str, Tensor, Tensor]], view: RolledBack, format: str, reverse: bool
) -> None:
    places: dict[str, list[Place]] = {name: [] for name in view.edited}
    for block in view.layout.blocks:
        for slot in block.slots:
            if slot.tensor in places:
                places[slot.tensor].append(Place.of(block.name, slot))
    told: dict[str, Any] = {}

    def tensors() -> Iterator[tuple[str, str, int, bytes]]:
        for name, before, after in versions:
            found, size = changes(before, after), before.numel()
            if not len(found.at):
                continue
            told[name] = {
                "shape": list(before.shape),
                "dtype": WORDS[before.dtype],
                "numbers": len(found.at),
                "before": {"tensor": found.before, "numbers": digest(found.old)},
                "after": {"tensor": found.after, "numbers": digest(found.new)},
                "places": [vars(place) for place in places[name]],
            }
            if format == "surgery":
                data = pack(found.at, found.old ^ found.new, size)
                yield name, "U8", len(data), data
            else:
                index = np.int32 if size < 1 << 31 else np.int64
                yield (
                    f"{name}.indices",
                    f"I{8 * np.dtype(index).itemsize}",
                    len(found.at),
                    found.at.astype(index).tobytes(),
                )
                yield f"{name}.values", WORDS[before.dtype], len(found.at), found.new.tobytes()

    write_tensors(new / NUMBERS, tensors(), {"format": "pt"})
    head = {"kind": KIND, "version": VERSION, "format": format, "reverse": reverse, "units": view.layout.units}
    manifest = {**head, "numbers": sum(one["numbers"] for one in told.values()), "record": view.record()}
    text = json_text({**manifest, "tensors": told}) + "\n"
    (new / MANIFEST).write_text(text, encoding="utf-8")
