"""The verdict: what an inquiry found, in words."""

from __future__ import annotations

from collections.abc import Iterator

from surgery.measure.history import Lost
from surgery.measure.rows import CEILING, Row
from surgery.measure.statistics import ALPHA
from surgery.report.inquiry import Inquiry
from surgery.report.study import GIVEN
from surgery.tables import Estimate


def verdict(found: Inquiry) -> list[str]:
    """What was damaged, where the damage is, and what a repair would bring back: a paragraph each, where known."""
    return [*_damage(found), *_place(found), *_repair(found)]


def _damage(found: Inquiry) -> Iterator[str]:
    if found.history is None:
        yield (
            f"There is no verdict on damage: the history was not computed "
            f"({found.skipped.get('history', 'it needs prompts')}). The page shows how the parameters changed."
        )
        return
    one = found.focus
    if one is None:
        largest = found.history.lost[0]
        yield (
            f"No domain showed a significant loss up to {largest.last}. The closest to one is {largest.domain}: "
            f"{_amount(largest)} since {largest.best}. More prompts can show smaller losses."
        )
        return
    where = f"most of it in the stage {one.at}" if one.at != one.last or one.best != one.at else ""
    yield (
        f"{one.domain} was damaged: from {one.best} to {one.last} its {found.score} fell by {_amount(one)}"
        f"{f', {where}' if where else ''}."
    )
    others = [other for other in found.history.lost if other is not one]
    also = [f"{other.domain} ({_amount(other)} since {other.best})" for other in others if _hurt(other)]
    if also:
        yield f"Also damaged: {', '.join(also)}."
    elif others:
        yield f"No significant loss in {', '.join(other.domain for other in others)}."


def _hurt(one: Lost) -> bool:
    return one.certain and one.amount > 0


def _amount(one: Lost) -> str:
    if one.paired is None:
        return f"{one.amount:.3g} (not tested: there are no scores per item)"
    return f"{Estimate(one.amount, *one.paired.interval)} (p = {one.paired.p:.2g}, {one.paired.items} items)"


def _place(found: Inquiry) -> Iterator[str]:
    said = []
    if (sites := found.sites) is not None:
        said.append(f"half of the first-order gain of reverting lies in {_percent(sites.half)} of the MLP neurons")
    if found.focus is not None and found.directions is not None:
        first, second = found.focus.best, found.focus.at
        if first in found.directions.changed and second in found.directions.changed and first != second:
            one = found.directions.of(first, second).whole
            if one.mean is not None and one.p is not None:
                way = "point against each other" if one.mean < 0 else "point the same way"
                way = way if one.p < ALPHA else "have no significant common direction"
                said.append(
                    f"on the {one.neurons} neurons that {first} and {second} both changed most, their updates "
                    f"{way} (mean cosine {one.mean:+.2f}, p = {one.p:.2g})"
                )
    if (terms := found.terms) is not None and terms.true[-1]:
        said.append(
            f"the curvature at {found.focus.best if found.focus else 'the earlier checkpoint'} alone predicts "
            f"{_percent(terms.second[-1] / terms.true[-1])} of the rise of the KL divergence from it"
        )
    if said:
        text = "; ".join(said)
        yield f"{text[0].upper()}{text[1:]}."


def _repair(found: Inquiry) -> Iterator[str]:
    if found.rollback is not None:
        rows = sorted((row for row in found.rollback["D"] if row.recovery is not None), key=lambda row: row.budget)
        told = [f"{_recovery(row)} with {_percent(row.budget)} of the MLP neurons" for row in _few(rows)]
        told += [f"{_recovery(row)} with all of them" for row in found.rollback[CEILING] if row.recovery is not None]
        told += [f"{_recovery(row)} with {GIVEN}" for row in found.rollback[GIVEN] if row.recovery is not None]
        yield f"A rollback brings back this share of the loss: {', '.join(told)}."
        if costly := [row for row in rows if _costs(row)]:
            worst = ", ".join(f"{name} {_delta(row, name)}" for row in costly[:1] for name in _costs(row))
            yield f"From {_percent(costly[0].budget)} on another domain loses significantly ({worst})."
        elif any(name in row.paired for row in rows for name in row.delta):
            yield "At none of these budgets does another domain show a significant loss."
        elif rows:
            why = "there are no scores per item" if rows[0].delta else "there are no prompts of another domain"
            yield f"What a rollback costs other domains was not tested: {why}."
    if (fresh := found.refreshed) is not None and fresh.row.recovery is not None:
        others = ", ".join(f"{name} {_delta(fresh.row, name)}" for name in fresh.row.delta)
        yield (
            f"A refresh of {fresh.report.steps[-1].step} steps (all parameters, {fresh.report.passes} forward and "
            f"backward passes) brings back {_recovery(fresh.row)} of the loss"
            f"{f'; other domains change by {others}' if others else ''}."
        )


def _few(rows: list[Row]) -> list[Row]:
    """The first, the middle and the last of many."""
    return rows if len(rows) <= 3 else [rows[0], rows[len(rows) // 2], rows[-1]]


def _costs(row: Row) -> list[str]:
    return [name for name in row.delta if name in row.paired and row.paired[name].interval[1] < 0 and _sure(row, name)]


def _sure(row: Row, name: str) -> bool:
    return row.paired[name].p < ALPHA


def _recovery(row: Row) -> str:
    share = 100 * (row.recovery or 0)
    text = str(Estimate(share, *(100 * end for end in row.interval))) if row.interval else f"{share:.0f}"
    return f"{text} %{' (underpowered)' if row.underpowered else ''}"


def _delta(row: Row, name: str) -> str:
    span = row.paired[name].interval if name in row.paired else None
    return Estimate(row.delta[name], *span).text("+") if span else f"{row.delta[name]:+.3g}"


def _percent(share: float) -> str:
    return f"{100 * share:.3g} %"
