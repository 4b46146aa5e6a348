"""The annotate command before it serves: the order of items, guidelines, options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from studies import candidates, item, write
from tiny_models import make_config
from transformers import LlamaForSequenceClassification

from rlhf_lightning.cli.commands import main
from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.annotate import _ordered
from rlhf_lightning.preferences.guidelines import read_guidelines
from rlhf_lightning.preferences.items import read_candidates
from rlhf_lightning.preferences.tasks import Pairs
from rlhf_lightning.preferences.uncertainty import disagreement, reward_scores


def test_a_random_order_shows_each_row_once_before_any_twice(tmp_path: Path) -> None:
    found = read_candidates(str(candidates(tmp_path / "c.jsonl", 20, 3)), Pairs()).items
    parts = [("gold", item("g")), *(("real", one) for one in found)]
    ordered = _ordered(parts, "random", [], "00" * 32)
    assert ordered[0] == parts[0]
    rows = [one.row for part, one in ordered if part == "real"]
    assert sorted(rows[:20]) == sorted(rows[20:40]) == sorted({one.row for one in found})
    assert rows[:20] != rows[20:40]
    assert rows[:20] != [f"r{n}" for n in range(20)]
    assert ordered == _ordered(parts, "random", [], "00" * 32)
    assert ordered != _ordered(parts, "random", [], "01" * 32)
    assert _ordered(parts, "file", [], "00" * 32) == parts


def test_an_uncertain_order_begins_with_what_two_models_disagree_about(
    tmp_path: Path, tiny_reward_dir: Path, kept_tokenizer
) -> None:
    torch.manual_seed(9)
    LlamaForSequenceClassification(make_config(num_labels=1)).save_pretrained(tmp_path / "other")
    kept_tokenizer.save_pretrained(tmp_path / "other")
    rows = [
        {"prompt": "the cat", "completions": [first, second]}
        for first, second in (("the", "mat"), ("dog dog", "cat the mat"), ("mat", "dog"), ("the the the", "cat"))
    ]
    found = read_candidates(str(write(tmp_path / "c.jsonl", rows)), Pairs()).items
    folders = [str(tiny_reward_dir), str(tmp_path / "other")]
    ordered = _ordered([("real", one) for one in found], "uncertain", folders, "00" * 32)
    uncertain = disagreement(torch.stack([reward_scores(found, folder) for folder in folders])).tolist()
    by_id = {one.id: value for one, value in zip(found, uncertain, strict=True)}
    values = [by_id[one.id] for _, one in ordered]
    assert values == sorted(values, reverse=True)
    assert len(set(values)) == 4


def test_guidelines_are_safe_html(tmp_path: Path) -> None:
    path = tmp_path / "guide.md"
    path.write_text(
        "# Rules\n\n<script>x</script> [a](javascript:alert(1))\n\n| a |\n|---|\n| b |\n\n"
        "```example\nprompt: <i>q</i>\ngood: |\n  two\n  lines\nbad: '<b>'\nwhy: shorter\n```\n\n```\ncode\n```\n"
    )
    html = read_guidelines(str(path))
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert 'href="javascript' not in html
    assert "<td>b</td>" in html
    assert '<section class="prompt"><strong>Prompt</strong><p dir="auto">&lt;i&gt;q&lt;/i&gt;</p>' in html
    assert '<section class="bad"><strong>Bad</strong><p dir="auto">&lt;b&gt;</p>' in html
    assert "<pre><code>code" in html


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", r"guide\.md: is empty"),
        ("a\n\n```example\ngood: x\n```\n", r"guide\.md:3: the example lacks bad; give a good and a bad answer"),
        ("```example\ngood: x\nbad: y: z\n```\n", r"guide\.md:3: the example is broken"),
        ("```example\ngood: [x]\nbad: x\n```\n", r"guide\.md:1: the example: 'good' is a list or an object"),
        ("```example\ngood: x\ngood: y\nbad: z\n```\n", r"guide\.md:1: the example has 'good' twice"),
        ("```example\ngood: " + "[" * 3000 + "\n```\n", r"guide\.md:\d: the example is"),
        ("```example\ngood: x\nbed: y\n```\n", r"guide\.md:1: the example has an unknown key 'bed'"),
        ("```example\n- x\n```\n", r"guide\.md:1: the example must have lines like"),
    ],
)
def test_broken_guidelines_are_one_line_with_the_place(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "guide.md"
    path.write_text(text)
    with pytest.raises(InputError, match=expected):
        read_guidelines(str(path))


def test_guidelines_that_are_no_utf8(tmp_path: Path) -> None:
    (tmp_path / "guide.md").write_bytes(b"caf\xe9")
    with pytest.raises(InputError, match="not UTF-8"):
        read_guidelines(str(tmp_path / "guide.md"))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (("--overlap", "0"), "--overlap 0: must be 1 or more"),
        (("--overlap", "3", "--annotators", "a", "b"), "--overlap 3: there are 2 annotators"),
        (("--annotators", "a", "a"), "--annotators: 'a' stands twice"),
        (("--annotators", "a\nb"), "is no name"),
        (("--criteria", "x", "x"), "--criteria: 'x' stands twice"),
        (("--task", "ranking", "--criteria", "x"), "--criteria: a ranking has none"),
        (("--gold_share", "0.1"), "--gold_share: there are no gold items"),
        (("--calibration", "2"), "--calibration: there are no gold items"),
        (("--repeat_share", "0.9"), "--repeat_share 0.9: must be a share from 0 to 0.5"),
        (("--host", "0.0.0.0"), "--annotators: others can reach the server"),
        (("--url", "https://x.example"), "--annotators: others can reach the server"),
        (("--url", "x.example/path"), "--url x.example/path: must be like"),
        (("--host", "a..b", "--annotators", "a"), "is no name of a machine"),
        (("--port", "70000"), "--port 70000"),
        (("--order", "uncertain"), "--order uncertain and --reward DIR... belong together"),
        (("--reward", "x"), "belong together"),
        (("--order", "uncertain", "--reward", "x"), "two or more"),
        (("--gold", "none.jsonl"), "none.jsonl"),
        (("--host", "256.1.1.1", "--annotators", "a"), "cannot listen there"),
        (("--store", "c.jsonl"), "this command reads it"),
        (("--gaurd",), "--gaurd"),
    ],
)
def test_faulty_options_are_one_line_and_make_no_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], arguments: tuple, expected: str
) -> None:
    monkeypatch.chdir(tmp_path)
    candidates(tmp_path / "c.jsonl", 2)
    assert main(["annotate", "c.jsonl", "--store", "s.sqlite", *arguments]) == 2
    error = capsys.readouterr().err
    assert expected in error
    assert error.count("\n") == 1
    assert not (tmp_path / "s.sqlite").exists()
