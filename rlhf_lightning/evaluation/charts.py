"""Draws small charts as inline SVG: lines over steps, a path over KL, histograms, estimates with their intervals.

The charts use no script, font or file from elsewhere. The report's style sheet makes them light or dark. Every mark
with a number shows it as a tooltip, and every chart describes itself in words for screen readers.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rlhf_lightning.evaluation.svg import (
    COLORS,
    HEIGHT,
    WIDTH,
    Frame,
    axis_for,
    clean,
    element,
    label_width,
    path,
    picture,
    shorten,
    spread,
    text,
)

_LONGEST_NAME = 18  # most letters of a label at the end of a line
_MOST_DOTS = 60  # of more points, only some get a dot


@dataclass(frozen=True)
class Series:
    """A named line. NaN in ``y`` leaves a gap."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    low: Sequence[float] | None = None  # lower edge of a band around y, as long as y
    high: Sequence[float] | None = None  # its upper edge
    color: int | None = None  # 0 to 5; None takes the series' place in the chart. 0 is the quiet grey of a baseline

    def __post_init__(self) -> None:
        for field in (self.y, self.low, self.high):
            if field is not None and len(field) != len(self.x):
                raise ValueError(f"series {self.name!r}: {len(self.x)} x values and {len(field)} y values")


@dataclass(frozen=True)
class Estimate:
    """A named number with its interval."""

    name: str
    value: float
    low: float
    high: float
    color: int | None = None


@dataclass(frozen=True)
class Figure:
    """A chart ready for a page."""

    title: str
    svg: str
    caption: str = ""


def line_chart(title: str, series: Sequence[Series], x_label: str, y_label: str, caption: str = "") -> Figure:
    """Lines over a common x, each labelled at its end, with a band if the series has one."""
    names = [shorten(s.name, _LONGEST_NAME) for s in series]
    right = 20 + label_width(names) if len(series) > 1 else 16
    frame = Frame(
        axis_for([x for s in series for x in s.x], tight=True),
        axis_for([y for s in series for column in (s.y, s.low or [], s.high or []) for y in column]),
        right=right,
    )
    body, ends = [frame.axes(x_label, y_label)], []
    for place, s in enumerate(series):
        color = _color(s.color, place)
        body.append(_band(frame, s, color))
        body.append(path((frame.at(x, y) for x, y in zip(s.x, s.y, strict=True)), f"line {color}"))
        seen = [(x, y) for x, y in zip(s.x, s.y, strict=True) if _finite(x, y)]
        if len(seen) == 1:
            body.append(_dot(frame, *seen[0], color, f"{s.name}: {_number(seen[0][1])}"))
        if seen:
            ends.append((seen[-1], names[place], color))
    if len(series) > 1:
        body.append(_end_labels(frame, ends))
    return Figure(title, picture(title, _in_words("Line chart", series, x_label, y_label), "".join(body)), caption)


def trajectory_chart(
    title: str, series: Sequence[Series], x_label: str, y_label: str, caption: str = "", counting: str = ""
) -> Figure:
    """Paths through a plane, such as proxy and gold reward over KL. Each point is a dot.

    A path's name is written at the height of its last point.

    Args:
        counting: the unit of the points' numbers in the tooltips, for instance ``iteration``; empty for no numbers.
    """
    names = [shorten(s.name, _LONGEST_NAME) for s in series]
    frame = Frame(
        axis_for([x for s in series for x in s.x], tight=False),
        axis_for([y for s in series for y in s.y]),
        right=22 + label_width(names),
    )
    body, ends = [frame.axes(x_label, y_label)], []
    for place, s in enumerate(series):
        color = _color(s.color, place)
        seen = [(i, x, y) for i, (x, y) in enumerate(zip(s.x, s.y, strict=True)) if _finite(x, y)]
        body.append(path((frame.at(x, y) for _, x, y in seen), f"line faint {color}"))
        for i, x, y in seen if len(seen) <= _MOST_DOTS else seen[:: math.ceil(len(seen) / _MOST_DOTS)]:
            which = f", {counting} {i + 1}" if counting else ""
            tip = f"{s.name}{which}: {x_label} {_number(x)}, {y_label} {_number(y)}"
            body.append(_dot(frame, x, y, color, tip))
        if seen:
            ends.append(((max(x for _, x, _ in seen), seen[-1][2]), names[place], color))
    body.append(_end_labels(frame, ends))
    return Figure(title, picture(title, _in_words("Path", series, x_label, y_label), "".join(body)), caption)


def histogram_chart(
    title: str, groups: Mapping[str, Sequence[float]], x_label: str, caption: str = "", bins: int = 24,
    colors: Sequence[int] = (),
) -> Figure:  # fmt: skip
    """One histogram for each group, drawn over each other, in shares of the group."""
    values = {name: [v for v in group if math.isfinite(v)] for name, group in groups.items()}
    x = axis_for([v for group in values.values() for v in group])
    edge = (x.high - x.low) / bins
    shares = {}
    for name, group in values.items():
        counts = [0] * bins
        for v in group:
            counts[min(int((v - x.low) / edge), bins - 1)] += 1
        shares[name] = [count / max(len(group), 1) for count in counts]
    frame = Frame(x, axis_for([0.0, *(s for share in shares.values() for s in share)], count=4))
    body = [frame.axes(x_label, "share of responses")]
    legend_x = WIDTH - 16.0
    for place, (name, share) in reversed(list(enumerate(shares.items()))):
        color = _color(colors[place] if place < len(colors) else None, place)
        outline = [frame.at(x.low, 0.0)]
        for i, s in enumerate(share):
            outline += [frame.at(x.low + i * edge, s), frame.at(x.low + (i + 1) * edge, s)]
        outline.append(frame.at(x.high, 0.0))
        mean = sum(values[name]) / len(values[name]) if values[name] else math.nan
        tip = element("title", clean(f"{name}: {len(values[name])} responses, mean {_number(mean)}"))
        body.append(element("g", tip + path(outline, f"area {color}") + path(outline, f"line thin {color}")))
        short = shorten(name, _LONGEST_NAME)
        legend_x -= label_width([short])
        body.append(text(short, legend_x, 14, f"name {color}"))
        body.append(element("rect", x=legend_x - 15, y=5, width=10, height=10, rx=2, class_=f"fill {color}"))
        legend_x -= 26
    means = "; ".join(
        f"{name}: {len(group)} values" + (f", mean {_number(sum(group) / len(group))}" if group else "")
        for name, group in values.items()
    )
    return Figure(title, picture(title, f"Histogram of {x_label}. {means}.", "".join(body)), caption)


