"""Long work says how far it is; names that are nearly right."""

from __future__ import annotations

import warnings
from types import SimpleNamespace

import pytest

from rlhf_lightning import text
from rlhf_lightning.cli import main


def test_long_work_says_how_far_it_is_on_the_first_process_alone(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 4))
    monkeypatch.setattr(text, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    assert list(text.counted("abcdefgh", "rows", every=10.0)) == list("abcdefgh")
    assert capsys.readouterr().out == "rows: 2 of 8\nrows: 5 of 8\n"
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert list(text.counted("abcdefgh", "rows", every=10.0)) == list("abcdefgh")
    assert capsys.readouterr().out == ""


def test_the_nearest_name_is_alike_enough() -> None:
    assert text.nearest("promt", ["chosen", "prompt", "prom"]) == "prompt"
    assert text.nearest("promt", ["chosen", "prompt"], cutoff=0.95) is None


def test_a_warning_of_ours_is_without_the_line_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back when the test ends
    text.plain_warnings()
    said = [warnings.formatwarning(Warning("look"), UserWarning, file, 7) for file in (text.__file__, "/else/where.py")]
    assert said == ["warning   look\n", "/else/where.py:7: look\n"]


def test_warnings_of_fit_and_evaluate_are_such(monkeypatch: pytest.MonkeyPatch) -> None:
    """After Lightning is imported, which sets the same hook."""
    for command in ("fit --config ppo.yaml --data.path no.jsonl", "evaluate --policies no --prompts no.jsonl"):
        monkeypatch.setattr(warnings, "formatwarning", None)
        main(command.split())
        assert warnings.formatwarning is text._plain_warning
