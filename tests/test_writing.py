"""Writing is not interrupted half-way: Ctrl-C waits, a program's own handler is called, an ignored signal stays so."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from surgery.files import uninterrupted


@pytest.fixture(autouse=True)
def handlers() -> Iterator[None]:
    before = signal.getsignal(signal.SIGINT)
    yield
    signal.signal(signal.SIGINT, before)


def test_ctrl_c_waits_for_the_end() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    done = []

    def body() -> None:
        with uninterrupted() as pending:
            signal.raise_signal(signal.SIGINT)
            done.append(len(pending))

    with pytest.raises(KeyboardInterrupt):
        body()
    assert done == [1]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_handler_of_ones_own_is_called_at_the_end() -> None:
    """A trainer's that stops after the step, say: the body is not told to stop, and nothing is raised."""
    order = []

    def own(number: int, frame: FrameType | None) -> None:
        order.append("handler")

    signal.signal(signal.SIGINT, own)
    with uninterrupted() as pending:
        signal.raise_signal(signal.SIGINT)
        order.append(f"body, {len(pending)} pending")
    assert order == ["body, 0 pending", "handler"]
    assert signal.getsignal(signal.SIGINT) is own


def test_what_is_ignored_stays_ignored() -> None:
    """A background job of a shell ignores Ctrl-C, which is meant for another."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted() as pending:
        signal.raise_signal(signal.SIGINT)
        assert not pending
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_inside_another_block_it_is_that_one_s() -> None:
    """So what is written step by step can stop early, and what is undone goes to its end."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    order = []

    def body() -> None:
        with uninterrupted() as outer:
            with uninterrupted() as inner:
                signal.raise_signal(signal.SIGINT)
                order.append(inner is outer and len(inner))
            order.append("after")

    with pytest.raises(KeyboardInterrupt):
        body()
    assert order == [1, "after"]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
