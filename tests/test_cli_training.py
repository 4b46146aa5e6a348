"""fit, validate, test and predict from the command line: what they leave, resume, refuse, and exit with."""

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
from transformers import AutoModelForCausalLM

from rlhf_lightning.cli import main
from rlhf_lightning.models import head

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with a file of preference pairs."""
    monkeypatch.chdir(tmp_path)
    rows = [
        {"prompt": f"the {colour} {animal} sees", "chosen": "a big fish", "rejected": "no"}
        for colour in ("red", "green", "blue")
        for animal in ("cat", "dog", "bird", "fish")
    ]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return tmp_path


@pytest.fixture
def sft(folder: Path, tiny_policy_dir: Path) -> list[str]:
    """Options of a small SFT run: 3 batches, one of the 12 prompts held out."""
    options = ["--config", "sft.yaml", "--model.model", str(tiny_policy_dir), "--data.path", "pairs.jsonl"]
    options += ["--data.batch_size", "4", "--data.validation_fraction", "0.1", "--trainer.accelerator", "cpu"]
    return [*options, "--model.warmup_steps", "0", "--model.max_new_tokens", "4"]


@pytest.fixture
def ppo(sft: list[str], tiny_reward_dir: Path) -> list[str]:
    """Options of a small PPO run on the prompts of the same file: 3 iterations of 4 responses."""
    options = ["--config", "ppo.yaml", "--model.reward.path", str(tiny_reward_dir), "--model.iterations", "3"]
    return [*options, *sft[2:], "--trainer.val_check_interval", "1.0"]


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1, lines
    assert lines[0].startswith("error: ")
    return lines[0]


def metrics(run: str) -> list[dict[str, Any]]:
    lines = Path(f"runs/{run}/metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


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
    assert main(["fit", *sft, "--model.learning_rate", "0.01", "--seed_everything", "3"]) == 0
    saved = yaml.safe_load(Path("runs/sft/config.yaml").read_text(encoding="utf-8"))
    assert saved["run"] is None
    assert (saved["seed_everything"], saved["data"]["init_args"]["seed"], saved["model"]["init_args"]["seed"]) == (
        3,
        3,
        3,
    )
    assert saved["model"]["init_args"]["learning_rate"] == 0.01
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
        "model:\n  init_args:\n    learning_rate: 0.5\n    weight_decay: 0.25\n", encoding="utf-8"
    )
    assert main(["fit", *sft, "--config", "mine.yaml", "--model.weight_decay", "0.125", "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]["init_args"]
    assert (printed["learning_rate"], printed["weight_decay"]) == (0.5, 0.125)
    assert printed["schedule"] == "cosine"


def test_last_resumes_and_the_configured_values_win(sft: list[str]) -> None:
    assert main(["fit", *sft]) == 0
    options = ["--trainer.max_epochs", "2", "--model.learning_rate", "0.003", "--model.schedule", "constant"]
    assert main(["fit", *sft, "--ckpt_path", "last", *options]) == 0
    rates = {line["step"]: line["train/learning_rate"] for line in metrics("sft") if "train/learning_rate" in line}
    assert sorted(rates) == [0, 1, 2, 3, 4, 5]
    assert rates[0] == pytest.approx(2e-5)
    assert [rates[step] for step in (3, 4, 5)] == pytest.approx([0.003] * 3)


def test_a_changed_batch_size_is_refused_on_resume(sft: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", *sft]) == 0
    capsys.readouterr()
    assert main(["fit", *sft, "--ckpt_path", "last", "--data.batch_size", "2"]) == 2
    assert "data.batch_size: the checkpoint was made with 4, now it is 2" in error_of(capsys)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--ckpt_path", "last"], "runs/sft/checkpoints holds no whole checkpoint"),
        (["--ckpt_path", "no.ckpt"], "--ckpt_path no.ckpt: no such checkpoint"),
        (["--config", "sft.yam"], "--config sft.yam: no such file, and no shipped config of that name"),
        (["--model.learning_rat", "1"], "unknown key of SFTModule (did you mean --model.learning_rate?)"),
        (["--model.learning_rate", "-1"], "--model.learning_rate: expected PositiveFloat (value >0), got -1"),
        (["--model.learning_rate", "fast"], "--model.learning_rate: expected PositiveFloat, got fast"),
        (["--model.learning_rate", "null"], "model.learning_rate: null is no value for it"),
        (["--model.schedule", "cosin"], "--model.schedule: expected 'constant' or 'linear' or 'cosine', got cosin"),
        (["--model.learning_rate"], "--model.learning_rate: a value must follow"),
        (["--model", "PPOModul"], "--model: no class 'PPOModul' is known (did you mean PPOModule?)"),
        (["--data.batch_size", "0"], "--data.batch_size: expected PositiveInt (value >0), got 0"),
        (["--data.long_prompt", "drop"], "unknown key of PreferenceDataModule (did you mean --data.long_prompts?)"),
        (["--trainer.max_epoch", "3"], "--trainer.max_epoch: unknown key (did you mean --trainer.max_epochs?)"),
        (["--trainer.strategy", "fsdp_cpu_offload"], "trainer.strategy: fsdp_cpu_offload is not supported: FSDP2"),
        (["--trainer.strategy", "fsdp9"], "trainer: You selected an invalid strategy name"),
        (["--weight_decay", "1"], "--weight_decay: unknown key (did you mean --model.weight_decay?)"),
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
        (["--model.top_p", "2"], "top_p"),
        (["--data.batch_size", "2", "--model.minibatches", "4"], "4 minibatches cannot be made of 2 responses"),
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
        "--model.learning_rate",
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


def test_checkpoints_hold_no_class_and_load_with_weights_only(sft: list[str]) -> None:
    assert main(["fit", *sft]) == 0
    (path,) = Path("runs/sft/checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    assert not checkpoint.get("hyper_parameters")
    assert type(checkpoint["optimizer_states"][0]["param_groups"][0]["weight_decay"]) is float


def test_a_class_that_a_checkpoint_names_is_not_imported(sft: list[str], folder: Path, monkeypatch: Any) -> None:
    assert main(["fit", *sft]) == 0
    (path,) = Path("runs/sft/checkpoints").glob("*.ckpt")
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["hyper_parameters"] = {"_class_path": "trap.Trap", "learning_rate": 123.0}
    torch.save(checkpoint, path)
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
