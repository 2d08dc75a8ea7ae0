"""The documentation is run: every python and console block, in order, one namespace a page; links and names hold."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import families
import pytest
import torch
import typer
from adapted import Kind, adapter
from small_lab import SEED0, copy_seed0
from training_folders import as_ranks

from benchmarks.lab.tokenizer import build_tokenizer
from surgery.cli import app

ROOT = Path(__file__).parent.parent
PAGES = sorted(ROOT.glob("docs/**/*.md")) + [ROOT / "CHANGELOG.md", ROOT / "README.md"]
# A block, with the comment right before it that may say why it is not run. Blocks inside a comment are run, unseen.
BLOCK = re.compile(r"(?P<skip><!-- not run: [^\n]+ -->\n+)?^```(?P<kind>\w+)\n(?P<code>.*?)^```$", re.M | re.S)
MY_EVAL = """
import torch

def score(model):
    with torch.inference_mode():
        logits = model(input_ids=torch.tensor([[3, 4, 5, 6]])).logits.float()
    return {"math": float(logits.log_softmax(-1)[0, -1, 7])}
"""
SIZES = dict(vocab_size=len(build_tokenizer()), eos_token_id=1)


def page_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


# The README says the same twice, in Python and in the shell: each on its own. A page of the docs is one story.
README = ROOT / "README.md"
CASES = [(path, "python console") for path in PAGES if path != README] + [(README, "python"), (README, "console")]


def blocks(path: Path) -> list[tuple[str, str, bool, int]]:
    """Kind, code, whether it is run, and line number of a page's blocks."""
    text = path.read_text(encoding="utf-8")
    found = BLOCK.finditer(text)
    return [(m["kind"], m["code"], not m["skip"], text.count("\n", 0, m.start("code"))) for m in found]


def commands(code: str, program: str = "surgery") -> list[list[str]]:
    """The arguments of each line ``surgery ...`` (with or without ``$``); a backslash continues a line."""
    lines = re.findall(rf"^(?:\$ )?{program} (.*)$", code.replace("\\\n", " "), re.M)
    return [shlex.split(line, comments=True) for line in lines]


def together(arguments: list[str], place: Path) -> None:
    """A line ``torchrun ...``, in processes of its own."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", *arguments]
    subprocess.run(command, env=env, cwd=place, check=True, timeout=300)


def three_stages(folder: Path, family: str) -> None:
    """Three checkpoints of a tiny model, each a small step from the one before, with the lab's tokenizer."""
    from transformers import AutoModelForCausalLM

    config = families.config(family)
    config.update(SIZES)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    for stage in ("base", "math", "qa"):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.1)
        model.save_pretrained(folder / stage)
        build_tokenizer().save_pretrained(folder / stage)


