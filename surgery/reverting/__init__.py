"""Setting masked weights back: in place in a live model, or from one checkpoint folder to another."""

from surgery.reverting.folder import save
from surgery.reverting.patch import Patch, Patched
from surgery.reverting.patch_writing import save_patch
from surgery.reverting.rollback import Rollback, RolledBack, rollback, rolled_back

__all__ = ["Patch", "Patched", "Rollback", "RolledBack", "rollback", "rolled_back", "save", "save_patch"]
