"""Evidence: what the analyses have in common. Each prints as a table, and is saved as JSON; JSON is read here, too."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Any

from surgery.files import whole_file


@dataclass(frozen=True)
class Estimate:
    """A number and its interval [low, high], printed with the decimals that the interval justifies.

    The last decimal is the coarsest power of ten, 1 at most, that is no larger than a quarter of the interval's width.

    >>> str(Estimate(0.1349, 0.0751, 0.2123)), str(Estimate(16.72, 8.18, 28.05))
    ('0.13 [0.08, 0.21]', '17 [8, 28]')
    """

    value: float
    low: float
    high: float

    def text(self, sign: str = "") -> str:
        """The number and its interval; with the sign "+" positive numbers have one as well."""
        count = places(self.low, self.high)
        value, low, high = (fixed(one, count, sign) for one in (self.value, self.low, self.high))
        return f"{value} [{low}, {high}]"

    def __str__(self) -> str:
        return self.text()


Cell = str | int | float | Estimate | None


def places(low: float, high: float) -> int:
    """How many decimals a number with that interval has (see ``Estimate``); without a width, or a finite one, 3."""
    width = high - low
    return max(0, math.ceil(-math.log10(width / 4) - 1e-9)) if 0 < width < math.inf else 3


def fixed(x: float, count: int, sign: str = "") -> str:
    """A number with that many decimals and separated thousands; what rounds to zero has no sign."""
    text = f"{x:{sign},.{count}f}"
    return text if text.strip("+-0.") else f"{0:.{count}f}"


def column_texts(cells: Sequence[Cell]) -> list[str]:
    """The cells of a column as printed: all numbers without an interval have the same decimals.

    The largest has three significant digits; zeros at the end that all numbers have are left out, and a number that
    would round to zero keeps its first digit. Where that takes more than six decimals, all are printed like 9.54e-12.

    >>> column_texts([23.86, 0.8495, 1e-7, None]), column_texts([1234567, 2])
    (['23.9', '0.8', '1e-07', ''], ['1,234,567', '2'])
    """
    numbers = [abs(cell) for cell in cells if isinstance(cell, float) and math.isfinite(cell)]
    largest = max(numbers, default=0.0)
    count = 2 - math.floor(math.log10(largest)) if largest else 2
    count = max(0, count)
    while numbers and 0 < count <= 6 and all(fixed(one, count).endswith("0") for one in numbers):
        count -= 1

    def text(cell: Cell) -> str:
        if cell is None:
            return ""
        if isinstance(cell, float) and math.isfinite(cell):
            if count > 6:
                return f"{cell:.2e}" if cell else "0"
            return fixed(cell, count) if not cell or abs(cell) >= 0.5 * 10.0**-count else f"{cell:.1g}"
        return f"{cell:,}" if isinstance(cell, int) and not isinstance(cell, bool) else str(cell)

    return [text(cell) for cell in cells]


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

    @property
    def texts(self) -> tuple[tuple[str, ...], ...]:
        """The rows as printed (see ``column_texts``)."""
        columns = (column_texts([row[at] for row in self.rows]) for at in range(len(self.head)))
        return tuple(zip(*columns, strict=True))

    @property
    def numeric(self) -> tuple[bool, ...]:
        """Which columns hold numbers."""
        return tuple(
            any(isinstance(row[at], int | float | Estimate) for row in self.rows) for at in range(len(self.head))
        )

    def __str__(self) -> str:
        return "\n".join([self.title, *aligned([self.head, *self.texts], [not number for number in self.numeric])])


def aligned(lines: Sequence[Sequence[str]], left: Sequence[bool]) -> list[str]:
    """Lines of cells as text, each column as wide as its widest cell, to the left or to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    sides = [str.ljust if flag else str.rjust for flag in left]
    return [
        "  ".join(side(c, width) for side, c, width in zip(sides, line, widths, strict=True)).rstrip() for line in lines
    ]


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


def json_text(value: Any, indent: int = 1) -> str:
    """A value as JSON with an indent; a list that fits into a line stands in one, a longer one of numbers in few.

    Raises:
        ValueError: NaN or an infinite number, for which JSON has no name.
    """

    def written(one: Any, depth: int) -> str:
        flat = json.dumps(one, allow_nan=False)
        start, end = "\n" + " " * indent * (depth + 1), "\n" + " " * indent * depth
        if isinstance(one, Mapping) and one:
            inner = [f"{json.dumps(str(key))}: {written(held, depth + 1)}" for key, held in one.items()]
            return f"{{{start}{f',{start}'.join(inner)}{end}}}"
        if not isinstance(one, list | tuple) or len(flat) <= 80:
            return flat
        if any(isinstance(held, list | tuple | Mapping | str) for held in one):
            return f"[{start}{f',{start}'.join(written(held, depth + 1) for held in one)}{end}]"
        return f"[{start}{start.join(textwrap.wrap(flat[1:-1], 110))}{end}]"

    return written(value, 0)


