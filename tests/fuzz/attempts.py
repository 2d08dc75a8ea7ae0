"""One input at a time: damaged, read, and what came of it."""

from __future__ import annotations

import linecache
import os
import shutil
import signal
import traceback
import warnings
from pathlib import Path
from random import Random
from types import FrameType

import surgery
from tests.fuzz.mutations import damaged
from tests.fuzz.targets import TARGETS, Desk

SECONDS = 10  # that one input may take
FINE = ("accepted", "refused")
OUTCOMES = (*FINE, "crash", "wrong", "outside", "hang")
_HOME = str(Path(surgery.__file__).parent)


class Hang(BaseException):
    """The time is up; nothing that is tried catches it."""


def attempt(desk: Desk, kind: str, number: int) -> tuple[str, str]:
    """What comes of one input (of ``OUTCOMES``), and what was said."""
    random, target = Random(f"{kind} {number}"), TARGETS[kind]
    files = dict(desk.files(kind))
    name = random.choice([one for one in files if f"/{one}".endswith(target.which)])
    files[name] = damaged(random, name, files[name])
    place, out = desk.root / "try/deep/in", desk.root / "try/deep/out"
    shutil.rmtree(desk.root / "try", ignore_errors=True)
    for one, raw in files.items():
        (place / one).parent.mkdir(parents=True, exist_ok=True)
        (place / one).write_bytes(raw)
    (out / "sound").mkdir(parents=True)
    allowed = place if target.resumes else out
    before = _seen(desk.root, allowed)
    outcome, said = _used(desk, kind, place, out)
    if outcome in FINE and (now := _seen(desk.root, allowed)) != before:
        return "outside", f"{sorted({*before.items()} ^ {*now.items()})[:3]}"
    return outcome, said


def _used(desk: Desk, kind: str, place: Path, out: Path) -> tuple[str, str]:
    def stop(_: int, __: FrameType | None) -> None:
        raise Hang

    old = signal.signal(signal.SIGALRM, stop)
    signal.alarm(SECONDS)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            TARGETS[kind].use(desk, place, out)
    except Hang:
        return "hang", f"more than {SECONDS} s"
    except AssertionError as error:
        if not traceback.extract_tb(error.__traceback__)[-1].filename.startswith(_HOME):
            return "wrong", _line(error)
        return "crash", _line(error)
    except Exception as error:
        return "refused" if is_sentence(error) else "crash", _line(error)
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, old)
    return "accepted", ""


def is_sentence(error: Exception) -> bool:
    """Whether the library itself raised an error of the kinds it promises, on one line and with some words."""
    if not isinstance(error, ValueError | LookupError | OSError):
        return False
    frame = traceback.extract_tb(error.__traceback__)[-1]
    raised = linecache.getline(frame.filename, frame.lineno or 0).strip().startswith("raise")
    if not (frame.filename.startswith(_HOME) and (raised or (isinstance(error, OSError) and error.filename))):
        return False
    text = str(error.args[0]) if isinstance(error, KeyError) and error.args else str(error)
    return len(text) < 2000 and "\n" not in text and len(text.split()) >= 5


def _line(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    where = f"{Path(frame.filename).name}:{frame.lineno}"
    return f"{type(error).__name__} at {where}: {str(error)[:300]!r}"


def _seen(root: Path, without: Path) -> dict[str, tuple[int, int, int]]:
    """Every file and folder below ``root`` but one folder's, with its inode, size and time of change."""
    found = {}
    for folder, folders, files in os.walk(root):
        folders[:] = [one for one in folders if os.path.join(folder, one) != str(without)]
        found[folder] = 0, 0, 0
        for one in files:
            stat = os.lstat(os.path.join(folder, one))
            found[os.path.join(folder, one)] = stat.st_ino, stat.st_size, stat.st_mtime_ns
    return found
