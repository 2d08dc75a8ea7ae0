"""Files and folders appear whole or not at all: with two writers, after a kill, an interrupt or a failing system."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
import signal
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest

from surgery import files
from surgery.files import Exists, check_folder, path_of, whole_file, whole_folder

OF = ("surgery.json", "*.safetensors")


class Kind:
    """A kind of output: how it is written, and what it holds."""

    def __init__(self, folder: bool) -> None:
        self.folder = folder

    def whole(self, path: Path, overwrite: bool = False) -> AbstractContextManager[Path]:
        return whole_folder(path, OF, overwrite=overwrite) if self.folder else whole_file(path, overwrite=overwrite)

    def fill(self, new: Path, text: str) -> None:
        if self.folder:
            new.mkdir()
            new /= "surgery.json"
        new.write_text(text)

    def write(self, path: Path, text: str, overwrite: bool = False) -> None:
        with self.whole(path, overwrite) as new:
            self.fill(new, text)

    def read(self, path: Path) -> str:
        return (path / "surgery.json" if self.folder else path).read_text()


@pytest.fixture(params=["file", "folder"])
def kind(request: pytest.FixtureRequest) -> Kind:
    return Kind(request.param == "folder")


def no_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "_exchanged", lambda one, other: False)


def no_links(monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: Any) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)


def no_locks(monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(*_: Any) -> None:
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)


SYSTEMS: dict[str, Callable[[pytest.MonkeyPatch], None]] = {
    "this one": lambda _: None, "no exchange": no_exchange, "no hard links": no_links, "no locks": no_locks,
}  # fmt: skip


@pytest.fixture(params=SYSTEMS)
def system(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    SYSTEMS[request.param](monkeypatch)
    return str(request.param)


def test_it_appears_at_the_end_and_replaces_only_where_asked(kind: Kind, system: str, tmp_path: Path) -> None:
    out = tmp_path / "a/b/out"
    with kind.whole(out) as new:
        kind.fill(new, "first")
        assert not out.exists()
    with pytest.raises(Exists, match="out exists: choose another"):
        kind.write(out, "second")
    assert kind.read(out) == "first"
    with kind.whole(out, overwrite=True) as new:
        kind.fill(new, "third")
        assert kind.read(out) == "first"
    assert kind.read(out) == "third"
    assert os.listdir(out.parent) == ["out"]


@pytest.mark.parametrize("slow_overwrites", [False, True])
@pytest.mark.parametrize("fast_overwrites", [False, True])
def test_two_writers_of_one_new_output(
    kind: Kind, system: str, tmp_path: Path, slow_overwrites: bool, fast_overwrites: bool
) -> None:
    """The one that is done first has it; the other replaces it only where that was asked for. Both prints are true."""
    out = tmp_path / "out"

    def both() -> None:
        with kind.whole(out, slow_overwrites) as new:
            kind.fill(new, "slow")
            kind.write(out, "fast", fast_overwrites)

    if slow_overwrites:
        both()
    else:
        with pytest.raises(Exists):
            both()
    assert kind.read(out) == ("slow" if slow_overwrites else "fast")
    assert os.listdir(tmp_path) == ["out"]


def test_the_output_comes_in_the_last_moment(kind: Kind, system: str, tmp_path: Path, monkeypatch: Any) -> None:
    """Between the last look and the rename: the rename itself does not replace."""
    out, check = tmp_path / "out", "check_folder" if kind.folder else "check_file"
    real, looks = getattr(files, check), []

    def late(*args: Any) -> None:
        real(*args)
        looks.append(args)
        if len(looks) == 2:
            out.mkdir() if kind.folder else None
            (out / "surgery.json" if kind.folder else out).write_text("theirs")

    monkeypatch.setattr(files, check, late)
    with pytest.raises(Exists):
        kind.write(out, "ours")
    assert kind.read(out) == "theirs"
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "gone"), KeyboardInterrupt(), ValueError("no")])
def test_a_failing_body_leaves_the_old_output_and_nothing_else(
    kind: Kind, system: str, tmp_path: Path, failure: BaseException
) -> None:

    def fail(out: Path) -> None:
        with kind.whole(out, overwrite=True) as new:
            kind.fill(new, "half")
            raise failure

    for out, there in ((tmp_path / "out", True), (tmp_path / "new/parents/out", False)):
        if there:
            kind.write(out, "old")
        with pytest.raises(type(failure)):
            fail(out)
        assert not there or kind.read(out) == "old"
        assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("failure", [OSError(errno.EIO, "gone"), KeyboardInterrupt()])
def test_a_failure_between_two_renames_puts_the_old_folder_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failure: BaseException
) -> None:
    no_exchange(monkeypatch)
    out, real = tmp_path / "out", Path.rename
    Kind(True).write(out, "old")

    def rename(self: Path, to: Path) -> Path:
        if self.name == "new":
            raise failure
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(type(failure)):
        Kind(True).write(out, "new", overwrite=True)
    assert Kind(True).read(out) == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_after_the_rename_finds_everything_done(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    out, real = tmp_path / "out", shutil.rmtree
    kind.write(out, "old")

    def rmtree(*args: Any, **named: Any) -> None:
        signal.raise_signal(signal.SIGINT)
        real(*args, **named)

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.raises(KeyboardInterrupt):
        kind.write(out, "new", overwrite=True)
    assert kind.read(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_ctrl_c_between_two_renames_waits_for_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, interruptible: None
) -> None:
    no_exchange(monkeypatch)
    out, real = tmp_path / "out", Path.rename
    Kind(True).write(out, "old")

    def rename(self: Path, to: Path) -> Path:
        signal.raise_signal(signal.SIGINT)
        return real(self, to)

    monkeypatch.setattr(Path, "rename", rename)
    with pytest.raises(KeyboardInterrupt):
        Kind(True).write(out, "new", overwrite=True)
    assert Kind(True).read(out) == "new"
    assert os.listdir(tmp_path) == ["out"]


def test_an_old_folder_that_cannot_be_removed_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The new one is in its place, so that is no error."""
    out = tmp_path / "out"
    Kind(True).write(out, "old")

    def rmtree(path: Path) -> None:
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(shutil, "rmtree", rmtree)
    with pytest.warns(UserWarning, match=r"/\.out\..*\.partial could not be removed .*: remove it yourself"):
        Kind(True).write(out, "new", overwrite=True)
    assert Kind(True).read(out) == "new"
    monkeypatch.undo()
    Kind(True).write(out, "newer", overwrite=True)
    assert os.listdir(tmp_path) == ["out"]


