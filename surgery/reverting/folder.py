"""``save``: a rolled-back checkpoint as a folder, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
import warnings
from collections.abc import Mapping
from functools import cache, partial
from pathlib import Path

from torch import Tensor

from surgery.checkpoints.checkpoint import Checkpoint
from surgery.files import sync, whole_folder
from surgery.formats.folders import MOMENTS, holds_moments, moments_in
from surgery.formats.stored import Stored
from surgery.progress import steps
from surgery.reverting.contents import Contents, Edited, contents_of, output_of

CHECKPOINT = (
    "surgery.json",
    "*.safetensors",
    "model_world_size_*_rank_*.pt",
    ".metadata",
)  # a folder with one of these is a checkpoint, and may be replaced


def save(
    tensors: Mapping[str, Tensor], folder: str | Path, *, overwrite: bool = False, reset_optimizer: bool = False
) -> Path:
    """Write a checkpoint (usually a ``rolled_back`` one) as a folder, byte for byte like the folder it comes from.

    ``save`` copies the later folder (as a reflink where the file system has them), writes the reverted slices into the
    copy one tensor at a time, and gives the copy its final name only when all of it is on the disk. A crash leaves no
    incomplete folder that loads. Outside the reverted slices every byte stays the same: shards, index, header order,
    dtype, tokenizer, config and unknown files. A second copy of the weights and old adapters are left out, and a
    warning names them; so is the state of a training run, unless the folder is a training checkpoint itself (rank
    files, a distributed checkpoint), which keeps it.

    Args:
        tensors: a ``Checkpoint`` or a ``rolled_back`` view of one.
        folder: where to write; it must not exist unless ``overwrite``.
        overwrite: replace an existing checkpoint (it stays as it was until the new one is complete).
        reset_optimizer: of a training checkpoint, also set the optimizer's moments (``exp_avg``, ``exp_avg_sq``) to
            zero where weights were reverted; otherwise a run that is resumed from it pushes them back.

    Returns:
        The folder's path.

    Raises:
        ValueError: ``tensors`` does not come from a folder; the output exists, is no checkpoint, or is one of the
            inputs; another process changed an input meanwhile; or there is no optimizer's state to reset.
        OSError: the disk is full or the folder can't be written; nothing is left behind.

    Source: ours.
    """
    source: Path | None = getattr(tensors, "folder", None)
    if source is None:
        raise ValueError(
            "save() writes what comes from a folder (a Checkpoint, or rolled_back(folder, ...)); "
            "write a live model with model.save_pretrained(folder)"
        )
    parents: list[Checkpoint] = getattr(tensors, "parents", [tensors])
    target = output_of(folder, parents)
    contents = contents_of(tensors, source)
    stored: Stored = tensors.stored  # type: ignore[attr-defined]
    moments = resettable(source, stored) if reset_optimizer else None
    with whole_folder(target, CHECKPOINT, overwrite=overwrite) as new:
        _copy(contents, new, tensors, parents, moments)
    for note in contents.notes:
        warnings.warn(note, stacklevel=2)
    if not reset_optimizer and holds_moments(source, stored):
        warnings.warn(
            "the optimizer's state was taken over as it is, and would push the reverted weights back in a run that is "
            "resumed from it: reset_optimizer=True (--reset-optimizer) sets its moments to zero there",
            stacklevel=2,
        )
    return target


def resettable(source: Path, stored: Stored) -> Stored:
    """The optimizer's running means in a training checkpoint; ``ValueError`` where it holds none, or something else."""
    moments = moments_in(source, stored)
    if moments is None:
        raise ValueError(f"{source} holds no optimizer's state that could be reset: leave out --reset-optimizer")
    for moment, shape in moments.shapes.items():
        name, _, entry = moment.rpartition("/")
        if entry not in MOMENTS and shape and shape == stored.shapes.get(name):
            raise ValueError(
                f"the optimizer in {source} keeps {entry!r} of {name!r}, which may be the weights themselves and is "
                f"not reset: leave out --reset-optimizer, and start a new optimizer"
            )
    return moments


