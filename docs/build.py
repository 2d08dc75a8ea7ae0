"""Write docs/reference/api.md from the docstrings; ``--check`` says whether it is up to date."""

from __future__ import annotations

import inspect
import re
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import surgery

PAGE = Path(__file__).parent / "reference" / "api.md"
ROOMS = ("checkpoints", "layout", "live", "masks", "scores", "selectors", "reverting", "measure", "evidence", "theory",
         "training", "plots", "report")  # fmt: skip
HEAD = """# Python

<!-- generated from the docstrings by docs/build.py: edit those, and run it -->

Names without a prefix are imported from `surgery`, the others from where they are listed. A *source* of weights is a
folder, a hub id in the local cache, an `nn.Module` or a mapping from tensor name to tensor.
"""
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Source):(.*\n?(?:(?: {4,}.*)?\n| {4,}.*)*)", re.M)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for room in ROOMS:
        module = import_module(f"surgery.{room}")
        parts.append(f"## {room}\n\n`surgery.{room}`: {text(module)}\n")
        parts += [entry(name, getattr(module, name)) for name in module.__all__]
    return re.sub(r" +$", "", "\n".join(parts), flags=re.M)


def entry(name: str, thing: Any) -> str:
    """A public name: its signature, its docstring, and the public methods and properties of a class."""
    where = "" if name in surgery.__all__ else f" (`{thing.__module__.rpartition('.')[0]}`)"
    lines = [f"### `{name}`{where}\n"]
    if callable(thing) and "__init__" in dir(thing):
        lines.append(f"```text\n{name}{signature(thing)}\n```\n")
    lines.append(text(thing) + "\n")
    for member, value in vars(thing).items() if inspect.isclass(thing) else ():
        call = value.__func__ if isinstance(value, classmethod | staticmethod) else value
        if (
            not member.startswith("_")
            and getattr(call, "__doc__", None)
            and (inspect.isfunction(call) or isinstance(call, property))
        ):
            shape = "" if isinstance(call, property) else signature(call)
            lines.append(f"- **`{member}{shape}`**: {text(call).replace(chr(10), chr(10) + '  ')}\n")
    return "\n".join(lines)


def signature(thing: Any) -> str:
    """The parameters with their defaults, without annotations and ``self``."""
    found = inspect.signature(thing)
    kept = [p.replace(annotation=p.empty) for p in found.parameters.values() if p.name not in ("self", "cls")]
    shown = str(found.replace(parameters=kept, return_annotation=found.empty))
    return re.sub(r"<(?:class|function) '?([\w.]+)[^>]*>", lambda m: m[1].rpartition(".")[2], shown)


def text(thing: Any) -> str:
    """A docstring as Markdown: its sections as lists, its examples fenced."""
    doc = re.sub(r"``([^`]+)``", r"`\1`", inspect.getdoc(thing) or "")
    doc = re.sub(r"^(?:>>> .*\n?(?:(?!>>>|\n).+\n?)*)+", lambda m: f"```pycon\n{m[0].rstrip()}\n```\n", doc, flags=re.M)
    return SECTION.sub(section, doc).strip()


def section(found: re.Match[str]) -> str:
    """One section of a docstring: a list of what is indented once, or one paragraph."""
    name, told = found[1], found[2].strip("\n")
    if name not in ("Args", "Raises"):
        return f"*{name}*: {' '.join(told.split())}\n\n"
    items = re.split(r"\n(?= {4}\S)", f"\n{told}" if told.startswith("    ") else told)
    lines = [" ".join(item.split()) for item in items if item.strip()]
    return f"*{name}*\n\n" + "".join(re.sub(r"^([\w, ]+): ", r"- `\1`: ", line) + "\n" for line in lines) + "\n"


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
