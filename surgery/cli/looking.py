"""Commands that look: analyse, inspect."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from surgery.cli.options import (
    Base,
    BatchSize,
    Device,
    Dtype,
    LayoutFile,
    Overwrite,
    Units,
    device_of,
    dtype_of,
    evaluation_of,
    files_of,
    fraction,
    kinds_in,
    layout_of,
    out,
    path_option,
    tell_adapters,
    trajectory_of,
    working,
)
from surgery.files import check_folder, path_of
from surgery.tables import as_json, json_text
from surgery.units import noun

if TYPE_CHECKING:
    from surgery.layout.slots import Block, Slot

BUDGETS = "0.01,0.02,0.04,0.08,0.16,0.32"


def analyse(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CKPT...", help="Folders in training order, or name=folder.")
    ],
    output: Annotated[Path, path_option("-o", "--output", help="The folder to write.")],
    data: Annotated[
        list[str] | None, typer.Option(help='Prompts of a domain, "domain=file"; repeat for each domain.')
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="As in sweep, one score per domain (default: the likelihood of the responses).")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Fractions of neurons to roll back, separated by commas.")] = BUDGETS,
    refresh_steps: Annotated[int, typer.Option(help="Steps of the refresh; 0 leaves it out.")] = 10,
    mask: Annotated[
        Path | None, path_option(help="A mask file: a repair of your own, measured and shown token by token.")
    ] = None,
    skip: Annotated[
        str | None, typer.Option(help='Parts to leave out, separated by commas, like "terms,refreshed".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read at most this many prompts of each file.")] = None,
    batch_size: BatchSize = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Does a later stage hurt an earlier one? Write a page with all the evidence, and what a repair brings back."""
    from surgery.checkpoints.trajectory import Trajectory
    from surgery.live.prompts import load_prompts
    from surgery.masks.mask import load_mask
    from surgery.report.inquiry import analyse as run_analysis
    from surgery.report.sections import REPORT, write_report
    from surgery.report.verdict import verdict

    check_folder(output, REPORT, overwrite)
    if mask is not None and not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    device_of(device)
    stages = _named(checkpoints)
    files = files_of(data or [], "--data")
    run = Trajectory.through(stages, layout=layout_of(layout, *reversed(stages.values())))
    tell_adapters(*map(run.held, run.checkpoints.values()))
    prompts = {
        domain: load_prompts(file, run.tensors("later"), batch_size=batch_size, limit=limit)
        for domain, file in files.items()
    }
    with working("reading") as say:
        found = run_analysis(
            run,
            prompts,
            evaluate=None if evaluate is None else evaluation_of(evaluate),
            budgets=[fraction(text) for text in budgets.split(",")],
            refresh_steps=refresh_steps,
            mask=None if mask is None else load_mask(mask),
            skip=[part.strip() for part in skip.split(",")] if skip else (),
            device=device,
            dtype=dtype_of(dtype),
            progress=say,
        )
        say("drawing")
        page = write_report(
            found, output, command=shlex.join(["surgery", *sys.argv[1:]]), data=files, overwrite=overwrite
        )
    for paragraph in verdict(found):
        out.print(f"{paragraph}\n", markup=False)
    for names, why in found.needs.items():
        out.print(f"not computed: {names} ({why})", markup=False)
    out.print(f"wrote {page}")


def _named(checkpoints: list[str]) -> dict[str, str]:
    """Stages by name: the name given, or the folder's own; a name that occurs twice gets its position added."""
    found: dict[str, str] = {}
    for at, text in enumerate(checkpoints):
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = path_of(text).name or text, text
        found[name if name not in found else f"{name} ({at + 1})"] = folder
    return found


def inspect(
    sources: Annotated[
        list[str],
        typer.Argument(metavar="CKPT...", help="A checkpoint's folder or a mask file; or [BASE] EARLIER LATER."),
    ],
    probe: Annotated[bool, typer.Option("--probe", help="Verify one block of each kind by autograd.")] = False,
    units: Units = "mlp",
    layout: LayoutFile = None,
    base: Base = None,
    data: Annotated[
        Path | None, typer.Option(help="JSON lines of prompts: print the first one's tokens as the model sees them.")
    ] = None,
) -> None:
    """Print where the neurons of a checkpoint lie; of two or three, check all that can be told before a rollback."""
    from surgery.checkpoints.checkpoint import Checkpoint, folder_of
    from surgery.checkpoints.opening import open_weights
    from surgery.formats.folders import is_adapter

    if len(sources) > 1:
        _print_preflight(sources, units, layout, data)
        return
    source = sources[0]
    if data is not None:
        folder = folder_of(source)
        _print_tokens(data, Checkpoint(folder, base) if is_adapter(folder) else folder)
        return
    if path_of(source).is_file():
        from surgery.masks.mask import load_mask

        mask = load_mask(source)
        out.print(repr(mask), markup=False)
        out.print(json_text(as_json(mask.made_by), 2), markup=False)
        return
    found = Checkpoint(source, base)
    tell_adapters(found)
    weights = open_weights(found, layout_of(layout, found), units=kinds_in(units))
    kinds: dict[Any, list[Block]] = {}
    for block in weights.layout.blocks:
        kinds.setdefault(_kind(block), []).append(block)
    total = sum(weights.layout.sizes.values())
    what = noun(weights.layout.units)
    out.print(f"{source}: {total} {what} in {len(weights.layout)} blocks of {len(kinds)} kind{'s' * (len(kinds) > 1)}")
    for blocks in kinds.values():
        _print_kind(blocks)
    for note in weights.layout.notes:
        out.print(f"\n{note}", markup=False)
    if probe and not _probed(found, layout, kinds_in(units), [blocks[0].name for blocks in kinds.values()]):
        raise typer.Exit(1)


