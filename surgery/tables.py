"""Evidence: what the analyses have in common. Each prints as a table, and is saved as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

Cell = str | int | float | None


@dataclass(frozen=True)
class Table:
    """Rows of one kind under a head; prints with aligned columns.

    Args:
        title: what the rows are, in a few words.
        head: the columns' names, with units in brackets.
        rows: one cell per column; None prints as an empty cell.
    """

    title: str
    head: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        if wrong := [row for row in self.rows if len(row) != len(self.head)]:
            raise ValueError(f"{self.title}: a row of {len(wrong[0])} cells under {len(self.head)} columns")

    def __str__(self) -> str:
        lines = [self.head, *(tuple(map(cell_text, row)) for row in self.rows)]
        numbers = [any(isinstance(row[at], int | float) for row in self.rows) for at in range(len(self.head))]
        return "\n".join([self.title, *aligned(lines, [not number for number in numbers])])


def aligned(lines: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Lines of cells as text, each column as wide as its widest cell, to the left or to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if flag else str.rjust for flag in left]
    return [
        "  ".join(side(c, width) for side, c, width in zip(sides, line, widths, strict=True)).rstrip() for line in lines
    ]


def cell_text(cell: Cell) -> str:
    """A cell as printed: a float with four significant digits, an integer with separated thousands.

    >>> cell_text(0.123456), cell_text(1234567), cell_text(1e-7), cell_text(None)
    ('0.1235', '1,234,567', '1e-07', '')
    """
    if cell is None:
        return ""
    if isinstance(cell, bool | str):
        return str(cell)
    return f"{cell:,}" if isinstance(cell, int) else f"{cell:.4g}"


def as_json(evidence: Any) -> Any:
    """Frozen dataclasses, mappings and sequences as plain JSON values; NaN and infinite numbers as None.

    Fields whose names begin with an underscore are no evidence, and are left out.
    """
    if is_dataclass(evidence) and not isinstance(evidence, type):
        return {one.name: as_json(getattr(evidence, one.name)) for one in fields(evidence) if one.name[0] != "_"}
    if isinstance(evidence, Mapping):
        return {str(key): as_json(value) for key, value in evidence.items()}
    if isinstance(evidence, tuple | list):
        return [as_json(value) for value in evidence]
    if isinstance(evidence, float) and not math.isfinite(evidence):
        return None
    return evidence


def write_json(evidence: Any, path: str | Path) -> None:
    """Write evidence as a JSON file, with the name of its class."""
    told = {"kind": type(evidence).__name__, **as_json(evidence)}
    Path(path).write_text(json.dumps(told, indent=1, allow_nan=False) + "\n", encoding="utf-8")
