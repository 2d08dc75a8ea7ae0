"""The report: one HTML page that needs no network, with its figures inside, and everything escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from html import escape
from typing import TYPE_CHECKING

from surgery.evidence import Cell, Table, cell_text

if TYPE_CHECKING:
    from matplotlib.axes import Axes


@dataclass(frozen=True)
class Figure:
    """A drawing and what it shows, in words (also its text for those who can't see it)."""

    axes: Axes
    caption: str


@dataclass(frozen=True)
class Section:
    """One part of the page.

    Args:
        title: a few words.
        finding: what was found, in a sentence or two.
        definition: what the numbers are and where that is from.
        columns: what each column of its tables means, by the column's name.
        figures, tables: what it shows.
    """

    title: str
    finding: str
    definition: str
    columns: Mapping[str, str] = field(default_factory=dict)
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()


def page(
    title: str, verdict: Iterable[str], sections: Iterable[Section], skipped: Mapping[str, str], made: Mapping[str, str]
) -> str:
    """The whole page.

    Args:
        title: of the page.
        verdict: paragraphs that it opens with.
        sections: its parts, in order.
        skipped: what was not computed → what it would need.
        made: how the page was made, by name: command, versions, hashes.

    Returns:
        HTML that refers to nothing outside itself. Every text is escaped.

    Source: ours.
    """
    parts = list(sections)
    links = "".join(f'<li><a href="#s{at}">{escape(one.title)}</a></li>' for at, one in enumerate(parts))
    body = [
        f"<header><h1>{escape(title)}</h1>",
        '<section class="verdict" aria-label="Verdict">',
        *(f"<p>{escape(text)}</p>" for text in verdict),
        "</section></header>",
        f"<nav aria-label='Contents'><ol>{links}</ol></nav>",
        "<main>",
        *(_section(at, one) for at, one in enumerate(parts)),
        _skipped(skipped),
        _made(made),
        "</main>",
    ]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>{escape(title)}</title><style>{_STYLE}</style></head>'
        f"<body>{''.join(body)}<script>{_SCRIPT}</script></body></html>\n"
    )


def _section(at: int, one: Section) -> str:
    figures = "".join(map(_figure, one.figures))
    tables = "".join(_table(f"s{at}t{number}", table, one.columns) for number, table in enumerate(one.tables))
    asked = _asked(f"s{at}d", f"How “{one.title}” is defined", one.definition)
    return (
        f'<section id="s{at}"><h2>{escape(one.title)} {asked}</h2><p>{escape(one.finding)}</p>'
        f'<div class="figures">{figures}</div>{tables}</section>'
    )


def _asked(anchor: str, label: str, text: str) -> str:
    """A question mark that shows a definition when it is clicked."""
    return (
        f'<button class="ask" popovertarget="{anchor}" aria-label="{escape(label)}">?</button>'
        f'<div id="{anchor}" class="definition" popover>{escape(text)}</div>'
    )


def _figure(one: Figure) -> str:
    return (
        f'<figure><img alt="{escape(one.caption)}" src="data:image/svg+xml;base64,{_svg(one.axes)}">'
        f"<figcaption>{escape(one.caption)}</figcaption></figure>"
    )


def _svg(axes: Axes) -> str:
    import matplotlib

    held, metadata = io.BytesIO(), {"Date": None, "Creator": None}
    with matplotlib.rc_context({"svg.hashsalt": "surgery"}):  # the same figure is the same bytes
        axes.get_figure().savefig(held, format="svg", metadata=metadata)  # type: ignore[union-attr]
    return base64.b64encode(held.getvalue()).decode()


def _table(anchor: str, table: Table, columns: Mapping[str, str]) -> str:
    numbers = [any(isinstance(row[at], int | float) for row in table.rows) for at in range(len(table.head))]
    heads = "".join(_head(f"{anchor}c{at}", name, columns, numbers[at]) for at, name in enumerate(table.head))
    rows = "".join(
        f"<tr>{''.join(_cell(cell, number) for cell, number in zip(row, numbers, strict=True))}</tr>"
        for row in table.rows
    )
    shown = (
        f'<div class="scroll"><table><caption>{escape(table.title)}</caption>'
        f"<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"
    )
    if len(table.rows) <= _SHOWN:
        return shown
    return f"<details><summary>{escape(table.title)}: {len(table.rows)} rows</summary>{shown}</details>"


