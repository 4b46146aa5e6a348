"""What can be said of the pages without a browser: they are whole, ask no other host, and take no text for HTML."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).parents[2] / "rlhf_lightning" / "preferences" / "page"
FILES = {path.name: path.read_text(encoding="utf-8") for path in sorted(PAGE.iterdir())}
TASKS = ("pairs", "ranking", "rating")


def test_no_page_asks_another_host() -> None:
    assert len(FILES) == 10
    for name, text in FILES.items():
        assert not re.search(r"https?://|//[a-z]+\.", text), name


def test_what_is_referred_to_exists() -> None:
    for name, text in FILES.items():
        for other in re.findall(r'"/page/([\w.]+)"|from "\./([\w.]+)"', text):
            assert set(other) & set(FILES), (name, other)


def test_no_text_is_taken_for_html() -> None:
    """The one place is the guidelines, in which the server has escaped all HTML."""
    found = [
        (name, line.strip())
        for name, text in FILES.items()
        for line in text.splitlines()
        if re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", line)
    ]
    assert [name for name, _ in found] == ["judge.js"]
    assert found[0][1].startswith('by("guidelines").innerHTML = study.guidelines')


def test_the_policy_of_content_allows_the_pages() -> None:
    """Inline scripts, styles and handlers would be refused by the browser."""
    for name in ("judge.html", "lead.html"):
        assert not re.search(r"<style|style=|\son\w+=|<script(?![^>]*src=)", FILES[name]), name


@pytest.mark.parametrize("task", TASKS)
def test_the_keys_that_are_listed_are_there(task: str) -> None:
    source = FILES[f"{task}.js"]
    listed = re.search(r"KEYS = \{(.*?)\};", source, re.DOTALL)
    assert listed is not None
    keys = [first or second for first, second in re.findall(r'^\s*(?:"([^"]+)"|(\w+)):', listed[1], re.MULTILINE)]
    others = [
        (first or second)
        for first, second in re.findall(
            r'"([^"]+)":|\b(\w+):', FILES["judge.js"].split("OTHER_KEYS = {")[1].split("}")[0]
        )
    ]
    handled = source + FILES["judge.js"] + FILES["item.js"] + FILES["judge.html"]
    single = [re.escape(key) for key in [*keys, *others] if len(key) == 1]
    assert len(others) == 7
    for key in single:
        assert re.search(rf'data-key="{key}"|"data-key": "{key}"|"{key}"[,)]|=== "{key}"', handled), key


def test_names_of_the_buttons() -> None:
    """People who use a screen reader, and scripts, find the buttons by these names."""
    for name in ("Skip", "Flag", "Comment", "Undo", "Guidelines"):
        assert re.search(rf'>{name} <kbd aria-hidden="true">', FILES["judge.html"]), name
    choices = re.search(r"CHOICES = \[(.*?)\];", FILES["pairs.js"], re.DOTALL)
    assert choices is not None
    assert re.findall(r'\["([^"]+)",', choices[1]) == ["A", "B", "Tie", "Both bad"]


def test_no_page_uses_what_browsers_keep_from_plain_http() -> None:
    """With ``--host``, people come from other machines without https, and browsers then lack these."""
    kept = r"randomUUID|crypto\.subtle|navigator\.(clipboard|serviceWorker|locks|storage|wakeLock)|\bcaches\."
    for name, text in FILES.items():
        code = re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)
        assert not re.search(kept, code), name


def test_arrows_in_a_radio_group_judge_nothing() -> None:
    """Beside a pair stand the criteria's radio buttons, in which an arrow key chooses the next one."""
    body = FILES["judge.js"].split("function pressed(event) {")[1].split("\n}\n")[0]
    used = [line.strip() for line in body.splitlines() if "arrows" in line]
    assert used[0].startswith('const arrows = event.target.closest("input[type=radio]") ? {} : view?.arrows;')
    assert not any("view?.arrows" in line for line in used[1:])
