"""What most scripts share: the folders of the lab's seeds from the command line, and a report that is written."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

RESULTS = Path("benchmarks/results")


def asked_for(doc: str | None) -> tuple[list[Path], Path]:
    """The seeds' folders and ``--out``; from here on one thread is used and loading shows no progress."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("seeds", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, default=RESULTS)
    asked = parser.parse_args()
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    asked.out.mkdir(parents=True, exist_ok=True)
    return asked.seeds, asked.out


def write(out: Path, name: str, text: str) -> None:
    """A report as ``name.md``, and on the screen."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)
