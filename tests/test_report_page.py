"""The page: whole, self-contained, escaped, and with every column explained."""

from __future__ import annotations

import ast
import re
from fnmatch import fnmatch
from html.parser import HTMLParser
from pathlib import Path

import pytest
from matplotlib.figure import Figure as Canvas

import surgery
from surgery.report.page import Figure, Section, page
from surgery.tables import Table

EVIL = """<script>alert("x")</script> & 'q' </td>"""
VOID = {"meta", "link", "img", "br"}


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that what is opened is closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


def drawn(text: str = "x") -> Figure:
    axes = Canvas().subplots()
    axes.plot([1, 2])
    axes.set_title(text)
    return Figure(axes, f"caption {text}")


def evil() -> str:
    table = Table(EVIL, ("name", "size", EVIL), ((EVIL, 3, None), ("plain", 0.25, EVIL)))
    section = Section(EVIL, EVIL, EVIL, {"name": EVIL, EVIL: EVIL}, (drawn("a < b & c"),), (table,))
    return page(EVIL, [EVIL], [section], {EVIL: EVIL}, {EVIL: EVIL})


def test_every_text_is_escaped():
    text = evil()
    assert EVIL not in text
    assert len(Reader(text).of("script")) == 1  # the page's own
    assert "".join(Reader(text).words).count(EVIL) >= 10


def test_nothing_outside_the_page_is_referred_to():
    for _, attributes in Reader(evil()).tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))


def test_anchors_lead_somewhere_once():
    reader = Reader(evil())
    names = [attributes["id"] for _, attributes in reader.tags if "id" in attributes]
    assert len(names) == len(set(names))
    asked = [attributes["popovertarget"] for attributes in reader.of("button") if "popovertarget" in attributes]
    assert len(asked) == 3
    assert set(asked) <= set(names)
    assert {link["href"][1:] for link in reader.of("a") if link["href"].startswith("#")} <= set(names)


def test_cells_carry_their_exact_value_for_sorting():
    table = Table("t", ("x",), ((0.123456789,), (None,), (1234567,)))
    text = page("t", [], [Section("s", "", "", tables=(table,))], {}, {})
    cells = Reader(text).of("td")
    assert [cell["data-value"] for cell in cells] == ["0.123456789", "", "1234567"]
    assert "1,234,567" in text
    assert "0.1" in text


def test_long_tables_are_folded():
    table = Table("many", ("x",), tuple((at,) for at in range(13)))
    assert len(Reader(page("t", [], [Section("s", "", "", tables=(table,))], {}, {})).of("details")) == 1


def test_the_same_page_is_the_same_bytes():
    assert page("t", [], [Section("s", "", "", figures=(drawn(),))], {}, {}) == page(
        "t", [], [Section("s", "", "", figures=(drawn(),))], {}, {}
    )


def test_the_page_s_markup_stands_in_the_template_alone():
    """A tag in an f-string is escaped by hand or not at all."""
    package = Path(surgery.__file__).parent
    assert [path.name for path in package.rglob("*.jinja")] == ["page.html.jinja"]
    for path in package.rglob("*.py"):
        texts = [node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)]
        tags = [text for text in texts if isinstance(text, str) and re.search(r"</\w+>|<(div|td|th|tr|p|li)\b", text)]
        assert not tags, f"{path.name} holds HTML: {tags[0][:60]!r}"


def test_the_built_package_holds_the_template():
    """hatch takes what is in the package's folder and not ignored by git."""
    package = Path(surgery.__file__).parent
    ignored = (package.parent / ".gitignore").read_text().split()
    for path in package.rglob("*.jinja"):
        assert not any(fnmatch(path.name, pattern) for pattern in ignored)


def test_a_row_that_does_not_fit_its_head_is_refused():
    with pytest.raises(ValueError, match="a row of 1 cells under 2 columns"):
        Table("t", ("a", "b"), ((1,),))


def test_the_example_is_a_page_of_its_own():
    """Made by the command that docs/reference/cli.md names; with no path of the machine that made it."""
    text = (Path(__file__).parent.parent / "docs/examples/smollm2.html").read_text(encoding="utf-8")
    for _, attributes in Reader(text).tags:
        for name in ("src", "href", "action", "data"):
            assert (attributes.get(name) or "#").startswith(("data:", "#"))
    assert not re.search(r"/(home|root|tmp|work|Users)/", re.sub(r"base64,[^\"]*", "", text))
    assert len(text) < 2_000_000
    command = " ".join(re.search(r"<dt>command</dt><dd><code>(.*?)</code>", text)[1].split())
    told = (Path(__file__).parent.parent / "docs/reference/cli.md").read_text(encoding="utf-8")
    assert command in " ".join(told.replace("\\\n", " ").split())