def _head(anchor: str, name: str, columns: Mapping[str, str], number: bool) -> str:
    asked = _asked(anchor, f"What “{name}” is", columns[name]) if name in columns else ""
    kind = ' class="number"' if number else ""
    return f'<th scope="col"{kind} aria-sort="none"><button class="sort">{escape(name)}</button>{asked}</th>'


def _cell(cell: Cell, number: bool) -> str:
    value = "" if cell is None else repr(cell) if isinstance(cell, int | float) else cell
    kind = ' class="number"' if number else ""
    return f'<td{kind} data-value="{escape(str(value))}">{escape(cell_text(cell))}</td>'


def _skipped(skipped: Mapping[str, str]) -> str:
    if not skipped:
        return ""
    rows = "".join(f"<li><b>{escape(name)}</b>: {escape(why)}</li>" for name, why in skipped.items())
    return f'<section id="skipped"><h2>Not computed</h2><ul>{rows}</ul></section>'


def _made(made: Mapping[str, str]) -> str:
    rows = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(text)}</code></dd>" for name, text in made.items())
    return f'<section id="made"><h2>How this page was made</h2><dl>{rows}</dl></section>'


_SHOWN = 30  # rows of a table up to which it is not folded
_STYLE = """
:root{font:16px/1.5 system-ui,sans-serif;color:#1a1a1a;background:#fff}
body{margin:0 auto;padding:1rem;max-width:62rem}
h1{font-size:1.6rem;line-height:1.25;overflow-wrap:anywhere}h2{font-size:1.2rem;margin:2.5rem 0 .5rem}
.verdict{border-left:4px solid #0072b2;background:#f2f7fb;padding:.6rem 1rem}.verdict p{margin:.5rem 0}
nav ol{columns:2 14rem;padding-left:1.4rem}a{color:#005a8f}
.figures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem}
figure{margin:0;max-width:38rem}figure img{width:100%;height:auto;display:block}figcaption{font-size:.85rem;color:#444}
.scroll{overflow-x:auto;margin:1rem 0}table{border-collapse:collapse;font-size:.875rem}
caption{text-align:left;font-weight:600;padding:.25rem 0;white-space:nowrap}
th,td{padding:.2rem .6rem;text-align:left;border-bottom:1px solid #ddd;white-space:nowrap}
.number{text-align:right;font-variant-numeric:tabular-nums}
th button.sort{all:unset;cursor:pointer;font-weight:600}
th button.sort:focus-visible,.ask:focus-visible{outline:2px solid #0072b2}
th[aria-sort=ascending] .sort::after{content:" ▲"}th[aria-sort=descending] .sort::after{content:" ▼"}
.ask{border:1px solid #888;border-radius:50%;background:#fff;color:#444;width:1.25rem;height:1.25rem;padding:0;
font-size:.75rem;line-height:1;cursor:pointer;margin-left:.25rem;vertical-align:middle}
.definition{max-width:min(34rem,88vw);padding:1rem;border:1px solid #888;border-radius:.4rem;font-weight:400;
font-size:.95rem;line-height:1.45;white-space:normal;text-align:left}
summary{cursor:pointer;margin:.5rem 0}dt{font-weight:600;margin-top:.5rem}dd{margin:0}
dd code{overflow-wrap:anywhere;white-space:pre-wrap}
@media print{.ask,nav{display:none}details{display:block}}
"""

_SCRIPT = """
for (const button of document.querySelectorAll("button.sort")) button.addEventListener("click", () => {
  const head = button.closest("th"), body = head.closest("table").tBodies[0];
  const down = head.getAttribute("aria-sort") === "ascending", at = head.cellIndex;
  const value = (row) => row.cells[at].dataset.value;
  const order = (a, b) => {
    if (value(a) === "" || value(b) === "") return (value(a) === "") - (value(b) === "");
    const x = Number(value(a)), y = Number(value(b));
    const found = Number.isNaN(x) || Number.isNaN(y) ? value(a).localeCompare(value(b)) : x - y;
    return down ? -found : found;
  };
  for (const other of head.parentNode.cells) other.setAttribute("aria-sort", "none");
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  body.append(...[...body.rows].sort(order));
});
"""
