"""Training: a refresh (the trained counterpart of a rollback), training under a mask, and callbacks for trainers."""

from typing import TYPE_CHECKING, Any

from surgery.training.refresh import Refresh, refresh
from surgery.training.verl import VerlRollbackCallback

if TYPE_CHECKING:
    from surgery.training.callbacks import GradientCosines, Masked
    from surgery.training.stages import RollbackCallback

__all__ = ["GradientCosines", "Masked", "Refresh", "RollbackCallback", "VerlRollbackCallback", "refresh"]


def __getattr__(name: str) -> Any:
    # these are made of transformers' own classes, which takes seconds to import
    if name in ("GradientCosines", "Masked"):
        from surgery.training import callbacks

        return getattr(callbacks, name)
    if name == "RollbackCallback":
        from surgery.training import stages

        return stages.RollbackCallback
    raise AttributeError(f"module 'surgery.training' has no attribute {name!r}")
