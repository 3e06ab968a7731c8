"""DTop-p against top-k from point to point of an axis, both at the same mean number of experts."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from study.parts import Part, Rows, cells, held_out, losses, noise, of_variant
from study.results import NOT_CLEAR, Comparison, Results, compared_by_seed
from study.tables import paragraph
from study.variants import TARGET, Variant, dtop_p, top_k


@dataclass(frozen=True)
class Point:
    """Two models that differ in their routing alone.

    Attributes:
        title: in the table.
        at: its place on the axis; a trend is the change with each doubling of it.
        name: the end of its runs' names. The point without one is the study's own model, which
            `PART=rules` trains.
        flags: what both models have instead of the study's model.
        experts: per token, of top-k; DTop-p has them in the mean.
        tokens: of the training, times the study's.
        num_seeds: trainings of each model.
        in_trend: whether the routings can differ here.
    """

    title: str
    at: float
    name: str = ""
    flags: str = ""
    experts: int = round(TARGET)
    tokens: float = 1.0
    num_seeds: int = 1
    in_trend: bool = True

    @property
    def runs(self) -> tuple[str, str]:
        """The names of the variants of DTop-p and of top-k."""
        end = f"_{self.name}" if self.name else ""
        return f"dtop_p{end}", f"top{self.experts}{end}"

    def variants(self) -> list[Variant]:
        """What has to be trained for this point."""
        if not self.name:
            return []
        titles = f"DTop-p, target {self.experts}", f"top-{self.experts}"
        routings = dtop_p(self.experts), top_k(self.experts) + " "
        return [
            Variant(
                name, f"{title}, {self.title}", routing + self.flags, self.num_seeds, self.tokens
            )
            for name, title, routing in zip(self.runs, titles, routings, strict=True)
        ]


@dataclass(frozen=True)
class Axis(Part):
    """The part that trains the points of an axis.

    Attributes:
        points: along the axis.
        claim: of DTop-p's authors, and what they saw, if they have this axis.
    """

    points: tuple[Point, ...] = ()
    claim: tuple[str, str] | None = None

    @classmethod
    def of(
        cls,
        name: str,
        about: str | None,
        points: Sequence[Point],
        claim: tuple[str, str] | None = None,
    ) -> Axis:
        """An axis from its points."""
        variants = {variant.name: variant for point in points for variant in point.variants()}
        show = partial(table, points)
        return cls(
            *(name, about, variants, held_out, show),
            beside="rules",
            points=tuple(points),
            claim=claim,
        )

    def trend(self, rows: Rows, of_main: Results | None) -> Trend | None:
        """How the lead changes; None before all points that can differ have been trained."""
        found = leads(self.points, rows, of_main)
        if any(point.in_trend and point not in found for point in self.points):
            return None
        return trend_of(found, rows)


Leads = Mapping[Point, Comparison]


class Trend(NamedTuple):
    """How a lead changes along an axis.

    Attributes:
        slope: by so much with each doubling, against 0.
        seeds: how many each point has of both models, along the axis.
    """

    slope: Comparison
    seeds: tuple[int, ...]


def leads(points: Sequence[Point], rows: Rows, of_main: Results | None) -> Leads:
    """The loss of top-k less that of DTop-p, at the points of which both have been trained."""
    found = losses(rows)
    known = noise(found, of_main)
    return {
        point: compared_by_seed(found, theirs, ours, known)
        for point in points
        for ours, theirs in [point.runs]
        if ours in found and theirs in found and found[ours].keys() & found[theirs].keys()
    }


def table(points: Sequence[Point], rows: Rows, of_main: Results | None = None) -> list[str]:
    """Loss and experts of both routings at each point, and the lead of DTop-p, in Markdown."""
    known = leads(points, rows, of_main)
    lines = [
        "| | DTop-p, seeds | loss | experts | top-k, seeds | loss | experts | lead of DTop-p, 95 % "
        "| |",
        "| --- " * 9 + "|",
    ]
    for point in points:
        models = [of_variant(rows, name) for name in point.runs]
        if not any(models):
            continue
        row = [point.title, *(cell for of_model in models for cell in cells(of_model))]
        lead = known.get(point)
        row += ["-", ""] if lead is None else [lead.interval, lead.verdict("behind", "ahead")]
        lines.append(f"| {' | '.join(row)} |")
    if (found := trend_of(known, rows)) is not None:
        complete = all(point in known for point in points if point.in_trend)
        so_far = "" if complete else " More points wait."
        lines += ["", paragraph(f"{in_words(found)}.{so_far}")]
    return lines


def in_words(found: Trend) -> str:
    """A trend, what it rests on, and what it says of the lead."""
    slope, seeds = found.slope, found.seeds
    verdict = slope.verdict("it narrows here", "it widens here")
    if verdict == NOT_CLEAR:
        verdict += " here whether it widens"
    numbers = f"{', '.join(map(str, seeds[:-1]))} and {seeds[-1]} seeds"
    if len(set(seeds)) == 1:
        numbers = f"{seeds[0]} {'seed' if seeds[0] == 1 else 'seeds'} each"
    noise = "" if math.isinf(slope.error) else " and noise that is mostly that of other models"
    return (
        f"By {len(seeds)} points ({numbers}){noise}, the lead changes by {slope.interval} with "
        f"each doubling along the axis{verdict and ': '}{verdict}"
    )


def trend(points: Sequence[tuple[float, Comparison]]) -> Comparison:
    """By how much a lead changes with each doubling: a line through points by least squares.

    Args:
        points: at least two places on an axis, each with its lead.

    Returns:
        The slope against 0. A lead counts by the inverse square of its error.
    """
    known = all(0 < lead.error < math.inf for _, lead in points)
    weights = [lead.error**-2 if known else 1.0 for _, lead in points]
    places = [math.log2(at) for at, _ in points]
    center = math.sumprod(weights, places) / sum(weights)
    arms = [w * (x - center) for w, x in zip(weights, places, strict=True)]
    square = math.sumprod(arms, places)
    slope = math.sumprod(arms, [lead.difference for _, lead in points]) / square
    return Comparison(slope, 0.0, square**-0.5 if known else math.inf)


def trend_of(known: Leads, rows: Rows) -> Trend | None:
    """The trend of the points at which the routings can differ; None of fewer than two."""
    inside = [point for point in known if point.in_trend]
    if len(inside) < 2:
        return None
    found = losses(rows)
    seeds = [
        len(found[ours].keys() & found[theirs].keys())
        for ours, theirs in (point.runs for point in inside)
    ]
    return Trend(trend([(point.at, known[point]) for point in inside]), tuple(seeds))
