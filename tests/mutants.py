"""A planted mutant, and the laws that have to notice it."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Mutant = Callable[[pytest.MonkeyPatch], None]


def dies(mutant: Mutant, laws: Callable[[], None]) -> None:
    """Fail unless a law's assertion fails while the mutant is planted; a mutant that only crashes is not killed."""
    with pytest.MonkeyPatch.context() as patch:
        mutant(patch)
        with pytest.raises(AssertionError):
            laws()
