"""How much memory this process takes while something runs."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def resident() -> tuple[float, float]:
    """Megabytes of this process that lie in no file, and all."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").split("\n")
    found = {line.split(":")[0]: int(line.split()[1]) / 1024 for line in lines if line.startswith(("RssAnon", "VmRSS"))}
    return found["RssAnon"], found["VmRSS"]


@contextmanager
def peak() -> Iterator[list[float]]:
    """The peaks of both while the body runs, above the start's, in a list of two."""
    start, done = resident(), threading.Event()
    found = [0.0, 0.0]

    def watch() -> None:
        while not done.wait(0.01):
            found[:] = [max(known, now - one) for known, now, one in zip(found, resident(), start, strict=True)]

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield found
    finally:
        done.set()
        thread.join()
