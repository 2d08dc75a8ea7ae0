"""surgery: ``git revert`` for LLM post-training.

Finds the few weights through which a later training stage hurt an earlier skill and puts exactly those back: bit for
bit, reversibly, on a live model or from folder to folder.

The names here are those of the main job; the others lie in the rooms: ``surgery.evidence``, ``surgery.theory``,
``surgery.measure``, ``surgery.training``, ``surgery.plots``, ``surgery.live``, ``surgery.layout``. Each is imported
when it is first used, so that ``surgery --help`` need not wait for torch.
"""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

_STUB = ast.parse(Path(__file__).with_name("__init__.pyi").read_text(encoding="utf-8"))
_HOME = {
    alias.name: node.module for node in _STUB.body if isinstance(node, ast.ImportFrom) for alias in node.names
}  # name → the room that has it
_ROOMS = {path.parent.name for path in Path(__file__).parent.glob("*/__init__.py")}

__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(import_module(str(_HOME[name])), name)
    if name in _ROOMS:
        return import_module(f"surgery.{name}")
    raise AttributeError(f"module 'surgery' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__, *_ROOMS])
