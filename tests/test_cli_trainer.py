"""Trainer's options as users of Lightning type them: they work, or are refused in one line."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.loggers import Logger

from rlhf_lightning.cli import main
from rlhf_lightning.cli.classes import keys_of
from rlhf_lightning.cli.configs import resolve_configs
from rlhf_lightning.cli.suggestions import _ELSEWHERE, did_you_mean
from rlhf_lightning.cli.training import TrainingCLI
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule


class ParsedOnly(TrainingCLI):
    """The command line up to the point where something would be built."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


class NoLogger(Logger):
    """Cannot be built, as a logger whose package is missing."""

    name = version = None

    def __init__(self) -> None:
        raise ModuleNotFoundError("Requirement 'nowhere>=1' not met")

    def log_metrics(self, *args: Any, **kwargs: Any) -> None: ...

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None: ...


class NoCallback(Callback):
    """Cannot be built."""

    def __init__(self) -> None:
        raise RuntimeError("no server\nanswers")


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty folder in which no stage has been run, and none is asked for."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_lightning.cli.training.check_inputs", lambda options: None)


@pytest.fixture
def sft(tmp_path: Path, tiny_policy_dir: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Options of a small SFT run: 2 batches, and 2 of 10 prompts held out."""
    monkeypatch.chdir(tmp_path)
    prompts = [f"the {colour} {animal}" for colour in ("red", "blue") for animal in ("cat", "dog", "bird", "fish")]
    prompts += ["the boat", "the big boat"]
    rows = [{"prompt": prompt, "completion": "a big fish"} for prompt in prompts]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    options = f"--config sft.yaml --model.model {tiny_policy_dir} --data.path rows.jsonl --data.batch_size 4"
    options += " --data.validation_fraction 0.2 --model.sampling.max_new_tokens 4 --trainer.accelerator cpu --run one"
    return ["fit", *shlex.split(options)]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    return lines[0]


def left() -> set[str]:
    names = {path.name for path in Path("runs/one").iterdir()} if Path("runs/one").is_dir() else set()
    return {"events" if name.startswith("events.out") else name for name in names}


EVERYTHING = {"checkpoints", "config.yaml", "events", "metrics.jsonl", "model", "samples.jsonl"}


@pytest.mark.parametrize(
    ("options", "missing"),
    [
        ("--trainer.enable_progress_bar false", set()),
        ("--trainer.enable_checkpointing false", {"checkpoints"}),
        ("--trainer.callbacks+=TQDMProgressBar", set()),
        ("--trainer.barebones true", {"checkpoints", "events", "metrics.jsonl"}),
        ("--trainer.fast_dev_run true", EVERYTHING),
    ],
)
def test_flags_that_leave_something_out(sft: list[str], options: str, missing: set[str]) -> None:
    assert main([*sft, *shlex.split(options)]) == 0
    assert left() == EVERYTHING - missing


def test_without_a_progress_bar_no_progress_is_printed(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    for option in ("true", "false"):
        assert main([*sft, "--run", option, "--trainer.enable_progress_bar", option]) == 0
        assert ("train 2/2" in capsys.readouterr().out) == (option == "true")


def test_fsdp_is_fsdp2_in_the_runs_config(elsewhere: None, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("fsdp", "lightning.pytorch.strategies.FSDPStrategy"):
        line = f"fit --config ppo.yaml --data.path x --trainer.strategy {name}"
        assert ParsedOnly(*resolve_configs(shlex.split(line))).options.trainer.strategy == "fsdp2"
        assert f"trainer.strategy: {name} is run as fsdp2" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("config", "options", "said"),
    [
        (
            "ppo.yaml",
            "--trainer.gradient_clip_val 1",
            "trainer.gradient_clip_val: PPOModule .* set model.update.max_grad_norm",
        ),
        ("grpo.yaml", "--trainer.gradient_clip_algorithm norm", "set model.update.max_grad_norm"),
        (
            "rloo.yaml",
            "--trainer.accumulate_grad_batches 2",
            "accumulate_grad_batches: .* set model.update.micro_batch_tokens",
        ),
        ("dpo.yaml", "--trainer.gradient_clip_algorithm value --trainer.gradient_clip_val null", "clips nothing"),
        ("ppo.yaml", "--trainer.strategy fsdp_cpu_offload", "fsdp_cpu_offload is not supported: .*; use fsdp2 with"),
        ("ppo.yaml", "--trainer.strategy ddp_spawn", "ddp_spawn is not supported: .*; use ddp or fsdp2"),
        ("sft.yaml", "--trainer.strategy deepspeed_stage_2", "deepspeed_stage_2 is not supported: .*; use fsdp2"),
        ("sft.yaml", "--trainer.strategy model_parallel", "model_parallel is not supported: .*; use fsdp2 to shard"),
        ("sft.yaml", "--trainer.barebones true --trainer.logger true", "trainer.barebones: does without logger"),
        ("sft.yaml", "--trainer.max_steps 0", "trainer.max_steps: expected a number from 1, or -1 for no limit, got 0"),
        ("sft.yaml", "--trainer.max_epochs -3", "trainer.max_epochs: .* from 1, or -1 for no limit, got -3"),
        ("ppo.yaml", "--trainer.devices 0", "trainer.devices: expected a number from 1, or -1 for all, got 0"),
        ("sft.yaml", "--trainer.check_val_every_n_epoch 0", "check_val_every_n_epoch: expected a number from 1, got 0"),
        ("sft.yaml", "--trainer.gradient_clip_val -1", "gradient_clip_val: expected a number from 0, got -1"),
        ("sft.yaml", "--trainer.limit_train_batches 0", "trainer.limit_train_batches: 0 trains nothing"),
        (
            "sft.yaml",
            "--trainer.max_time 0",
            "trainer.max_time: expected days:hours:minutes:seconds in quotes, .* got 0",
        ),
        ("sft.yaml", "--trainer.max_time 1:2:3", "trainer.max_time: expected days:hours:minutes:seconds in quotes"),
    ],
)
def test_what_the_modules_cannot_do_names_what_they_can(config: str, options: str, said: str, elsewhere: None) -> None:
    with pytest.raises(InputError, match=said):
        ParsedOnly(*resolve_configs(shlex.split(f"fit --config {config} --model.model m --data.path x {options}")))


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (f"--trainer.logger {__name__}.NoLogger", "trainer.logger: NoLogger cannot be built: Requirement 'nowhere>=1'"),
        (
            f"--trainer.callbacks+={__name__}.NoCallback",
            "trainer.callbacks: NoCallback cannot be built: no server answers",
        ),
        ("--trainer.val_check_interval 100", "`val_check_interval` (100) must be less than or equal to the number"),
        ("--trainer.precision transformer-engine", "trainer: Requirement 'transformer_engine"),
        ("--trainer.callbacks+=Timer", "config.yaml cannot hold"),
    ],
)
def test_what_cannot_be_built_is_one_line_and_leaves_nothing(
    sft: list[str], options: str, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*sft, *shlex.split(options)]) == 2
    assert said in error_of(capsys)
    assert not left()


# What the parser says


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--model rlhf_lightning.modules.PPOModul", "--model: no class .* has no PPOModul (did you mean PPOModule?)"),
        ("--model runs/sft/model", "--model: runs/sft/model is a path, .*; write --model.model runs/sft/model"),
        (
            "--model.reward runs/r/model",
            "--model.reward: runs/r/model is a path.*write --model.reward.path runs/r/model",
        ),
        (
            "--data prefs.jsonl",
            "--data: prefs.jsonl is a path, .*PreferenceDataModule .*; write --data.path prefs.jsonl",
        ),
        ("--model rlhf.modules.PPOModule", "--model: no class .*: there is no module rlhf"),
        ("--model.reward rlhf_lightning.rewards.ModelRewar", "--model.reward: no class .*(did you mean ModelReward?)"),
        ("--model.reward PPOModule", "--model.reward: PPOModule is no Reward"),
        ("--model torch.nn.Linear", "--model: torch.nn.Linear is no RLHFModule"),
        ("--model [1]", "--model: expected the name of a RLHFModule and its init_args, got [1]"),
        ("--model.optimizer.learning_rate=", "--model.optimizer.learning_rate: expected a number above 0, got nothing"),
        ("--model.help PPOModul", "--model.help: no class 'PPOModul' is known (did you mean PPOModule?)"),
        ("--model.nope.x 3", "--model.nope.x: unknown key"),
        ("--data", "--data: a value must follow"),
        ("--trainer.callbacks+=my.Nope", "--trainer.callbacks: no class 'my.Nope': there is no module my"),
        ("--trainer.callbacks.x=1", "--trainer.callbacks.x: no callback is chosen; add --trainer.callbacks+=CLASS"),
        ("--trainer.logger.save_dir x", "--trainer.logger.save_dir: no class is chosen for trainer.logger"),
        ("--trainer.logger CSVLogger", "trainer.logger.save_dir: required by CSVLogger but not given"),
        (
            "--trainer.callbacks+=EarlyStopping --trainer.callbacks.monitr=x",
            "unknown key of EarlyStopping (did you mean --trainer.callbacks.monitor?)",
        ),
        ("--lr 1", "--lr: unknown key (did you mean --model.optimizer.learning_rate?)"),
        ("--model.lr 1", "--model.lr: unknown key of PPOModule (did you mean --model.optimizer.learning_rate?)"),
        ("--model null", "error: model: required"),
        ("--trainer.callbacks+=EarlyStoping", "no class 'EarlyStoping' is known (did you mean EarlyStopping?)"),
        (
            "--data.chat_template_kwargs {a:false}",
            "expected options as `key: value` lines, got {a:false}; write a space behind each colon",
        ),
        ("--data.chat_template_kwargs 5", "expected options as `key: value` lines, got 5"),
        (
            "--checkpoint x",
            "--checkpoint: x is no config file, and a group of options is expected; write --checkpoint.",
        ),
        ("--model.critic head", "--model.critic: head is no config file, .*write --model.critic.kind VALUE"),
        ("--print_config=nope", "--print_config=nope: no such flag; there are skip_default and skip_unset"),
    ],
)
def test_the_parsers_reports_are_one_line_with_a_remedy(
    options: str, said: str, elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(shlex.split(f"fit --config ppo.yaml --data.path x {options}")) == 2
    told = error_of(capsys)
    for part in said.split(".*"):
        assert part in told


def test_a_file_that_is_given_for_a_class_is_led_to_its_option(
    elsewhere: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "p", "completion": "a"}\n' * 3)
    assert main(["fit", "--config", "sft.yaml", "--data", str(rows)]) == 2
    assert error_of(capsys).strip().endswith(f"; write --data.path {rows}")


def test_a_misspelt_class_in_a_config_is_placed(elsewhere: None, capsys: pytest.CaptureFixture[str]) -> None:
    Path("c.yaml").write_text("model:\n  class_path: rlhf_lightning.modules.PPOModul\n", encoding="utf-8")
    assert main(["fit", "--config", "c.yaml", "--data.path", "x"]) == 2
    assert "c.yaml:1: model: no class 'rlhf_lightning.modules.PPOModul'" in error_of(capsys)


@pytest.mark.parametrize("flag", [["--print_config", "skip_default"], ["--print_config=skip_default"]])
def test_print_config_takes_its_flags_in_both_spellings(
    flag: list[str], elsewhere: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *flag, "--config", "ppo.yaml", "--data.path", "x", "--model.kl.coef", "0.5"]) == 0
    printed = capsys.readouterr().out
    assert "kl:\n      coef: 0.5" in printed and "clip_low" not in printed


def test_usage_says_how_the_command_is_typed(capsys: pytest.CaptureFixture[str]) -> None:
    for command in (["fit", "--help"], ["predict", "--help"], ["fit", "--model.help", "PPOModule"]):
        assert main(command) == 0
        assert capsys.readouterr().out.startswith(f"usage: python -m rlhf_lightning {command[0]} ")


def test_what_other_libraries_call_an_option_leads_to_one_that_there_is(
    elsewhere: None,
) -> None:
    cli = ParsedOnly(*resolve_configs(shlex.split("fit --config grpo.yaml --data.path x --model.reward.path y")))
    known = cli._accepted(None)
    for name, ours in _ELSEWHERE.items():
        meant = did_you_mean(name, known).removeprefix(" (did you mean ").removesuffix("?)")
        assert meant in known and f".{meant}".endswith((f".{ours}", f".{name}")), name


def test_a_gpu_that_is_not_there_is_told_by_its_option(
    sft: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main([*sft, "--trainer.accelerator", "gpu"]) == 2
    assert error_of(capsys) == "error: trainer.accelerator: torch finds no GPU here; leave the option out"


# What options were called before they stood in groups, where the squashed name of today's does not say it already.
ONCE = {
    "learning_rate": "optimizer.learning_rate",
    "adam_eps": "optimizer.eps",
    "warmup_steps": "optimizer.warmup_steps",
    "gradient_checkpointing": "network.gradient_checkpointing",
    "lora_rank": "lora.rank",
    "max_new_tokens": "sampling.max_new_tokens",
    "micro_batch_tokens": "update.micro_batch_tokens",
    "max_grad_norm": "update.max_grad_norm",
    "normalise_scores": "scores.normalise",
    "score_clip": "scores.clip",
    "kl_coef": "kl.coef",
    "kl_loss_coef": "kl.loss_coef",
    "clip_high": "objective.clip_high",
    "loss_normalisation": "objective.normalisation",
    "critic": "critic.kind",
    "critic_from": "critic.model",
    "critic_learning_rate": "critic.learning_rate",
    "critic_warmup": "critic.warmup",
    "clip_value": "critic.clip",
    "value_coef": "critic.coef",
    "lam": "advantages.lam",
    "whiten_advantages": "advantages.whiten",
}


@pytest.mark.parametrize("name", ONCE)
def test_an_option_that_was_flat_leads_to_its_group(name: str) -> None:
    known = [f"model.{key}" for key in keys_of(PPOModule)]
    for typed in (name, f"model.{name}"):
        assert did_you_mean(typed, known, "--") == f" (did you mean --model.{ONCE[name]}?)"
    assert did_you_mean("critic.lr", known) == " (did you mean model.critic.learning_rate?)"
