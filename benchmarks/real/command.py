"""What every command of the real lab begins with: where the lab is, where results go, one thread."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from transformers.utils import logging as transformers_logging

from benchmarks.seeds import RESULTS


def command(text: str | None) -> argparse.ArgumentParser:
    """A parser with ``--lab`` and ``--out``; from now on one thread, and no progress bars of transformers."""
    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    parser = argparse.ArgumentParser(description=text, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--lab", type=Path, default=Path("runs/real"), help="where checkpoints and data lie")
    parser.add_argument("--out", type=Path, default=RESULTS, help="where pages and rows go")
    return parser
