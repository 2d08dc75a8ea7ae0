"""Commands that choose and write: select, strengths, rollback, patch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from surgery.cli.choosing import answered, check_selectors, protected, selector_of
from surgery.cli.options import (
    Answers,
    Base,
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
    Strength,
    checked,
    device_of,
    dtype_of,
    layout_of,
    out,
    path_option,
    sharding_of,
    strength_of,
    tell,
    tell_adapters,
    trajectory_of,
    working,
)
from surgery.files import check_file, check_folder, whole_file

if TYPE_CHECKING:
    from surgery.live.losses import Divergence
    from surgery.masks.mask import Mask
    from surgery.reverting.patch import Patched
    from surgery.reverting.rollback import RolledBack


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
        batches = load_prompts(data, run.tensors("later"), batch_size=batch_size) if data else None
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
    elif budget and taken and len(mask.units) > 1:
        out.print(f"the budget of {budget:.4g} is a share of the parameters of all these units, not of their number")
    elif budget and not taken:
        out.print(f"budget {budget} is less than one of these units, so none was selected: pass a larger --budget")
    if warning := overpromised(mask.made_by):
        out.print(warning, markup=False)
    for expert in mask.made_by.get("never_routed", []):
        out.print(f"no token reached this expert, so it has no activation: {expert}")


def rollback(
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    to: Annotated[str | None, typer.Option(help="The earlier checkpoint's folder.")] = None,
    mask: Annotated[Path | None, path_option(help="A mask file that select wrote.")] = None,
    patch: Annotated[
        Path | None, path_option(help="Instead of --to and --mask: a folder that surgery patch wrote.")
    ] = None,
    reverse: Annotated[bool, typer.Option("--reverse", help="Take the patch back.")] = False,
    output: Annotated[Path | None, path_option("-o", "--output", help="The folder to write.")] = None,
    strength: Strength = "1",
    reset_optimizer: ResetOptimizer = False,
    layout: LayoutFile = None,
    base: Base = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the later checkpoint with the masked neurons set back; every other byte of its weights stays the same."""
    from surgery.formats.stored import ADAPTED
    from surgery.reverting.contents import contents_of
    from surgery.reverting.folder import CHECKPOINT, resettable, save

    if output is None and not dry_run:
        raise ValueError("name the folder to write: -o FOLDER (or --dry-run to see the counts only)")
    if output is not None and not dry_run:
        check_folder(output, CHECKPOINT, overwrite)
    view: RolledBack | Patched
    if patch is None:
        if reverse:
            raise ValueError("--reverse takes a patch back: name it with --patch")
        if to is None or mask is None:
            raise ValueError("name the earlier checkpoint with --to and a mask with --mask, or a patch with --patch")
        view = _rolled_back(later, to, mask, strength, layout, base)
        if view.stored is not None and view.stored.kind == ADAPTED:
            view.papers()  # what an adapter can't hold is refused before anything is printed
        _tell_counts(view)
    else:
        if to or mask or layout or base or strength != "1":
            raise ValueError(
                "--patch holds all that is written: leave out --to, --mask, --strength, --layout and --base"
            )
        view = _patched(later, patch, reverse)
    for file, names in view.stored.files.items() if view.stored else ():
        out.print(f"  {file}: {len(view.touched(file))} of {len(names)} tensors touched")
    if dry_run or output is None:
        assert view.folder is not None
        if reset_optimizer and view.stored is not None:
            resettable(view.folder, view.stored)
        contents = contents_of(view, view.folder)
        for note in contents.notes:
            out.print(note, markup=False)
        out.print(
            f"dry run: nothing was written; {len(contents.files)} files and what is added have {contents.size:,} bytes"
        )
        return
    with working(f"writing {output}"):
        save(view, output, overwrite=overwrite, reset_optimizer=reset_optimizer)
    out.print(f"wrote {output}")


def _rolled_back(
    later: str, to: str, mask: Path, strength: str, layout: Path | None, base: str | None = None
) -> RolledBack:
    """The later checkpoint with the mask set back."""
    from surgery.checkpoints.checkpoint import Checkpoint, opened
    from surgery.masks.mask import load_mask
    from surgery.reverting.rollback import rolled_back

    if not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    chosen = load_mask(mask)
    found = opened(later, to) if base is None else Checkpoint(later, base)
    earlier = opened(to, found)
    tell_adapters(found, earlier)
    own = layout_of(layout, found)
    return rolled_back(found, to=earlier, mask=chosen, strength=strength_of(strength), layout=own)


def _tell_counts(view: RolledBack) -> None:
    from surgery.reverting.writing import recorded, spoken

    mask = view.mask
    counted = f"{sum(mask.count().values())} of {mask.total} {mask.noun} ({mask.fraction:.2%})"
    out.print(f"{counted}, {view.parameters} parameters")
    if view.strength != 1:
        out.print(spoken(recorded(view.strength, mask)))


def _patched(later: str, folder: Path, reverse: bool) -> Patched:
    """The later checkpoint with a patch applied or taken back; the counts are printed."""
    from surgery.reverting.patch import Patch

    held = Patch(folder)
    with working("verifying the patch"):
        view = held.applied(later, reverse=reverse)
    out.print(f"{held.numbers} numbers in {len(held.tensors)} tensors {'taken back' if reverse else 'patched'}")
    return view


def patch(
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    to: Annotated[str, typer.Option(help="The earlier checkpoint's folder.")],
    mask: Annotated[Path, path_option(help="A mask file that select wrote.")],
    output: Annotated[Path, path_option("-o", "--output", help="The folder to write.")],
    format: Annotated[
        str, typer.Option(help='"surgery" (rollback --patch applies it), "slime" (SGLang\'s disk delta) or "vllm".')
    ] = "surgery",
    reverse: Annotated[
        bool, typer.Option("--reverse", help="Write the patch that leads back, from the rolled-back checkpoint.")
    ] = False,
    encoding: Annotated[str, typer.Option(help='For slime: "xor" or "overwrite".')] = "xor",
    base_version: Annotated[int, typer.Option(help="For slime: the version that the servers hold.")] = 0,
    strength: Strength = "1",
    layout: LayoutFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Write a rollback as a patch: a small folder with the changed numbers only."""
    from surgery.reverting.patch import size_of
    from surgery.reverting.patch_writing import PATCH, save_patch

    check_folder(output, PATCH, overwrite)
    view = _rolled_back(later, to, mask, strength, layout)
    _tell_counts(view)
    with working(f"writing {output}"):
        save_patch(
            view,
            output,
            format=format,
            reverse=reverse,
            encoding=encoding,
            base_version=base_version,
            overwrite=overwrite,
        )
    size = size_of(output)
    home = view.folder
    files = view.stored.files if home and view.stored else ()
    whole = sum((home / file).stat().st_size for file in files) if home else 0
    out.print(f"wrote {output}: {size:,} bytes, {size / max(whole, 1):.2%} of the checkpoint's {whole:,}")


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
    tell_adapters(*map(run.tensors, run.checkpoints))
    with working("finding strengths"):
        prompts = load_prompts(data, run.tensors("later"), batch_size=batch_size)
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
