"""What the command line comes to: the same in any order, with null for null and one seed for everything."""

from __future__ import annotations

import itertools
import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jsonargparse.typing import PositiveInt

from rlhf_lightning.cli.arguments import ordered, split
from rlhf_lightning.cli.configs import resolve_configs
from rlhf_lightning.cli.training import TrainingCLI
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules import PPOModule


class ParsedOnly(TrainingCLI):
    """The command line up to the point where something would be built."""

    def instantiate_classes(self) -> None:
        pass

    def _run_subcommand(self, subcommand: str) -> None:
        pass


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("rlhf_lightning.cli.training.check_inputs", lambda options: None)  # no stage has been run here
    return tmp_path


def parsed(line: str) -> Any:
    return ParsedOnly(*resolve_configs(shlex.split(line)))


def options(line: str) -> dict[str, Any]:
    found = parsed(line).options.as_dict()
    del found["config"]  # the files' paths, as typed
    return found


def model(line: str) -> dict[str, Any]:
    return options(line)["model"]["init_args"]


def write(name: str, text: str) -> str:
    Path(name).write_text(text, encoding="utf-8")
    return name


# Order

SETS = [
    [
        "--model PPOModule",
        "--model.model m",
        "--data.path x",
        "--model.reward FunctionReward",
        "--model.reward.function f.py:f",
    ],
    ["--config ppo.yaml", "--model.lora.rank 4", "--data.path x", "--data PreferenceDataModule", "--data.batch_size=8"],
    ["--config ppo.yaml", "--config lora.yaml", "--config fsdp.yaml", "--data.path x", "--trainer.max_epochs 2"],
    ["--config sft.yaml", "--config lora.yaml", "--model.model m", "--data.path x", "--model.lora.alpha null"],
    ["--config lora.yaml", "--model PPOModule", "--model.model m", "--data.path x", "--seed_everything 5"],
    [
        "--config ppo.yaml",
        "--data.path x",
        "--model.reward FunctionReward",
        "--model.reward.function f.py:f",
        "--model.reward.timeout 3",
    ],
    [
        "--config ppo.yaml",
        "--data.path x",
        "--trainer.logger CSVLogger",
        "--trainer.logger.save_dir logs",
        "--trainer.logger.version null",
    ],
]


@pytest.mark.parametrize("typed", SETS, ids=[" ".join(typed)[:60] for typed in SETS])
def test_the_order_of_options_changes_nothing(typed: list[str]) -> None:
    expected = options("fit " + " ".join(typed))
    for order in [typed[::-1], *random.Random(0).sample(list(itertools.permutations(typed)), 3)]:
        assert options("fit " + " ".join(order)) == expected, order


def test_an_option_before_its_class_gets_the_classs_defaults() -> None:
    # PPO's, from its signature and from the literature; AdamW's own epsilon is 1e-8.
    found = model("fit --model.lora.rank 4 --data.path x --config ppo.yaml")
    assert (found["optimizer"]["learning_rate"], found["optimizer"]["eps"], found["lora"]["rank"]) == (1e-6, 1e-5, 4)
    found = model("fit --config lora.yaml --data.path x --config ppo.yaml")
    assert (found["optimizer"]["learning_rate"], found["optimizer"]["eps"]) == (2e-4, 1e-5)


def test_an_overlay_before_its_config_is_laid_over_it_and_says_so() -> None:
    cli = parsed("fit --config lora.yaml --config sft.yaml --model.model m --data.path x")
    assert cli.options.model.init_args.optimizer.learning_rate == 2e-4
    (note,) = cli.layers.notes
    assert "model.optimizer.learning_rate: 0.0002 of lora.yaml wins over 2e-05 of sft.yaml" in note
    assert parsed("fit --config sft.yaml --config lora.yaml --model.model m --data.path x").layers.notes == []


