"""The processes that torchrun starts: one of them prints, and what one has said the others leave unsaid."""

from __future__ import annotations

import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path

from surgery.cli.options import err

_REPORT = "TORCHELASTIC_ERROR_FILE"  # where torchrun reads why a process has failed: .../LOCAL_RANK/error.json
_PATIENCE, _ENDING = 2.0, 0.5  # seconds: for others that fail alike, and for one of them to end


def started() -> bool:
    """Whether torchrun has started this process."""
    return _REPORT in os.environ


@contextmanager
def first_alone() -> Iterator[None]:
    """While the body runs, the first process alone prints, whoever it is that prints (also a wrong option's usage)."""
    if not started() or os.environ.get("RANK") == "0":
        yield
        return
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        yield


def say(text: str, code: int) -> int:
    """Print why the command ends, unless another process on this machine has said so; gives the exit code.

    Under torchrun that of a process which leaves it unsaid is 0, since torchrun reports every other code.
    """
    if started() and not _unsaid(text):
        return _last(0)
    err.print(text, markup=False)
    return _told(text, code)


def left(code: int) -> int:
    """The exit code where the first process has said why: of torchrun's other processes on a machine 0."""
    if started() and code and os.environ["LOCAL_RANK"] == "0":
        return _told("see what is printed above", code)
    return _last(0) if started() else code


def follows() -> bool:
    """Whether another process on this machine has said why it ended, so that errors of a connection follow from it."""
    return started() and any(_home().glob("said-*"))


def leave() -> None:
    """End what the processes had in common, where there was something."""
    distributed = sys.modules.get("torch.distributed")
    if started() and distributed is not None and distributed.is_initialized():
        distributed.destroy_process_group()


def _home() -> Path:
    """A folder that torchrun made for all processes of this machine."""
    return Path(os.environ[_REPORT]).parent.parent


def _unsaid(text: str) -> bool:
    try:
        (_home() / f"said-{hashlib.sha256(text.encode()).hexdigest()[:16]}").touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _told(text: str, code: int) -> int:
    """The exit code; torchrun's own report will give the text."""
    if started():
        told = {"message": text, "extraInfo": {"py_callstack": text, "timestamp": str(int(time.time()))}}
        Path(os.environ[_REPORT]).write_text(json.dumps({"message": told}), encoding="utf-8")
    return _last(code)


def _last(code: int) -> int:
    """The exit code; one that is not 0 after the others, since torchrun stops and reports those that still run."""
    if started():
        (_home() / f"left-{os.environ['LOCAL_RANK']}").touch()
        end = time.monotonic() + _PATIENCE
        while code and time.monotonic() < end and len([*_home().glob("left-*")]) < int(os.environ["LOCAL_WORLD_SIZE"]):
            time.sleep(0.05)
        time.sleep(_ENDING if code else 0)
    return code
