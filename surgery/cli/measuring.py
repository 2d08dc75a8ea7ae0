"""Commands that evaluate: sweep, repair."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.choosing import answered, check_selectors, protected, selector_of, unanswered
from surgery.cli.options import (
    Answers,
    BatchSize,
    Checkpoints,
    Data,
    Device,
    DryRun,
    Dtype,
    Evaluation,
    How,
    LayoutFile,
    LogTo,
    Metric,
    Overwrite,
    Protect,
    ProtectWeight,
    ResetOptimizer,
    Rounds,
    Rows,
    Selected,
    Shard,
    checked,
    device_of,
    dtype_of,
    evaluation_of,
    files_of,
    fraction,
    function_of,
    out,
    path_option,
    prompts_of,
    sharding_of,
    tell,
    trajectory_of,
    working,
)
from surgery.files import check_folder

if TYPE_CHECKING:
    from surgery.checkpoints.trajectory import Trajectory
    from surgery.live.prompts import Batch


UNREPAIRED = 3  # the exit code: damaged, and not repairable within the limits


@contextmanager
def _loaded(
    run: Trajectory,
    data: Path | None,
    evaluate: str | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    shard: Any,
) -> Iterator[tuple[list[Batch] | None, Any, Callable[[str], None]]]:
    """The prompts, the evaluation, and a function that shows progress, with the run's later model loaded."""
    from surgery.live.prompts import load_prompts

    device_of(device)
    batches = load_prompts(data, run.tensors("later"), batch_size=batch_size) if data else None
    function = None if evaluate is None else evaluation_of(evaluate)
    with working("loading") as say:
        run.load(device, dtype_of(dtype), shard)
        yield batches, function, say


def sweep(
    checkpoints: Checkpoints,
    evaluate: Evaluation,
    data: Data = None,
    budgets: Annotated[str, typer.Option(help="Fractions, separated by commas.")] = "0.01,0.02,0.04",
    selectors: Annotated[str, typer.Option(help='Like "D,D:kl,AMC,MC,A/AMC,A,random".')] = "D,random",
    how: How = None,
    protect: Protect = None,
    protect_weight: ProtectWeight = 0.3,
    answers: Answers = None,
    units: Selected = None,
    rounds: Rounds = None,
    metric: Metric = None,
    output: Rows = None,
    log: LogTo = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = None,
    shard: Shard = None,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
) -> None:
    """Evaluate selectors at several budgets on one live model, with the rows earlier, later and ceiling."""
    from surgery.measure.sweep import sweep as run_sweep

    tracker = None if log is None else function_of(log, "--log")
    fractions = [fraction(text) for text in budgets.split(",")]
    check_selectors(selectors.split(","), checkpoints, data, how, units, protect, answers)
    how_sharded = sharding_of(shard)
    run = checked(trajectory_of(checkpoints, layout), units)
    guard = protected(protect, protect_weight, run, batch_size)
    chosen = [selector_of(text, fractions[0], how, 0, units, guard, rounds) for text in selectors.split(",")]
    if dry_run:
        references = 2 + len({str(getattr(one, "units", "mlp")) for one in chosen})  # a ceiling for each kind of unit
        rows = len(chosen) * len(fractions) + references
        out.print(f"{len(chosen)} selectors × {len(fractions)} budgets + {references} references = {rows} rows")
        return
    with _loaded(run, data, evaluate, batch_size, device, dtype, how_sharded) as (prompts, function, say):
        batches, told = answered(run, prompts, answers)
        found = run_sweep(
            run,
            batches,
            selectors=unanswered(chosen, prompts) if answers else chosen,
            budgets=fractions,
            evaluate=function,
            metric=metric,
            path=output,
            progress=say,
            log=tracker,
        )
    tell(told)
    out.print(str(found), markup=False)


def _kept(keep: list[str], evaluate: str | None, run: Trajectory, batch_size: int) -> Any:
    """What is to be kept: metrics of the evaluation, or without one the prompts of each domain."""
    if evaluate is None:
        return prompts_of(files_of(keep, "--keep"), run, batch_size)
    if files := [text for text in keep if "=" in text]:
        raise ValueError(
            f"--keep {files[0]}: --evaluate measures, so name its metric alone: --keep {files[0].partition('=')[0]}"
        )
    return keep


