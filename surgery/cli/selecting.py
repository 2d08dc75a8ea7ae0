"""Commands that choose and write: select, strengths, rollback."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from surgery.cli.choosing import answered, check_selectors, protected, selector_of
from surgery.cli.options import (
    Answers,
    BatchSize,
    Budget,
    Checkpoints,
    Data,
    Device,
    DryRun,
    Dtype,
    How,
    LayoutFile,
    Overwrite,
    Protect,
    ProtectWeight,
    ResetOptimizer,
    Rounds,
    Selected,
    Shard,
    checked,
    device_of,
    dtype_of,
    folder_of,
    layout_of,
    out,
    path_option,
    sharding_of,
    strength_of,
    tell,
    trajectory_of,
    working,
)
from surgery.files import check_file, check_folder, whole_file

if TYPE_CHECKING:
    from surgery.live.losses import Divergence
    from surgery.masks.mask import Mask


def select(
    checkpoints: Checkpoints,
    output: Annotated[Path | None, path_option("-o", "--output", help="The mask file to write.")] = None,
    data: Data = None,
    budget: Budget = 0.02,
    selector: Annotated[
        str,
        typer.Option(help='"D", "D:kl", "random", or letters of A, M, C; "A/AMC" ranks by A and allocates by A×M×C.'),
    ] = "D",
    how: How = None,
    protect: Protect = None,
    protect_weight: ProtectWeight = 0.3,
    answers: Answers = None,
    units: Selected = None,
    rounds: Rounds = None,
    seed: Annotated[int, typer.Option(help="Seed of the random selector.")] = 0,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = None,
    shard: Shard = None,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose the neurons or single weights to revert, and write a mask file."""
    from surgery.live.prompts import load_prompts

    if output is None and not dry_run:
        raise ValueError("name the file for the mask: -o mask.safetensors (or --dry-run to see the counts only)")
    if output is not None and not dry_run:
        check_file(output, overwrite)
    check_selectors([selector], checkpoints, data, how, units, protect, answers)
    device_of(device)
    how_sharded = sharding_of(shard)
    run = checked(trajectory_of(checkpoints, layout), units)
    guard = protected(protect, protect_weight, run, batch_size)
    chosen = selector_of(selector, budget, how, seed, units, guard, rounds)
    with working(f"reading {len(checkpoints)} checkpoints"):
        batches = load_prompts(data, folder_of(run.later), batch_size=batch_size) if data else None
        if batches is not None and set(selector) & set("AD"):
            run.load(device, dtype_of(dtype), how_sharded)
        batches, told = answered(run, batches, answers, write=not dry_run)
        mask = chosen.select(run, batches)
    tell(told)
    _describe(mask, budget)
    if output is not None and not dry_run and not out.quiet:
        with whole_file(output, overwrite=overwrite) as new:
            mask.save(new)
        out.print(f"wrote {output}")


def _describe(mask: Mask, budget: float) -> None:
    """Print what was chosen, and warnings about it."""
    from surgery.scores.damage import overpromised

    out.print(repr(mask), markup=False)
    for note in mask.made_by.get("not_covered", []):
        out.print(note, markup=False)
    taken = sum(mask.count().values())
    if found := mask.made_by.get("entries"):
        out.print(f"{found['allowed']} weights allowed, {taken} taken")
        if "curve" in found:
            out.print("loss, the distance from the earlier model's predictions on --data; the smallest is kept:")
        for count, loss in found.get("curve", []):
            out.print(f"  {count:>10} reverted: loss {loss:.5g}{' (kept)' if count == taken else ''}")
    elif budget and not taken:
        out.print(f"budget {budget} is less than one of these units, so none was selected: pass a larger --budget")
    if warning := overpromised(mask.made_by):
        out.print(warning, markup=False)
    for expert in mask.made_by.get("never_routed", []):
        out.print(f"no token reached this expert, so it has no activation: {expert}")


