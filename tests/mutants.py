"""A planted mutant, and the laws that have to notice it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]
NOTICED = (AssertionError, RuntimeError, IndexError, ValueError)


def dies(mutant: Mutant, laws: Callable[[], None], noticed: type[Exception] | tuple[type[Exception], ...]) -> None:
    """Fail unless the laws are broken while the mutant is planted."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(noticed):
            laws()
