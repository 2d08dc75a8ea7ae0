"""The report: one HTML page that needs no network, with its figures inside, and everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from surgery.report.tokens import MOVED, Tokens, percent
from surgery.tables import Cell, Estimate, Table

if TYPE_CHECKING:
    from matplotlib.axes import Axes

TEMPLATE = "page.html.jinja"  # beside this module
_MANY = 8  # columns of a table up to which it has room to spare
_SHOWN = 12  # rows of a table up to which it is not folded


@dataclass(frozen=True)
class Figure:
    """A drawing, and its caption, which is also the text for readers who can't see it."""

    axes: Axes
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Args:
        title: a few words.
        finding: what was found, in a sentence or two.
        definition: what the numbers are, and the source of the definition.
        columns: what each column of its tables means, by the column's name.
        figures, tables, tokens: what it shows.
    """

    title: str
    finding: str
    definition: str
    columns: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    tokens: Tokens | None = None


def page(
    title: str, verdict: Iterable[str], sections: Iterable[Section], skipped: Mapping[str, str], made: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        title: of the page.
        verdict: the paragraphs at its top.
        sections: its parts, in order.
        skipped: parts that were not computed → what they need.
        made: how the page was made, by name: command, versions, hashes.

    Returns:
        HTML that refers to nothing outside itself. Every text is escaped.

    Source: ours.
    """
    import jinja2

    made_of = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,  # a misspelt name is an error, and no empty place on the page
        keep_trailing_newline=True,
    )
    made_of.filters |= {"filled": _filled, "exact": _exact, "svg": _svg, "percent": percent, "visible": _visible}
    return made_of.get_template(TEMPLATE).render(
        title=title,
        verdict=list(verdict),
        sections=list(sections),
        skipped=skipped,
        made=made,
        folded_from=_SHOWN,
        moved=MOVED,
        many=_MANY,
    )


def _svg(axes: Axes) -> str:
    """A figure as base64; the same figure is the same bytes."""
    import matplotlib

    held, metadata = io.BytesIO(), {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "surgery"}):
        axes.get_figure().savefig(held, format="svg", metadata=metadata)  # type: ignore[union-attr]
    return base64.b64encode(held.getvalue()).decode()


def _filled(table: Table) -> Table:
    """The table without columns that are empty in every row."""
    kept = [at for at in range(len(table.head)) if any(row[at] is not None for row in table.rows)]
    rows = tuple(tuple(row[at] for at in kept) for row in table.rows)
    return Table(table.title, tuple(table.head[at] for at in kept), rows)


def _visible(token: str) -> str:
    """A token with signs for line ends and tabs, and for a space that stands alone."""
    token = token.replace("\n", "↵").replace("\t", "⇥")
    return token if token.strip() else token.replace(" ", "␣") or "∅"


def _exact(cell: Cell) -> str:
    """What a cell is sorted by: all digits of a number."""
    cell = cell.value if isinstance(cell, Estimate) else cell
    return "" if cell is None else repr(cell) if isinstance(cell, int | float) else cell