def _check_room(run: Trajectory, selector: Any) -> None:
    """Refuse before anything is measured what an adapter could not hold."""
    from surgery.reverting.adapters import check_room, single_weights
    from surgery.selectors.settings import units_asked
    from surgery.units import single

    if getattr(run.tensors("later"), "adapter", None) is None:
        return
    if single(selector.units):
        raise single_weights(run.later)
    check_room(*run.weights("later", "earlier", units=units_asked(run, selector.units)))


def repair(
    checkpoints: Checkpoints,
    data: Annotated[Path, path_option(help="JSON lines of the damaged domain: half choose, half measure.")],
    keep: Annotated[
        list[str] | None,
        typer.Option(
            help='A domain that must not be hurt, like "qa=qa.jsonl" (with --evaluate a metric, "qa"); repeat for more.'
        ),
    ] = None,
    recovery: Annotated[float, typer.Option(help="The wanted share of what can be won back, 0 to 1.")] = 0.8,
    limit: Annotated[float, typer.Option(help="How much a kept metric may lose, in its own unit.")] = 0.01,
    output: Annotated[
        Path | None, path_option("-o", "--output", help="The folder to write (default: only print the result).")
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="As in sweep (default: the likelihood of the measuring half's responses).")
    ] = None,
    selector: Annotated[str, typer.Option(help="As in select.")] = "D",
    units: Annotated[
        str | None,
        typer.Option(help='As in select (default: "weight"; of an adapter, which holds no single weights, as there).'),
    ] = None,
    rounds: Rounds = None,
    how: How = None,
    budgets: Annotated[
        str | None, typer.Option(help="Fractions to choose among (default: 23 from 0.0002 to 1).")
    ] = None,
    answers: Answers = None,
    metric: Annotated[
        str | None,
        typer.Option(help="The damaged metric (default: the file's name; with --evaluate the one that fell most)."),
    ] = None,
    rows: Annotated[
        Path | None, path_option(help="A JSON-lines file for the rows; an interrupted run resumes from it.")
    ] = None,
    log: LogTo = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = None,
    shard: Shard = None,
    layout: LayoutFile = None,
    reset_optimizer: ResetOptimizer = False,
    overwrite: Overwrite = False,
) -> None:
    """Find the smallest rollback that repairs a domain and does not hurt others; exit code 3 if there is none."""
    from surgery.checkpoints.checkpoint import folder_of
    from surgery.formats.folders import is_adapter
    from surgery.measure.repair import BUDGETS
    from surgery.measure.repair import repair as run_repair
    from surgery.reverting.folder import CHECKPOINT

    if output is not None:
        check_folder(output, CHECKPOINT, overwrite)
    tracker = None if log is None else function_of(log, "--log")
    fractions = [fraction(text) for text in budgets.split(",")] if budgets else list(BUDGETS)
    units = units or (None if is_adapter(folder_of(checkpoints[-1])) else "weight")
    check_selectors([selector], checkpoints, data, how, units, None, answers)
    how_sharded = sharding_of(shard)
    run = checked(trajectory_of(checkpoints, layout), units)
    chosen = selector_of(selector, fractions[0], how, 0, units, ({}, 0.0), rounds)
    if output is not None:
        _check_room(run, chosen)
    kept = _kept(keep or [], evaluate, run, batch_size)
    with _loaded(run, data, evaluate, batch_size, device, dtype, how_sharded) as (prompts, function, say):
        batches, told = answered(run, prompts, answers)
        done = run_repair(
            run,
            batches,
            keep=kept,
            recovery=recovery,
            limit=limit,
            selector=chosen,
            budgets=fractions,
            evaluate=function,
            metric=metric or (None if function else data.stem.partition(".")[0]),
            path=rows,
            progress=say,
            log=tracker,
        )
    tell(told)
    out.print(str(done), markup=False)
    if done.outcome == "not repairable":
        share = 0 if done.best is None else int(100 * done.wanted * (done.best.recovery or 0) / (done.goal or 1)) / 100
        out.print("\nnothing was written" + (f": --recovery {share:g} would settle for the best" if share > 0 else ""))
        raise typer.Exit(UNREPAIRED)
    if done.mask is not None and output is None:
        out.print("\nnothing was written: pass -o FOLDER to write the repaired checkpoint")
    elif done.mask is not None and output is not None:
        with working(f"writing {output}"):
            done.save(output, overwrite=overwrite, reset_optimizer=reset_optimizer)
        out.print(f"\nwrote {output}")
