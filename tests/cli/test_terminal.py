"""What other libraries say is kept from the terminal, what this one says is not."""

from __future__ import annotations

import io
import logging
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.utilities.rank_zero import rank_zero_info

from rlhf_lightning.batches import View
from rlhf_lightning.cli.training import _quiet
from rlhf_lightning.data import datamodule
from rlhf_lightning.rewards import ModelReward


@pytest.fixture
def lightnings(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What comes out of the handler that Lightning gives its logger; pytest's own handlers keep it from doing so."""
    logger, stream = logging.getLogger("lightning.pytorch"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [logging.StreamHandler(stream)])
    monkeypatch.setattr(logger, "level", logging.INFO)
    _quiet()
    return stream


def test_notes_of_ours_reach_the_terminal(lightnings: io.StringIO) -> None:
    rank_zero_info("GPU available: False")
    ModelReward("some/folder")._tell_once("it reads conversations its own way")
    logging.getLogger("lightning.pytorch").warning("of weight")
    assert lightnings.getvalue() == "reward some/folder: it reads conversations its own way\nof weight\n"


def test_what_preflight_says_is_not_said_twice(
    lightnings: io.StringIO, tiny_tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "the cat", "chosen": "likes fish", "rejected": "likes"}\n' * 3)
    data = datamodule.PreferenceDataModule(str(tmp_path / "pairs.jsonl"), validation_fraction=0)
    logger, everything = logging.getLogger("lightning.pytorch"), io.StringIO()
    monkeypatch.setattr(logger, "handlers", [*logger.handlers, logging.StreamHandler(everything)])
    data.prepare(View("pairs"), tiny_tokenizer)
    assert "data: 3 pairs" in everything.getvalue() and lightnings.getvalue() == ""
