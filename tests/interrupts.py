"""Ctrl-C at each line of a function."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import pytest


def at_every_line(function: Callable[..., Any], call: Callable[[], object], check: Callable[[int], None]) -> None:
    """Send SIGINT at each line of ``function`` that ``call`` passes; it has to interrupt, and then ``check(line)``.

    Not at the last line, the return: there the caller has what the function made.
    """
    lines: set[int] = set()

    def traced(line: int | None) -> None:
        sent: list[int] = []

        def trace(frame: Any, event: str, _: Any) -> Any:
            if frame.f_code is not function.__code__:
                return None
            if event == "line":
                lines.add(frame.f_lineno)
                if frame.f_lineno == line and not sent:
                    sent.append(1)
                    os.kill(os.getpid(), signal.SIGINT)
            return trace

        original = sys.gettrace()
        sys.settrace(trace)
        try:
            call()
        finally:
            sys.settrace(original)

    traced(None)
    for line in sorted(lines - {max(lines)}):
        with pytest.raises(KeyboardInterrupt):
            traced(line)
        check(line)
