"""Lines for the terminal: warnings of every command, without the place in the code that they come from."""

from __future__ import annotations

import warnings

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.data import datamodule


def test_a_warning_of_ours_is_without_the_line_it_comes_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(warnings, "formatwarning", warnings.formatwarning)  # put back when the test ends
    main(["--version"])
    said = [
        warnings.formatwarning(Warning("look"), UserWarning, file, 7)
        for file in (datamodule.__file__, "/else/where.py")
    ]
    assert said == ["warning   look\n", "/else/where.py:7: look\n"]
