"""The page in a real browser: Debian's package chromium, without a window.

A script that is added to a copy of the page uses it as a person would and writes down what it saw.
"""

import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from megatron_dynmoe.cli.analyze import main

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs a browser: apt-get install chromium"),
]
# What a browser without a desktop says of the machine, not of the page
CONSOLE = re.compile(r":CONSOLE[:(\d].*")
FRAME = """<iframe src="{page}" style="border: 0; width: {width}px; height: 800px"></iframe>
<script>addEventListener("message", event => document.body.append(Object.assign(
  document.createElement("pre"), {{ id: "answer", textContent: JSON.stringify(event.data) }})));
</script>"""
Try = Callable[..., Any]


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory, exported: Path, texts: dict[str, Path]) -> Path:
    folder = tmp_path_factory.mktemp("page")
    hostile = folder / "hostile.txt"
    hostile.write_text(
        "</script><img src=x onerror=alert(1)> <!-- {{data}} \\u2028 & \u2028 a house\n" * 40
    )
    (folder / "another.txt").write_text("the house of a man who was not at home\n" * 40)
    files = [*texts.values(), hostile]
    command = ["--model", exported, "--data", *files, "--output", folder / "report"]
    command += [
        "--group",
        f"{'long' * 50}={folder / 'another.txt'}",
        "--sequence-length",
        32,
        "--sweep",
        "0.2,0.8",
        "--min-count",
        5,
    ]
    assert main([str(word) for word in command]) == 0
    return folder / "report" / "index.html"


