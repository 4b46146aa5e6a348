"""Makes one self-contained ``report.html`` of plain data: text, tables, charts, samples side by side, and provenance.

The page loads nothing: no script, font or image from elsewhere. Its content security policy refuses all of them. Every
piece of text is escaped, since a model may write markup.
"""

from __future__ import annotations

import base64
import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_lightning.evaluation.charts import Figure
from rlhf_lightning.evaluation.style import STYLE
from rlhf_lightning.evaluation.svg import COLORS, clean, element
from rlhf_lightning.outputs import write_whole

_SAMPLES_SHOWN = 6  # more samples are folded away


@dataclass(frozen=True)
class Interval:
    """A share between 0 and 1 with its interval. A table draws it as a bar beside the number."""

    value: float
    low: float
    high: float


Cell = str | int | float | Interval | None  # None is shown as a dash


@dataclass(frozen=True)
class Table:
    """A table. The first cell of a row is its name. Floats have three significant digits, below 100 two decimals."""

    columns: Sequence[str]
    rows: Sequence[Sequence[Cell]]
    title: str = ""
    note: str = ""

    def __post_init__(self) -> None:
        for row in self.rows:
            if len(row) != len(self.columns):
                raise ValueError(f"table {self.title!r}: {len(self.columns)} columns and a row of {len(row)} cells")


@dataclass(frozen=True)
class Answer:
    """What one method answered to a prompt."""

    method: str
    text: str
    scores: Mapping[str, float] = field(default_factory=dict)  # shown under the text, in this order
    note: str = ""  # for instance "cut off at 64 tokens"
    color: int | None = None  # 0 to 5, the method's colour in the charts; None for its place among the answers


@dataclass(frozen=True)
class Sample:
    """A prompt and what each method answered, shown side by side."""

    prompt: str
    answers: Sequence[Answer]


@dataclass(frozen=True)
class Highlight:
    """A number for the top of the page."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class Section:
    """A heading with text (blank lines separate paragraphs), then its tables, figures and samples."""

    title: str
    text: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()
    samples: Sequence[Sample] = ()


@dataclass(frozen=True)
class Report:
    """A whole page. ``warnings`` come first; ``provenance`` (seed, versions, wall times, command) comes last."""

    title: str
    summary: str
    sections: Sequence[Section]
    highlights: Sequence[Highlight] = ()
    provenance: Mapping[str, str] = field(default_factory=dict)
    warnings: Sequence[str] = ()  # things that a reader must know before any number


def render(report: Report) -> str:
    """The page as one string of HTML."""
    digest = base64.b64encode(hashlib.sha256(STYLE.encode()).digest()).decode()
    # Only this style sheet is allowed. Everything that would be fetched or run is refused.
    policy = f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    titles = [section.title for section in report.sections] + (["What was run"] if report.provenance else [])
    links = "".join(element("a", clean(t), href=f"#s{i}") for i, t in enumerate(titles))
    body = [
        element("h1", clean(report.title)),
        *(element("p", clean(warning), class_="warning", role="alert") for warning in report.warnings),
        _paragraphs(report.summary, "summary"),
        element("nav", links, aria_label="Contents") if len(titles) > 2 else "",
        _highlights(report.highlights),
        *(_section(section, i) for i, section in enumerate(report.sections)),
        _provenance(report.provenance, len(report.sections)),
    ]
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{clean(report.title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<main>\n"
        + "\n".join(part for part in body if part)
        + "\n</main>\n</body>\n</html>\n"
    )


def write_report(report: Report, path: str | Path) -> Path:
    """Writes the page and returns its path. The file is complete as soon as it exists."""
    write_whole(path, render(report))
    return Path(path)


def _section(section: Section, number: int) -> str:
    shown, folded = section.samples[:_SAMPLES_SHOWN], section.samples[_SAMPLES_SHOWN:]
    more = element("summary", f"{len(folded)} more prompts") + "".join(map(_sample, folded))
    parts = [
        element("h2", clean(section.title), id=f"s{number}"),
        _paragraphs(section.text),
        *map(_table, section.tables),
        element("div", "".join(map(_figure, section.figures)), class_="figures") if section.figures else "",
        *map(_sample, shown),
        element("details", more) if folded else "",
    ]
    return element("section", "\n".join(part for part in parts if part))


def _paragraphs(text: str, class_: str = "") -> str:
    parts = [clean(part.strip()) for part in text.split("\n\n") if part.strip()]
    return "".join(element("p", part, class_=class_) if class_ else element("p", part) for part in parts)


def _highlights(highlights: Sequence[Highlight]) -> str:
    cells = "".join(
        element(
            "div",
            element("dt", clean(h.label))
            + element("dd", clean(h.value) + (element("small", clean(h.note)) if h.note else "")),
        )
        for h in highlights
    )
    return element("dl", cells, class_="highlights") if cells else ""


def _table(table: Table) -> str:
    # On a phone the style sheet makes a card of each row and writes the column's name before each cell. Browsers then
    # no longer treat the elements as a table, so their roles are written out.
    head = "".join(element("th", clean(name), scope="col", role="columnheader") for name in table.columns)
    rows = "".join(
        element(
            "tr",
            element("th", _cell(row[0]), scope="row", role="rowheader")
            + "".join(
                element("td", _cell(cell), role="cell", data_label=name)
                for name, cell in zip(table.columns[1:], row[1:], strict=True)
            ),
            role="row",
        )
        for row in table.rows
    )
    caption = element("caption", clean(table.title)) if table.title else ""
    body = element("thead", element("tr", head, role="row"), role="rowgroup") + element("tbody", rows, role="rowgroup")
    whole = element("table", caption + body, role="table")
    # A region that scrolls must be reachable by keyboard and have a name.
    name = table.title or " and ".join(table.columns[:2])
    note = element("p", clean(table.note), class_="note") if table.note else ""
    return element("div", whole, class_="scroll", tabindex=0, role="region", aria_label=name) + note


def _cell(cell: Cell) -> str:
    if isinstance(cell, Interval):
        return _interval(cell)
    if isinstance(cell, str):
        return clean(cell)
    return clean(number(cell))


def number(value: float | int | None) -> str:
    """A number as tables show it: integers whole, floats with three significant digits, a dash for None and NaN."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return "\u2013"
    if isinstance(value, int):
        return f"{value:,}".replace("-", "\u2212")
    if math.isinf(value):
        return "\u221e" if value > 0 else "\u2212\u221e"
    small = value != 0 and abs(value) < 0.005
    digits = f"{value:.1e}" if small else f"{value:,.{2 if abs(value) < 100 else 1 if abs(value) < 1000 else 0}f}"
    return digits.replace("-", "\u2212")


