"""What was tried to break it, as a page.

    python -m benchmarks.reliability                          the page, from the figures that are stored
    python -m benchmarks.reliability --inputs 100000          damaged inputs first; goes on where it was stopped
    python -m benchmarks.reliability --inputs 9000 --kinds "headers" "indices"   of these kinds alone
    python -m benchmarks.reliability --try headers 17         one of them again, with what is said of it

The kills come from ``python -m benchmarks.reliability.kills``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.reliability.fuzz import fuzz
from tests.fuzz.attempts import attempt
from tests.fuzz.targets import Desk

RESULTS = Path(__file__).parents[1] / "results"
PAGE, FUZZ, KILLS = (RESULTS / f"reliability{name}" for name in (".md", "-fuzz.json", "-kills.json"))
NAMES = {"crash": "crashes without a sentence", "wrong": "wrong results", "outside": "writes outside the output"}
NAMES["hang"] = "hangs (over 10 s)"


def table(first: str, rows: dict[str, dict[str, Any]]) -> str:
    """Rows of named cells as Markdown."""
    head = list(next(iter(rows.values())))
    cells = [[first, *(NAMES.get(name, name) for name in head)], ["---"] + ["---:"] * len(head)]
    cells += [[name, *(_cell(row[one]) for one in head)] for name, row in rows.items()]
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def _cell(value: Any) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else f"{value:,}"


def summed(rows: dict[str, dict[str, int]]) -> dict[str, dict[str, int]]:
    """The rows, and their sum."""
    return {**rows, "all": {name: sum(row[name] for row in rows.values()) for name in next(iter(rows.values()))}}


def _later(names: str, about: str) -> str:
    return f"Run later, by themselves: {names}. The other rows are of an earlier version of the library. {about}"


def page() -> str:
    """The page that the stored figures make."""
    parts = ["# How sure is it?", "Made by `python -m benchmarks.reliability` from the files beside it."]
    if FUZZ.exists():
        found = json.loads(FUZZ.read_text(encoding="utf-8"))
        parts += [
            "## Damaged files",
            "One to three changes in a sound file (JSON values, names and nesting, headers, bytes), by a random number "
            "that can be tried again. *Accepted* means that the result was right: equal, bit for bit, to one that is "
            "computed without the library, or to what the file says. *Refused* means a `ValueError`, `LookupError` or "
            "`OSError` of one line that the library itself raised. All else is counted as a crash. "
            "`make fuzz` makes the figures, in [reliability-fuzz.json](reliability-fuzz.json).",
            table("kind of file", summed(found["kinds"])),
            found["about"],
            *[_later(kinds, one["about"]) for kinds, one in found.get("later", {}).items()],
        ]
    if KILLS.exists():
        found = json.loads(KILLS.read_text(encoding="utf-8"))
        parts += [
            "## Killed at a random moment",
            "Each command is killed (SIGKILL) at a random moment, looked at, and run again to its end. "
            "`python -m benchmarks.reliability.kills` makes the figures, in "
            "[reliability-kills.json](reliability-kills.json).",
            table("command", summed(found["kills"])),
            *[_later(names, about) for names, about in found.get("later", {}).items()],
            "## A disk, a folder or another job in the way",
            table("situation", found["troubles"]),
            found["about"],
        ]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=0, help="how many, over all kinds")
    parser.add_argument("--kinds", nargs="*", default=(), help="of these kinds alone")
    parser.add_argument("--try", nargs=2, dest="one", metavar=("KIND", "NUMBER"))
    asked = parser.parse_args()
    if asked.one:
        with tempfile.TemporaryDirectory() as folder:
            print(*attempt(Desk(Path(folder)), asked.one[0], int(asked.one[1])))
    else:
        if asked.inputs:
            fuzz(asked.inputs, FUZZ, *asked.kinds)
        PAGE.write_text(page(), encoding="utf-8")
        print(page())