def _copy(
    contents: Contents,
    new: Path,
    tensors: Mapping[str, Tensor],
    parents: list[Checkpoint],
    moments: Stored | None,
) -> None:
    """The files, then the edits, then what says where it came from; refused where an input changed meanwhile."""
    # A weight file carries its final name only once it is whole: a killed process leaves no folder that loads.
    stored: Stored = tensors.stored  # type: ignore[attr-defined]
    weights = [file for file in (*stored.files, *(moments.files if moments else ())) if file not in contents.added]
    unfinished = {file: new / f"{file}.{uuid.uuid4().hex}.partial" for file in weights}
    before = _stamps(contents)
    new.mkdir()
    for name in contents.folders:
        (new / name).mkdir()
    for name, path in steps("files", contents.files.items(), lambda one: one[1].stat().st_size):
        _clone(path, unfinished.get(name, new / name))
    _check_unchanged(contents, before, parents)  # before the edits, which go by the headers
    if isinstance(tensors, Edited):
        _edit(tensors, stored, moments, unfinished)
    for name, text in contents.added.items():
        (new / name).parent.mkdir(exist_ok=True)
        (new / name).write_bytes(text)
    for file, path in unfinished.items():
        path.rename(new / file)
    for path in [*new.rglob("*"), new]:
        sync(path)
    _check_unchanged(contents, before, parents)


def _edit(tensors: Edited, stored: Stored, moments: Stored | None, places: dict[str, Path]) -> None:
    """Write the edits into the copies through the page cache, where the numbers lie: no tensor is held whole."""

    @cache
    def views(of: Stored, file: str) -> Mapping[str, Tensor]:
        return of.views(places[file], file, True)

    files = [file for file in sorted(stored.files) if file in places]  # those of an adapter are written anew
    touched = dict.fromkeys(name for file in files for name in tensors.touched(file))
    for name in touched:
        tensors.edit(name, stored.lying(name, partial(views, stored)))
    for moment, shape in moments.shapes.items() if moments else ():
        name = moment.rpartition("/")[0]
        if moments and name in touched and shape == stored.shapes[name]:
            tensors.reset(name, moments.lying(moment, partial(views, moments)))


def _stamps(contents: Contents) -> dict[Path, tuple[int, int, int]]:
    """Size, time of change and inode of every file that is copied."""
    found = ((path, path.stat()) for path in contents.files.values())
    return {path: (one.st_size, one.st_mtime_ns, one.st_ino) for path, one in found}


def _check_unchanged(contents: Contents, before: dict[Path, tuple[int, int, int]], parents: list[Checkpoint]) -> None:
    """Raise ``ValueError`` where a file is another one than at the start, or a parent than when it was opened."""
    now = _stamps(contents)
    changed = [path for path, stamp in before.items() if now[path] != stamp]
    changed += [parent.folder for parent in parents if not parent.is_current]
    if changed:
        raise ValueError(
            f"{changed[0]} was changed while it was being rolled back, and nothing was written: wait until no other "
            f"process writes there, then open the checkpoints again"
        )


def _clone(source: Path, target: Path) -> None:
    """Copy one file: a reflink where the file system has them, else in the kernel; the mode is kept, plus ``u+w``."""
    with open(source, "rb") as reader, open(target, "wb") as writer:
        size, done = os.fstat(reader.fileno()).st_size, 0
        try:
            while done < size:
                sent = os.copy_file_range(reader.fileno(), writer.fileno(), size - done)
                if sent == 0:
                    break
                done += sent
        except OSError as error:
            if error.errno not in (errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM):
                raise
        if done < size:
            reader.seek(done)
            writer.seek(done)
            shutil.copyfileobj(reader, writer, 1 << 24)
    target.chmod(source.stat().st_mode | stat.S_IWUSR)  # a hub cache's files are read-only; the edits come next
