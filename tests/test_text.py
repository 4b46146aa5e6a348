"""Long work says how far it is; names that are nearly right."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlhf_lightning import text


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
