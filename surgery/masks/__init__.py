"""Masks, which say what to revert: scores and masks over neurons, masks over single weights, and budgets."""

from surgery.masks.budget import allocate, top
from surgery.masks.entries import Entries
from surgery.masks.mask import Mask, load_mask
from surgery.masks.neurons import Neurons

__all__ = ["Entries", "Mask", "Neurons", "allocate", "load_mask", "top"]
