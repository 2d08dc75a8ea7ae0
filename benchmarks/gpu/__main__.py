"""All that needs a GPU, in one command: ``python -m benchmarks.gpu --out FOLDER [--rehearse]``.

The parts run one after the other, the most important first, each in a process of its own and within its time, until
``--minutes`` are over. A part that came to its end, and whose checks held, is not done again (``FOLDER/PART.json``), so
an interrupted run goes on where it stopped; what a stopped part had found is kept. Every part prints its table as it
ends, and ``FOLDER/gpu.md`` holds all of them. ``--rehearse`` runs the same code without a GPU: tiny shapes, kernels in
Triton's interpreter, every check; its times mean nothing.

The exit code is 1 where a part failed or a check did not hold.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from benchmarks.hardware import statement

PARTS = ("rollback", "exact", "scores", "profile")
NAMES = {
    "rollback": "rollback, undo, a sweep's step",
    "exact": "the same bits and verdicts as on the CPU",
    "scores": "what choosing costs",
    "profile": "where the time goes",
}
SECONDS = {"rollback": 110, "exact": 110, "scores": 150, "profile": 60}  # at most, so that the others have theirs
END = "it came to its end"


def measured(name: str, out: Path, rehearse: bool) -> bool:
    """Run one part in this process; whether it came to its end and all of its checks held.

    What it has found so far is kept each time that it yields, so that a part that fails or is stopped leaves that.
    """
    part, start, found = import_module(f"benchmarks.gpu.{name}"), time.perf_counter(), None
    missing: str | None = END
    try:
        for found in part.run(torch.device("cpu" if rehearse else "cuda"), rehearse):
            keep(name, out, rehearse, start, found, missing)
        missing = None
    except Exception as error:
        traceback.print_exc()
        missing = f"{END} ({type(error).__name__}: {str(error).partition(chr(10))[0][:200]})"
    if found is None:
        return False
    print(section(name, keep(name, out, rehearse, start, found, missing)), flush=True)
    return missing is None and all(found["checks"].values())


def keep(
    name: str, out: Path, rehearse: bool, start: float, found: dict[str, Any], missing: str | None = None
) -> dict[str, Any]:
    """Write what a part has found; ``missing`` is a check that does not hold yet."""
    found = found | {"checks": found["checks"] | ({missing: False} if missing else {})}
    kept = {"rehearse": rehearse, "statement": said(rehearse), "seconds": time.perf_counter() - start, "found": found}
    temporary = out / f"{name}.part"
    temporary.write_text(json.dumps(kept), encoding="utf-8")
    os.replace(temporary, out / f"{name}.json")
    return kept


def said(rehearse: bool) -> str:
    """Hardware, versions and date; a rehearsal says that it is one."""
    return statement() + ("; **a rehearsal on the CPU: its times mean nothing**" if rehearse else "")


def section(name: str, kept: dict[str, Any]) -> str:
    """One part as a piece of the page: its table, and its checks in a sentence."""
    part = import_module(f"benchmarks.gpu.{name}")
    checks: dict[str, bool] = kept["found"]["checks"]
    wrong = [check for check, held in checks.items() if not held]
    told = f"{len(checks)} checks held." if not wrong else "**These checks did not hold**: " + "; ".join(wrong) + "."
    return f"## {part.NAME}\n\n{part.table(kept['found'])}\n\n{told} {kept['seconds']:.0f} s.\n"


def held(out: Path, rehearse: bool) -> dict[str, dict[str, Any]]:
    """The parts that are done; what a rehearsal found is not what a GPU found."""
    found = {name: json.loads((out / f"{name}.json").read_text()) for name in PARTS if (out / f"{name}.json").exists()}
    return {name: kept for name, kept in found.items() if kept["rehearse"] == rehearse}


def page(kept: dict[str, dict[str, Any]]) -> str:
    """All parts that are done, those that ran together under one statement."""
    told = " ".join(dict.fromkeys(one["statement"] for one in kept.values()))
    head = f"# On the GPU\n\nWritten by `python -m benchmarks.gpu`. {told}\n"
    missing = [NAMES[name] for name in PARTS if name not in kept]
    tail = [f"Not measured: {'; '.join(missing)}.\n"] if missing else []
    return "\n".join([head, *(section(name, one) for name, one in kept.items()), *tail])


def within(seconds: float, command: list[str], environment: dict[str, str]) -> int | None:
    """The exit code of a command; None where it had to be stopped, with all that it started."""
    child = subprocess.Popen(command, env=environment, start_new_session=True)
    try:
        return child.wait(seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        if child.poll() is None:
            os.killpg(child.pid, signal.SIGKILL)
            child.wait()


def main() -> None:
    """Run what is missing, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="where rows and the page go")
    parser.add_argument("--rehearse", action="store_true", help="tiny shapes on the CPU, kernels interpreted")
    parser.add_argument("--minutes", type=float, default=6.0, help="no part goes on beyond this")
    parser.add_argument("--part", choices=PARTS, help="this one alone, in this process")
    asked = parser.parse_args()
    asked.out.mkdir(parents=True, exist_ok=True)
    if asked.part:
        sys.exit(0 if measured(asked.part, asked.out, asked.rehearse) else 1)
    if not asked.rehearse and not torch.cuda.is_available():
        sys.exit("error: there is no GPU here: --rehearse runs every part on the CPU, with tiny shapes")
    began, fine = time.perf_counter(), True
    environment = os.environ | ({"TRITON_INTERPRET": "1"} if asked.rehearse else {})
    for name in PARTS:
        done = held(asked.out, asked.rehearse)
        if name in done and all(done[name]["found"]["checks"].values()):
            print(f"{NAMES[name]}: measured already", flush=True)
            continue
        left = 60 * asked.minutes - (time.perf_counter() - began)
        if left < 10:
            print(f"{NAMES[name]}: no time is left", flush=True)
            fine = False
            continue
        left = left if asked.rehearse else min(left, SECONDS[name])
        print(f"{NAMES[name]}: at most {left:.0f} s", flush=True)
        command = [sys.executable, "-m", "benchmarks.gpu", "--out", str(asked.out), "--part", name]
        code = within(left, command + ["--rehearse"] * asked.rehearse, environment)
        if code is None:
            print(f"{NAMES[name]}: stopped, it took too long", flush=True)
        fine &= code == 0
        (asked.out / "gpu.md").write_text(page(held(asked.out, asked.rehearse)), encoding="utf-8")
    print(f"wrote {asked.out / 'gpu.md'}")
    sys.exit(0 if fine else 1)


if __name__ == "__main__":
    main()
