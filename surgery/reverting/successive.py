"""Masks rolled back one after another on one live model: from each to the next only what differs is written."""

from __future__ import annotations

from types import TracebackType

from torch import nn

from surgery.checkpoints.checkpoint import Source
from surgery.files import uninterrupted
from surgery.layout.slots import Layout
from surgery.masks.mask import Mask, checked, inside
from surgery.reverting.rollback import Rollback, rollback


class Successive:
    """A ``with`` block in which a model has one mask after another rolled back; at its end all is undone.

    What a mask adds to the one before is rolled back on top of that. Where it lacks some of it, the latest additions
    are undone first, until it contains what is left.

    Args:
        model, to, layout: as for ``rollback``.

    Source: ours.
    """

    def __init__(self, model: nn.Module, *, to: Source, layout: Layout | None = None) -> None:
        self._model, self._to, self._layout = model, to, layout
        self._done: list[tuple[Mask, Rollback]] = []  # all that is reverted by then, and what wrote the last of it

    def now(self, mask: Mask) -> None:
        """Roll the model back by this mask and no other; where it fails, the model is as some mask before it left it.

        Raises:
            ValueError: as ``rollback``.
        """
        with uninterrupted():
            while self._done and not inside(self._done[-1][0], checked(mask)):
                self._done[-1][1].undo()
                self._done.pop()
            new = (mask - self._done[-1][0]).signed(mask.made_by) if self._done else mask
            self._done.append((mask, rollback(self._model, to=self._to, mask=new, layout=self._layout)))

    def __enter__(self) -> Successive:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        failed: list[Exception] = []
        with uninterrupted():
            while self._done:
                try:
                    self._done.pop()[1].undo()
                except Exception as one:  # the others are undone all the same
                    failed.append(one)
        if failed:
            raise failed[0]