def interval_chart(
    title: str, estimates: Sequence[Estimate], x_label: str, caption: str = "", reference: float | None = None,
    percent: bool = False,
) -> Figure:  # fmt: skip
    """Estimates as dots with their intervals as whiskers, one row each.

    Args:
        reference: a value to compare with, drawn as a dashed line (0.5 for win rates).
        percent: write the values as percentages and let the axis go from 0 to 1.
    """
    names = [shorten(e.name, 22) for e in estimates]
    row, top, left = 34.0, 16.0, 16 + label_width(names)
    right, bottom = 128.0, top + row * max(len(estimates), 1)
    across = [v for e in estimates for v in (e.value, e.low, e.high)] + ([] if reference is None else [reference])
    x = axis_for([0.0, 1.0] if percent else across, count=4)

    def at(value: float) -> float:
        return left + min(max(x.share(value), 0.0), 1.0) * (WIDTH - left - right)

    body = []
    for tick in x.ticks:
        label = f"{100 * tick:.0f}%" if percent else x.tick_label(tick)
        body.append(element("line", x1=at(tick), x2=at(tick), y1=top, y2=bottom, class_="grid"))
        body.append(text(label, at(tick), bottom + 18, "tick", "middle"))
    if reference is not None:
        body.append(element("line", x1=at(reference), x2=at(reference), y1=top - 6, y2=bottom, class_="reference"))
    for place, e in enumerate(estimates):
        color, y = _color(e.color, place), top + row * (place + 0.5)
        value, low, high = (_percent(v) if percent else _number(v) for v in (e.value, e.low, e.high))
        body.append(text(names[place], 4, y + 4, "name"))
        if _finite(e.value):
            marks = element("title", clean(f"{e.name}: {value}, interval {low} to {high}"))
            if _finite(e.low, e.high):
                marks += element("line", x1=at(e.low), x2=at(e.high), y1=y, y2=y, class_=f"whisker {color}")
            marks += element("circle", cx=at(e.value), cy=y, r=5, class_=f"fill {color}")
            body.append(element("g", marks))
        body.append(text(value, WIDTH - right + 14, y, "value"))
        body.append(text(f"{low} \u2013 {high}", WIDTH - right + 14, y + 14, "tick"))
    body.append(text(x_label, (left + WIDTH - right) / 2, bottom + 38, "label", "middle"))
    words = "; ".join(f"{e.name} {_number(e.value)} ({_number(e.low)} to {_number(e.high)})" for e in estimates)
    return Figure(title, picture(title, f"{x_label}: {words}.", "".join(body), height=bottom + 48), caption)


def _color(chosen: int | None, place: int) -> str:
    return f"c{(place if chosen is None else chosen) % COLORS}"


def _finite(*values: float) -> bool:
    return all(math.isfinite(v) for v in values)


def _number(value: float) -> str:
    return f"{value:.3g}".replace("-", "\u2212") if math.isfinite(value) else "n/a"


def _percent(value: float) -> str:
    return f"{100 * value:.1f}%" if math.isfinite(value) else "n/a"


def _dot(frame: Frame, x: float, y: float, color: str, tip: str) -> str:
    cx, cy = frame.at(x, y)
    return element("circle", element("title", clean(tip)), cx=cx, cy=cy, r=2.8, class_=f"fill {color}")


def _band(frame: Frame, s: Series, color: str) -> str:
    if s.low is None or s.high is None:
        return ""
    edges = [(x, lo, hi) for x, lo, hi in zip(s.x, s.low, s.high, strict=True) if _finite(x, lo, hi)]
    outline = [frame.at(x, lo) for x, lo, _ in edges] + [frame.at(x, hi) for x, _, hi in reversed(edges)]
    return path(outline, f"area {color}")


def _end_labels(frame: Frame, ends: list[tuple[tuple[float, float], str, str]]) -> str:
    heights = spread([frame.at(*point)[1] for point, _, _ in ends], 15.0, 34.0, HEIGHT - 46.0)
    return "".join(
        text(name, frame.at(*point)[0] + 8, y + 4, f"name halo {color}")
        for (point, name, color), y in zip(ends, heights, strict=True)
    )


def _in_words(kind: str, series: Sequence[Series], x_label: str, y_label: str) -> str:
    told = []
    for s in series:
        seen = [(x, y) for x, y in zip(s.x, s.y, strict=True) if _finite(x, y)]
        if seen:
            (x0, y0), (x1, y1) = seen[0], seen[-1]
            told.append(f"{s.name}: {_number(y0)} at {_number(x0)}, {_number(y1)} at {_number(x1)}")
        else:
            told.append(f"{s.name}: no values")
    return f"{kind} of {y_label} over {x_label}. {'; '.join(told)}."
