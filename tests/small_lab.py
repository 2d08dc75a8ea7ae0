"""A seed of the lab for tests: its own checkpoints, and the first of its prompts."""

from __future__ import annotations

import shutil
from pathlib import Path

SEED0 = Path(__file__).parent.parent / "benchmarks/lab/seed0"


def copy_seed0(folder: Path, *, evaluation: int, calibration: int) -> Path:
    """Copy seed 0 to ``folder``, with that many of each domain's 256 and 128 prompts."""
    shutil.copytree(SEED0, folder)
    for kind, count in (("evaluation", evaluation), ("calibration", calibration)):
        for file in (folder / "data").glob(f"*.{kind}.jsonl"):
            lines = file.read_text(encoding="utf-8").splitlines(keepends=True)
            file.write_text("".join(lines[:count]), encoding="utf-8")
    return folder