def _interval(interval: Interval) -> str:
    if not all(math.isfinite(v) for v in (interval.value, interval.low, interval.high)):
        return "\u2013"
    low, value, high = (100 * min(max(v, 0.0), 1.0) for v in (interval.low, interval.value, interval.high))
    marks = (
        element("line", x1=0, x2=100, y1=12, y2=12, class_="track")
        + element("line", x1=50, x2=50, y1=3, y2=21, class_="reference")
        + element("line", x1=low, x2=high, y1=12, y2=12, class_="whisker c1")
        + element("circle", cx=value, cy=12, r=4, class_="fill c1")
    )
    bar = element("svg", marks, viewBox="-5 0 110 24", aria_hidden="true")
    words = element("small", f"{low:.1f} \u2013 {high:.1f}")
    return element("span", element("span", f"{value:.1f}%") + words + bar, class_="interval")


def _figure(figure: Figure) -> str:
    caption = element("p", clean(figure.caption)) if figure.caption else ""
    return element("figure", element("h3", clean(figure.title)) + figure.svg + element("figcaption", caption))


def _sample(sample: Sample) -> str:
    answers = "".join(_answer(answer, place) for place, answer in enumerate(sample.answers))
    return element(
        "article",
        element("div", clean(sample.prompt), class_="prompt", dir="auto") + element("div", answers, class_="answers"),
        class_="sample",
    )


def _answer(answer: Answer, place: int) -> str:
    body = clean(answer.text) if answer.text.strip() else element("span", "(an empty answer)", class_="empty")
    scores = [f"{name} {number(value)}" for name, value in answer.scores.items()] + (
        [answer.note] if answer.note else []
    )
    color = (place if answer.color is None else answer.color) % COLORS
    return element(
        "div",
        element("h4", clean(answer.method))
        + element("p", body, dir="auto")
        + (element("p", clean(" \u00b7 ".join(scores)), class_="scores") if scores else ""),
        class_=f"answer c{color}",
    )


def _provenance(provenance: Mapping[str, str], number_: int) -> str:
    pairs = "".join(element("dt", clean(name)) + element("dd", clean(value)) for name, value in provenance.items())
    heading = element("h2", "What was run", id=f"s{number_}")
    return element("section", heading + element("dl", pairs, class_="provenance")) if pairs else ""
