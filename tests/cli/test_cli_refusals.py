"""Whatever is wrong with a command is one line, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from cli_runs import error_of

from rlhf_lightning.cli import main
from rlhf_lightning.models import head


def test_a_changed_batch_size_is_refused_on_resume(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft]) == 0
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", "last", "--data.batch_size", "2"]) == 2
    assert "data.batch_size: the checkpoint was made with 4, now it is 2" in error_of(capsys)


RATE, SCHEDULE = "--model.optimizer.learning_rate", "--model.optimizer.schedule"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ckpt_path", "last"], "runs/sft/checkpoints holds no whole checkpoint"),
        (["--ckpt_path", "no.ckpt"], "--ckpt_path no.ckpt: no such checkpoint"),
        (["--config", "sft.yam"], "--config sft.yam: no such file, and no shipped config of that name"),
        (["--config", "a" * 300], f"{'a' * 300}: no file can have such a long name"),
        (["--data.path", "a" * 300], f"{'a' * 300}: no file can have such a long name"),
        (["--config", "ppo.yml"], r"no shipped config of that name (did you mean ppo.yaml?)"),
        (["--model.learning_rat", "1"], "unknown key of SFTModule (did you mean --model.optimizer.learning_rate?)"),
        ([RATE, "-1"], RATE + ": expected a number above 0, got -1"),
        ([RATE, "fast"], RATE + ": expected a number above 0, got fast"),
        ([RATE, "null"], "model.optimizer.learning_rate: null is no value for it"),
        ([SCHEDULE, "cosin"], SCHEDULE + ": expected 'constant' or 'linear' or 'cosine', got cosin"),
        ([RATE], RATE + ": a value must follow"),
        ([RATE, "inf"], "model.optimizer.learning_rate: expected a finite number, got inf"),
        (["--model", "PPOModul"], "--model: no class 'PPOModul' is known (did you mean PPOModule?)"),
        (["--data.batch_size", "0"], "--data.batch_size: expected a whole number above 0, got 0"),
        (["--data.long_prompt", "drop"], "unknown key of PreferenceDataModule (did you mean --data.long_prompts?)"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch: unknown key (did you mean --trainer.max_epochs?)"),
        (["--trainer.strategy", "fsdp_cpu_offload"], "trainer.strategy: fsdp_cpu_offload is not supported: FSDP2"),
        (["--trainer.strategy", "fsdp9"], "trainer: You selected an invalid strategy name"),
        (["--weight_decay", "1"], "--weight_decay: unknown key (did you mean --model.optimizer.weight_decay?)"),
        (["--run", "a/b"], "--run a/b: use letters, digits"),
        (["stray"], "stray: this argument belongs to no option"),
        (["--data.path", "a", "b"], "b: this argument belongs to no option; options are written --key value, and a "
         "list --data.path '[a, b]'"),
        (["--data.path", "none.jsonl"], "none.jsonl: cannot be read"),
        (["--model.model", "nowhere/at/all"], "nowhere/at/all"),
        (["--trainer.precision", "bf16-true"], "trainer.precision: bf16-true keeps the weights in 16 bits"),
        (["--trainer.precision", "16-true"], "use bf16-mixed"),
        (["--trainer.accumulate_grad_batches", "0"], "accumulate_grad_batches: expected a number from 1, got 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_is_one_line_and_leaves_nothing(
    sft: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *sft, *options]) == 2
    assert said in error_of(capsys)
    assert not Path("runs").exists()


FUNCTION = ["--model.reward", "FunctionReward", "--model.reward.function"]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--model.sampling.top_p", "2"], "top_p"),
        (["--model.sampling.temperature", "1e-30"], "expected 0 or a number from 1e-12 to 1e+12, got 1e-30"),
        (["--data.batch_size", "2", "--model.update.minibatches", "4"], "4 minibatches cannot be made of 2 responses"),
        ([*FUNCTION, "no.py:f"], "function file no.py does not exist"),
        ([*FUNCTION, "mine.py:short"], "expected one score for each of 4 responses"),
        ([*FUNCTION, "mine.py:hang", "--model.reward.timeout", "1"], "did not answer within 1 s"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)  # fmt: skip
def test_bad_input_of_ppo_is_one_line_and_leaves_nothing(
    ppo: list[str], options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The last two are found at the first rollout, when there are a config and an event file.
    hang = "def hang(prompts, responses):\n    import time\n    time.sleep(60)\n"
    Path("mine.py").write_text(f"def short(prompts, responses):\n    return [1.0]\n{hang}", encoding="utf-8")
    if options[0] == "--model.reward":
        del ppo[2:4]  # the path of the reward model, which a function has not
    assert main(["fit", *ppo, *options]) == 2
    assert said in error_of(capsys)
    assert not Path("runs").exists()


def test_a_policy_is_not_validated_as_a_reward_model(
    folder: Path, tiny_policy_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["--config", "reward_model.yaml", "--model.model", str(tiny_policy_dir), "--data.path", "pairs.jsonl"]
    assert main(["validate", *options, "--trainer.accelerator", "cpu"]) == 2
    assert "score.weight is missing" in error_of(capsys)
    assert not Path("runs").exists()


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("pairs.jsonl/a.jsonl", "pairs.jsonl is a file, not a folder"),
        (".", "this is a folder"),
        ("out.csv", "name a .jsonl file"),
    ],
)
def test_predictions_that_cannot_be_written_are_refused_at_once(
    sft: list[str], output: str, said: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("rlhf_lightning.cli.training.TrainingCLI.instantiate_classes", lambda self: pytest.fail("late"))
    assert main(["predict", *sft, "--output", output]) == 2
    assert said in error_of(capsys)


def test_faults_in_a_config_are_placed(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    Path("bad.yaml").write_text(
        "trainer:\n  max_epochs: 1\nmodel:\n  init_args:\n    learning_rat: 1\n", encoding="utf-8"
    )
    assert main(["fit", *sft, "--config", "bad.yaml"]) == 2
    assert "bad.yaml:5: model.learning_rat: unknown key of SFTModule (did you mean" in error_of(capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--config", "ppo.yaml"], "data.path: required by PreferenceDataModule but not given"),
        (
            ["--data.path", "pairs.jsonl", "--model.model", "x"],
            "no module is chosen; add --config NAME (shipped: dpo.yaml",
        ),
        (["sft.yaml", "--data.path", "pairs.jsonl"], "did you mean --config sft.yaml?"),
        (["--cfg=sft.yaml"], "did you mean --config sft.yaml?"),
        (["--data.path", "rows.yaml"], "no module is chosen; add --config NAME"),
        (["--data.path=rows.yaml"], "no module is chosen; add --config NAME"),
        (
            ["--config", "ppo.yaml", "--model.reward", "null", "--model.reward.path", "x"],
            "--model.reward.path: no class is chosen for model.reward; add --model.reward CLASS before it",
        ),
        (["--model", "SFTModule", "--data.path", "pairs.jsonl"], "model.model: required by SFTModule but not given"),
    ],
)
def test_what_is_missing_is_named(
    folder: Path, arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["fit", *arguments]) == 2
    assert said in error_of(capsys)


def test_last_without_a_run_of_that_name_names_the_newest(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft, "--run", "first"]) == 0
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", "last"]) == 2
    said = error_of(capsys)
    assert "runs/sft/checkpoints holds no whole checkpoint; start without it, or name a run" in said
    assert said.endswith("the newest that has one is first, --run first")
    assert main(["fit", "--config", "runs/first/config.yaml", "--ckpt_path", "last"]) == 0
    assert "run       runs/first goes on from batch-00000003.ckpt" in capsys.readouterr().out


def test_a_loss_that_is_nan_exits_with_1_and_saves_nothing(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        "--model.optimizer.learning_rate",
        "1e30",
        "--trainer.gradient_clip_val",
        "null",
        "--checkpoint.every_n_batches",
        "1",
    ]
    assert main(["fit", *sft, *options]) == 1
    assert "NaN or infinite" in error_of(capsys)
    for path in Path("runs/sft/checkpoints").glob("*.ckpt"):
        weights = torch.load(path, weights_only=True)["state_dict"]
        assert all(torch.isfinite(weight).all() for weight in weights.values())
    assert not Path("runs/sft/model").exists()


def test_memory_that_runs_out_exits_with_1_and_names_the_options(
    sft: list[str], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def starved(*args: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr(head, "linear_cross_entropy", starved)
    assert main(["fit", *sft]) == 1
    told = error_of(capsys)
    assert "out of memory" in told and "vocabulary 64" in told and "--data.batch_size (4)" in told
