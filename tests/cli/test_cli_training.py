"""fit, validate, test and predict from the command line: what they leave, resume, and exit with."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from cli_runs import error_of, metrics
from transformers import AutoModelForCausalLM

from rlhf_lightning.cli import main
from rlhf_lightning.data.datamodule import PreferenceDataModule

ROOT = Path(__file__).resolve().parents[2]


def test_a_fit_leaves_a_run_folder_and_says_where(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft]) == 0
    said = capsys.readouterr().out
    for expected in (
        "run       runs/sft: SFTModule, 1 x 3 batches of 4",
        "eos '<eos>' (1), pad '<pad>' (0)",
        "11 demonstrations to train on, 1 held out",
        "| 'a big fish<eos>' (4 tokens right of the bar carry the loss)",
        "model     runs/sft/model",
        "fit --config reward_model.yaml --model.model runs/sft/model",
    ):
        assert expected.replace(" ", "") in said.replace(" ", "")
    names = {path.name for path in Path("runs/sft").iterdir()}
    events = {name for name in names if name.startswith("events.out.tfevents.")}
    assert names - events == {"config.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "model"}
    assert len(events) == 1
    assert AutoModelForCausalLM.from_pretrained("runs/sft/model").config.vocab_size == 64
    assert any("val/perplexity" in line for line in metrics("sft"))


def test_a_second_run_takes_a_name_of_its_own(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft]) == 0
    before = {path: path.read_bytes() for path in Path("runs/sft").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert main(["fit", *sft]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "run       runs/sft holds a run already: this one is runs/sft-2"
    assert said[0] in said[-4:] and "model     runs/sft-2/model" in said[-3]
    assert {path: path.read_bytes() for path in Path("runs/sft").rglob("*") if path.is_file()} == before
    assert main(["fit", *sft, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert "run       runs/sft-2 goes on from batch-00000003.ckpt" in capsys.readouterr().out
    assert (len(metrics("sft")), len(metrics("sft-2"))) == (4, 8)
    assert main(["fit", *sft, "--run", "sft"]) == 2
    assert "runs/sft holds a run already" in error_of(capsys)


def test_the_saved_config_repeats_the_run(sft: list[str]) -> None:
    assert main(["fit", *sft, "--model.optimizer.learning_rate", "0.01", "--seed_everything", "3"]) == 0
    saved = yaml.safe_load(Path("runs/sft/config.yaml").read_text(encoding="utf-8"))
    assert saved["run"] is None
    assert (saved["seed_everything"], saved["data"]["init_args"]["seed"], saved["model"]["init_args"]["seed"]) == (
        3,
        3,
        3,
    )
    assert saved["model"]["init_args"]["optimizer"]["learning_rate"] == 0.01
    assert main(["fit", "--config", "runs/sft/config.yaml", "--run", "again"]) == 0
    one, two = (AutoModelForCausalLM.from_pretrained(f"runs/{run}/model").state_dict() for run in ("sft", "again"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert main(["fit", "--config", "runs/sft/config.yaml", "--run", "other", "--seed_everything", "4"]) == 0
    other = AutoModelForCausalLM.from_pretrained("runs/other/model").state_dict()
    assert not all(torch.equal(one[name], other[name]) for name in one)


def test_print_config_can_be_run(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft, "--print_config"]) == 0
    Path("printed.yaml").write_text(capsys.readouterr().out, encoding="utf-8")
    assert main(["fit", "--config", "printed.yaml"]) == 0
    assert Path("runs/sft/model").is_dir()


def test_later_configs_and_options_win(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("mine.yaml").write_text(
        "model:\n  init_args:\n    optimizer:\n      learning_rate: 0.5\n      weight_decay: 0.25\n", encoding="utf-8"
    )
    assert (
        main(["fit", *sft, "--config", "mine.yaml", "--model.optimizer.weight_decay", "0.125", "--print_config"]) == 0
    )
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]["optimizer"]
    assert (printed["learning_rate"], printed["weight_decay"]) == (0.5, 0.125)
    assert printed["schedule"] == "cosine"


def test_last_resumes_and_the_configured_values_win(sft: list[str]) -> None:
    assert main(["fit", *sft]) == 0
    options = [
        "--trainer.max_epochs",
        "2",
        "--model.optimizer.learning_rate",
        "0.003",
        "--model.optimizer.schedule",
        "constant",
    ]
    assert main(["fit", *sft, "--ckpt_path", "last", *options]) == 0
    rates = {line["step"]: line["train/learning_rate"] for line in metrics("sft") if "train/learning_rate" in line}
    assert sorted(rates) == [0, 1, 2, 3, 4, 5]
    assert rates[0] == pytest.approx(2e-5)
    assert [rates[step] for step in (3, 4, 5)] == pytest.approx([0.003] * 3)


def test_without_loggers_everything_still_lies_in_the_run_folder(sft: list[str]) -> None:
    assert main(["fit", *sft, "--trainer.logger", "false"]) == 0
    assert {path.name for path in Path().iterdir()} == {"pairs.jsonl", "runs"}
    assert {path.name for path in Path("runs/sft").iterdir()} == {
        "config.yaml",
        "samples.jsonl",
        "checkpoints",
        "model",
    }


def test_another_runs_checkpoint_does_not_open_a_run_to_overwriting(
    sft: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *sft, "--run", "other"]) == 0
    assert main(["fit", *sft]) == 0
    before = Path("runs/sft/metrics.jsonl").read_bytes()
    capsys.readouterr()
    (checkpoint,) = Path("runs/other/checkpoints").glob("*.ckpt")
    longer = ["--ckpt_path", str(checkpoint), "--trainer.max_epochs", "2"]
    assert main(["fit", *sft, *longer]) == 0
    assert Path("runs/sft-2/model").is_dir()
    assert Path("runs/sft/metrics.jsonl").read_bytes() == before
    assert main(["fit", *sft, *longer, "--run", "third"]) == 0
    assert main(["fit", *sft, *longer, "--run", "other"]) == 0


def test_checkpoints_hold_no_class_and_load_with_weights_only(sft: list[str]) -> None:
    assert main(["fit", *sft]) == 0
    (path,) = Path("runs/sft/checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    options = checkpoint["hyper_parameters"]
    assert "_class_path" not in options and "_instantiator" not in options
    assert json.loads(json.dumps(options)) == options  # plain data
    assert type(options["optimizer"]["learning_rate"]) is float
    assert type(checkpoint["optimizer_states"][0]["param_groups"][0]["weight_decay"]) is float


def test_a_class_that_a_checkpoint_names_is_not_imported(sft: list[str], folder: Path, monkeypatch: Any) -> None:
    assert main(["fit", *sft]) == 0
    (path,) = Path("runs/sft/checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] = {"_class_path": "trap.Trap", "learning_rate": 123.0}
    torch.save(checkpoint, path)
    path.with_name(f"{path.name}.manifest.json").unlink()  # its hash is another now
    Path("trap.py").write_text("raise SystemExit('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    assert main(["fit", *sft, "--ckpt_path", "last", "--trainer.max_epochs", "2"]) == 0
    assert "trap" not in sys.modules


def test_validate_and_test(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", *sft, "--run", "looked"]) == 0
    assert "val/perplexity" in capsys.readouterr().out
    assert main(["test", *sft, "--run", "looked"]) == 0
    assert "test/perplexity" in capsys.readouterr().out
    assert not Path("runs/looked/config.yaml").exists()
    assert len(metrics("looked")) == 2
    # The metrics of a training are its own.
    assert main(["fit", *sft]) == 0
    before = metrics("sft")
    capsys.readouterr()
    assert main(["validate", *sft, "--ckpt_path", "last"]) == 0
    said = capsys.readouterr().out
    assert "run       the metrics are written to runs/sft/validate" in said
    assert "data      1 demonstrations held out" in said
    assert metrics("sft") == before
    assert "val/perplexity" in metrics("sft/validate")[-1]


def test_a_checkpoint_is_measured_on_the_day_of_its_run(sft: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    days: list[tuple[str, str]] = []
    plain = PreferenceDataModule.prepare

    def noting(self: PreferenceDataModule, *arguments: Any, **options: Any) -> PreferenceDataModule:
        prepared = plain(self, *arguments, **options)
        assert prepared.template is not None
        days.append((prepared.date, prepared.template.render([{"role": "user", "content": "a"}])))
        return prepared

    monkeypatch.setattr(PreferenceDataModule, "prepare", noting)
    dated = "{{ strftime_now('%d %m %Y') }}{% for m in messages %}{{ m.content + eos_token }}{% endfor %}"
    Path("dated.jinja").write_text(dated, encoding="utf-8")
    chat = [*sft, "--data.chat", "true", "--data.chat_template", "dated.jinja"]
    assert main(["fit", *chat, "--data.date", "2001-02-03"]) == 0
    (checkpoint,) = Path("runs/sft/checkpoints").glob("*.ckpt")
    for command, option in (("validate", []), ("test", []), ("predict", ["--output", "a.jsonl"])):
        days.clear()
        assert main([command, *chat, "--ckpt_path", str(checkpoint), *option]) == 0
        assert days[-1] == ("2001-02-03", "03 02 2001a<eos>")
    assert main(["validate", *chat, "--ckpt_path", str(checkpoint), "--data.date", "2004-05-06"]) == 0
    assert days[-1][0] == "2004-05-06"


def test_a_fast_dev_run_leaves_nothing(sft: list[str]) -> None:
    assert main(["fit", *sft, "--trainer.fast_dev_run", "true"]) == 0
    assert not Path("runs").exists()


def test_predict_answers_every_prompt_in_order(sft: list[str]) -> None:
    assert main(["predict", *sft, "--output", "answers/a.jsonl"]) == 0
    rows = [json.loads(line) for line in Path("answers/a.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["row"] for row in rows] == list(range(12))
    prompts = [json.loads(line)["prompt"] for line in Path("pairs.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in rows] == prompts
    assert all(0 < row["tokens"] <= 4 for row in rows)


# As a process of its own


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "rlhf_lightning", *arguments]


ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_two_processes_predict_what_one_does(sft: list[str]) -> None:
    assert main(["predict", *sft, "--output", "one.jsonl"]) == 0
    two = command("predict", *sft, "--output", "two.jsonl", "--trainer.strategy", "ddp", "--trainer.devices", "2")
    done = subprocess.run(two, env=ENVIRONMENT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert Path("two.jsonl").read_bytes() == Path("one.jsonl").read_bytes()


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_saves_and_gives_its_exit_code(sft: list[str], number: int, code: int) -> None:
    options = ["--trainer.max_epochs", "100000", "--checkpoint.every_n_batches", "1000000"]
    process = subprocess.Popen(command("fit", *sft, *options), env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        log = Path("runs/sft/metrics.jsonl")
        deadline = time.monotonic() + 120
        while not log.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.1)
        process.send_signal(number)
        assert process.wait(timeout=60) == code
    finally:
        process.kill()
    (saved,) = Path("runs/sft/checkpoints").glob("batch-*.ckpt")
    assert main(["validate", *sft, "--ckpt_path", str(saved), "--run", "check"]) == 0
