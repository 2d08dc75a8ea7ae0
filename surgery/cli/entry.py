"""The command ``surgery``."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from typing import Any

import typer

from surgery.cli.looking import analyse, inspect
from surgery.cli.measuring import repair, sweep
from surgery.cli.options import err, out
from surgery.cli.processes import first_alone, follows, leave, left, say, started
from surgery.cli.selecting import patch, rollback, select, strengths

INTERRUPTED = 130  # the exit code

app = typer.Typer(
    help="git revert for LLM post-training: set back the weights through which a later stage hurt an earlier skill.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
for command in (repair, select, rollback, patch, strengths, sweep, analyse, inspect):
    app.command()(command)


def _told_once() -> Callable[..., None]:
    """Print each warning the first time: the checks at the start and the work itself may see the same."""
    seen = set[str]()

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if str(message) not in seen and not out.quiet:
            seen.add(str(message))
            err.print(f"warning: {message}", markup=False)

    return show


def _check_processes() -> None:
    """Refuse the processes of torchrun where each would do, and write, the same."""
    if started() and not any(one.startswith("--shard") for one in sys.argv):
        raise ValueError(
            "torchrun starts several processes, and without --shard each would do the same: pass --shard fsdp or "
            "--shard tp to select, sweep or repair, or start the command without torchrun"
        )


def main() -> None:
    """The command ``surgery``.

    The exit code is 0 on success; 1 for an error that the user can mend, printed in one line; 2 for wrong usage; 3
    where ``repair`` finds damage that can't be repaired within the limits. torchrun makes 1 of every code but 0.
    """
    try:
        with first_alone(), warnings.catch_warnings():
            warnings.showwarning = _told_once()
            _check_processes()
            app()
    except (ValueError, LookupError, OSError) as error:
        text = error.args[0] if isinstance(error, KeyError) and error.args else error
        sys.exit(say(f"error: {text}", 1))
    except RuntimeError:
        if not follows():
            raise
        sys.exit(left(0))
    except SystemExit as end:  # what typer makes of Ctrl-C, without a word
        if end.code == INTERRUPTED:
            told = "interrupted: inputs are unchanged, and no output is left half-written"
            sys.exit(say(told, INTERRUPTED))
        if not end.code:
            leave()
        sys.exit(left(int(end.code or 0)))
