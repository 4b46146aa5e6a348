"""The page holds what it is given, escaped; it loads nothing and lets nothing run."""

from __future__ import annotations

import base64
import hashlib
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from rlhf_lightning.evaluation.charts import Series, line_chart
from rlhf_lightning.evaluation.compare import Answers, Comparison, Settings
from rlhf_lightning.evaluation.html_report import (
    Answer,
    Highlight,
    Interval,
    Report,
    Sample,
    Section,
    Table,
    number,
    render,
    write_report,
)
from rlhf_lightning.evaluation.present import samples

HOSTILE = "<script>alert(1)</script><img src=x onerror='alert(2)'>\" onmouseover=\"x\x1b\ud800</p></style>"
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Collects tags and attributes, and checks that tags are closed in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.words: list[str] = []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words.append(data)


def example(text: str = "plain") -> Report:
    return Report(
        text,
        f"{text}\n\nsecond paragraph",
        [
            Section(
                text,
                text,
                tables=[Table([text, "b", "c"], [[text, Interval(0.9, 0.8, 0.95), None], ["x", 1, 2.5]], text, text)],
                figures=[line_chart(text, [Series(text, [1, 2], [1.0, 2.0])], text, text, text)],
                samples=[Sample(text, [Answer(text, text, {text: 1.5}, text), Answer("y", "")])] * 8,
            ),
            Section("second"),
        ],
        [Highlight(text, text, text)],
        {text: text},
        [text],
    )


def test_hostile_text_everywhere_stays_text() -> None:
    page = Page(render(example(HOSTILE)))
    harmless = Page(render(example()))
    # The same elements with the same attribute names: no text turned into markup.
    assert [(t, set(a)) for t, a in page.tags] == [(t, set(a)) for t, a in harmless.tags]
    assert any("<script>alert(1)</script>" in words for words in page.words)
    assert "\x1b" not in "".join(page.words)


def test_page_is_self_contained() -> None:
    html = render(example())
    page = Page(html)
    assert "http:" not in html and "https:" not in html and "url(" not in html and "@import" not in html
    for tag, attributes in page.tags:
        assert tag not in {"script", "link", "img", "iframe", "object", "embed", "base", "form"}
        assert not any(name.startswith("on") or name in ("style", "src") for name in attributes)
        assert attributes.get("href", "#").startswith("#")


def test_policy_lets_in_this_style_sheet_and_nothing_else() -> None:
    html = render(example())
    policy = next(a["content"] for t, a in Page(html).tags if a.get("http-equiv") == "Content-Security-Policy")
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert policy == f"default-src 'none'; style-src 'sha256-{digest}'; base-uri 'none'; form-action 'none'"
    assert html.index("Content-Security-Policy") < html.index("<style>")


def test_contents_samples_and_intervals_are_all_there() -> None:
    html = render(example())
    page = Page(html)
    assert sum(a.get("class") == "sample" for _, a in page.tags) == 8
    assert "2 more prompts" in page.words
    assert "90.0%" in page.words and "80.0 \u2013 95.0" in page.words
    assert "(an empty answer)" in page.words
    links = [a["href"][1:] for t, a in page.tags if t == "a"]
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert links == ids and len(ids) == 3


def test_warnings_stand_before_everything_but_the_title() -> None:
    report = Report(
        "the title", "the summary", [Section("a")], [Highlight("the best", "1")], warnings=["beware", "of it"]
    )
    places = [render(report).index(f">{text}<") for text in ("beware", "of it", "the summary", "the best")]
    assert places == sorted(places)


def test_every_cell_has_its_columns_name_for_screens_that_show_rows_as_cards() -> None:
    html = render(
        Report("t", "", [Section("s", tables=[Table(["policy", "KL, <nats>", "b"], [["x", 1, 2], ["y", 3, 4]])])])
    )
    cells = [a for t, a in Page(html).tags if t == "td"]
    assert [a["data-label"] for a in cells] == ["KL, <nats>", "b"] * 2
    # A row that is no longer a table's row to the browser keeps its meaning.
    roles = [a.get("role") for t, a in Page(html).tags if t in ("table", "tr", "th", "td")]
    assert roles.count("row") == 3 and roles.count("columnheader") == 3 and None not in roles
    assert "attr(data-label)" in re.search(r"<style>(.*?)</style>", html, re.S).group(1)


def test_every_class_in_the_page_is_styled() -> None:
    html = render(example())
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    used = {name for _, a in Page(html).tags for name in (a.get("class") or "").split()}
    assert not {name for name in used if f".{name}" not in style}


def test_write_report_replaces_whole_files(tmp_path: Path) -> None:
    path = write_report(example(HOSTILE), tmp_path / "new" / "report.html")
    write_report(example(), path)
    assert path.read_text(encoding="utf-8") == render(example())
    assert [p.name for p in path.parent.iterdir()] == ["report.html"]


def test_row_of_the_wrong_width_is_refused() -> None:
    with pytest.raises(ValueError, match="2 columns and a row of 1"):
        Table(["a", "b"], [["only"]], "t")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "\u2013"),
        (float("nan"), "\u2013"),
        (1234567, "1,234,567"),
        (-0.614, "\u22120.61"),
        (12.345, "12.35"),
        (123.45, "123.5"),
        (0.0012, "1.2e\u221203"),
        (float("inf"), "\u221e"),
        (0.0, "0.00"),
    ],
)
def test_numbers_as_tables_show_them(value: float | int | None, shown: str) -> None:
    assert number(value) == shown


@pytest.mark.parametrize(("total", "shown"), [(1, [0]), (3, [0, 1, 2]), (10, [0, 3, 6, 9]), (4, [0, 1, 2, 3])])
def test_samples_are_spread_over_all_prompts_also_where_there_are_few(total: int, shown: list[int]) -> None:
    prompts = [f"prompt {row}" for row in range(total)]
    answers = Answers(prompts, torch.ones(total), torch.zeros(total, dtype=torch.bool), torch.zeros(total), {})
    found = samples(Comparison(prompts, {"sft": answers}, "sft", (), Settings()), count=4)
    assert [sample.prompt for sample in found] == [f"prompt {row}" for row in shown]
