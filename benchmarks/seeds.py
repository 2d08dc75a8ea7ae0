"""What most scripts ask for: the folders of the lab's seeds, and where to write."""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers.utils import logging as transformers_logging


def asked_for(doc: str | None) -> tuple[list[Path], Path]:
    """The seeds' folders and ``--out``, from the command line; loading a model shows no progress bar from here on."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    asked = parser.parse_args()
    transformers_logging.disable_progress_bar()
    return asked.seeds, asked.out