def write_json(evidence: Any, path: str | Path) -> None:
    """Write evidence as a JSON file, with the name of its class."""
    told = {"kind": type(evidence).__name__, **as_json(evidence)}
    with whole_file(path) as new:
        new.write_text(json_text(told) + "\n", encoding="utf-8")


LARGEST, DEEPEST = 1 << 25, 64  # bytes of one JSON text (an index of 200 000 tensors has as many), and its levels


def read_json(path: Path, kind: Any = object) -> Any:
    """What a JSON file holds (see ``json_of``)."""
    with open(path, "rb") as file:
        return json_of(file.read(LARGEST + 1), str(path), kind)


def json_of(text: str | bytes, what: str, kind: Any = object) -> Any:
    """What a JSON text holds: others wrote it, so all of it is checked before any of it is used.

    A kind is a type (``int`` is a natural number, ``float`` a finite one, ``object`` anything); ``[kind]``, a list of
    one kind; ``{str: kind}``, an object whose values are of one kind; or ``{"name": kind, "other?": kind}``, an object
    with these names, of which those with a question mark may be left out, and others may be added.

    Raises:
        ValueError: it is no JSON, too large, too deep, or of another kind; the sentence begins with ``what``.

    >>> json_of('{"budget": 0.5, "ids": [1, 2.5]}', "a.json", {"budget": float, "ids": [int]})
    Traceback (most recent call last):
    ...
    ValueError: a.json: "ids", 1 is 2.5, expected a natural number
    """
    if len(text) > LARGEST:
        raise ValueError(f"{what} is too large: more than {LARGEST >> 20} MiB of JSON")
    try:
        value = json.loads(text if isinstance(text, str) else text.decode())
        json.dumps(value, ensure_ascii=False).encode()  # half of a surrogate pair can be read, but never printed
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{what} is not JSON: {error}") from error
    level = [value]
    for _ in range(DEEPEST):
        inner = (one.values() if isinstance(one, dict) else one for one in level if isinstance(one, dict | list))
        level = [one for some in inner for one in some]
    if level:
        raise ValueError(f"{what} is nested more than {DEEPEST} levels deep")
    if found := _misfit(value, kind):
        *keys, why = found
        place = ", ".join(json.dumps(key) for key in keys)
        raise ValueError(f"{what}: {place or 'the whole'} is {why}")
    return value


def _misfit(value: Any, kind: Any) -> list[Any]:
    """The keys that lead to the first value of another kind, and what it is; nothing where all is as it should be."""
    name, fits = _KINDS[type(kind) if isinstance(kind, list | dict) else kind]
    if not fits(value):
        return [f"{_shown(value)}, expected {name}"]
    pairs: Iterable[tuple[Any, Any, Any]]
    if not isinstance(kind, list | dict):
        return []
    if isinstance(kind, list):
        pairs = ((at, one, kind[0]) for at, one in enumerate(value))
    elif str in kind:
        pairs = ((key, one, kind[str]) for key, one in value.items())
    else:
        if missing := [name for name in kind if name[-1] != "?" and name not in value]:
            return [missing[0], "missing"]
        named = {name.rstrip("?"): one for name, one in kind.items()}
        pairs = ((name, value[name], one) for name, one in named.items() if name in value)
    for key, one, inner in pairs:
        if found := _misfit(one, inner):
            return [key, *found]
    return []


_KINDS: dict[Any, tuple[str, Callable[[Any], bool]]] = {
    object: ("anything", lambda _: True),
    str: ("a text", lambda one: isinstance(one, str)),
    int: ("a natural number", lambda one: type(one) is int and 0 <= one < 1 << 63),
    float: ("a finite number", lambda one: type(one) in (int, float) and abs(one) < 1e100),
    dict: ("an object", lambda one: isinstance(one, dict)),
    list: ("a list", lambda one: isinstance(one, list)),
}


def _shown(value: Any) -> str:
    """A value on a few characters of one line; containers by what they are."""
    if isinstance(value, dict | list):
        return f"{_KINDS[type(value)][0]} of {len(value)}"
    text = json.dumps(value) if not isinstance(value, int) or abs(value) < 1 << 64 else "a number of many digits"
    return text if len(text) <= 40 else f"{text[:40]}..."


def briefly(error: Exception) -> str:
    """How another library's error begins, on one line, with its kind: some say no more than a key, others go on."""
    said = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
    return textwrap.shorten(said, 240, placeholder=" ...")
