"""What commands share: consoles, options, and how their texts are read."""

from __future__ import annotations

import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.status import Status
from rich.text import Text

from surgery.files import path_of
from surgery.progress import reporting, spoken
from surgery.tables import read_json
from surgery.units import KINDS, WEIGHT, kinds_of, single

if TYPE_CHECKING:
    import torch

    from surgery.checkpoints.trajectory import Trajectory
    from surgery.layout.slots import Layout
    from surgery.live.prompts import Batch
    from surgery.reverting.writing import Strength as HowFar

path_option = partial(typer.Option, parser=path_of, metavar="PATH")

out, err = Console(soft_wrap=True, highlight=False), Console(stderr=True, soft_wrap=True, highlight=False)

Checkpoints = Annotated[list[str], typer.Argument(metavar="[BASE] EARLIER LATER", help="Folders, in training order.")]
Data = Annotated[Path | None, path_option(help="JSON lines of the damaged domain (needed for A and D).")]
Budget = Annotated[
    float, typer.Option(help="Fraction of all neurons to revert, 0 to 1 (with several --units, of their parameters).")
]
Device = Annotated[str | None, typer.Option(help='Where the model runs, like "cuda".')]
Dtype = Annotated[str | None, typer.Option(help="The model's dtype, like \"bfloat16\" (default: the checkpoint's).")]
Shard = Annotated[
    str | None,
    typer.Option(help="fsdp or tp: the processes that torchrun started hold the model together (docs/how-to)."),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print what would be done, with counts, and write nothing.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an existing output.")]
ResetOptimizer = Annotated[
    bool, typer.Option("--reset-optimizer", help="Of a training checkpoint, also zero the optimizer's moments there.")
]
Evaluation = Annotated[
    str,
    typer.Option(
        help='"module:function" or "file.py:function", from a model to {metric: score}; or "lm_eval:task,task".'
    ),
]
Metric = Annotated[
    str | None, typer.Option(help="The metric whose recovery is reported (default: the one that fell most).")
]
LogTo = Annotated[
    str | None,
    typer.Option(
        "--log", help='"module:function" or "file.py:function", called with each row as a dictionary, like "wandb:log".'
    ),
]
Rows = Annotated[
    Path | None,
    path_option("-o", "--output", help="A JSON-lines file for the rows; an interrupted run resumes from it."),
]
Protect = Annotated[
    list[str] | None,
    typer.Option(help='For D: a domain to protect and its prompts, like "qa=qa.jsonl"; repeat for more.'),
]
ProtectWeight = Annotated[
    float, typer.Option(help="The weight of a protected domain's loss against the damaged domain's gain.")
]
Answers = Annotated[
    Path | None,
    path_option(help="For D: a file of the earlier model's answers to --data without responses; read if it exists."),
]
Base = Annotated[
    str | None, typer.Option(help="Of an adapter: the folder of its base, where its configuration names none.")
]
LayoutFile = Annotated[
    Path | None, path_option("--layout", help="Your own layout: a JSON file (docs/how-to/add-an-architecture.md).")
]
How = Annotated[
    str | None,
    typer.Option(help="proportional, global or uniform (default: global for D and single weights, else proportional)."),
]
Units = Annotated[str, typer.Option(help='"mlp", "kv_group", "value_channel", or two like "mlp,kv_group".')]
Selected = Annotated[
    str | None,
    typer.Option(
        "--units",
        help='"mlp", "kv_group", "value_channel", or two like "mlp,kv_group"; "weight": single weights of MLPs and KV '
        'groups; "mlp,weight": those of MLPs (default: "mlp,value_channel" for D and random, else "mlp").',
    ),
]
Rounds = Annotated[
    int | None,
    typer.Option(help="For D of single weights: how many rounds make 0.25 % of them (default: 16; fewer are faster)."),
]
Strength = Annotated[
    str, typer.Option(help="How far back, 0 to 3 (1 copies the earlier bits), or a file that strengths wrote.")
]
BatchSize = Annotated[int, typer.Option(help="Prompts per forward pass.")]


def trajectory_of(checkpoints: list[str], layout: Path | None) -> Trajectory:
    from surgery.checkpoints.trajectory import Trajectory

    if len(checkpoints) not in (2, 3):
        raise ValueError(f"expected [BASE] EARLIER LATER, got {len(checkpoints)} checkpoints")
    base = checkpoints[0] if len(checkpoints) == 3 else None
    own = layout_of(layout, *reversed(checkpoints))
    return Trajectory(base, checkpoints[-2], checkpoints[-1], own)


def checked(run: Trajectory, units: str | None) -> Trajectory:
    """The run, after everything that can be told of it before a model is loaded: warnings, or the first refusal."""
    from surgery.live.preflight import preflight, refuse

    kinds = tuple(kind for kind in asked(units) if kind != WEIGHT) or ("mlp",)
    with working("looking at the checkpoints"):
        found = preflight(run, units=kinds)
    refuse(found)
    tell_adapters(*map(run.tensors, run.checkpoints))
    for one in found:
        if one.verdict == "warning":
            warnings.warn(one.said, stacklevel=2)
    return run


def kinds_in(units: str) -> tuple[str, ...]:
    if single(asked(units)):
        raise ValueError(
            f"--units {units}: single weights lie in units: inspect those, --units mlp or --units mlp,kv_group. "
            f"Only select, sweep and repair take weight"
        )
    return kinds_of(asked(units))


def asked(units: str | None) -> tuple[str, ...]:
    """The kinds that --units names; none where it is left out."""
    if units is None:
        return ()
    kinds = tuple(kind.strip() for kind in units.split(","))
    if set(kinds) - {*KINDS, WEIGHT}:
        raise ValueError(
            f"--units {units}: expected {', '.join(KINDS)}, or two like mlp,kv_group; select, "
            f"sweep and repair also take weight"
        )
    return kinds


def dtype_of(name: str | None) -> torch.dtype | None:
    import torch

    if name is not None and not isinstance(getattr(torch, name, None), torch.dtype):
        raise ValueError(f"--dtype {name}: expected a torch dtype like bfloat16")
    return getattr(torch, name) if name else None


def device_of(name: str | None) -> str | None:
    """The device's name, where this machine has it: asked before anything is read."""
    import torch

    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:  # AssertionError: a torch that was built without it
        reason = str(error).partition("\n")[0]
        raise ValueError(
            f'--device {name}: torch {torch.__version__} can\'t use it here ({reason}): expected a device like "cuda", '
            f"or leave --device out for the CPU"
        ) from error
    return name


def sharding_of(shard: str | None) -> Any:
    """How the model is sharded; then the first process alone prints and writes."""
    import os

    if shard is None:
        return None
    if shard not in ("fsdp", "tp"):
        raise ValueError(f"--shard {shard}: expected fsdp or tp")
    if "RANK" not in os.environ:
        raise ValueError(
            f"--shard {shard} needs several processes: torchrun --nproc-per-node 2 -m surgery ... --shard {shard}"
        )
    out.quiet = os.environ["RANK"] != "0"
    return shard


def layout_of(path: Path | None, source: Any, *others: Any) -> Layout | None:
    if path is None:
        return None
    from surgery.checkpoints.checkpoint import Checkpoint, opened
    from surgery.layout.finding import spec_layout

    found = opened(source, *others)
    assert isinstance(found, Checkpoint)
    return spec_layout(read_json(path, {str: {str: str}}), found.shapes)


def tell_adapters(*sources: Any) -> None:
    """Say of each source that is an adapter's folder what it is read as."""
    for source in sources:
        if getattr(source, "adapter", None) is not None:
            err.print(f"{source.folder} is an adapter on {source.base.folder}: read as if it were merged", markup=False)


def fraction(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"--budgets: {text!r} is not a number") from None


def strength_of(text: str) -> HowFar:
    from surgery.masks.neurons import Neurons

    try:
        return float(text)
    except ValueError:
        if not path_of(text).is_file():
            raise ValueError(f"--strength {text!r}: expected a number, or a file that strengths wrote") from None
    return Neurons.load(text)


def files_of(texts: list[str], option: str) -> dict[str, Path]:
    """Files by the name of their domain."""
    found: dict[str, Path] = {}
    for text in texts:
        domain, equals, file = text.partition("=")
        if not equals or not domain or not file:
            raise ValueError(f'{option} {text!r}: expected a domain and its file, like "math=math.jsonl"')
        if domain in found:
            raise ValueError(f"{option} names {domain!r} twice: put its prompts into one file")
        found[domain] = path_of(file)
    return found


def prompts_of(files: dict[str, Path], run: Trajectory, batch_size: int) -> dict[str, list[Batch]]:
    """The prompts of each domain."""
    from surgery.live.prompts import load_prompts

    return {name: load_prompts(file, run.tensors("later"), batch_size=batch_size) for name, file in files.items()}


def evaluation_of(name: str) -> Callable[..., Any] | str:
    """The function that --evaluate names; ``lm_eval:tasks`` stays as it is."""
    return name if name.startswith("lm_eval:") else function_of(name, "--evaluate")


def function_of(name: str, option: str) -> Callable[..., Any]:
    """The function that ``module:function`` or ``file.py:function`` names."""
    home, _, attribute = name.rpartition(":")
    if not home:
        raise ValueError(f'{option} {name!r}: expected "module:function" or "file.py:function"')
    file = path_of(home).absolute() if home.endswith(".py") else None
    sys.path.insert(0, str(file.parent if file else Path.cwd()))
    try:
        return getattr(_run(file) if file else import_module(home), attribute)  # type: ignore[no-any-return]
    except (ImportError, AttributeError, FileNotFoundError) as error:
        raise ValueError(f"{option} {name!r}: {error}") from error


def _run(file: Path) -> ModuleType:
    """The module that a file is, whatever other module has its name (a ``math.py`` of one's own)."""
    spec = spec_from_file_location(str(file), file)
    if spec is None or spec.loader is None:
        raise ImportError(f"{file} is no Python file")
    module = sys.modules[str(file)] = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tell(text: str) -> None:
    """Print a text, if there is any."""
    if text:
        out.print(text, markup=False)


_OFTEN, _FIRST, _SELDOM = 0.2, 1.0, 10.0  # seconds between two lines: on a terminal; else the first time, and later


@contextmanager
def working(what: str) -> Iterator[Callable[[str], None]]:
    """What is being done, since when, and how long it may still take, on the error stream: output can be piped.

    On a terminal one line that changes; elsewhere a plain line after a second and then now and then.
    """
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    if out.quiet:
        yield lambda _: None
        return
    start, done, told = time.monotonic(), threading.Event(), [what, ""]

    def line() -> str:
        return f"{': '.join(filter(None, told))} ({spoken(time.monotonic() - start)})"

    def show(status: Status) -> None:
        pause = _OFTEN if err.is_terminal else _FIRST
        while not done.wait(pause):
            if err.is_terminal:
                status.update(Text(line()))
            else:
                err.print(line(), markup=False)
                pause = _SELDOM

    def say(text: str) -> None:
        told[:] = text, ""

    def inside(text: str) -> None:
        told[1] = text

    with err.status(Text(what)) as status, reporting(inside):
        thread = threading.Thread(target=show, args=(status,), daemon=True)
        thread.start()
        try:
            yield say
        finally:
            done.set()
            thread.join()