def killed(action: Callable[[], None]) -> None:
    """Do it in a child process, which ends itself by SIGKILL on the way."""
    child = os.fork()
    if child == 0:
        try:
            action()
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def suicide(*_: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_the_next_run_removes_what_killed_ones_left_and_no_living_one(kind: Kind, tmp_path: Path) -> None:
    out, other = tmp_path / "out", tmp_path / "out.b"

    def die(path: Path) -> None:
        with kind.whole(path) as new:
            kind.fill(new, "half")
            suicide()

    killed(lambda: die(out))
    killed(lambda: die(other))
    assert len(os.listdir(tmp_path)) == 2
    with kind.whole(out) as alive:
        kind.fill(alive, "alive")
        (left,) = tmp_path.glob(".out.b.*")
        assert sorted(tmp_path.iterdir()) == sorted([left, alive.parent])
        killed(lambda: die(out))
        kind.write(out, "quick", overwrite=True)
        assert sorted(tmp_path.iterdir()) == sorted([left, alive.parent, out])
        shutil.rmtree(out) if kind.folder else out.unlink()
    assert kind.read(out) == "alive"
    kind.write(other, "b")
    assert sorted(os.listdir(tmp_path)) == ["out", "out.b"]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_kill_between_two_renames_loses_no_output(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a system can't exchange two names the old folder has none for a moment; the next run gives it back."""
    out, kind = tmp_path / "out", Kind(True)
    kind.write(out, "old")

    def die() -> None:
        no_exchange(monkeypatch)
        real = Path.rename
        monkeypatch.setattr(Path, "rename", lambda self, to: suicide() if self.name == "new" else real(self, to))
        kind.write(out, "new", overwrite=True)

    killed(die)
    assert not out.exists()
    with pytest.raises(Exists):
        kind.write(out, "another")
    assert kind.read(out) == "old"
    assert os.listdir(tmp_path) == ["out"]


def test_without_locks_nothing_of_others_is_removed(
    kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_locks(monkeypatch)
    with kind.whole(tmp_path / "out") as new:
        kind.fill(new, "one")
        kind.write(tmp_path / "out", "two")
        assert new.exists()
        (tmp_path / "out").rename(tmp_path / "moved")
    assert kind.read(tmp_path / "out") == "one"


@pytest.mark.parametrize("held", [["notes.txt"], ["deep/model.safetensors"], [".git/config", "model.bin"], [".hidden"]])
def test_a_folder_that_is_something_else_is_never_replaced(tmp_path: Path, held: list[str]) -> None:
    out = tmp_path / "out"
    for name in held:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("mine")
    with pytest.raises(ValueError, match=r"out is never replaced, .* no surgery.json and no \*.safetensors"):
        Kind(True).write(out, "new", overwrite=True)
    assert all((out / name).read_text() == "mine" for name in held)
    assert os.listdir(tmp_path) == ["out"]


def test_an_empty_folder_and_a_checkpoint_are_replaced(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    Kind(True).write(out, "one", overwrite=True)
    (out / "surgery.json").rename(out / "model-00001-of-00002.safetensors")
    check_folder(out, OF, True)
    Kind(True).write(out, "two", overwrite=True)
    assert Kind(True).read(out) == "two"


def test_a_link_to_a_file_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk/file")
    for text in ("one", "two"):
        Kind(False).write(tmp_path / "link", text, overwrite=True)
        assert (tmp_path / "link").is_symlink()
        assert (tmp_path / "disk/file").read_text() == text
    assert sorted(os.listdir(tmp_path)) == ["disk", "link"]


def test_a_folder_or_a_device_is_never_replaced_by_a_file(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for name in ("pipe", "folder"):
        with pytest.raises(ValueError, match=f"{name} is no regular file, and never replaced"):
            Kind(False).write(tmp_path / name, "text", overwrite=True)


def test_an_error_of_the_system_names_the_output(kind: Kind, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(OSError, match=r"file/out can't be written, and nothing was changed: .*(Not a dir|File exists)"):
        kind.write(tmp_path / "file/out", "new")
    with pytest.raises(OSError, match=r"can't be written, and nothing was changed: .*File name too long"):
        kind.write(tmp_path / ("x" * 250), "new")
    assert os.listdir(tmp_path) == ["file"]


def test_the_home_directory(kind: Kind, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    kind.write(Path("~/a/out"), "text")
    assert kind.read(tmp_path / "a/out") == "text"
    assert path_of("~/x") == tmp_path / "x"
    assert str(path_of("~nobody-of-that-name/x")) == "~nobody-of-that-name/x"
    assert str(path_of("a~/x")) == "a~/x"
