"""Lines for the terminal: warnings of every command, without the place in the code that they come from."""

from __future__ import annotations

import importlib
import warnings

import pytest
from lightning.fabric.utilities import warnings as lightnings

from rlhf_lightning.cli import main
from rlhf_lightning.data import datamodule


def test_a_warning_of_ours_is_without_the_line_it_comes_from(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for hook in ("showwarning", "formatwarning"):
        monkeypatch.setattr(warnings, hook, getattr(warnings, hook))  # put back when the test ends
    main(["--version"])
    importlib.reload(lightnings)  # a command imports Lightning later, which takes a hook
    for file in (datamodule.__file__, "/else/where.py"):
        warnings.showwarning(Warning("look"), UserWarning, file, 7)
    assert capsys.readouterr().err == "warning   look\n/else/where.py:7: look\n"
