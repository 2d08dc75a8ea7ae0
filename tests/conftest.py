"""The option that widens the tests to every family."""

from __future__ import annotations

import families
import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--all-families", action="store_true", help="test on every family, not on the representatives only"
    )


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("all_families"):
        families.on_all_families()
