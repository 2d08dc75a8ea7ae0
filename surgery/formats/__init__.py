"""How numbers lie in files: safetensors, the rank files of FSDP, torch's distributed checkpoints, adapters."""

from surgery.formats.adapters import Adapter
from surgery.formats.stored import Piece, Stored

__all__ = ["Adapter", "Piece", "Stored"]
