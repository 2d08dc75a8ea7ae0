"""The page in a real browser: no error, nothing fetched, readable at a desk's and a phone's width, tables that sort."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from test_report_page import drawn, evil

from surgery.report.page import Section, page
from surgery.tables import Table

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")

# What a reader would do, written at the end of a copy of the page; what came of it is left in the document.
READER = """<script>
const errors = [];
addEventListener("error", (event) => errors.push(event.message));
addEventListener("load", () => {
const tables = [...document.querySelectorAll("table")].map((table) => {
  const heads = table.tHead.rows[0], at = heads.cells.length - 1;
  const column = () => [...table.tBodies[0].rows].map((row) => row.cells[at].textContent);
  const last = heads.cells[at].querySelector("button.sort");
  const found = { before: column() };
  last.click(); found.up = column(); last.click(); found.down = column();
  return found;
});
const shown = [...document.querySelectorAll(".ask")].map((button) => {
  button.click();
  const one = document.getElementById(button.getAttribute("popovertarget"));
  const open = one.matches(":popover-open") && one.getBoundingClientRect().right <= innerWidth + 1;
  one.hidePopover();
  return open;
});
document.querySelectorAll("details").forEach((one) => (one.open = true));
const images = [...document.images].map((image) => image.complete && image.naturalWidth > 0);
const aside = [...document.querySelectorAll(".scroll")].filter((one) => one.scrollWidth > one.clientWidth + 1).length;
const told = { errors, tables, shown, images, aside, wide: document.documentElement.scrollWidth, room: innerWidth };
document.body.innerHTML = ""; document.body.dataset.told = JSON.stringify(told);
});
</script>"""


def read(text: str, folder: Path, width: int) -> dict[str, object]:
    """What the reader met, at a window of that width; fails where the console holds an error."""
    file = folder / f"page{width}.html"
    file.write_text(text.replace("</body>", f"{READER}</body>"), encoding="utf-8")
    frame = folder / f"frame{width}.html"  # a headless window is never narrower than about 500 pixels; a frame is
    frame.write_text(
        f'<iframe src="{file.name}" width="{width}" height="800" style="border:0"></iframe><script>'
        "setInterval(() => { const told = document.querySelector('iframe').contentDocument?.body?.dataset.told;"
        " if (told) document.body.dataset.told = told; }, 50);</script>"
    )
    done = subprocess.run(
        [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-sync",
            "--disable-background-networking", "--disable-component-update", "--allow-file-access-from-files",
            f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900", "--enable-logging=stderr", "--v=0",
            "--virtual-time-budget=4000", "--dump-dom", frame.as_uri(),
        ],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert "CONSOLE" not in done.stderr, done.stderr
    found = re.search(r'data-told="([^"]*)"', done.stdout)
    assert found, done.stdout[-2000:] + done.stderr[-2000:]
    told: dict[str, object] = json.loads(found[1].replace("&quot;", '"').replace("&lt;", "<").replace("&amp;", "&"))
    return told


def sample() -> str:
    table = Table("numbers", ("name", "size"), (("b", 10), ("a", 9), ("c", None), ("d", -2.5)))
    long = Table("words", ("n", "name"), tuple((at, f"x{at % 5}") for at in range(40)))
    pairs = tuple(f"mathematics–stage-{at}-of-training" for at in range(10))
    wide = Table(
        "a title that is longer than the table " * 8, ("block", *pairs), (("model.layers.29.mlp", *[0.25] * 10),)
    )
    section = Section(
        "Sizes", "They differ.", "How large.", {"size": "how large it is"}, (drawn(), drawn("y")), (table, long, wide)
    )
    return page(
        "A page", ["All is well."], [section], {"theory": "would need --data"}, {"command": "surgery " + "x" * 300}
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_the_page_is_read_without_an_error_and_fits(tmp_path, width):
    told = read(sample(), tmp_path, width)
    assert told["errors"] == []
    assert told["images"] == [True, True]
    assert told["shown"] == [True, True]
    assert told["room"] == width
    assert told["wide"] <= width
    assert told["aside"] == 0 or width < 1280  # tables that scroll sideways


def test_columns_sort_as_numbers_and_empty_cells_stay_last(tmp_path):
    numbers, words, _ = read(sample(), tmp_path, 1280)["tables"]
    assert numbers["before"] == ["10", "9", "", "-2.5"]
    assert numbers["up"] == ["-2.5", "9", "10", ""]
    assert numbers["down"] == ["10", "9", "-2.5", ""]
    assert words["up"] == sorted(words["before"])
    assert words["down"] == sorted(words["before"], reverse=True)


def test_what_looks_like_code_is_only_text(tmp_path):
    assert read(evil(), tmp_path, 1280)["errors"] == []
