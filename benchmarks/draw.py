"""Draw a sweep's dose-response: ``python -m benchmarks.draw sweep.jsonl picture.png --metric math``."""

from __future__ import annotations

import argparse
from pathlib import Path

from surgery.measure import load_sweep
from surgery.plots.sweeps import dose_response


def main() -> None:
    """Read, draw, save."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sweep", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--metric", required=True)
    asked = parser.parse_args()
    figure = dose_response(load_sweep(asked.sweep, asked.metric)).figure
    figure.savefig(asked.picture)
    print(f"wrote {asked.picture}")


if __name__ == "__main__":
    main()
