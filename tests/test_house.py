"""The house rules that a machine can hold: imports go downwards, names are public once, the package is light."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import surgery

PACKAGE = Path(surgery.__file__).parent
# each room (a package or a module of its own) may import from those before it
ORDER = (
    "units", "files", "devices", "tables", "progress", "compat", "layout", "masks", "formats", "checkpoints",
    "reverting", "live", "scores", "theory", "selectors", "measure", "evidence", "training", "plots", "report", "cli",
    "__main__",
)  # fmt: skip
PUBLIC = [
    "Trajectory",
    "Checkpoint",
    "load_prompts",
    "activation",
    "magnitude",
    "conflict",
    "damage",
    "allocate",
    "top",
    "Selector",
    "AMCSelector",
    "DamageSelector",
    "RandomSelector",
    "Neurons",
    "Entries",
    "rollback",
    "rolled_back",
    "save",
    "Patch",
    "save_patch",
    "strengths",
    "sweep",
    "repair",
    "likelihood",
    "harness",
    "refresh",
    "analyse",
    "write_report",
]
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    """``scores.damage`` of surgery/scores/damage.py, ``scores`` of its ``__init__``."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


MODULES = {name_of(path): path for path in FILES if path != PACKAGE / "__init__.py"}


def imports(path: Path) -> set[str]:
    """The modules of the package that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "surgery":
            home = (node.module or "").partition(".")[2]
            inner = {f"{home}.{alias.name}".strip(".") for alias in node.names} & set(MODULES)
            found |= inner or {home}
    return found - {""}


def private_names(tree: ast.AST) -> tuple[set[str], set[str]]:
    """The names beginning with one underscore that a module defines, and those that it asks something else for."""
    defined, asked = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.Attribute):
            (defined if isinstance(node.ctx, ast.Store) else asked).add(node.attr)
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in ("getattr", "hasattr"):
            asked |= {str(one.value) for one in node.args[1:2] if isinstance(one, ast.Constant)}
        elif isinstance(node, ast.ImportFrom) and not (node.module or "").startswith("surgery"):
            asked |= {*(node.module or "").split("."), *(alias.name for alias in node.names)}
    single = [{name for name in names if name[:1] == "_" != name[1:2]} for names in (defined, asked)]
    return single[0], single[1]


def test_private_names_of_others_are_asked_for_in_one_module() -> None:
    found = {module: private_names(ast.parse(path.read_text())) for module, path in MODULES.items()}
    ours = {name for defined, _ in found.values() for name in defined}
    foreign = {module: asked - ours for module, (_, asked) in found.items() if asked - ours}
    assert set(foreign) == {"compat"}, f"ask surgery/compat.py for it: {foreign}"


def test_every_module_lies_in_a_room() -> None:
    assert {module.split(".")[0] for module in MODULES} == set(ORDER)


@pytest.mark.parametrize("module", MODULES)
def test_imports_go_downwards(module: str) -> None:
    room = module.split(".")[0]
    rooms = {other.split(".")[0] for other in imports(MODULES[module])}
    assert rooms <= set(ORDER[: ORDER.index(room) + 1])


@pytest.mark.parametrize("room", ORDER)
def test_no_two_modules_of_a_room_need_each_other(room: str) -> None:
    own = {module: path for module, path in MODULES.items() if module.startswith(f"{room}.")}
    tuple(TopologicalSorter({module: imports(path) & set(own) for module, path in own.items()}).static_order())


@pytest.mark.parametrize("module", MODULES)
def test_a_file_is_a_page_or_two(module: str) -> None:
    assert len(MODULES[module].read_text().splitlines()) <= 400


@pytest.mark.parametrize("room", [room for room in ORDER if (PACKAGE / room).is_dir() and room != "cli"])
def test_a_room_says_what_lives_there_and_exports_it(room: str) -> None:
    module = getattr(surgery, room)
    assert module.__doc__.count("\n") == 0
    assert all(getattr(module, name) is not None for name in module.__all__)


def test_the_public_names_are_those_of_the_main_job() -> None:
    """Written once, in ``__init__.pyi``; each is the room's own, and none has the name of a room."""
    assert sorted(surgery.__all__) == sorted(PUBLIC)
    assert len(PUBLIC) <= 30
    for name in PUBLIC:
        thing = getattr(surgery, name)
        room = thing.__module__.split(".")[1]
        assert getattr(getattr(surgery, room), name) is thing
    assert not set(PUBLIC) & set(ORDER)


def test_importing_the_package_or_its_help_imports_no_torch() -> None:
    code = "import sys, surgery.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_what_docstrings_name_is_there():
    """Plots went on to speak of surgery.changes, which had become surgery.evidence.changes."""
    named = {
        name for path in FILES for name in re.findall(r"``surgery((?:\.\w+)+)[`(]", path.read_text(encoding="utf-8"))
    }
    assert named
    for name in sorted(named):
        thing = surgery
        for part in name.split(".")[1:]:
            assert hasattr(thing, part), f"surgery{name}"
            thing = getattr(thing, part)
