"""Where the units of a model lie in its tensors, in memory and on disk; no other room knows an architecture."""

from surgery.layout.finding import find_layout
from surgery.layout.slots import Block, Layout, Slot

__all__ = ["Block", "Layout", "Slot", "find_layout"]
