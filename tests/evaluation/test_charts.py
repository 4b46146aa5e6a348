"""Charts are well-formed, put marks where the numbers are, and survive NaN, emptiness and hostile names."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf_lightning.evaluation.charts import (
    Estimate,
    Figure,
    Series,
    histogram_chart,
    interval_chart,
    line_chart,
    trajectory_chart,
)
from rlhf_lightning.evaluation.svg import WIDTH, Frame, axis_for, clean, spread

HOSTILE = "</svg><script>alert('x')</script>\x00\x1b[31m\ud800 & \"quoted\""
SERIES = [
    Series("train", [1, 2, 3], [3.0, 2.0, math.nan]),
    Series("a rather long name for a line", [1, 3], [2.5, 2.0], low=[2.0, 1.5], high=[3.0, 2.5]),
    Series(HOSTILE, [], []),
]
MAKERS: dict[str, Callable[[str, list[Series]], Figure]] = {
    "line": lambda title, s: line_chart(title, s, "step", "loss"),
    "trajectory": lambda title, s: trajectory_chart(title, s, "KL", "reward", counting="iteration"),
    "histogram": lambda title, s: histogram_chart(title, {x.name: x.y for x in s}, "reward"),
    "interval": lambda title, s: interval_chart(
        title, [Estimate(x.name, 0.6, 0.5, 0.7) for x in s], "share", reference=0.5, percent=True
    ),
}


@pytest.mark.parametrize("maker", MAKERS.values(), ids=MAKERS)
@pytest.mark.parametrize(
    "series",
    [
        SERIES,
        [],
        [Series("one", [1], [1.0])],
        [Series("nan", [1, 2], [math.nan, math.inf])],
        [Series("flat", [1, 2], [3, 3])],
    ],
    ids=["mixed", "none", "point", "nan", "flat"],
)
def test_every_chart_is_well_formed_and_described(maker: Callable, series: list[Series]) -> None:
    svg = maker(HOSTILE, series).svg
    root = ElementTree.fromstring(svg)
    assert root.tag == "svg"
    assert root.find("title").text.startswith("</svg>")
    assert root.find("desc").text
    assert root.get("role") == "img"
    assert "<script" not in svg
    assert "style=" not in svg and "http" not in svg
    assert not re.search(r'"[^"]*\b(nan|inf)\b', re.sub(r"<(title|desc|text)\b[^>]*>[^<]*</\1>", "", svg))


def test_a_line_goes_through_its_points_and_lifts_at_nan() -> None:
    svg = line_chart("t", [Series("s", [0, 1, 2, 3, 4], [0.0, 10.0, math.nan, 0.0, 10.0])], "x", "y").svg
    (line,) = (p for p in ElementTree.fromstring(svg).iter("path") if "line" in p.get("class"))
    moves = re.findall(r"([ML])([\d.]+) ([\d.]+)", line.get("d"))
    assert [m[0] for m in moves] == ["M", "L", "M", "L"]
    frame = Frame(axis_for([0, 4], tight=True), axis_for([0, 10]))
    assert (float(moves[1][1]), float(moves[1][2])) == pytest.approx(frame.at(1, 10), abs=0.06)
    assert float(moves[0][2]) > float(moves[1][2])  # larger is higher up


def test_histogram_shares_add_up_to_one() -> None:
    svg = histogram_chart("t", {"a": [1.0, 2.0, 2.0, 9.0], "b": [5.0]}, "x", bins=8).svg
    outline = next(p for p in ElementTree.fromstring(svg).iter("path") if p.get("class") == "line thin c0").get("d")
    points = [(float(x), float(y)) for x, y in re.findall(r"[ML]([\d.]+) ([\d.]+)", outline)]
    frame = Frame(axis_for([1, 9]), axis_for([0.0, 0.25, 0.5, 1.0], count=4))
    zero, one = frame.at(1, 0)[1], frame.at(1, 1)[1]
    heights = [
        (zero - y) / (zero - one) for (_, y), (_, after) in zip(points[1:-1:2], points[2::2], strict=True) if y == after
    ]
    assert sum(heights) == pytest.approx(1.0, abs=0.01)


def test_series_with_columns_of_different_length_is_refused() -> None:
    with pytest.raises(ValueError, match="'s': 2 x values and 1 y values"):
        Series("s", [1, 2], [1.0])


@given(st.lists(st.floats(-1e9, 1e9), min_size=1, max_size=20), st.booleans())
@settings(max_examples=200)
def test_axis_holds_the_data_with_few_increasing_ticks(values: list[float], tight: bool) -> None:
    axis = axis_for(values, tight=tight)
    slack = 1e-6 * max(1.0, abs(axis.low), abs(axis.high))
    assert axis.low - slack <= min(values) <= max(values) <= axis.high + slack
    assert axis.low < axis.high
    assert 1 <= len(axis.ticks) <= 9
    assert all(a < b for a, b in pairwise(axis.ticks))


def test_axis_ticks_are_round() -> None:
    assert axis_for([0.3, 9.1]).ticks == (0, 2, 4, 6, 8, 10)
    axis = axis_for([0.31, 0.72])
    assert [axis.tick_label(t) for t in axis.ticks] == ["0.3", "0.4", "0.5", "0.6", "0.7", "0.8"]
    assert axis_for([-1.2, 3]).tick_label(-2) == "\u22122"


@given(st.lists(st.floats(0, 200), min_size=1, max_size=8))
@settings(max_examples=100)
def test_labels_are_spread_in_order_without_overlap(wanted: list[float]) -> None:
    placed = spread(wanted, 15.0, 0.0, 200.0)
    ordered = sorted(placed)
    assert all(b - a >= 15.0 - 1e-9 for a, b in pairwise(ordered))
    assert ordered[0] >= -1e-9 and ordered[-1] <= 200 + 1e-9
    assert all(placed[i] < placed[j] for i in range(len(wanted)) for j in range(len(wanted)) if wanted[i] < wanted[j])


@given(st.text())
@settings(max_examples=100)
def test_any_text_is_fit_for_xml(text: str) -> None:
    ElementTree.fromstring(f'<t a="{clean(text)}">{clean(text)}</t>')


def test_clean_shows_control_characters() -> None:
    assert clean("a\x1b[0m\x00\r\nb\tc\ud800") == "a\u241b[0m\u2400\nb\tc\ufffd"
    assert clean("<b a='1'>&") == "&lt;b a=&#x27;1&#x27;&gt;&amp;"


def test_clean_shows_marks_that_override_the_direction_of_text() -> None:
    overrides = [chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))]
    assert clean("".join(overrides)) == "\ufffd" * 9
    assert clean("\u05d0\u200f\u05d1") == "\u05d0\u200f\u05d1"  # a mark that Hebrew needs stays


def test_marks_stay_inside_the_picture() -> None:
    svg = interval_chart("t", [Estimate("n", 1.0, -0.2, 1.3)], "x", percent=True).svg
    for line in ElementTree.fromstring(svg).iter("line"):
        assert 0 <= float(line.get("x1")) <= WIDTH and 0 <= float(line.get("x2")) <= WIDTH