def test_another_class_keeps_what_was_set_and_says_what_it_leaves_out() -> None:
    cli = parsed("fit --config ppo.yaml --model.model m --data.path x --model SFTModule")
    found = cli.options.model.init_args.optimizer
    assert (found.warmup_steps, found.learning_rate, found.eps) == (10, 1e-5, 1e-8)  # set; SFT's own defaults
    assert sorted(note.split()[0] for note in cli.layers.notes) == ["model.critic.learning_rate", "model.reward"]
    later = write("mine.yaml", "model:\n  class_path: DPOModule\n  init_args:\n    beta: 0.5\n")
    found = parsed(f"fit --config sft.yaml --model.model m --data.path x --config {later}").options.model
    assert found.class_path.endswith("DPOModule") and found.init_args.optimizer.learning_rate == 2e-5


def test_an_overlay_without_a_class_is_written_for_the_one_below() -> None:
    mine = write("mine.yaml", "model:\n  reward:\n    path: RM\n")
    assert model(f"fit --config {mine} --config ppo.yaml --data.path x")["reward"]["init_args"]["path"] == "RM"
    function = "--model.reward FunctionReward --model.reward.function f.py:f"
    cli = parsed(f"fit --config {mine} --config ppo.yaml --data.path x {function}")
    left_out = [note for note in cli.layers.notes if "is left out" in note]
    assert [note.split(":")[0].split(" is")[0] for note in left_out] == [
        "model.reward.path of ppo.yaml",
        "model.reward.path of mine.yaml",
    ]


def test_a_typo_is_no_option_of_the_class_that_gave_way() -> None:
    typo = write("typo.yaml", "model:\n  class_path: SFTModule\n  init_args:\n    learning_rat: 1\n")
    with pytest.raises(InputError, match=r"typo.yaml:4: model.learning_rat: unknown key of DPOModule"):
        parsed(f"fit --config {typo} --model DPOModule --model.model m --data.path x")


def test_of_two_equal_options_the_last_counts_and_the_other_is_named() -> None:
    cli = parsed("fit --trainer.max_epochs 2 --config ppo.yaml --data.path x --trainer.max_epochs=3")
    assert cli.options.trainer.max_epochs == 3
    assert cli.layers.notes == ["--trainer.max_epochs is given again later, so 2 is not used"]


def test_what_is_added_to_a_list_keeps_its_own_options() -> None:
    line = "fit --config ppo.yaml --data.path x --trainer.callbacks+=EarlyStopping --trainer.callbacks.monitor=a"
    line += " --trainer.callbacks+=LearningRateMonitor --trainer.callbacks.logging_interval=step --run one"
    first, second = options(line)["trainer"]["callbacks"]
    assert (first["init_args"]["monitor"], second["init_args"]["logging_interval"]) == ("a", "step")


def test_a_file_is_no_class(empty_folder: Path) -> None:
    config = write("c.yaml", "data:\n  tokenizer:\n    a.jsonl: 1\n")
    words = [option.tokens for option in ordered(split(["--model.a.b", "-1", "--data.path", "rows.jsonl", "stray"]))]
    assert words == [("--data.path", "rows.jsonl"), ("--model.a.b", "-1"), ("stray",)]
    with pytest.raises(InputError, match=r"data.tokenizer: expected a text"):  # and no class of the name rows.jsonl
        parsed(f"fit --config ppo.yaml --data.tokenizer rows.jsonl --config {config}")


# null