def rollback(
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    to: Annotated[str, typer.Option(help="The earlier checkpoint's folder.")],
    mask: Annotated[Path, path_option(help="A mask file that select wrote.")],
    output: Annotated[Path | None, path_option("-o", "--output", help="The folder to write.")] = None,
    strength: Annotated[
        str, typer.Option(help="How far back, 0 to 3 (1 copies the earlier bits), or a file that strengths wrote.")
    ] = "1",
    reset_optimizer: ResetOptimizer = False,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the later checkpoint with the masked neurons set back; every other byte of its weights stays the same."""
    from surgery.masks.mask import load_mask
    from surgery.reverting.contents import contents_of
    from surgery.reverting.folder import CHECKPOINT, save
    from surgery.reverting.rollback import rolled_back
    from surgery.reverting.writing import recorded, spoken

    if output is None and not dry_run:
        raise ValueError("name the folder to write: -o FOLDER (or --dry-run to see the counts only)")
    if not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    if output is not None and not dry_run:
        check_folder(output, CHECKPOINT, overwrite)
    chosen = load_mask(mask)
    own = layout_of(layout, later)
    view = rolled_back(later, to=to, mask=chosen, strength=strength_of(strength), layout=own)
    counted = f"{sum(chosen.count().values())} of {chosen.total} {chosen.noun} ({chosen.fraction:.2%})"
    out.print(f"{counted}, {view.parameters} parameters")
    if view.strength != 1:
        out.print(spoken(recorded(view.strength, chosen)))
    for file, names in view.stored.files.items() if view.stored else ():
        out.print(f"  {file}: {len(view.touched(file))} of {len(names)} tensors touched")
    if dry_run or output is None:
        contents = contents_of(view, folder_of(later))
        for note in contents.notes:
            out.print(note, markup=False)
        out.print(
            f"dry run: nothing was written; {len(contents.files)} files and what is added have {contents.size:,} bytes"
        )
        return
    with working(f"writing {output}"):
        save(view, output, overwrite=overwrite, reset_optimizer=reset_optimizer)
    out.print(f"wrote {output}")


def strengths(
    earlier: Annotated[str, typer.Argument(help="The earlier checkpoint's folder.")],
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    mask: Annotated[Path, path_option(help="A mask file that select wrote.")],
    data: Annotated[Path, path_option(help="JSON lines of the damaged domain.")],
    output: Annotated[Path, path_option("-o", "--output", help="The file to write, for rollback --strength.")],
    most: Annotated[float, typer.Option(help="The furthest a neuron may go, up to 3; 1 is the earlier value.")] = 2.0,
    passes: Annotated[int, typer.Option(help="Forward and backward passes over the data.")] = 16,
    loss: Annotated[str, typer.Option(help='"hellinger" or "kl": the distance from the earlier model.')] = "hellinger",
    answers: Answers = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    layout: LayoutFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Find how far back each masked neuron should go and write it as a file; the model is loaded in float32."""
    from surgery.live.prompts import load_prompts
    from surgery.masks.mask import load_mask
    from surgery.reverting.writing import recorded, spoken
    from surgery.selectors.strengths import strengths as find

    check_file(output, overwrite)
    if not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    if loss not in ("kl", "hellinger"):
        raise ValueError(f"--loss {loss}: expected kl or hellinger")
    device_of(device)
    chosen = load_mask(mask)
    run = trajectory_of([earlier, later], layout)
    with working("finding strengths"):
        prompts = load_prompts(data, folder_of(later), batch_size=batch_size)
        run.load(device, dtype_of("float32"))
        batches, kept = answered(run, prompts, answers)
        found = find(run, batches, chosen, most=most, passes=passes, loss=cast("Divergence", loss))
    tell(kept)
    told = found.made_by["strengths"]
    none, full = told["loss"][:2]
    full_at = f"{full:.5g} at strength {min(1.0, most):g}"
    out.print(f"loss {none:.5g} in the later model, {full_at}, {told['least']:.5g} with these strengths")
    out.print(spoken(recorded(found, chosen)))
    with whole_file(output, overwrite=overwrite) as new:
        found.save(new)
    out.print(f"wrote {output}")
