"""How numbers lie in files: safetensors, the rank files of FSDP, torch's distributed checkpoints."""

from surgery.formats.stored import Piece, Stored

__all__ = ["Piece", "Stored"]
