"""The sections of a report: for each part of an inquiry the finding in words, figures, tables and definitions."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from surgery.evidence.overlap import Overlap
from surgery.files import path_of, whole_folder
from surgery.measure.rows import EARLIER, LATER, Row
from surgery.plots.evidence import (
    change_histogram,
    directional_cosine,
    gradient_extremes,
    gradient_heatmap,
    layer_lines,
    overlap_matrix,
    profile_bars,
    score_lines,
)
from surgery.plots.sweeps import dose_response, pareto_front
from surgery.plots.theory import expansion
from surgery.report.definitions import (
    ACTIVE,
    CHANGE,
    CHANGED,
    CHANGED_LAYER,
    CHANGES,
    COLUMNS,
    DIRECTIONS,
    NEAR,
    ROLLBACK,
    SCORE,
    SITES,
    TERMS,
    TOKENS,
)
from surgery.report.inquiry import Inquiry, best
from surgery.report.page import Figure, Section, page
from surgery.report.study import GIVEN
from surgery.report.verdict import verdict
from surgery.tables import Cell, Estimate, Table

PAGE, NUMBERS = "index.html", "report.json"
REPORT = (NUMBERS,)  # a folder with this is a report, and may be replaced


def write_report(
    found: Inquiry, folder: str | Path, *, command: str = "", data: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> Path:  # fmt: skip
    """Write an inquiry as one HTML page that needs no network, and its numbers as JSON.

    Args:
        found: the result of ``surgery.analyse``.
        folder: a new folder for ``index.html`` and ``report.json``.
        command: the command that made it, shown on the page.
        data: domain → the file of its prompts, shown on the page with its hash.
        overwrite: replace an existing report (it stays as it was until the new one is complete).

    Returns:
        The page's path.

    Raises:
        ValueError: the folder exists, or something else than a report has its name.

    Source: ours.
    """
    folder = path_of(folder)
    with whole_folder(folder, REPORT, overwrite=overwrite) as new:
        new.mkdir()
        title = f"What training did: {' → '.join(found.stages)}"
        text = page(title, verdict(found), sections(found), found.needs, _made(found, command, data or {}))
        (new / PAGE).write_text(text, encoding="utf-8")
        found.save(new / NUMBERS)
    return folder / PAGE


def _made(found: Inquiry, command: str, data: Mapping[str, Path]) -> dict[str, str]:
    told = {"command": command} if command else {}
    told |= {f"prompts of {domain}": f"{file}, sha256 {_sha256(file)}" for domain, file in data.items()}
    for name, one in found.made["checkpoints"].items():
        hashes = "; ".join(f"{file} {digest}" for file, digest in one.get("sha256", {}).items())
        told[f"checkpoint {name}"] = (
            f"{one['name']} (sha256 of {one['sha256_of']}: {hashes})" if hashes else one["name"]
        )
    return {**told, "versions": json.dumps(found.made["versions"])}


def _sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def sections(found: Inquiry) -> Iterator[Section]:
    """The sections that there is something for, in the order of the page."""
    parts: tuple[Callable[[Inquiry], Section | None], ...] = (
        _history, _rollback, _tokens, _sites, _terms, _changes, _changed, _directions, _active, _gradients,
    )  # fmt: skip
    for part in parts:
        if (section := part(found)) is not None:
            yield section


def _history(found: Inquiry) -> Section | None:
    if (history := found.history) is None:
        return None
    lost = [one for one in history.lost if one.certain and one.amount > 0]
    names = ", ".join(f"{one.domain} (since {one.best}, most of it at {one.at})" for one in lost)
    finding = f"Significant losses: {names}." if lost else "No domain showed a significant loss."
    drawn = Figure(score_lines(history), "Score of every domain after each stage; larger is better.")
    return Section("What was damaged", finding, f"{history.definition} {SCORE}", COLUMNS, (drawn,), history.tables())


def _rollback(found: Inquiry) -> Section | None:
    if (sweep := found.rollback) is None or found.focus is None:
        return None
    told = ["No rollback by D brings anything back."]
    if (most := best(sweep)) is not None:
        told = [
            f"The best rollback by D brings back {100 * (most.recovery or 0):.0f} % of the loss with "
            f"{100 * most.budget:g} % of the neurons."
        ]
    told += [f"{GIVEN[0].upper()}{GIVEN[1:]} brings back {100 * (row.recovery or 0):.0f} %." for row in sweep[GIVEN]]
    rows = list(sweep.rows)
    if found.refreshed is not None:
        rows.append(found.refreshed.row)
        back = 100 * (found.refreshed.row.recovery or 0)
        told.append(f"A refresh of {found.refreshed.report.steps[-1].step} steps brings back {back:.0f} %.")
    drawn = Figure(
        dose_response(sweep),
        f"Recovery of {sweep.metric} against the share of neurons rolled back, with 95 % intervals.",
    )
    others = [name for name in rows[0].metrics if name != sweep.metric]
    table = Table(
        f"what a repair of {sweep.metric} brings back, on the measuring half of the prompts",
        ("repair", "budget (%)", "recovery (%)", *(f"Δ {n}" for n in others)),
        tuple(_repair(row, others) for row in rows),
    )
    figures = [drawn]
    if others:
        told_front = (
            "Recovery against the worst loss of another domain; the line joins the rows that no other row beats."
        )
        figures.append(Figure(pareto_front(sweep), told_front))
    tables = (table,) if found.refreshed is None else (table, found.refreshed.report.table())
    meant = {**COLUMNS, **{f"Δ {name}": f"{CHANGE} Here of {name}." for name in others}}
    return Section("What a repair would bring back", " ".join(told), ROLLBACK, meant, tuple(figures), tables)


def _repair(row: Row, others: list[str]) -> tuple[Cell, ...]:
    if row.selector in (EARLIER, LATER):
        whole = 100 if row.selector == EARLIER else 0  # by definition
        return row.selector, None, whole, *(None for _ in others)
    recovery: Cell = None if row.recovery is None else 100 * row.recovery
    if row.recovery is not None and row.interval:
        recovery = Estimate(100 * row.recovery, *(100 * end for end in row.interval))
    budget = float(f"{100 * row.budget:.3g}") if row.neurons else None
    changes: list[Cell] = [
        Estimate(row.delta[name], *row.paired[name].interval) if name in row.paired else row.delta.get(name)
        for name in others
    ]
    return row.selector, budget, recovery, *changes


def _tokens(found: Inquiry) -> Section | None:
    if (tokens := found.tokens) is None or found.focus is None:
        return None
    _, later, *repaired = tokens.counts
    finding = (
        f"Of {later.tokens:,} response tokens of {found.focus.domain} {later.fell:,} fell by 10 points or more from "
        f"{tokens.models[0]} to {later.model}, and {later.rose:,} rose."
    )
    told = (f"With the repair ({one.model}) {one.fell:,} lie so far below, {one.rose:,} above." for one in repaired)
    finding = " ".join([finding, *told])
    finding += f" Below are the {len(tokens.prompts)} prompts of {tokens.of} that lost most."
    return Section("Which tokens moved?", finding, TOKENS, COLUMNS, (), (tokens.table(),), tokens)


def _sites(found: Inquiry) -> Section | None:
    if (sites := found.sites) is None or found.focus is None:
        return None
    first = max(sites.blocks.blocks, key=lambda one: one.share)
    finding = (
        f"Half of the first-order gain of reverting lies in {100 * sites.half:.3g} % of the neurons. The block with "
        f"the largest share is {first.block} ({100 * first.share:.0f} %)."
    )
    drawn = Figure(profile_bars(sites.blocks), f"Share of the damage score D of {found.focus.domain} in each block.")
    return Section("Where the damage is", finding, SITES, COLUMNS, (drawn,), sites.blocks.tables())


def _terms(found: Inquiry) -> Section | None:
    if (terms := found.terms) is None:
        return None
    share = terms.second[-1] / terms.true[-1] if terms.true[-1] else 0.0
    finding = (
        f"At the last checkpoint the curvature at the earlier one predicts {100 * share:.0f} % of the true rise of the "
        f"loss; at {terms.fractions[0]:g} of the way {100 * terms.second[0] / (terms.true[0] or 1):.0f} %."
    )
    drawn = Figure(expansion(terms), "True rise of the loss along the change, and the terms of the theory.")
    return Section("Is it a second-order effect?", finding, TERMS, COLUMNS, (drawn,), (terms.table(),))


def _changes(found: Inquiry) -> Section | None:
    if (changes := found.changes) is None:
        return None
    last = changes.incremental[-1]
    finding = (
        f"{last.stage} left {100 * last.whole.share(last.whole.unchanged):.1f} % of the parameters unchanged; the norm "
        f"of its change is {100 * (last.whole.relative_norm or 0):.2g} % of the parameters' norm."
    )
    told = f" Left out: {'; '.join(changes.left_out)}." if changes.left_out else ""
    figures = (
        Figure(change_histogram(changes, "absolute", "base"), "Absolute change, against the first checkpoint."),
        Figure(change_histogram(changes, "relative", "before"), "Relative change, against the checkpoint before."),
        Figure(
            layer_lines(
                {
                    step.stage: [
                        100 * one.relative_norm if one.relative_norm else None for one in step.layers if one.layer
                    ]
                    for step in changes.incremental
                },
                "‖Δ‖/‖θ‖ (%)",
            ),
            "Change of each layer, against the checkpoint before.",
        ),
    )
    near = [head for table in changes.tables() for head in table.head if head.startswith("abs(")]
    meant = {**COLUMNS, **dict.fromkeys(found.stages, CHANGED_LAYER), **dict.fromkeys(near, NEAR)}
    return Section("How far parameters moved", finding + told, CHANGES, meant, figures, changes.tables())


def _changed(found: Inquiry) -> Section | None:
    if (overlap := found.changed) is None:
        return None
    drawn = Figure(overlap_matrix(overlap, title="changed"), "Jaccard of the most changed neurons; in brackets chance.")
    return _overlap("Do stages change the same neurons?", overlap, "changed", CHANGED, drawn)


def _active(found: Inquiry) -> Section | None:
    if (overlap := found.active) is None:
        return None
    drawn = Figure(overlap_matrix(overlap, title="active"), "Jaccard of the most active neurons; in brackets chance.")
    return _overlap("Do domains use the same neurons?", overlap, "active", ACTIVE, drawn)


def _overlap(title: str, overlap: Overlap, what: str, definition: str, drawn: Figure) -> Section:
    one, other = max(overlap.pairs(), key=lambda pair: overlap.of(*pair))
    chance = overlap.chance[overlap.domains.index(one)][overlap.domains.index(other)]
    finding = (
        f"The most {what} neurons of two domains overlap by {overlap.mean:.2f} on average (Jaccard). The largest "
        f"overlap is that of {one} and {other}: {overlap.of(one, other):.2f}, where chance gives {chance:.2f}."
    )
    meant = {f"{a}–{b}": f"Jaccard of {a} and {b} in that layer." for a, b in overlap.pairs()}
    curves: dict[str, list[float | None]] = {}
    for a, b in overlap.pairs():
        i, j = overlap.domains.index(a), overlap.domains.index(b)
        curves[f"{a}–{b}"] = [layer.jaccard[i][j] for layer in overlap.layers]
    layers = Figure(layer_lines(curves, "Jaccard"), f"Jaccard of the most {what} neurons of each layer.")
    return Section(title, finding, definition, {**COLUMNS, **meant}, (drawn, layers), overlap.tables())


def _directions(found: Inquiry) -> Section | None:
    if (directions := found.directions) is None:
        return None
    known = [(pair, pair.whole.mean) for pair in directions.pairs if pair.whole.mean is not None]
    if not known:
        finding = "No two stages have a neuron in common among their most changed ones."
    else:
        pair, mean = min(known, key=lambda item: item[1])
        finding = (
            f"The updates that point most against each other are those of {pair.first} and {pair.second}: mean cosine "
            f"{mean:+.3f} on {pair.whole.neurons} neurons."
        )
    drawn = Figure(directional_cosine(directions), "Mean cosine of two updates by block; bands: unrelated updates.")
    return Section("Do updates clash?", finding, DIRECTIONS, COLUMNS, (drawn,), directions.tables())


def _gradients(found: Inquiry) -> Section | None:
    if (gradients := found.gradients) is None:
        return None
    (one, other) = min(gradients.pairs, key=lambda pair: gradients.whole.cosines[pair[0]][pair[1]] or 0.0)
    lowest = gradients.whole.cosines[one][other] or 0.0
    finding = f"Over the whole model the lowest cosine is that of {one} and {other}: {lowest:+.3f}."
    for worst in gradients.conflicts[:1]:
        pair = f"{worst.first} and {worst.second}"
        finding += f" The strongest conflict of a module: {worst.module}, {pair} ({worst.cosine:+.2f})."
    kinds = [kind for kind in ("attention", "mlp") if any(part.kind == kind for part in gradients.modules)]
    figures = (
        *(Figure(gradient_heatmap(gradients, kind), f"Cosine of the gradients by layer: {kind}.") for kind in kinds),
        Figure(gradient_extremes(gradients), "The modules with the strongest conflicts and synergies."),
    )
    meant = {**COLUMNS, **{f"{a}–{b}": f"Cosine of the gradients of {a} and {b}." for a, b in gradients.pairs}}
    return Section(
        "Do the domains' gradients conflict?", finding, gradients.definition, meant, figures, gradients.tables()
    )