@pytest.fixture
def browse(tmp_path: Path, page: Path) -> Try:
    def run(script: str, width: int = 1200) -> Any:
        """The value of an expression in the page, which may have no error in its console."""
        # A window has a least width, a frame has none; and a frame may not be looked into.
        frame, copy = tmp_path / "frame.html", tmp_path / "page.html"
        frame.write_text(FRAME.format(width=width, page=copy.name))
        ask = f"<script>parent.postMessage((() => {{{script}}})(), '*')</script></body>"
        copy.write_text(page.read_text().replace("</body>", ask))
        browser = subprocess.run(
            [
                *(str(CHROMIUM), "--headless=new", "--no-sandbox", "--disable-gpu"),
                "--disable-dev-shm-usage",  # of which a container has little
                *("--enable-logging=stderr", "--v=0", "--virtual-time-budget=5000"),
                *("--window-size=1400,1000", f"--user-data-dir={tmp_path / 'profile'}"),
                *("--dump-dom", frame.as_uri()),
            ],
            env=os.environ | {"HOME": str(tmp_path)},
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert not CONSOLE.findall(browser.stderr)
        found = re.search(r'<pre id="answer">(.*?)</pre>', browser.stdout, re.DOTALL)
        assert found, browser.stderr[-2000:]
        return json.loads(found[1].replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&"))

    return run


def test_errors_would_be_seen(browse: Try) -> None:
    with pytest.raises(AssertionError, match="CONSOLE"):
        browse("console.error('a mistake'); return 1;")


def test_the_slider_changes_the_colors(browse: Try) -> None:
    seen = browse("""
      const colors = () => [...document.querySelectorAll("#sample span")]
        .map(span => getComputedStyle(span).backgroundColor).join();
      const slider = document.getElementById("layer"), seen = [];
      for (const layer of [0, 1, 2, 0]) {
        slider.value = layer;
        slider.dispatchEvent(new Event("input"));
        seen.push([document.getElementById("layer-name").textContent, colors()]);
      }
      return { seen, most: slider.max };""")
    assert seen["most"] == "2"
    names, colors = zip(*seen["seen"], strict=True)
    assert names == ("all layers", "layer 1", "layer 3", "all layers")
    assert len(set(colors)) == 3
    assert colors[0] == colors[3]


def test_colors_are_those_of_the_counts(browse: Try, page: Path) -> None:
    seen = browse("""
      const slider = document.getElementById("layer");
      slider.value = 1;
      slider.dispatchEvent(new Event("input"));
      return [...document.querySelectorAll("#sample span")].map(span => [span.textContent,
        span.title, span.className]);""")
    pieces = json.loads((page.parent / "routing.json").read_text())["samples"]["prose"]
    assert [text for text, _, _ in seen] == [piece["text"] for piece in pieces]
    assert [title for _, title, _ in seen] == [
        f"{piece['experts_L'][0]:.2f} experts" for piece in pieces
    ]
    levels = sorted(
        (piece["experts_L"][0], row[2]) for piece, row in zip(pieces, seen, strict=True)
    )
    assert [level for _, level in levels] == sorted(level for _, level in levels)


def test_another_text_and_the_keyboard(browse: Try) -> None:
    seen = browse("""
      const group = document.getElementById("group"), sample = document.getElementById("sample");
      group.value = "hostile";
      group.dispatchEvent(new Event("change"));
      const press = key => sample.dispatchEvent(new KeyboardEvent("keydown", { key }));
      press("ArrowRight"); press("ArrowRight"); press("ArrowLeft");
      return { text: sample.textContent, detail: document.getElementById("detail").textContent,
        chosen: [...sample.children].findIndex(span => span.className.includes("chosen")) };""")
    assert seen["text"].startswith("</script><img src=x onerror=alert(1)> <!")
    assert seen["chosen"] == 0
    assert "experts on average; by layer:" in seen["detail"]


def test_tables_sort(browse: Try, page: Path) -> None:
    seen = browse("""
      const values = (table, column) => [...document.querySelectorAll(`#table-${table} tbody tr`)]
        .map(row => row.children[column].textContent);
      const seen = {};
      for (const [table, column] of [["groups", 0], ["groups", 1], ["experts", 3], ["most", 1]]) {
        const head = document.querySelectorAll(`#table-${table} th`)[column];
        const button = head.querySelector("button");
        button.focus();
        const focused = document.activeElement === button;
        button.click();
        const first = [head.getAttribute("aria-sort"), values(table, column)];
        button.click();
        const then = [head.getAttribute("aria-sort"), values(table, column)];
        seen[table + column] = { focused, first, then };
      }
      return seen;""")
    for name, (column_is_text, table) in {
        "groups0": (True, "groups"),
        "groups1": (False, "groups"),
        "experts3": (False, "experts"),
        "most1": (False, "most"),
    }.items():
        found = seen[name]
        assert found["focused"], table
        for direction, values in (found["first"], found["then"]):
            numbers = values if column_is_text else [float(v.replace(",", "")) for v in values]
            assert numbers == sorted(numbers, reverse=direction == "descending"), name
        assert found["first"][0] != found["then"][0]


def test_every_color_can_be_read_on_light_and_dark_systems(browse: Try) -> None:
    seen = browse("""
      const parts = ["body", ...Array.from({ length: 7 }, (_, n) => `#legend .e${n}`)];
      const styles = parts.map(of => getComputedStyle(document.querySelector(of)));
      return [styles[0].colorScheme, styles.map(style => [style.backgroundColor, style.color])];""")
    assert seen[0] == "light"  # so that no dark system colors fields for itself
    for background, ink in seen[1]:
        assert contrast(background, ink) > 4.5, (background, ink)


def test_tables_that_do_not_fit_say_so(browse: Try) -> None:
    seen = browse(
        """return [...document.querySelectorAll(".table")].map(table =>
          [table.id, table.scrollWidth > table.clientWidth,
           getComputedStyle(table, "::after").content.includes("scroll")]);""",
        360,
    )
    assert all(too_wide == hinted for _, too_wide, hinted in seen), seen
    assert ["table-layers", True, True] in seen


@pytest.mark.parametrize("width", [360, 1200])
def test_nothing_is_wider_than_the_window(browse: Try, width: int) -> None:
    seen = browse(
        "const root = document.documentElement; return [root.scrollWidth, root.clientWidth]", width
    )
    assert seen[0] <= seen[1]
    assert width - 20 <= seen[1] <= width  # a scroll bar may take its part


def contrast(first: str, second: str) -> float:
    """As the Web Content Accessibility Guidelines define it."""

    def luminance(color: str) -> float:
        channels = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(first), luminance(second)))
    return (high + 0.05) / (low + 0.05)