@pytest.fixture(scope="session")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the pages find where they run: checkpoints in ``runs/`` and ``moe/``, prompts, an evaluation, the lab."""
    place = tmp_path_factory.mktemp("docs")
    three_stages(place / "runs", "qwen3")
    three_stages(place / "moe", "qwen3_moe")
    shutil.copytree(place / "runs/base", place / "runs/code")
    for stage, step in (("math", 200), ("qa", 300)):
        as_ranks(place / "runs" / stage, place / "ckpt" / stage / f"global_step_{step}/actor")
    for seed, stage in enumerate(("math", "qa")):
        adapter(Kind("qwen3", dict(target_modules="all-linear")), place / "runs/base", place / "adapters" / stage, seed)
    (place / "my_eval.py").write_text(MY_EVAL)
    lines = [f'{{"prompt": "{i}+{i + 1}=", "response": "{2 * i + 1}"}}' for i in range(10, 26)]
    (place / "math.jsonl").write_text("\n".join(lines) + "\n")
    if SEED0.is_dir():  # with fewer prompts than a reader has, so that the pages run in seconds
        copy_seed0(place / "benchmarks/lab/seed0", evaluation=64, calibration=64)
    return place


@pytest.fixture
def here(desk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the desk as the working directory; modules that a page imports from it are forgotten after."""
    shutil.copytree(desk, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    path = list(sys.path)
    yield tmp_path
    sys.path[:] = path
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", None) or "").startswith(str(tmp_path)):
            del sys.modules[name]


@pytest.mark.parametrize(("path", "kinds"), CASES, ids=[f"{page_name(path)}: {kinds}" for path, kinds in CASES])
def test_the_blocks_of_a_page_run_in_order(path: Path, kinds: str, here: Path) -> None:
    found = [block for block in blocks(path) if block[0] in kinds.split()]
    if any("benchmarks/lab/seed0" in code and run for _, code, run, _ in found) and not SEED0.is_dir():
        pytest.skip("the lab's checkpoints are not there")
    namespace: dict[str, Any] = {"__name__": "docs"}
    for kind, code, run, line in found:
        if kind == "python" and run:
            # as many empty lines before as in the page, so that a traceback shows the page's own line
            exec(compile("\n" * line + code, str(path), "exec", dont_inherit=True), namespace)
        elif kind == "console":
            for arguments in commands(code, "torchrun") if run else ():
                together(arguments, here)
            for arguments in commands(code) if run else ():
                app(arguments, standalone_mode=False)


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_blocks_are_of_a_known_kind_and_commands_parse(path: Path) -> None:
    group: Any = typer.main.get_command(app)
    for kind, code, run, line in blocks(path):
        assert kind in ("python", "console", "text", "json", "pycon"), f"{path}:{line}: a block of kind {kind!r}"
        for arguments in commands(code) if kind == "console" and not run else ():
            name, *rest = [argument for argument in arguments if arguments != ["--help"]] or ["--help"]
            if name != "--help":
                group.commands[name].make_context(name, rest)


def _anchors(path: Path) -> set[str]:
    """The anchors that GitHub gives a page's headings."""
    headings = re.findall(r"^#+ (.*)$", BLOCK.sub("", path.read_text(encoding="utf-8")), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PAGES, ids=page_name)
def test_relative_links_resolve(path: Path) -> None:
    text = BLOCK.sub("", path.read_text(encoding="utf-8"))
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        name, _, anchor = link.partition("#")
        target = (path.parent / name).resolve() if name else path
        assert target.exists(), f"{path}: {link} leads nowhere"
        assert not anchor or anchor in _anchors(target), f"{path}: {link}: no such heading"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    for path in ROOT.glob("docs/*/*.md"):
        assert f"({path.relative_to(ROOT / 'docs')})" in index, f"docs/README.md does not mention {path.name}"


def test_the_reference_is_what_the_docstrings_say() -> None:
    """Every public name of every room, generated: ``python docs/build.py`` writes it."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "docs/build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert (ROOT / "docs/reference/api.md").read_text(encoding="utf-8") == build.page()


def test_every_command_and_option_is_documented() -> None:
    text = (ROOT / "docs/reference/cli.md").read_text(encoding="utf-8")
    group: Any = typer.main.get_command(app)
    for name, command in group.commands.items():
        section = re.search(rf"^## `surgery {name}`\n(.*?)(?=^## |\Z)", text, re.M | re.S)
        assert section, f"cli.md has no section on {name}"
        for option in (option for parameter in command.params for option in parameter.opts if option.startswith("-")):
            assert f"`{option}" in section[1] or option == "--help", f"cli.md: {name} has an option {option}"
        for option in re.findall(r"`(--?[a-z-]+)", section[1]):
            assert any(option in parameter.opts for parameter in command.params), f"cli.md: {name} has no {option}"


def test_quoted_messages_exist() -> None:
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "surgery").rglob("*.py"))
    source = re.sub(r'"\n\s*f?"', "", source)  # a message may go over several lines
    quoted = re.findall(r"^\| `([^`]+)`", (ROOT / "docs/reference/errors.md").read_text(encoding="utf-8"), re.M)
    assert len(quoted) > 10
    for message in quoted:
        for part in message.split("…"):
            assert part.strip() in source, f"errors.md quotes {part.strip()!r}, and no module says it"


def test_the_changelog_names_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert "## [Unreleased]" in text or f"## [{version}]" in text
