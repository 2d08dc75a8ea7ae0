"""Draw a sweep's dose-response: ``python -m benchmarks.draw sweep.jsonl picture.png --metric math``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from surgery.measure.rows import EARLIER, LATER, Row, Sweep, judged
from surgery.plots.sweeps import dose_response


def read(path: Path, metric: str) -> Sweep:
    """The sweep that a JSON-lines file holds, with recoveries for the given metric."""
    rows = [Row(**line) for line in map(json.loads, path.read_text().splitlines()[1:])]
    earlier, later = (next(row for row in rows if row.selector == name) for name in (EARLIER, LATER))
    return Sweep(metric, tuple(judged(rows, earlier, later, metric)))


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--metric", required=True)
    asked = parser.parse_args()
    figure = dose_response(read(asked.sweep, asked.metric)).figure
    figure.savefig(asked.picture)
    print(f"wrote {asked.picture}")


if __name__ == "__main__":
    main()
