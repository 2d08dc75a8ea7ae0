"""Commands that evaluate: sweep, tune."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.choosing import answered, check_selectors, protected, selector_of, unanswered
from surgery.cli.options import (
    Answers,
    Checkpoints,
    Data,
    Device,
    DryRun,
    Dtype,
    Evaluation,
    How,
    LayoutFile,
    Metric,
    Protect,
    ProtectWeight,
    Rows,
    Selected,
    folder_of,
    fraction,
    function_of,
    limit_of,
    live,
    out,
    tell,
    trajectory_of,
    working,
)

if TYPE_CHECKING:
    from surgery.prompts import Batch
    from surgery.trajectory import Trajectory


@contextmanager
def _loaded(
    run: Trajectory, data: Path | None, evaluate: str, batch_size: int, device: str | None, dtype: str | None
) -> Iterator[tuple[Trajectory, list[Batch] | None, Any, Callable[[str], None]]]:
    """The later model live in its trajectory, the prompts, the evaluation, and what tells of progress."""
    from surgery.prompts import load_prompts

    batches = load_prompts(data, folder_of(run.later), batch_size=batch_size) if data else None
    function = function_of(evaluate)
    with working("loading") as say:
        yield live(run, device, dtype), batches, function, say


def sweep(
    checkpoints: Checkpoints,
    evaluate: Evaluation,
    data: Data = None,
    budgets: Annotated[str, typer.Option(help="Fractions, separated by commas.")] = "0.01,0.02,0.04",
    selectors: Annotated[str, typer.Option(help='Like "D,D:hellinger,AMC,MC,A/AMC,A,random".')] = "AMC,random",
    how: How = None,
    protect: Protect = None,
    protect_weight: ProtectWeight = 0.3,
    answers: Answers = None,
    units: Selected = "mlp",
    metric: Metric = None,
    output: Rows = None,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
) -> None:
    """Evaluate selectors at budgets on one live model, beside earlier, later and the ceiling."""
    from surgery.sweeps import sweep as run_sweep

    fractions = [fraction(text) for text in budgets.split(",")]
    check_selectors(selectors.split(","), checkpoints, data, how, units, protect, answers)
    run = trajectory_of(checkpoints, layout, units)
    guard = protected(protect, protect_weight, run, batch_size)
    chosen = [selector_of(text, fractions[0], how, 0, units, guard) for text in selectors.split(",")]
    if dry_run:
        rows = len(chosen) * len(fractions) + 3
        out.print(f"{len(chosen)} selectors × {len(fractions)} budgets + 3 references = {rows} rows")
        return
    with _loaded(run, data, evaluate, batch_size, device, dtype) as (run, prompts, function, say):
        batches, told = answered(run, prompts, answers)
        found = run_sweep(
            run.load(),
            run,
            batches,
            selectors=unanswered(chosen, prompts) if answers else chosen,
            budgets=fractions,
            evaluate=function,
            metric=metric,
            path=output,
            progress=say,
        )
    tell(told)
    out.print(str(found), markup=False)


def tune(
    checkpoints: Checkpoints,
    evaluate: Evaluation,
    data: Data = None,
    selector: Annotated[str, typer.Option(help="As in select.")] = "AMC",
    how: Annotated[str, typer.Option(help="As in select; only the masks of global are nested.")] = "global",
    protect: Protect = None,
    protect_weight: ProtectWeight = 0.3,
    answers: Answers = None,
    recovery: Annotated[float, typer.Option(help="The wanted part of what was lost.")] = 0.8,
    limit: Annotated[
        list[str] | None, typer.Option(help='The least change allowed elsewhere, like "qa=-0.002"; repeat for more.')
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Fractions to choose among (default: 19 from 0.001 to 1).")
    ] = None,
    units: Selected = "mlp",
    metric: Metric = None,
    output: Rows = None,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
) -> None:
    """Find the smallest budget that reaches a wanted recovery under limits elsewhere; exit code 1 if none does."""
    from surgery.tuning import BUDGETS, recommend

    fractions = [fraction(text) for text in budgets.split(",")] if budgets else list(BUDGETS)
    check_selectors([selector], checkpoints, data, how, units, protect, answers)
    limits = dict(map(limit_of, limit or ()))
    run = trajectory_of(checkpoints, layout, units)
    guard = protected(protect, protect_weight, run, batch_size)
    chosen = selector_of(selector, fractions[0], how, 0, units, guard)
    with _loaded(run, data, evaluate, batch_size, device, dtype) as (run, prompts, function, say):
        batches, told = answered(run, prompts, answers)
        found = recommend(
            run.load(),
            run,
            batches,
            selector=chosen,
            evaluate=function,
            recovery=recovery,
            limits=limits,
            budgets=fractions,
            metric=metric,
            path=output,
            progress=say,
        )
    tell(told)
    out.print(str(found), markup=False)
    if found.budget is None:
        raise typer.Exit(1)
    words = [*checkpoints, *(["--data", str(data)] if data else []), "--selector", selector, "--how", how]
    words += [word for text in protect or () for word in ("--protect", text)]
    words += ["--protect-weight", f"{protect_weight:g}"] if protect else []
    words += ["--answers", str(answers)] if answers else []
    words += ["--units", units] if units != "mlp" else []
    words += ["--layout", str(layout)] if layout else []
    words += ["--batch-size", str(batch_size)] if batch_size != 16 else []
    words += [word for name, text in (("--device", device), ("--dtype", dtype)) if text for word in (name, text)]
    out.print(f"\nsurgery select {shlex.join(words)} --budget {found.budget} -o mask.safetensors", markup=False)
