"""The house rules that a machine can hold: imports go downwards, names are public once, the package is light."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import surgery

PACKAGE = Path(surgery.__file__).parent
# each module may import those before it
ORDER = (
    "compat",
    "significance",
    "evidence",
    "scratch",
    "theory",
    "theory_krylov",
    "units",
    "vectors",
    "slots",
    "edits",
    "neurons",
    "entries",
    "masks",
    "strength_values",
    "weight_ranking",
    "hooks",
    "heads",
    "attention",
    "layout_checks",
    "layout",
    "stored",
    "probing",
    "shards",
    "checkpoint",
    "saving",
    "prompts",
    "opening",
    "fingerprints",
    "trajectory",
    "deltas",
    "tensor_places",
    "evidence_matching",
    "evidence_histograms",
    "evidence_changes",
    "budget",
    "scores",
    "predictions",
    "responses",
    "papers",
    "writing",
    "operators",
    "gradient_hooks",
    "refresh_copies",
    "refresh_masked",
    "swap",
    "theory_landscape",
    "theory_subspaces",
    "theory_damage",
    "theory_spectrum",
    "theory_contraction",
    "gradient_parts",
    "gradient_products",
    "gradient_cosines",
    "gradient_callback",
    "attribution",
    "weight_damage",
    "weight_scores",
    "strength_search",
    "score_products",
    "selector_settings",
    "weight_selection",
    "selection",
    "rows",
    "judging",
    "refresh_report",
    "refreshing",
    "evaluators",
    "histories",
    "bench",
    "sweeps",
    "tuning",
    "resampling",
    "evidence_profile",
    "evidence_overlap",
    "evidence_cosines",
    "evidence_directions",
    "report_parts",
    "report_inquiry",
    "report_verdict",
    "report_definitions",
    "plots",
    "history_plots",
    "evidence_plots",
    "gradient_plots",
    "theory_plots",
    "report_page",
    "report_sections",
    "refresh_plots",
    "cli.options",
    "cli.choosing",
    "cli.repairing",
    "cli.measuring",
    "cli.looking",
    "cli.entry",
    "cli.__main__",
    "cli.__init__",
)


def text(module: str) -> str:
    return (PACKAGE / f"{module.replace('.', '/')}.py").read_text()


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, at the top or inside a function."""
    found = set()
    for node in ast.walk(ast.parse(text(module))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("surgery."):
            found.add(str(node.module).removeprefix("surgery."))
    return found


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
    found = {module: private_names(ast.parse(text(module))) for module in ORDER}
    ours = {name for defined, _ in found.values() for name in defined}
    foreign = {module: asked - ours for module, (_, asked) in found.items() if asked - ours}
    assert set(foreign) == {"compat"}, f"ask surgery/compat.py for it: {foreign}"


def test_every_module_has_its_place() -> None:
    paths = [path.relative_to(PACKAGE).with_suffix("") for path in PACKAGE.rglob("*.py")]
    assert {".".join(path.parts) for path in paths} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_downwards(module: str) -> None:
    assert imports(module) <= set(ORDER[: ORDER.index(module)])


def test_public_names_resolve_and_shadow_no_module() -> None:
    assert all(getattr(surgery, name) is not None for name in surgery.__all__)
    assert not {name for name in surgery.__all__ if name in ORDER}
    assert not set(ORDER) & sys.stdlib_module_names


def test_importing_the_package_or_its_help_imports_no_torch() -> None:
    code = "import sys, surgery.cli; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
