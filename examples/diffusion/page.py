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
    "1em } img { max-width: 100% } pre { white-space: pre-wrap }"
)

ABOUT = (
    "Recognized is the share of samples that a small network, which has learned the real images, "
    "takes for the class that was asked. The Fréchet distance compares its features of samples and "
    "of real images; 0 is equal, and held-out real images show what is small. At time 0 there is "
    "noise alone, at time 1 the image. Everything else is explained in docs/diffusion.md."
)


def write(run: Path, iteration: int, lines: Sequence[str], names: Sequence[str]) -> None:
    """Write the page, one file that needs nothing else.

    Args:
        run: the folder of the run.
        iteration: of the samples.
        lines: what was measured.
        names: of the classes, in their order.
    """
    figures = (
        (f"Samples, by row: {html.escape(', '.join(names))}", f"samples/step_{iteration}.png"),
        ("Experts by layer, noise level and patch", f"samples/experts_{iteration}.png"),
        ("Curves", CURVES),
    )
    title = html.escape(f"{run}, step {iteration}")
    parts = [
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>',
        f"<style>{STYLE}</style></head><body><h1>{title}</h1>",
        f"<p>{ABOUT}</p>",
        f"<pre>{html.escape(chr(10).join(line.removeprefix('> ') for line in lines))}</pre>",
    ]
    for caption, name in figures:
        if (run / name).is_file():
            source = base64.b64encode((run / name).read_bytes()).decode()
            image = f'<img alt="{caption}" src="data:image/png;base64,{source}">'
            parts.append(f"<h2>{caption}</h2>{image}")
    text = "\n".join([*parts, "</body></html>\n"])
    replace_file(run / NAME, lambda path: path.write_text(text, encoding="utf-8"))