@pytest.mark.parametrize(
    ("option", "place"),
    [
        ("--model.scores.clip 3 --model.scores.clip null", ("model", "init_args", "scores", "clip")),
        ("--model.reference=null", ("model", "init_args", "reference")),
        ("--data.val_path null", ("data", "init_args", "val_path")),
        ("--model.init_args.update.max_grad_norm null", ("model", "init_args", "update", "max_grad_norm")),
        (
            "--model.reward FunctionReward --model.reward.function f.py:f --model.reward.timeout null",
            ("model", "init_args", "reward", "init_args", "timeout"),
        ),
        ("--model.engine null", ("model", "init_args", "engine")),
        ("--trainer.max_time null", ("trainer", "max_time")),
        ("--run null", ("run",)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_null_on_the_command_line_is_null(option: str, place: tuple[str, ...]) -> None:
    found: Any = options(f"fit --config ppo.yaml --data.path x {option}")
    for key in place:
        found = found[key]
    assert found is None


@pytest.mark.parametrize(
    "option",
    [
        "--model.sampling.temperature null",
        "--model.reward.trust_remote_code null",
        "--data.batch_size null",
        "--checkpoint.every_n_batches null",
        "--samples.rows null",
        "--trainer.accumulate_grad_batches null",
        "--seed_everything null",
    ],
)
def test_null_where_a_type_has_none_is_refused(option: str) -> None:
    key = option.split()[0].removeprefix("--")
    with pytest.raises(InputError, match=f"^{key}: null is no value for it"):
        parsed(f"fit --config ppo.yaml --data.path x {option}")


# Options in groups, as a user's own class may have them


@dataclass(frozen=True, kw_only=True)
class Extra:
    """Two options."""

    first: PositiveInt = 1
    second: PositiveInt | None = 2


class Grouped(PPOModule):
    """A user's own method."""

    def __init__(self, extra: Extra = Extra(), **kwargs: Any) -> None:
        super().__init__(**kwargs)


def test_groups_of_options_are_reached_in_any_order_and_by_null() -> None:
    line = f"fit --model.extra.first 5 --model {__name__}.Grouped --model.extra.second null --data.path x"
    found = model(f"{line} --config ppo.yaml")
    assert found["extra"] == {"first": 5, "second": None} and found["optimizer"]["eps"] == 1e-5


@pytest.mark.parametrize(
    ("text", "option", "said"),
    [
        ("", "--model.extra.frist 3", r"^--model.extra.frist: unknown key \(did you mean --model.extra.first\?\)"),
        ("", "--model.extra.first null", r"^model.extra.first: null is no value for it"),
        ("extra: {frist: 3}", "", r"c.yaml:3: model.extra.frist: unknown key of Grouped \(did you mean"),
        ("extra:", "", r"^model.extra: null is no value for it"),
        ("extra: 5", "", r"^model.extra: expected its options as `key: value` lines, got 5"),
    ],
)
def test_faults_in_groups_of_options_are_named(text: str, option: str, said: str) -> None:
    config = write("c.yaml", f"model:\n  init_args:\n    {text}\n" if text else "{}")
    with pytest.raises(InputError, match=said):
        parsed(f"fit --config ppo.yaml --config {config} --model {__name__}.Grouped --data.path x {option}")


# Seeds


def seeds(line: str) -> tuple[Any, Any, Any]:
    found = options(f"fit --config ppo.yaml --data.path x {line}")
    return found["seed_everything"], found["data"]["init_args"]["seed"], found["model"]["init_args"]["seed"]


def test_one_seed_reaches_data_and_model_unless_they_have_their_own() -> None:
    assert seeds("") == (0, 0, 0)
    assert seeds("--seed_everything 3") == (3, 3, 3)
    assert seeds("--seed_everything 3 --data.seed 7") == (3, 7, 3)
    assert seeds("--seed_everything false") == (False, 0, 0)
    config = write("seed.yaml", "seed_everything: 4\nmodel:\n  seed: 9\n")
    assert seeds(f"--config {config}") == (4, 4, 9)
    assert seeds(f"--config {config} --seed_everything 5") == (5, 5, 9)


def test_true_takes_lightnings_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PL_GLOBAL_SEED", "11")
    assert seeds("--seed_everything true") == (11, 11, 11)
    assert seeds("--seed_everything true --model.seed 2") == (11, 11, 2)


def test_seeds_that_followed_follow_again() -> None:
    saved = write("saved.yaml", "seed_everything: 3\ndata:\n  seed: 3\nmodel:\n  seed: 8\n")
    assert seeds(f"--config {saved}") == (3, 3, 8)
    cli = parsed(f"fit --config ppo.yaml --data.path x --config {saved} --seed_everything 4")
    assert (cli.options.data.init_args.seed, cli.options.model.init_args.seed) == (4, 8)
    (note,) = cli.layers.notes
    assert "data.seed is 4, no longer saved.yaml's 3" in note and "model.seed stays 8" in note


@pytest.mark.parametrize("seed", ["-1", "4294967296"])
def test_a_seed_out_of_bounds_is_refused(seed: str) -> None:
    with pytest.raises(InputError, match=f"^seed_everything: expected a whole number from 0 to .*, got {seed}"):
        parsed(f"fit --config ppo.yaml --data.path x --seed_everything {seed}")
