"""What writes for people may fail; the training goes on, and says what was lost."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from small_data import SmallData, train

from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.run_files import append_line, rewind_lines
from rlhf_lightning.callbacks.samples import SampleTable, prompts_of
from rlhf_lightning.callbacks.sinks import Sink, SinkGuard
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.text import say
from rlhf_lightning.training.sampler import SamplingOptions


class Broken(Logger):
    """As a service that is down: every call fails."""

    name, version = "broken", ""

    def __init__(self) -> None:
        super().__init__()
        self.asked = 0

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        self.asked += 1
        raise ConnectionError("nobody\nanswers")

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        raise ConnectionError("nobody answers")

    def save(self) -> None:
        raise ConnectionError("nobody answers")

    def finalize(self, status: str) -> None:
        raise ConnectionError("nobody answers")


def fit(folder: Path, model: Path, *loggers: Logger) -> SFTModule:
    module = SFTModule(str(model), sampling=SamplingOptions(max_new_tokens=4))
    data = SmallData(model, [[0, 1], [2, 3], [4, 5]], held_out=True)
    loggers = (TensorBoardLogger(str(folder), name="", version=""), JsonlLogger(folder), *loggers)
    train(module, data, logger=list(loggers), callbacks=[SinkGuard(), SampleTable(rows=1)])
    return module


def test_a_training_outlives_its_sinks(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(path: Path, row: dict[str, Any]) -> None:
        raise OSError(28, "No space left on device")

    def failing(*args: Any, **kwargs: Any) -> None:
        raise ValueError("The histogram is empty")

    monkeypatch.setattr("rlhf_lightning.callbacks.metrics.append_line", full)
    monkeypatch.setattr("rlhf_lightning.callbacks.samples.append_line", full)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_text", failing)
    monkeypatch.setattr("torch.utils.tensorboard.SummaryWriter.add_scalar", failing)
    module = fit(tmp_path / "run", tiny_policy_dir, Broken())
    assert module.trainer.global_step == 3
    said = capsys.readouterr().err.splitlines()
    for name in ("run/metrics.jsonl", "samples.jsonl", "TensorBoard's samples", "TensorBoardLogger", "Broken"):
        first, last = (line for line in said if line.split(":")[1].split(" cannot")[0].endswith(name))
        assert "; the training goes on" in first and "writes failed" in last
    assert any("numbers of this run are being LOST" in line and "No space left" in line for line in said)
    assert any("4 writes failed and are LOST" in line for line in said)  # 3 steps and 1 validation
    assert "ConnectionError: nobody answers" in "\n".join(said)


def test_another_loggers_failures_are_not_waited_for_without_end() -> None:
    sink, own = Sink("theirs"), Sink("ours", needed=True)
    for _ in range(19):
        for each in (sink, own):
            with each:
                raise ValueError
    assert not sink.given_up
    with sink:
        pass  # it works again
    with sink:
        raise ValueError
    assert not sink.given_up
    for _ in range(19):
        for each in (sink, own):
            with each:
                raise ValueError
    assert sink.given_up and not own.given_up
    with pytest.raises(KeyboardInterrupt), sink:
        raise KeyboardInterrupt


def test_scores_that_are_no_numbers_have_no_histogram(
    tiny_policy_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = fit(tmp_path / "run", tiny_policy_dir)
    table = SampleTable(rows=2)
    table.setup(module.trainer, module, "fit")
    batch = next(iter(module.trainer.datamodule.val_dataloader()))
    rollout = module.generate(prompts_of(batch, 2, module.tokenizer))
    for scores in (torch.tensor([torch.nan, torch.nan]), torch.tensor([torch.inf, 1.0])):
        table.write(module.trainer, rollout, {"score": scores}, "val")
    assert (table._file.failed, table._events.failed) == (0, 0)
    assert capsys.readouterr().err == ""


def test_a_line_is_written_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    append_line(path, {"step": 0})

    class Full(io.FileIO):
        def write(self, data: Any) -> int:
            return super().write(bytes(data)[:7])

    with monkeypatch.context() as patched:
        patched.setattr(Path, "open", lambda self, *args, **kwargs: Full(self, "ab"))
        with pytest.raises(OSError, match="No space left"):
            append_line(path, {"step": 1})
    append_line(path, {"step": 2, "text": "\ud800"})
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [0, 2]


def test_a_line_torn_within_a_character_is_no_obstacle(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    append_line(path, {"step": 0, "response": "é"})
    with path.open("ab") as file:
        file.write('{"step": 1, "response": "é'.encode()[:-1])
    rewind_lines(path, 5)
    assert path.read_text(encoding="utf-8") == '{"step": 0, "response": "é"}\n'


def test_a_stream_that_nobody_reads_ends_nothing() -> None:
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    assert say("é", stream)
    assert stream.buffer.getvalue() == b"\\xe9\n"
    stream.close()
    assert not say("line", stream)
