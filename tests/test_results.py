"""What the results' page says is what the stored rows say, no two files differ, and every file has its place."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from benchmarks.pareto.comparison import Store
from benchmarks.pareto.points import Point, points
from benchmarks.real.report import README, headline
from surgery.measure.rows import CEILING, EARLIER, LATER

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
CHANNELS, GROUPS = "D of units (neurons and value channels)", "D of units (neurons and KV groups)"
TABLE = {
    "A×M×C (the paper's), 2 % of the neurons": ("A×M×C", 0.02),
    "D, 2 % of the neurons": ("D", 0.02),
    "D by KL, 2 % of the neurons": ("D (KL)", 0.02),
    "D, 2 % of neurons and value channels": (CHANNELS, 0.02),
    "the same with strengths up to 2": (f"{CHANNELS}, strengths ≤ 2", 0.02),
    "D, 1 % of single weights": ("D of single weights", 0.01),
    "D, 4 % of single weights": ("D of single weights", 0.04),
    "D, 32 % of neurons and KV groups": (GROUPS, 0.32),
    "all neurons (the ceiling)": (CEILING, 1.0),
    "spectral thresholding (DG-Hard, factor 2)": ("spectral (DG-Hard)", 2.0),
    "WiSE-FT, α = 0.4": ("WiSE-FT", 0.4),
    "20 steps of GRPO, training prompts": ("GRPO, training prompts", 20.0),
}
PAIRS = "Math by QA", "QA by Math"
Points = dict[tuple[str, float], Point]


@pytest.fixture(scope="module")
def runs() -> dict[str, list[dict[str, Any]]]:
    """The stored runs of the two pairs."""
    named: dict[str, list[dict[str, Any]]] = {}
    for run in Store(RESULTS / "pareto.json.gz").runs:
        named.setdefault(run["pair"]["name"].split(" (")[0], []).append(run)
    return named


def measured(runs: list[dict[str, Any]], asked: set[tuple[str, float]]) -> Points:
    """Those points of a pair, where they are stored."""
    asked = {*asked, (LATER, 0.0), (EARLIER, 1.0)}
    few = [{**run, "rows": [r for r in run["rows"] if (r["method"], r["value"]) in asked]} for run in runs]
    return {(point.method, point.value): point for point in points(few)}


def table(path: Path) -> list[list[str]]:
    """The cells of every row of every table on a page."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("| ")]


def test_the_pages_table_is_what_the_rows_say(runs: dict[str, list[dict[str, Any]]]) -> None:
    found = [measured(runs[pair], set(TABLE.values())) for pair in PAIRS]
    told = {label: cells for label, *cells in table(RESULTS / "README.md") if label in TABLE}
    assert list(told) == list(TABLE)
    for label, key in TABLE.items():
        for one, cell in zip(found, told[label], strict=True):
            point = one[key]
            assert cell == f"{100 * point.recovery:.1f} [{100 * point.low:.1f}, {100 * point.high:.1f}]", label


@pytest.mark.parametrize("name", ["table6", "single-weights", "protect"])
def test_another_file_of_the_same_question_says_the_same(name: str, runs: dict[str, list[dict[str, Any]]]) -> None:
    """The recovery of Math, mean over seeds, wherever a method and a budget stand in both."""
    told: dict[tuple[str, float], set[str]] = {}
    for label, *cells in table(RESULTS / f"{name}.md"):
        if cells and cells[0].endswith(" %"):
            budgets = [
                float(cell.removesuffix(" %")) / 100 for cell in cells if cell.endswith(" %") and "Δ" not in cell
            ]
        else:
            method = {"0": "D"}.get(label, label) if name == "protect" else label
            for budget, cell in zip(budgets, cells, strict=False):
                told.setdefault((method, round(budget, 6)), set()).add(cell.split(" ")[0])
    found = measured(runs[PAIRS[0]], set(told))
    both = told.keys() & found.keys()
    assert len(both) >= 3
    assert {key: {f"{100 * found[key].recovery:.1f}"} for key in both} == {key: told[key] for key in both}


def test_the_readmes_table_is_what_the_real_labs_rows_say() -> None:
    named: dict[str, list[dict[str, Any]]] = {}
    for run in Store(RESULTS / "real.json.gz").runs:
        named.setdefault(run["pair"]["name"], []).append(run)
    said = headline(named, {name: points(group) for name, group in named.items()})
    assert said.count("\n") == 2 + len(README)
    assert said in (RESULTS.parent.parent / "README.md").read_text(encoding="utf-8")


def test_every_result_is_named_and_none_is_of_checkpoints_that_are_gone() -> None:
    """On the page itself, or on a page that it names."""
    pages = {path.name: path.read_text(encoding="utf-8") for path in RESULTS.glob("*.md")}
    assert not [name for name, text in pages.items() if "†" in text]
    links = {name: set(re.findall(r"[\w-]+\.(?:md|png|json(?:\.gz)?)", text)) for name, text in pages.items()}
    named = links["README.md"].union(*(links.get(page, ()) for page in links["README.md"]))
    assert not {path.name for path in RESULTS.iterdir()} - named - {"README.md"}
    assert not {one for one in named if not one.endswith(".md") and not (RESULTS / one).exists()}
