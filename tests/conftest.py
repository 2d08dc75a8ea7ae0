"""The options that widen the tests, and Ctrl-C as it is at a prompt."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator

import families
import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports Triton: its kernels run on the CPU then


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-families", action="store_true", help="test on every family, not on the representatives only"
    )
    parser.addoption("--slow", action="store_true", help="also the tests on a real model, which need surgery[real]")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("all_families"):
        families.on_all_families()
    config.addinivalue_line("markers", "slow: only run with --slow")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="--slow runs it"))


@pytest.fixture
def interruptible() -> Iterator[None]:
    """SIGINT raises KeyboardInterrupt, as in a foreground process: a shell starts background jobs with it ignored."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)