def _print_preflight(sources: list[str], units: str, layout: Path | None, data: Path | None) -> None:
    """A line for each check; the exit code is 1 where one of them refuses."""
    from surgery.live.preflight import preflight

    run = trajectory_of(sources, layout)
    with working("looking at the checkpoints"):
        found = preflight(run, data, kinds_in(units))
    refused = any(one.verdict == "refused" for one in found)
    if not refused:
        tell_adapters(*map(run.tensors, run.checkpoints))
    width = max(len(one.what) for one in found)
    for one in found:
        out.print(f"{one.verdict:<8} {one.what:<{width}}  {one.said}", markup=False)
    if data is not None and not refused:
        out.print()
        _print_tokens(data, run.tensors("later"))
    if refused:
        raise typer.Exit(1)


def _print_tokens(data: Path, source: Any) -> None:
    """The first prompt of a file and its response, token by token."""
    from surgery.live.lines import end_tokens
    from surgery.live.prompts import load_prompts, opened_tokenizer, response_mask

    tokenizer = opened_tokenizer(source)
    (batch,) = load_prompts(data, tokenizer, limit=1)
    ids, counted = batch["input_ids"][0], response_mask(batch)[0]
    for what, some in (("prompt", ids[~counted]), ("response", ids[counted])):
        named = what if "labels" in batch else "prompt, without a response"
        if len(some):
            said = " ".join(repr(tokenizer.decode([token])) for token in some.tolist())
            out.print(f"{named} ({len(some)} token{'s' * (len(some) > 1)}): {said}\n", markup=False, highlight=False)
    ends = " or ".join(repr(tokenizer.decode([token])) for token in sorted(end_tokens(tokenizer)))
    out.print(f"the tokenizer and its chat template end an answer with {ends or 'nothing'}", markup=False)


def _kind(block: Block) -> Any:
    slots = tuple(
        (slot.part, slot.pattern, slot.sizes, slot.shape) for slot in block.slots[: 8 if block.experts else None]
    )
    return block.neurons, block.experts, block.found, slots


def _print_kind(blocks: list[Block]) -> None:
    first = blocks[0]
    names = first.name if len(blocks) == 1 else f"{first.name} … {blocks[-1].name} ({len(blocks)} blocks)"
    experts = f", {first.experts} experts" if first.experts else ""
    what = noun((first.kind,))
    out.print(f"\n{names}", markup=False)
    out.print(f"  {first.neurons} {what}{experts}, {first.width} parameters each; found by {first.found}", markup=False)
    shown = first.slots if len(first.slots) <= 8 else [first.of(part)[0] for part in first.parts]
    width = max(len(slot.tensor) for slot in shown)
    for slot in shown:
        pattern = f"{slot.pattern}{_which(slot)}"
        out.print(f"  {slot.part:<9} {slot.tensor:<{width}}  {list(slot.shape)}  {pattern}", markup=False)
    if len(shown) < len(first.slots):
        out.print(f"  … and the same for the other experts: {len(first.slots)} tensors in all")


def _which(slot: Slot) -> str:
    """What a slot's pattern leaves open: the sizes of its axes, which part, which rows."""
    said = [f"{axis} = {size}" for axis, size in slot.sizes]
    if slot.g is not None:
        said.append(f"g = {slot.g}" if isinstance(slot.g, int) else f"g = {slot.g[0]} … {slot.g[1] - 1}")
    if slot.rows is not None:
        said.append(f"of {slot.rows[0]} … {slot.rows[1] - 1}")
    return f" ({', '.join(said)})" if said else ""


def _probed(source: Any, layout: Path | None, kinds: tuple[str, ...], names: list[str]) -> bool:
    """Whether autograd confirms the named blocks; prints what it finds."""
    from surgery.checkpoints.trajectory import Trajectory
    from surgery.layout.finding import find_layout
    from surgery.live.probing import probe as verify

    with working("loading the model to probe it"):
        model = Trajectory(later=source).load()
    live = layout_of(layout, source) or find_layout(model, units=kinds)
    right = True
    for name in names:
        problems = verify(model, live, live[name])
        right &= not problems
        whose = "neuron" if live[name].kind == "mlp" else "unit"
        said = "; ".join(problems) or f"gradient lies on exactly the {whose}'s slices"
        out.print(f"probe {name}: {said}", markup=False)
    return right
