"""What a run leaves and shows: metrics.jsonl, samples.jsonl, tables, the exported model."""

from __future__ import annotations

import html
import json
import time
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from small_data import SmallData, train
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_lightning.callbacks.checkpoint_files import latest
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.model_export import ModelExport
from rlhf_lightning.callbacks.run_files import append_line, rewind_lines
from rlhf_lightning.callbacks.samples import SampleTable, escaped, markdown_table
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.text import printable
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.sampler import SamplingOptions

BATCHES = [[0, 1], [2, 3], [4, 5], [6, 7], [8, 9]]


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def fit(run: Path, module: RLHFModule, *callbacks: Callback, **options: object) -> Trainer:
    loggers = [TensorBoardLogger(save_dir=str(run.parent), name=run.name, version=""), JsonlLogger(run)]
    data = SmallData(module.model_folder, BATCHES, held_out=True)
    checkpoint = RunCheckpoint(every_n_batches=2, keep=9)
    options = {"logger": loggers, "enable_checkpointing": True, "val_check_interval": 2, **options}
    train(module, data, callbacks=[checkpoint, *callbacks], **options)
    return module.trainer


def test_a_run_leaves_metrics_samples_and_a_model(tiny_policy_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "first"
    fit(
        run,
        SFTModule(str(tiny_policy_dir), sampling=SamplingOptions(max_new_tokens=4)),
        SampleTable(rows=3),
        ModelExport(),
    )
    metrics = lines(run / "metrics.jsonl")
    trained = [row for row in metrics if "train/loss" in row]
    assert [row["step"] for row in trained] == [0, 1, 2, 3, 4]
    wanted = {"train/loss", "train/grad_norm", "train/learning_rate", "train/tokens_per_second", "time", "epoch"}
    assert wanted <= trained[0].keys()
    assert [row["step"] for row in metrics if "val/perplexity" in row] == [1, 3]
    samples = lines(run / "samples.jsonl")
    assert [row["step"] for row in samples] == [1] * 3 + [3] * 3
    assert {"prompt", "response", "tokens", "truncated", "row", "stage"} <= samples[0].keys()
    assert max(row["tokens"] for row in samples) <= 4
    AutoModelForCausalLM.from_pretrained(run / "model")
    card = ModelCard.load(run / "model" / "README.md")
    (stage,) = card.data.to_dict()["rlhf_lightning"]
    last = [row["val/perplexity"] for row in metrics if "val/perplexity" in row][-1]
    assert stage["metrics"]["val/perplexity"] == pytest.approx(last)
    assert stage["steps"] == 5 and "`train/loss`" in card.text
    events = EventAccumulator(str(run)).Reload()
    assert "train/loss" in events.Tags()["scalars"]
    assert "samples/val/text_summary" in events.Tags()["tensors"]


def test_a_reward_models_run_leaves_a_reward_model(tiny_policy_dir: Path, tmp_path: Path) -> None:
    run = tmp_path / "reward"
    fit(run, RewardModelModule(str(tiny_policy_dir)), SampleTable(), ModelExport())
    model = AutoModelForSequenceClassification.from_pretrained(run / "model")
    assert model.config.num_labels == 1
    assert model.config.reward_mean != 0.0
    row = next(row for row in lines(run / "metrics.jsonl") if "val/accuracy" in row)
    assert {"val/accuracy_length_balanced", "val/calibration_error", "val/margin", "val/longer_wins"} <= row.keys()
    assert not (run / "samples.jsonl").exists()


def test_a_resumed_run_writes_every_line_once(tiny_policy_dir: Path, tmp_path: Path) -> None:
    class Crash(Callback):
        def on_train_batch_start(self, trainer: Trainer, *args: object) -> None:
            if trainer.global_step == 3:
                raise RuntimeError

    def numbers(path: Path) -> list[dict]:
        return [{k: v for k, v in row.items() if k not in ("time", "train/tokens_per_second")} for row in lines(path)]

    def module() -> SFTModule:
        return SFTModule(
            str(tiny_policy_dir), sampling=SamplingOptions(max_new_tokens=4), optimizer=AdamWOptions(learning_rate=0.01)
        )

    fit(tmp_path / "straight", module(), SampleTable(rows=2))
    run = tmp_path / "broken"
    with pytest.raises(RuntimeError):
        fit(run, module(), SampleTable(rows=2), Crash())
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "train/lo')  # killed in the middle of a line
    assert latest(run / "checkpoints").name == "batch-00000002.ckpt"
    time.sleep(1.0)  # TensorBoard reads event files in the order of their names, which begin with the second
    loggers = [TensorBoardLogger(save_dir=str(tmp_path), name="broken", version=""), JsonlLogger(run)]
    data = SmallData(tiny_policy_dir, BATCHES, held_out=True)
    train(
        module(),
        data,
        ckpt_path=str(latest(run / "checkpoints")),
        callbacks=[RunCheckpoint(every_n_batches=2, keep=9), SampleTable(rows=2)],
        logger=loggers,
        enable_checkpointing=True,
        val_check_interval=2,
    )
    assert numbers(run / "metrics.jsonl") == numbers(tmp_path / "straight" / "metrics.jsonl")
    assert lines(run / "samples.jsonl") == lines(tmp_path / "straight" / "samples.jsonl")
    events = EventAccumulator(str(run)).Reload()
    assert len(list(run.glob("events.out.tfevents.*"))) == 2
    assert [event.step for event in events.Scalars("train/loss")] == [0, 1, 2, 3, 4]
    assert [event.step for event in events.Scalars("val/perplexity")] == [1, 3]


def test_rewinding_keeps_lines_with_unusual_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    for step in range(3):
        append_line(path, {"step": step, "response": "one\u2028two\u0085three"})
    rewind_lines(path, 2)
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").split("\n")[:-1]] == [0, 1]


def test_metrics_that_json_has_no_number_for_become_null(tmp_path: Path) -> None:
    logger = JsonlLogger(tmp_path / "run")
    logger.log_metrics({"a": float("nan"), "b": float("inf"), "c": 1.5}, step=3)
    (row,) = lines(tmp_path / "run" / "metrics.jsonl")
    assert (row["a"], row["b"], row["c"], row["step"]) == (None, None, 1.5, 3)


def test_model_text_cannot_do_anything() -> None:
    assert printable("a\x1b[31mb\x07\u202ec\nd") == "a[31mbc\nd"
    cell = escaped("<img src=x onerror=alert(1)>|**bold**\n# title `code`")
    assert not set("<>|*#`") & set(cell.replace("&#", "").replace("<br>", ""))
    assert html.unescape(cell.replace("<br>", "\n")) == "<img src=x onerror=alert(1)>|**bold**\n# title `code`"
    table = markdown_table([{"prompt": "a|b", "tokens": 3}])
    assert table.splitlines() == ["| prompt | tokens |", "| --- | --- |", "| a&#124;b | 3 |"]
