"""Damaged inputs by the ten thousand (``tests/fuzz``), in processes that are killed where an input takes for ever."""

from __future__ import annotations

import hashlib
import json
import logging
import multiprocessing
import resource
import tempfile
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.hardware import statement
from tests.fuzz.attempts import FINE, OUTCOMES, SECONDS, attempt
from tests.fuzz.targets import TARGETS, Desk

ROOT = Path(__file__).parents[2]
CHUNK, MEMORY = 500, 32 << 30  # inputs of a kind in turn; bytes of address space
_fork = multiprocessing.get_context("fork")


def fuzz(inputs: int, results: Path, *kinds: str) -> dict[str, Any]:
    """Try so many inputs, evenly over the kinds, and count what came of them.

    The file is written after every chunk, and a run goes on where the last one with the same code ended. Of some kinds
    alone it is a run of its own (``later``, with its code), whose rows stand beside those that are stored.
    """
    found: dict[str, Any] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else {}
    none = {kind: dict.fromkeys(("inputs", *OUTCOMES), 0) for kind in kinds or TARGETS}
    if kinds:
        later = found.setdefault("later", {}).setdefault(", ".join(kinds), {})
        if later.get("code") != _code():
            later["code"], found["kinds"] = _code(), found["kinds"] | none
            found["found"] = [one for one in found["found"] if one[0] not in kinds]
    elif found.get("code") != _code():
        found = {"code": _code(), "kinds": none, "found": []}
    each = -(-inputs // len(none))
    logging.disable(logging.CRITICAL)  # transformers tells of every damaged file
    with tempfile.TemporaryDirectory() as folder:
        desk = Desk(Path(folder))
        for start in range(0, each, CHUNK):
            for kind, counts in ((kind, found["kinds"][kind]) for kind in none):
                stop = min(each, start + CHUNK)
                for number, outcome, said in _tried(desk, kind, max(start, counts["inputs"]), stop):
                    counts["inputs"] += 1
                    counts[outcome] += 1
                    if outcome not in FINE:
                        found["found"].append([kind, number, outcome, said])
                        print(f"{kind} {number}: {outcome}, {said}", flush=True)
                if stop > start:
                    (later if kinds else found)["about"] = statement()
                    results.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
            print(f"{min(each, start + CHUNK)} of {each} inputs of each kind", flush=True)
    return found


def _tried(desk: Desk, kind: str, start: int, stop: int) -> Iterator[tuple[int, str, str]]:
    number = start
    desk.files(kind)  # made here, once, and not by every process
    while number < stop:
        reader, writer = _fork.Pipe(duplex=False)
        child = _fork.Process(target=_work, args=(desk, kind, number, stop, writer))
        child.start()
        writer.close()
        lost = False
        while number < stop and not lost:
            outcome = "hang", "no signal reached it"
            try:
                lost = not reader.poll(3 * SECONDS)
                outcome = outcome if lost else reader.recv()
            except EOFError:
                lost, outcome = True, ("crash", "the process ended")
            yield number, *outcome
            number += 1
        child.kill()
        child.join()


def _work(desk: Desk, kind: str, start: int, stop: int, writer: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for number in range(start, stop):
        writer.send(attempt(desk, kind, number))


def _code() -> str:
    """What identifies the library and the targets: figures of another are not added to these."""
    digest = hashlib.sha256()
    for path in sorted([*(ROOT / "surgery").rglob("*.py"), *(ROOT / "tests/fuzz").glob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]
