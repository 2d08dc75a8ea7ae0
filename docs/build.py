"""Write docs/reference/api.md from the docstrings: ``python docs/build.py``; ``--check`` says whether it is up to date."""

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
SECTION = re.compile(r"^(Args|Returns|Yields|Raises|Source|Example):[ \n]", re.M)


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for room in ROOMS:
        module = import_module(f"surgery.{room}")
        parts.append(f"## {room}\n\n`surgery.{room}`: {text(module)}\n")
        parts += [entry(name, getattr(module, name)) for name in module.__all__]
    return "\n".join(parts)


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
    doc = inspect.getdoc(thing) or ""
    doc = re.sub(r"``([^`]+)``", r"`\1`", doc)
    doc = re.sub(r"((?:^>>> .*\n?(?:^(?!>>>|\n).*\n?)*)+)", r"```pycon\n\1\n```\n", doc, flags=re.M)
    body, *sections = SECTION.split(doc)
    for name, told in zip(sections[::2], sections[1::2], strict=True):
        items = [" ".join(item.split()) for item in re.split(r"\n(?=    \S)", f"\n{told}") if item.strip()]
        if name in ("Args", "Raises"):
            items = [re.sub(r"^([\w, ]+): ", r"`\1`: ", item) for item in items]
            body += f"*{name}*\n\n" + "\n".join(f"- {item}" for item in items) + "\n\n"
        else:
            body += f"*{name}*: {told.strip()}\n\n"
    return body.strip()


if __name__ == "__main__":
    made = page()
    if "--check" in sys.argv:
        sys.exit(PAGE.read_text(encoding="utf-8") != made)
    PAGE.write_text(made, encoding="utf-8")
