"""The sections of a report: for each part of an inquiry the finding in words, figures, tables and definitions."""

from __future__ import annotations

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from surgery.evidence.overlap import Overlap
from surgery.measure.rows import EARLIER, LATER, Row
from surgery.plots.evidence import (
    change_histogram,
    directional_cosine,
    gradient_extremes,
    gradient_heatmap,
    overlap_matrix,
    profile_bars,
    score_lines,
)
from surgery.plots.sweeps import dose_response, pareto_front
from surgery.plots.theory import expansion
from surgery.report.inquiry import GIVEN, Inquiry, best
from surgery.report.page import Figure, Section, page
from surgery.report.verdict import verdict
from surgery.reverting.folder import check_free, put_in_place
from surgery.tables import Cell, Estimate, Table

# What the numbers of a report mean: a definition for each section and each column, with its source.
SCORE = (
    "Unless an evaluation was given, the score is the log-likelihood of the responses: per prompt the mean over its "
    "response tokens, in nats per token; 0 is certainty. It is measured on every other prompt; the other half of the "
    "prompts chooses the neurons."
)
ROLLBACK = (
    "Neurons of the last checkpoint are set back to the checkpoint where the domain was best, and the score is "
    "measured on the prompts that did not choose them. Recovery = (score − score of later) / (score of earlier − score "
    "of later). D: ranked by the damage score; A×M×C: the paper's selector; random: the control; ceiling: all MLP "
    "neurons. The refresh trains all parameters for a few steps towards the earlier checkpoint's answers. Source: the "
    "paper's Table 6 in kind; D and the refresh from the earlier model's answers are ours."
)
SITES = (
    "D_n = ⟨∇L, δ_n⟩, with L the Hellinger distance between the later and the earlier model's predictions, the mean "
    "over response tokens: the first-order gain of setting neuron n back. The table has the sum of the positive D by "
    "block. Ours, from the paper's Proposition 1."
)
TERMS = (
    "Proposition 1 of the paper: along θ_A + t·δ the domain's loss rises by t⟨∇L, δ⟩ + ½ t² δᵀHδ plus a remainder. "
    "The loss is the KL divergence from the earlier checkpoint, whose gradient there is zero. A large remainder means "
    "that the change is too large for the local theory."
)
TOKENS = (
    "The probability that each model gives to a token of the response, after the prompt and the response up to there, "
    "in whole percent; in brackets the token that it finds likelier, if there is one. Marked is what lies at least 10 "
    "points below (▾) or above (▴) the first model. The prompts are from the half that did not choose the repair; "
    "those whose response lost most log-likelihood come first. Ours."
)
CHANGES = (
    "Δ is a checkpoint's parameter minus the same parameter of the checkpoint it is compared with. Absolute: abs(Δ); "
    "relative: abs(Δ) / abs(θ before). Near zero: below the threshold in the column's head. In 16-bit checkpoints a "
    "change below one rounding step is no change at all. Source: the paper, Section 4 and Appendix B."
)
CHANGED = (
    "Each stage's most changed neurons are the 10 % with the largest ‖δ_n‖ of the model. Jaccard = shared / all of "
    "both; 1 is the same set. Chance: two random sets of those sizes. Source: the paper, Section 4."
)
ACTIVE = (
    "Each domain's most active neurons are the 5 % with the largest mean abs(h_n) on its prompts, at the last "
    "checkpoint. Jaccard = shared / all of both. Chance: two random sets of those sizes. Source: the paper, Section "
    "4."
)
DIRECTIONS = (
    "On the neurons that are among the 10 % most changed of their layer in both stages, the cosine of the two "
    "updates of each neuron (gate, up and down end to end): −1 they undo each other, +1 they agree. Band: where the "
    "mean lies if each update is paired with another neuron's. Source: the paper's Figure 4; the null is ours."
)
CHANGE = "The score minus that of the last checkpoint before the repair; below zero is a loss."
CHANGED_LAYER = "‖Δ‖ of that stage in that layer, in percent of ‖θ‖ before it; or the score after that stage."
NEAR = "Parameters whose change stays below the threshold, in percent; those that did not change at all count too."
COLUMNS = {
    "domain": "A set of prompts, as named by --data.",
    "from": "The checkpoint that the loss counts from: the domain's own stage, or its best.",
    "to": "The last checkpoint.",
    "lost": "Score at “from” minus score at “to”; above zero is a loss. In brackets its 95 % interval (paired "
    "bootstrap over prompts).",
    "p": "p-value of a two-sided paired test: exact McNemar for 0/1 scores, else a sign-flip permutation test.",
    "largest step": "The stage that lowered the score most, and by how much.",
    "repair": "What was set back or trained.",
    "budget (%)": "How many of all MLP neurons were set back, in percent; for a given mask, of what it chose among.",
    "recovery (%)": "The part of the loss that came back, in percent; 100 is all of it. In brackets its 95 % interval "
    "(paired bootstrap over prompts).",
    "model": "A checkpoint, or the last one with a repair.",
    "mean probability (%)": "Mean over the response tokens.",
    "tokens that fell": "Response tokens whose probability is at least 10 points lower than in the first model.",
    "tokens that rose": "Response tokens whose probability is at least 10 points higher than in the first model.",
    "score": "Minus the loss on the prompts that choose; the weights with the highest score are kept.",
    "step": "The step of the refresh; 0 is the model before the first one.",
    "loss": "In a refresh, on the step's own batch before the step; of gradients, over all batches. In nats per token.",
    "gradient": "L2 norm of the gradient over the trained numbers.",
    "seconds": "Duration of the step.",
    "block": "An MLP or an attention, by its module path.",
    "kind": "Kind of unit or module.",
    "units": "How many neurons (or other units) there are.",
    "sum of scores": "Sum of the positive D, in units of the Hellinger distance (0 to 1).",
    "share of all (%)": "Share of the sum over all blocks.",
    "t": "Fraction of the way from the earlier to the later checkpoint.",
    "true": "The measured rise of the loss.",
    "first order": "t⟨∇L, δ⟩ at the earlier checkpoint.",
    "second order": "½ t² δᵀHδ with the curvature at the earlier checkpoint.",
    "remainder": "What the two terms leave unexplained.",
    "second / true": "1 where the second-order term explains all of the rise.",
    "stage": "The checkpoint, by the stage that led to it.",
    "against": "The checkpoint that it is compared with.",
    "parameters": "Number of parameters.",
    "Δ = 0 (%)": "Parameters whose value did not change at all.",
    "‖Δ‖": "L2 norm of the change, in the unit of the weights.",
    "‖Δ‖/‖θ‖ (%)": "The norm of the change relative to the norm of the parameters before it.",
    "layer": "A layer of the model.",
    "neurons": "How many neurons the row counts.",
    "pair": "Two stages or two domains.",
    "whole model": "Jaccard of the two sets, taken from the whole model.",
    "chance": "Expected Jaccard of two random sets of the same sizes.",
    "chance, layers kept": "Expected Jaccard of random sets with the same numbers of neurons in each layer.",
    "chance in a layer": "Expected Jaccard of two random sets of a layer's neurons, averaged over the layers.",
    "mean over layers": "Jaccard of the top shares within each layer, averaged over the layers.",
    "by chance": "How many neurons two independent sets of those sizes would share.",
    "mean cosine": "Mean over the shared neurons; −1 to 1.",
    "quartiles": "A quarter of the neurons lies below the first, a quarter above the second.",
    "below 0 (%)": "Neurons whose two updates point against each other.",
    "null, 95 %": "95 % of the mean cosines if each update is paired with another neuron's.",
    "response tokens": "How many tokens the mean is over.",
    "gradient norm": "L2 norm of the gradient of the domain's mean loss.",
    "tensors without gradient": "Tensors whose gradient is exactly zero, like those of experts that no token reached.",
    "part": "The whole model, or all its modules of a kind.",
    "module": "A module, by its path.",
    "domains": "Two domains.",
    "cosine": "Cosine of the two domains' gradients: conflict below zero, synergy above.",
}


PAGE, NUMBERS = "index.html", "report.json"


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
        overwrite: replace an existing folder (it stays as it was until the new one is complete).

    Returns:
        The page's path.

    Raises:
        ValueError: the folder exists, or a file or a link has its name.

    Source: ours.
    """
    folder = Path(folder)
    check_free(folder, overwrite)
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    try:
        partial.chmod(0o755)
        title = f"What training did: {' → '.join(found.stages)}"
        text = page(title, verdict(found), sections(found), found.needs, _made(found, command, data or {}))
        (partial / PAGE).write_text(text, encoding="utf-8")
        found.save(partial / NUMBERS)
        put_in_place(partial, folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
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
    finding += "".join(f" With {one.model} {one.fell:,} lie so far below, and {one.rose:,} above." for one in repaired)
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
    return Section(title, finding, definition, {**COLUMNS, **meant}, (drawn,), overlap.tables())


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
