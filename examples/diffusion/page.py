"""``report.html`` of a run: what was measured, its samples, its experts and its curves."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from pathlib import Path

from megatron_dynmoe.runs.folder import CURVES
from megatron_dynmoe.storage.atomic import replace_file

NAME = "report.html"
STYLE = (
    "body { font: 16px/1.5 system-ui, sans-serif; max-width: 1100px; margin: 2em auto; padding: 0 "
    "1em } img { max-width: 100%; image-rendering: pixelated } pre { white-space: pre-wrap }"
)


def write(run: Path, iteration: int, lines: Sequence[str]) -> None:
    """Write the page, one file that needs nothing else.

    Args:
        run: the folder of the run.
        iteration: of the samples.
        lines: what was measured.
    """
    figures = (
        ("Samples, a row for each class", f"samples/step_{iteration}.png"),
        ("Experts by layer, noise level and patch", f"samples/experts_{iteration}.png"),
        ("Curves", CURVES),
    )
    title = html.escape(f"{run}, step {iteration}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        f"<pre>{html.escape(chr(10).join(line.removeprefix('> ') for line in lines))}</pre>",
    ]
    for caption, name in figures:
        if (run / name).is_file():
            source = base64.b64encode((run / name).read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
            parts.append(f"<h2>{caption}</h2>{image}")
    text = "\n".join([*parts, "</body></html>\n"])
    replace_file(run / NAME, lambda path: path.write_text(text, encoding="utf-8"))
