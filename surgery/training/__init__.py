"""Training: a refresh (the trained counterpart of a rollback), training under a mask, and watching gradients."""

from typing import TYPE_CHECKING, Any

from surgery.training.refresh import Refresh, refresh

if TYPE_CHECKING:
    from surgery.training.callbacks import GradientCosines, Masked

__all__ = ["GradientCosines", "Masked", "Refresh", "refresh"]


def __getattr__(name: str) -> Any:
    if name in (
        "GradientCosines",
        "Masked",
    ):  # they are made of transformers' own classes, which takes seconds to import
        from surgery.training import callbacks

        return getattr(callbacks, name)
    raise AttributeError(f"module 'surgery.training' has no attribute {name!r}")
