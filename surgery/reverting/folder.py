"""``save``: a rolled-back checkpoint as a folder, whole or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from surgery.checkpoints.checkpoint import header_of, mapped
from surgery.progress import steps


@runtime_checkable
class _Edited(Protocol):
    """What ``save`` needs of a rolled-back view: its shards, its edits, and the papers that go beside them."""

    headers: dict[str, Any]

    def touched(self, file: str) -> list[str]: ...
    def edit(self, name: str, tensor: Tensor) -> None: ...
    def papers(self) -> dict[str, bytes]: ...


def save(tensors: Mapping[str, Tensor], folder: str | Path, *, overwrite: bool = False) -> Path:
    """Write a checkpoint (usually a ``rolled_back`` one) as a folder, byte for byte like the folder it comes from.

    ``save`` copies the later folder (as a reflink where the file system has them), writes the reverted slices into the
    copy one tensor at a time, and gives the copy its final name only when all of it is on the disk. A crash leaves no
    incomplete folder that loads. Outside the reverted slices every byte stays the same: shards, index, header order,
    dtype, tokenizer, config and unknown files.

    Args:
        tensors: a ``Checkpoint`` or a ``rolled_back`` view of one.
        folder: where to write; it must not exist unless ``overwrite``.
        overwrite: replace an existing folder (it stays as it was until the new one is complete).

    Returns:
        The folder's path.

    Raises:
        ValueError: ``tensors`` does not come from a folder; the output exists, or is one of the inputs.
        OSError: the disk is full or the folder can't be written; nothing is left behind.

    Source: ours.
    """
    target = Path(os.path.abspath(folder))
    source: Path | None = getattr(tensors, "folder", None)
    if source is None:
        raise ValueError(
            "save() writes what comes from a folder (a Checkpoint, or rolled_back(folder, ...)); "
            "write a live model with model.save_pretrained(folder)"
        )
    for parent in (source, *getattr(tensors, "parents", ())):
        here, there = target.resolve(), Path(parent).resolve()
        if here.is_relative_to(there) or there.is_relative_to(here):
            raise ValueError(f"the output {target} is, holds or lies in one of the inputs: choose another folder")
    check_free(target, overwrite)
    made = [parent for parent in target.parents if not parent.exists()]
    partial = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        _copy(source, partial, tensors)
        put_in_place(partial, target)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        with suppress(OSError):
            for parent in made:
                parent.rmdir()
        raise
    return target


def _copy(source: Path, partial: Path, tensors: Mapping[str, Tensor]) -> None:
    """Everything of the source's tree, symbolic links resolved, then the edits, then what says where it came from."""
    # A weight file carries its final name only once it is whole: a killed process leaves no folder that loads.
    weights: set[str] = set(getattr(tensors, "headers", ()))
    unfinished = {file: partial / f"{file}.{uuid.uuid4().hex}.partial" for file in weights}
    partial.mkdir()
    for path, inside in steps("files", _tree(source), lambda one: one[0].stat().st_size):
        if path.is_dir():
            (partial / inside).mkdir()
        else:
            _clone(path, unfinished.get(inside, partial / inside))
    if isinstance(tensors, _Edited):
        for file, path in sorted(unfinished.items()):
            _edit_file(path, tensors, file)
        for name, text in tensors.papers().items():
            (partial / name).parent.mkdir(exist_ok=True)
            (partial / name).write_bytes(text)
    for file, path in unfinished.items():
        path.rename(partial / file)
    for path in [*partial.rglob("*"), partial]:
        _sync(path)


def _tree(folder: Path, inside: str = "", above: tuple[Path, ...] = ()) -> Iterator[tuple[Path, str]]:
    """Everything in a folder with its name from there, folders before what they hold, symbolic links followed."""
    if folder.resolve() in above:
        raise ValueError(f"{folder} is a link to a folder that it lies in: remove the link")
    for path in sorted(folder.iterdir()):
        if not (path.is_file() or path.is_dir()):
            raise ValueError(f"{path} is neither a file nor a folder (a dangling link?): remove it or copy it yourself")
        yield path, f"{inside}{path.name}"
        if path.is_dir():
            yield from _tree(path, f"{inside}{path.name}/", (*above, folder.resolve()))


def _edit_file(path: Path, tensors: _Edited, file: str) -> None:
    """Write the edits of one shard into ``path``, through the page cache; no tensor is ever held in memory whole."""
    names = tensors.touched(file)
    if not names:
        return
    if header_of(path) != tensors.headers[file]:
        raise ValueError(f"{file} was changed while it was being rolled back: nothing was written")
    views = mapped(path, tensors.headers[file], writable=True)
    for name in names:
        tensors.edit(name, views[name])


def check_free(target: Path, overwrite: bool) -> None:
    """Raise ``ValueError`` unless a folder can be written there: nothing is there, or a folder and ``overwrite``."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} is a file or a link, and never replaced: choose another folder")
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists: choose another folder, or pass overwrite=True (--overwrite)")


def put_in_place(partial: Path, target: Path) -> None:
    """Give a complete folder its final name; a folder that has it already is removed after that, and stays on failure.

    Args:
        partial: the new folder, complete, on the same disk as the target.
        target: the final name: a folder, or nothing yet.

    Raises:
        OSError: it can't be renamed; what was at ``target`` is there again.
    """
    old = None
    if target.exists():
        old = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.old")
        target.rename(old)
    try:
        partial.rename(target)
    except BaseException:
        if old:
            old.rename(target)
        raise
    _sync(target.parent)
    if old:
        shutil.rmtree(old)


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


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
