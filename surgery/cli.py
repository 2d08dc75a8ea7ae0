"""The command line: the library's own functions under the same words. Importing this module imports no torch."""

from __future__ import annotations

import json
import shlex
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from surgery.units import kinds_of, noun

if TYPE_CHECKING:
    from surgery.reach import Strength
    from surgery.selection import Selector
    from surgery.slots import Block, Layout, Slot
    from surgery.trajectory import Trajectory

_BUDGETS = "0.01,0.02,0.04,0.08,0.16,0.32"
_WEIGHT = "weight"  # --units of single weights; not a kind of unit

app = typer.Typer(
    help="git revert for LLM post-training: put back the neurons through which a later stage hurt an earlier skill.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Checkpoints = Annotated[list[str], typer.Argument(metavar="[BASE] EARLIER LATER", help="Folders, in training order.")]
Data = Annotated[Path | None, typer.Option(help="JSON lines of the damaged domain (needed for A and D).")]
Budget = Annotated[
    float, typer.Option(help="Fraction of all neurons to revert, 0 to 1 (of several --units: of their parameters).")
]
Device = Annotated[str | None, typer.Option(help='Where the model runs, like "cuda".')]
Dtype = Annotated[str | None, typer.Option(help='Its dtype, like "bfloat16" (default: the checkpoint\'s).')]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Say what would be done, with counts, and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
Evaluation = Annotated[
    str,
    typer.Option(
        help='"module:function" or "file.py:function"; model in, {metric: score} out. Or "lm_eval:task,task".'
    ),
]
Metric = Annotated[str | None, typer.Option(help="Whose recovery to report (default: the one that fell most).")]
Rows = Annotated[Path | None, typer.Option("-o", "--output", help="JSON lines; what was interrupted resumes.")]
LayoutFile = Annotated[
    Path | None, typer.Option("--layout", help="Your own layout: a JSON file (docs/how-to/add-an-architecture.md).")
]
Units = Annotated[
    str, typer.Option(help='"mlp", "kv_group", "query_head", "value_channel", or two like "mlp,kv_group".')
]
Selected = Annotated[str, typer.Option("--units", help='As in inspect; or "weight": single weights.')]
NoStop = Annotated[
    bool,
    typer.Option("--no-stop", help="Of single weights by D take the whole budget, also where fewer lower the loss."),
]


@app.command()
def select(
    checkpoints: Checkpoints,
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The mask file to write.")] = None,
    data: Data = None,
    budget: Budget = 0.02,
    selector: Annotated[
        str, typer.Option(help='"D" (damage); letters of A, M, C that rank, "/" letters that split; "random".')
    ] = "AMC",
    how: Annotated[
        str | None, typer.Option(help="proportional, global or uniform (default: global for D, else proportional).")
    ] = None,
    units: Selected = "mlp",
    no_stop: NoStop = False,
    seed: Annotated[int, typer.Option(help="Of the random selector.")] = 0,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Choose the neurons to revert and write them as a mask file."""
    from surgery.prompts import load_prompts

    if output is None and not dry_run:
        raise ValueError("say where the mask goes: -o mask.safetensors (or --dry-run to see the counts only)")
    if output is not None and output.exists() and not (overwrite or dry_run):
        raise ValueError(f"{output} exists: choose another file, or pass --overwrite")
    run = _trajectory(checkpoints, layout, units)
    chosen = _selector(selector, budget, how, seed, units, no_stop)
    with _working(f"reading {len(checkpoints)} checkpoints"):
        batches = load_prompts(data, _folder(run.later), batch_size=batch_size) if data else None
        if batches is not None and set(selector) & set("AD"):
            run = _live(run, device, dtype)
        mask = chosen.select(run, batches)
    out.print(repr(mask), markup=False)
    for note in mask.made_by.get("not_covered", []):
        out.print(note, markup=False)
    taken = sum(mask.count().values())
    if found := mask.made_by.get("entries"):
        out.print(f"{found['allowed']} weights allowed, {taken} taken")
        for count, loss in found.get("curve", []):
            out.print(f"  {count:>10} reverted: loss {loss:.5g}{' (kept)' if count == taken else ''}")
    elif budget and not taken:
        out.print(f"budget {budget} buys not one of these units: pass a larger --budget")
    for expert in mask.made_by.get("never_routed", []):
        out.print(f"never routed, so without an activation: {expert}")
    if output is not None and not dry_run:
        output.parent.mkdir(parents=True, exist_ok=True)
        mask.save(output)
        out.print(f"wrote {output}")


@app.command()
def rollback(
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    to: Annotated[str, typer.Option(help="The earlier checkpoint's folder.")],
    mask: Annotated[Path, typer.Option(help="A mask file, as select writes it.")],
    output: Annotated[Path | None, typer.Option("-o", "--output", help="The folder to write.")] = None,
    strength: Annotated[
        str, typer.Option(help="How far back, 0 to 3; 1 copies bits. Or a file, as strengths writes it.")
    ] = "1",
    layout: LayoutFile = None,
    dry_run: DryRun = False,
    overwrite: Overwrite = False,
) -> None:
    """Write the later checkpoint with the masked neurons set back; every other byte stays as it was."""
    from surgery.entries import load_mask, noun_of
    from surgery.operators import rolled_back
    from surgery.reach import recorded, spoken
    from surgery.saving import save

    if output is None and not dry_run:
        raise ValueError("say where the healed checkpoint goes: -o FOLDER (or --dry-run to see the counts only)")
    if not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    chosen = load_mask(mask)
    own = _layout(layout, later)
    view = rolled_back(later, to=to, mask=chosen, strength=_strength(strength), layout=own)
    counted = f"{sum(chosen.count().values())} of {chosen.total} {noun_of(chosen)} ({chosen.fraction:.2%})"
    out.print(f"{counted}, {view.parameters} parameters")
    if view.strength != 1:
        out.print(spoken(recorded(view.strength, chosen)))
    for file in view.headers:
        out.print(f"  {file}: {len(view.touched(file))} of {len(view.headers[file])} tensors touched")
    if dry_run or output is None:
        out.print("dry run: nothing was written")
        return
    with _working(f"writing {output}"):
        save(view, output, overwrite=overwrite)
    out.print(f"wrote {output}")


@app.command()
def strengths(
    earlier: Annotated[str, typer.Argument(help="The earlier checkpoint's folder.")],
    later: Annotated[str, typer.Argument(help="The later checkpoint's folder.")],
    mask: Annotated[Path, typer.Option(help="A mask file, as select writes it.")],
    data: Annotated[Path, typer.Option(help="JSON lines of the damaged domain.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The file to write, for rollback --strength.")],
    most: Annotated[float, typer.Option(help="The furthest a neuron may go, up to 3; 1 is the earlier value.")] = 2.0,
    joint: Annotated[bool, typer.Option("--joint", help="One strength for all.")] = False,
    passes: Annotated[int, typer.Option(help="Forward and backward passes over the data.")] = 16,
    batch_size: int = 16,
    device: Device = None,
    layout: LayoutFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Find how far back each masked neuron should go and write it as a file; the model is loaded in float32."""
    from surgery.entries import load_mask
    from surgery.optimum import strengths as find
    from surgery.prompts import load_prompts
    from surgery.reach import recorded, spoken

    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another file, or pass --overwrite")
    if not mask.is_file():
        raise LookupError(f"there is no mask file {mask}")
    chosen = load_mask(mask)
    run = _trajectory([earlier, later], layout, "mlp")
    with _working("finding strengths"):
        batches = load_prompts(data, _folder(later), batch_size=batch_size)
        run = _live(run, device, "float32")
        found = find(run, batches, chosen, most=most, joint=joint, passes=passes)
    told = found.made_by["strengths"]
    none, full = told["loss"][:2]
    out.print(f"loss {none:.5g} in the later model, {full:.5g} at strength {min(1.0, most):g}, {told['least']:.5g} now")
    out.print(spoken(recorded(found, chosen)))
    output.parent.mkdir(parents=True, exist_ok=True)
    found.save(output)
    out.print(f"wrote {output}")


@app.command()
def sweep(
    checkpoints: Checkpoints,
    evaluate: Evaluation,
    data: Data = None,
    budgets: Annotated[str, typer.Option(help="Fractions, separated by commas.")] = "0.01,0.02,0.04",
    selectors: Annotated[str, typer.Option(help='Like "D,AMC,MC,A/AMC,A,random".')] = "AMC,random",
    units: Selected = "mlp",
    no_stop: NoStop = False,
    metric: Metric = None,
    output: Rows = None,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
    dry_run: DryRun = False,
) -> None:
    """Evaluate selectors at budgets on one live model, beside earlier, later and the ceiling."""
    from surgery.prompts import load_prompts
    from surgery.sweeps import sweep as run_sweep

    fractions = [_fraction(text) for text in budgets.split(",")]
    chosen = [_selector(text, fractions[0], None, 0, units, no_stop) for text in selectors.split(",")]
    run = _trajectory(checkpoints, layout, units)
    if dry_run:
        rows = len(chosen) * len(fractions) + 3
        out.print(f"{len(chosen)} selectors × {len(fractions)} budgets + 3 references = {rows} rows")
        return
    batches = load_prompts(data, _folder(run.later), batch_size=batch_size) if data else None
    function = _function(evaluate)
    with _working("loading") as say:
        run = _live(run, device, dtype)
        model = run.load()
        found = run_sweep(
            model,
            run,
            batches,
            selectors=chosen,
            budgets=fractions,
            evaluate=function,
            metric=metric,
            path=output,
            progress=say,
        )
    out.print(str(found), markup=False)


@app.command()
def tune(
    checkpoints: Checkpoints,
    evaluate: Evaluation,
    data: Data = None,
    selector: Annotated[str, typer.Option(help="As in select.")] = "AMC",
    how: Annotated[str, typer.Option(help="As in select; only the masks of global are nested.")] = "global",
    recovery: Annotated[float, typer.Option(help="The wanted part of what was lost.")] = 0.8,
    limit: Annotated[
        list[str] | None, typer.Option(help='The least change allowed elsewhere, like "qa=-0.002"; repeat for more.')
    ] = None,
    budgets: Annotated[
        str | None, typer.Option(help="Fractions to choose among (default: 19 from 0.001 to 1).")
    ] = None,
    units: Selected = "mlp",
    no_stop: NoStop = False,
    metric: Metric = None,
    output: Rows = None,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
) -> None:
    """Find the smallest budget that reaches a wanted recovery under limits elsewhere; exit code 1 if none does."""
    from surgery.prompts import load_prompts
    from surgery.tuning import BUDGETS, recommend

    fractions = [_fraction(text) for text in budgets.split(",")] if budgets else list(BUDGETS)
    chosen = _selector(selector, fractions[0], how, 0, units, no_stop)
    limits = dict(map(_limit, limit or ()))
    run = _trajectory(checkpoints, layout, units)
    batches = load_prompts(data, _folder(run.later), batch_size=batch_size) if data else None
    function = _function(evaluate)
    with _working("loading") as say:
        run = _live(run, device, dtype)
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
    out.print(str(found), markup=False)
    if found.budget is None:
        raise typer.Exit(1)
    words = [*checkpoints, *(["--data", str(data)] if data else []), "--selector", selector, "--how", how]
    words += ["--units", units] if units != "mlp" else []
    words += ["--no-stop"] if no_stop else []
    out.print(f"\nsurgery select {shlex.join(words)} --budget {found.budget:g} -o mask.safetensors", markup=False)


@app.command()
def analyse(
    checkpoints: Annotated[
        list[str], typer.Argument(metavar="CKPT...", help="Folders in training order, or name=folder.")
    ],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder to write.")],
    data: Annotated[
        list[str] | None, typer.Option(help='Prompts of a domain, "domain=file"; repeat for each domain.')
    ] = None,
    evaluate: Annotated[
        str | None, typer.Option(help="As in sweep, per domain (default: how likely the responses are).")
    ] = None,
    budgets: Annotated[str, typer.Option(help="Of the rollbacks: fractions, separated by commas.")] = _BUDGETS,
    refresh_steps: Annotated[int, typer.Option(help="Of the refresh; 0 leaves it out.")] = 10,
    skip: Annotated[
        str | None, typer.Option(help='Parts to leave out, separated by commas, like "terms,refreshed".')
    ] = None,
    limit: Annotated[int | None, typer.Option(help="Read only so many prompts of each file.")] = None,
    batch_size: int = 16,
    device: Device = None,
    dtype: Dtype = None,
    layout: LayoutFile = None,
    overwrite: Overwrite = False,
) -> None:
    """Is a later stage hurting an earlier one? Write a page with all the evidence, and what a repair would bring."""
    import torch

    from surgery.inquiry import analyse as run_analysis
    from surgery.prompts import load_prompts
    from surgery.sections import write_report
    from surgery.trajectory import Trajectory
    from surgery.verdict import verdict

    if output.exists() and not overwrite:
        raise ValueError(f"{output} exists: choose another folder, or pass --overwrite")
    stages = _named(checkpoints)
    files = _domains(data or [])
    run = Trajectory.through(stages, layout=_layout(layout, list(stages.values())[-1]))
    prompts = {
        domain: load_prompts(file, _folder(run.later), batch_size=batch_size, limit=limit)
        for domain, file in files.items()
    }
    with _working("reading") as say:
        found = run_analysis(
            run,
            prompts,
            evaluate=None if evaluate is None else _function(evaluate),
            budgets=[_fraction(text) for text in budgets.split(",")],
            refresh_steps=refresh_steps,
            skip=[part.strip() for part in skip.split(",")] if skip else (),
            device=device,
            dtype=getattr(torch, dtype) if dtype else None,
            progress=say,
        )
        say("drawing")
        page = write_report(
            found, output, command=shlex.join(["surgery", *sys.argv[1:]]), data=files, overwrite=overwrite
        )
    for paragraph in verdict(found):
        out.print(f"{paragraph}\n", markup=False)
    for name, why in found.skipped.items():
        out.print(f"not computed: {name}: {why}", markup=False)
    out.print(f"wrote {page}")


def _named(checkpoints: list[str]) -> dict[str, str]:
    """Stages by name: as given, or the folders' own names; the same name twice gets its place."""
    found: dict[str, str] = {}
    for at, text in enumerate(checkpoints):
        name, equals, folder = text.partition("=")
        if not equals or "/" in name:
            name, folder = Path(text).name or text, text
        found[name if name not in found else f"{name} ({at + 1})"] = folder
    return found


def _domains(data: list[str]) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for text in data:
        domain, equals, file = text.partition("=")
        if not equals or not domain or not file:
            raise ValueError(f'--data {text!r}: expected a domain and its file, like "math=math.jsonl"')
        if domain in found:
            raise ValueError(f"--data names {domain!r} twice: put its prompts into one file")
        found[domain] = Path(file)
    return found


@app.command()
def inspect(
    source: Annotated[str, typer.Argument(metavar="MODEL", help="A checkpoint's folder, or a mask file.")],
    probe: Annotated[bool, typer.Option("--probe", help="Verify one block of each kind by autograd.")] = False,
    units: Units = "mlp",
    layout: LayoutFile = None,
) -> None:
    """Print where the neurons (or other units) lie and how that was found."""
    from surgery.trajectory import open_weights

    if Path(source).is_file():
        from surgery.entries import load_mask

        mask = load_mask(source)
        out.print(repr(mask), markup=False)
        out.print(json.dumps(mask.made_by, indent=2), markup=False)
        return
    weights = open_weights(source, _layout(layout, source), units=_kinds(units))
    kinds: dict[Any, list[Block]] = {}
    for block in weights.layout.blocks:
        kinds.setdefault(_kind(block), []).append(block)
    total = sum(weights.layout.sizes.values())
    what = noun(weights.layout.units)
    out.print(f"{source}: {total} {what} in {len(weights.layout)} blocks of {len(kinds)} kinds")
    for blocks in kinds.values():
        _print_kind(blocks)
    for note in weights.layout.notes:
        out.print(f"\n{note}", markup=False)
    if probe and not _probed(source, layout, _kinds(units), [blocks[0].name for blocks in kinds.values()]):
        raise typer.Exit(1)


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


def _probed(source: str, layout: Path | None, kinds: tuple[str, ...], names: list[str]) -> bool:
    """Whether autograd confirms the named blocks; prints what it finds."""
    from surgery.layout import find_layout
    from surgery.probing import probe as verify
    from surgery.trajectory import Trajectory

    with _working("loading the model to probe it"):
        model = Trajectory(later=source).load()
    live = _layout(layout, source) or find_layout(model, units=kinds)
    right = True
    for name in names:
        problems = verify(model, live, live[name])
        right &= not problems
        whose = "neuron" if live[name].kind == "mlp" else "unit"
        said = "; ".join(problems) or f"gradient lies on exactly the {whose}'s slices"
        out.print(f"probe {name}: {said}", markup=False)
    return right


def _trajectory(checkpoints: list[str], layout: Path | None, units: str) -> Trajectory:
    from surgery.trajectory import Trajectory

    if len(checkpoints) not in (2, 3):
        raise ValueError(f"expected [BASE] EARLIER LATER, got {len(checkpoints)} checkpoints")
    base = checkpoints[0] if len(checkpoints) == 3 else None
    own = _layout(layout, checkpoints[-1])
    kinds = ("mlp",) if units == _WEIGHT else _kinds(units)
    return Trajectory(base, checkpoints[-2], checkpoints[-1], layout=own, units=kinds)


def _kinds(units: str) -> tuple[str, ...]:
    return kinds_of(tuple(kind.strip() for kind in units.split(",")))


def _live(run: Trajectory, device: str | None, dtype: str | None) -> Trajectory:
    from dataclasses import replace

    import torch

    if dtype is not None and not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise ValueError(f"--dtype {dtype}: expected a torch dtype like bfloat16")
    return replace(run, model=run.load(device, getattr(torch, dtype) if dtype else None))


def _layout(path: Path | None, source: str) -> Layout | None:
    if path is None:
        return None
    from surgery.checkpoint import Checkpoint
    from surgery.layout import spec_layout

    return spec_layout(json.loads(path.read_text()), Checkpoint(source).shapes)


def _folder(source: Any) -> Path:
    from surgery.checkpoint import Checkpoint

    return Checkpoint(source).folder


def _selector(text: str, budget: float, how: Any, seed: int, units: str, no_stop: bool) -> Selector:
    from surgery.selection import AMCSelector, DamageSelector, RandomSelector
    from surgery.singles import EntrySelector

    if units == _WEIGHT:
        rank = text.strip()
        if rank == "random" or "/" in rank:
            raise ValueError(f"--units {_WEIGHT} are ranked by D or by letters of A, M, C, and {rank!r} was asked for")
        return EntrySelector(budget, rank, how or "global", stop=not no_stop)
    if text.strip() == "random":
        return RandomSelector(budget, seed)
    if text.strip() == "D":
        return DamageSelector(budget, how or "global")
    rank, _, spend = text.strip().partition("/")
    return AMCSelector(budget, rank, spend or rank, how or "proportional")


def _fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--budgets: {text!r} is not a number") from None


def _strength(text: str) -> Strength:
    from surgery.neurons import Neurons

    try:
        return float(text)
    except ValueError:
        if not Path(text).is_file():
            raise ValueError(f"--strength {text!r}: expected a number, or a file as strengths writes it") from None
    return Neurons.load(text)


def _limit(text: str) -> tuple[str, float]:
    name, _, least = text.partition("=")
    try:
        return name.strip(), float(least)
    except ValueError:
        raise ValueError(f'--limit {text!r}: expected a metric and its least change, like "qa=-0.002"') from None


def _function(name: str) -> Callable[..., Any] | str:
    """The function that ``module:function`` or ``file.py:function`` names; ``lm_eval:tasks`` stays as it is."""
    if name.startswith("lm_eval:"):
        return name
    home, _, attribute = name.rpartition(":")
    if not home:
        raise ValueError(f'--evaluate {name!r}: expected "module:function" or "file.py:function"')
    if home.endswith(".py"):
        path = Path(home).absolute()
        sys.path.insert(0, str(path.parent))
        home = path.stem
    else:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return getattr(import_module(home), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--evaluate {name!r}: {error}") from error


@contextmanager
def _working(what: str) -> Iterator[Callable[[str], None]]:
    """A spinner with the seconds that have gone by, on the error stream, so that output can be piped."""
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    start = time.monotonic()
    with err.status(what) as status:
        yield lambda text: status.update(f"{text} ({time.monotonic() - start:.0f} s)")


def main() -> None:
    """The command ``surgery``: exit code 0, 1 for what the user can mend (said in one line), 2 for wrong usage."""
    try:
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: err.print(f"warning: {message}", markup=False)
            app()
    except (ValueError, LookupError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        err.print(f"error: {text}", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        err.print("interrupted: nothing was changed", markup=False)
        sys.exit(130)


if __name__ == "__main__":
    main()
