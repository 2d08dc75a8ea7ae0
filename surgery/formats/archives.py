"""Files of ``torch.save``: archives of uncompressed tensors, opened so that nothing in them is ever run."""

from __future__ import annotations

import io
import logging
import mmap
import pickle
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from surgery.tables import briefly

ALIGNED = 64  # bytes; where torch.save lets a tensor's numbers begin
_BETWEEN = 24  # bytes; the most that lies between the numbers of one tensor and the header of the next


def opened(path: Path, writable: bool = False) -> Any:
    """What a file of ``torch.save`` holds, its tensors as views of the mapped file.

    Raises:
        ValueError: it is damaged, or needs more than tensors, which would be code.
    """
    import torch.distributed.tensor

    flags = mmap.MAP_SHARED if writable else mmap.MAP_PRIVATE
    with open(path, "rb") as file:
        try:
            sizes = check_archive(file)
            with _quiet(), torch.serialization.set_default_mmap_options(flags):
                found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
            _check_sizes(found, sizes)
            return found
        except pickle.UnpicklingError as error:
            raise ValueError(
                f"{path} needs code to be read, which is never run ({briefly(error)}): save tensors only, or pass a "
                f"folder of safetensors"
            ) from error
        except Exception as error:  # whatever a damaged archive makes torch and zipfile raise
            raise ValueError(f"{path} is damaged or no file of torch.save: {briefly(error)}") from error


def _check_sizes(found: Any, sizes: set[int]) -> None:
    """Raise where a tensor would be read beyond its record: torch, mapping, trusts the pickle, too."""
    for name, value in found.items() if isinstance(found, dict) else ():
        if isinstance(value, Tensor):
            held: Any = value.detach()
            size = (held.to_local() if hasattr(held, "to_local") else held).untyped_storage().nbytes()
            if size and size not in sizes:
                raise ValueError(f"no record has the size of {name!r}, {size} bytes")


def check_archive(file: IO[bytes]) -> set[int]:
    """The sizes of its records, in bytes.

    Raises unless every record lies where its own header and the directory say: torch, mapping, trusts the header.
    """
    with zipfile.ZipFile(file) as archive:
        records = sorted(archive.infolist(), key=lambda one: one.header_offset)
        ends = []
        for one in records:
            archive.open(one).close()  # compares the header's name with the directory's
            file.seek(one.header_offset + 26)
            begin = one.header_offset + 30 + sum(int.from_bytes(file.read(2), "little") for _ in range(2))
            ends.append(begin + one.file_size)
            if one.compress_type != zipfile.ZIP_STORED or one.compress_size != one.file_size:
                raise ValueError(f"its record {one.filename!r} is compressed")
            if "/data/" in one.filename and begin % ALIGNED:
                raise ValueError(f"its record {one.filename!r} begins at byte {begin}, no multiple of {ALIGNED}")
        for end, (one, other) in zip(ends, pairwise(records), strict=False):
            if not 0 <= other.header_offset - end <= _BETWEEN:
                raise ValueError(f"its record {one.filename!r} ends at byte {end}, and the next begins elsewhere")
    file.seek(0)
    return {one.file_size for one in records if "/data/" in one.filename}


class Window(io.RawIOBase):
    """A stretch of a file, as a file of its own."""

    def __init__(self, file: IO[bytes], offset: int, length: int) -> None:
        self._file, self._offset, self._length, self._at = file, offset, length, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._length}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        self._file.seek(self._offset + self._at)
        found = self._file.read(max(0, min(len(buffer), self._length - self._at)))
        buffer[: len(found)] = found
        self._at += len(found)
        return len(found)


@contextmanager
def _quiet() -> Iterator[None]:
    """Torch warns that what it reads has no process group: none is needed."""
    logger = logging.getLogger("torch.distributed.device_mesh")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)
