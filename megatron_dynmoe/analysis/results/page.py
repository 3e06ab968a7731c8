"""Makes one HTML file that needs nothing else: no network, no server, no framework."""

from __future__ import annotations

import base64
import html
import json
import re
from pathlib import Path
from typing import Any

from megatron_dynmoe.analysis.results.figures import Drawn

TEMPLATE = Path(__file__).with_name("page.html")
# What the page shows; the counts stay in routing.json.
_SHOWN = ("model", "windows", "samples", "sweep", "statistics", "notes")
CAPTIONS = {
    "layers": "The line is the mean, the bands hold 50 and 90 % of the tokens. All text is "
    "counted exactly.",
    "distribution": "Left: a token in one layer. Right: each token's mean over all layers.",
    "groups": "The diamond is the mean over all tokens and layers, the bands hold 50 and 90 % of "
    "the tokens.",
    "loss": "A token's own loss says how much it surprised the model; the other line is over the "
    "loss of the next token, which it helps to predict. The numbers are Spearman's rank "
    "correlations over all tokens, with the 95 % interval of a bootstrap over documents in "
    "brackets. A correlation says nothing about causes.",
    "influences": "What a token's experts go along with in each layer: blue with the five other "
    "things held fixed (partial rank correlation; the band is the 95 % interval over documents), "
    "orange without. Entropy is that of the prediction after the token, frequency how often the "
    "token came before in its group. A correlation says nothing about causes.",
    "positions": "At the start of a window there is no context yet.",
    "sweep": "The same weights with other thresholds in every layer, on a part of the text. The "
    "star is the model's own routing.",
    "budgets": "The model's budget_curve: the threshold and the loss for each number of experts "
    "that can be asked for, as measured when the curve was made, on the text of that time; without "
    "losses, the map that the training steered.",
    "load": "Orange: busier than the mean of its layer, blue: idler. Colors end at 4 and 1/4.",
    "together": "How many of the tokens that use one expert (row) also use another (column).",
    "specialization": "Orange: the group's tokens use the expert more often than all text does, "
    "blue: less often. A cross: no token uses it.",
}


def render(content: dict[str, Any], drawn: dict[str, Drawn]) -> str:
    """The page.

    Args:
        content: of ``routing.json``.
        drawn: the figures, by name.
    """
    data = json.dumps({name: content[name] for name in _SHOWN}, ensure_ascii=False)
    parts = {
        "title": html.escape(content["model"]["name"]),
        # Nothing in a text may end the script or begin a comment.
        "data": data.replace("<", "\\u003c"),
        "figures": "\n".join(_figure(name, figure) for name, figure in drawn.items()),
    }
    template = TEMPLATE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], template)


def _figure(name: str, figure: Drawn) -> str:
    # As an image it shares no id or style with the page.
    source = f"data:image/svg+xml;base64,{base64.b64encode(figure.svg).decode()}"
    return (
        f'<figure id="figure-{name}"><h3>{html.escape(figure.title)}</h3>'
        f'<img alt="{html.escape(figure.alt, quote=True)}" src="{source}">'
        f"<figcaption>{html.escape(CAPTIONS[name])}</figcaption></figure>"
    )
