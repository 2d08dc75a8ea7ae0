"""Paths as users type them, and outputs that appear whole or not at all, whoever else writes them."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import threading
import uuid
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # Linux's numbers


class Exists(ValueError):
    """There is something where an output should go."""


def path_of(path: str | Path) -> Path:
    """A path with the home directory in place of a leading ``~``."""
    return Path(os.path.expanduser(path))


@contextmanager
def whole_file(path: str | Path, *, overwrite: bool = True) -> Iterator[Path]:
    """Where to write a file while the body runs; it gets its own name at the end, unless the body raises.

    Until then it lies in a hidden folder beside ``path``. What a killed process left there is removed by the next
    process that writes the same path. A link stays one, and the file that it leads to is replaced.

    Raises:
        Exists: something has the path (also if it came while the body ran), and ``overwrite`` is False.
        ValueError: it is no file.
        OSError: the body's own, or there can be no file there.
    """
    target = Path(os.path.realpath(path_of(path)))

    def place(new: Path) -> None:
        if overwrite:
            new.replace(target)
            return
        try:
            _link(new, target)
        except FileExistsError:
            check_file(target, overwrite)

    with _whole(target, lambda: check_file(target, overwrite), place) as new:
        yield new


@contextmanager
def whole_folder(path: str | Path, of: tuple[str, ...], *, overwrite: bool = False) -> Iterator[Path]:
    """Where to make a folder while the body runs, as with ``whole_file``; ``overwrite`` is that of ``check_folder``.

    The old folder keeps its name until the new one takes it, and is removed after that.
    """
    target = Path(os.path.abspath(path_of(path)))

    def place(new: Path) -> None:
        if not (overwrite and target.exists()):
            try:
                new.rename(target)  # never onto a folder that holds something
            except OSError:
                check_folder(target, of, overwrite)
                raise
        elif not _exchanged(new, target):
            target.rename(new.with_name("old"))  # from where it comes back if this process ends here
            new.rename(target)
        with suppress(OSError):
            sync(target.parent)

    with _whole(target, lambda: check_folder(target, of, overwrite), place) as new:
        yield new


def check_file(path: str | Path, overwrite: bool) -> None:
    """Raise ``ValueError`` unless a file can be written there: nothing is there, or a file and ``overwrite``."""
    path = path_of(path)
    if path.exists() and not overwrite:
        raise Exists(f"{path} exists: choose another file, or pass overwrite=True (--overwrite)")
    if path.exists() and not path.is_file():
        raise ValueError(f"{path} is no regular file, and never replaced: choose another name")


def check_folder(path: str | Path, of: tuple[str, ...], overwrite: bool) -> None:
    """Raise ``ValueError`` unless a folder can be written there.

    That is where nothing is, or with ``overwrite`` an empty folder or one that holds a file with a name ``of`` those.
    """
    path = path_of(path)
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        raise ValueError(f"{path} is a file or a link, and never replaced: choose another folder")
    if path.exists() and not overwrite:
        raise Exists(f"{path} exists: choose another folder, or pass overwrite=True (--overwrite)")
    if path.exists() and any(path.iterdir()) and not any(True for name in of for _ in path.glob(name)):
        raise ValueError(
            f"{path} is never replaced, since it holds no {' and no '.join(of)} and so is something else than what "
            f"would be written: choose another folder, or remove it yourself"
        )


@contextmanager
def _whole(target: Path, check: Callable[[], None], place: Callable[[Path], None]) -> Iterator[Path]:
    _clear_stale(target)
    check()
    made = [parent for parent in target.parents if not parent.exists()]
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with _holder(target) as holder:
            yield holder / "new"
            with uninterrupted():
                check()  # another process may have been faster
                place(holder / "new")
    except OSError as error:
        if error.errno is None:  # a sentence already
            raise
        told = type(error)(f"{target} can't be written, and nothing was changed: {error}")
        told.errno = error.errno
        raise told from error
    finally:
        with suppress(OSError):
            for parent in made:
                parent.rmdir()


@contextmanager
def _holder(target: Path) -> Iterator[Path]:
    """A new folder beside ``target``, locked for as long as the body runs: by that others know that it is in use."""
    lock = None
    while lock is None:
        holder = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}.partial")
        holder.mkdir()
        lock = _locked(holder, ours=True)
    try:
        yield holder
    finally:
        with uninterrupted():
            _clear(holder, target)
            os.close(lock)


def _locked(holder: Path, ours: bool) -> int | None:
    """A descriptor that keeps a folder locked; None where another process has it locked, or removed it.

    Where the file system has no locks, the process that made the folder has it.
    """
    handle = os.open(holder / "lock", os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if os.path.samestat(os.fstat(handle), (holder / "lock").stat()):
            return handle
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        if ours:
            return handle
    os.close(handle)
    return None


def _clear_stale(target: Path) -> None:
    """Remove what killed processes left beside ``target``; what a living one is writing stays."""
    name = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    with suppress(OSError):  # no folder yet, or another user's
        for holder in [path for path in target.parent.iterdir() if name.fullmatch(path.name)]:
            with suppress(OSError):
                if (lock := _locked(holder, ours=False)) is not None:
                    _clear(holder, target)
                    os.close(lock)


def _clear(holder: Path, target: Path) -> None:
    """Remove a temporary folder; the old output goes back first, where it lies there and its place is free."""
    old = holder / "old"
    try:
        if old.exists() and not target.exists():
            old.rename(target)
        shutil.rmtree(holder)
    except OSError as error:
        what = f"it holds the old {target}: move it back" if not target.exists() else "remove it yourself"
        warnings.warn(f"{holder} could not be removed ({error}): {what}", stacklevel=2)


def _link(new: Path, target: Path) -> None:
    """Give a file a second name, which has to be free."""
    try:
        os.link(new, target)
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links
        os.close(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
        new.replace(target)


def _exchanged(one: Path, other: Path) -> bool:
    """Swap two names in one step; False where the system or the file system knows no such step."""
    try:
        swap = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if swap(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


@contextmanager
def alone(path: Path) -> Iterator[IO[str]]:
    """A file of lines that several processes write, to read from its beginning; others wait until it is closed."""
    with open(path, "a+", encoding="utf-8", errors="replace") as file:
        fcntl.flock(file, fcntl.LOCK_EX)  # until it is closed
        file.seek(0)
        yield file


def uncut(text: str, head: str) -> str:
    """JSON lines, ``head`` the first, without a last one that a killed process or a full disk left unfinished."""
    before, newline, last = text.rpartition("\n")
    cut = head.startswith(last) if not before else last.startswith("{") and not _is_json(last)
    return before + newline if cut else text


def end_line(path: Path, file: IO[str]) -> None:
    """End a file of JSON lines with a whole one: a line that was cut goes, one without its newline gets it."""
    held = path.read_bytes()
    start = held.rfind(b"\n") + 1
    if start < len(held) and _is_json(held[start:]):
        file.write("\n")
    elif start < len(held):
        file.truncate(start)


def _is_json(text: str | bytes) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return False
    return True


def sync(path: Path) -> None:
    """Flush a file or a folder to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@dataclass(frozen=True)
class _Holding:
    """The handler of Ctrl-C while it is held back."""

    kept: list[int]
    pending: list[int]

    def __call__(self, number: int, _frame: Any) -> None:
        self.kept.append(number)


@contextmanager
def uninterrupted() -> Iterator[list[int]]:
    """Hold Ctrl-C back while the body runs; the list that it yields is filled by one. Raised again at the end.

    A program's own handler is called at the end, and fills no list; a signal that is ignored stays ignored. Inside
    another such block the list is that block's, and what is raised comes at the end of that.
    """
    pending: list[int] = []
    held: list[int] = []
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or before in (None, signal.SIG_IGN):
        yield pending  # signals only ever reach the main thread
        return
    if isinstance(before, _Holding):
        yield before.pending
        return
    kept = pending if before is signal.default_int_handler else held
    signal.signal(signal.SIGINT, _Holding(kept, pending))
    try:
        yield pending
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            signal.raise_signal(signal.SIGINT)
    if pending:
        raise KeyboardInterrupt
