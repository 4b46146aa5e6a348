"""Whatever a config file holds, the run trains, or the answer is one line."""

from __future__ import annotations

import inspect
import os
from dataclasses import fields, is_dataclass
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st

from rlhf_lightning import modules
from rlhf_lightning.cli import main

EXAMPLES = int(os.environ.get("ODD_CONFIGS", 24))  # more are other ones each time

NAMES = ["trainer", "model", "data", "run", "checkpoint", "seed_everything", "class_path", "init_args", "optimizer"]
NAMES += ["learning_rate", "max_steps", "callbacks", "logger", "strategy", "path", "batch_size", "reward", "kl", "lora"]
CLASSES = ["rlhf_lightning.modules.SFTModule", "PPOModule", "torch.nn.Linear", "os.system", "rlhf_lightning"]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 10**12),
    st.floats(),
    st.text(max_size=8),
    st.sampled_from([*CLASSES, "x" * 300, "../..", "last", "{}", "[]", "null", "1e400", "\u202eevil", "a\x00b"]),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=4), inner, max_size=4)
    ),
    max_leaves=8,
)
CONFIGS = VALUES | st.dictionaries(st.sampled_from(NAMES), VALUES, min_size=1, max_size=4)


@settings(max_examples=25, derandomize=True, suppress_health_check=list(HealthCheck))
@given(config=CONFIGS)
def test_any_config_is_answered_by_one_line(
    config: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("odd.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), encoding="utf-8")
    capsys.readouterr()
    assert main(["fit", "--config", "sft.yaml", "--config", "odd.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    assert sorted(path.name for path in tmp_path.iterdir()) == ["odd.yaml"]


# Options of every section, whose odd values get past the parser to the constructors and the training.
OPTIONS = {
    "trainer": [
        "max_epochs",
        "precision",
        "gradient_clip_val",
        "accumulate_grad_batches",
        "max_time",
        "limit_train_batches",
        "log_every_n_steps",
        "devices",
        "strategy",
        "val_check_interval",
    ],
    "data.init_args": [
        "batch_size",
        "batch_tokens",
        "max_length",
        "validation_fraction",
        "val_path",
        "chat_template",
        "seed",
        "columns",
    ],
    "checkpoint": ["every_n_batches", "keep"],
    "samples": ["rows"],
}
NAMED = [f"{section}.{name}" for section, names in OPTIONS.items() for name in names] + ["seed_everything", "run"]
# Each shipped method with its module; the module's options are found in its signature, groups included.
METHODS = {
    "sft.yaml": modules.SFTModule,
    "reward_model.yaml": modules.RewardModelModule,
    "dpo.yaml": modules.DPOModule,
    "kto.yaml": modules.KTOModule,
    "orpo.yaml": modules.ORPOModule,
    "simpo.yaml": modules.SimPOModule,
    "ppo.yaml": modules.PPOModule,
    "grpo.yaml": modules.GRPOModule,
    "rloo.yaml": modules.RLOOModule,
    "reinforce.yaml": modules.ReinforcePlusPlusModule,
    "rejection_sampling.yaml": modules.RejectionSamplingModule,
    "online_dpo.yaml": modules.OnlineDPOModule,
}
NUMBERS = st.sampled_from([0, -1, 1, 2, 0.5, -0.5, 1e-30, 1e30, 10**12, float("nan"), float("inf"), True, None])


def nested(options: dict[str, object]) -> dict[str, object]:
    config: dict[str, object] = {}
    for name, value in options.items():
        *sections, last = name.split(".")
        place: dict[str, object] = config
        for section in sections:
            place = place.setdefault(section, {})  # type: ignore[assignment]
        place[last] = value
    return config


def test_every_method_is_searched() -> None:
    shipped = {path.name for path in (Path(__file__).parents[2] / "configs").glob("*.yaml")}
    assert set(METHODS) == shipped - {"fsdp.yaml", "lora.yaml"}


def options_of(module: type) -> list[str]:
    """``model.init_args.kl.coef`` and all others of a module."""
    found = []
    for name, parameter in inspect.signature(module).parameters.items():
        group = parameter.default
        inner = [field.name for field in fields(group)] if is_dataclass(group) else []
        found += [f"model.init_args.{name}.{one}" for one in inner] or [f"model.init_args.{name}"]
    return found


def odd(method: str) -> st.SearchStrategy[tuple[str, dict[str, object]]]:
    names = st.sampled_from([*NAMED, *options_of(METHODS[method])])
    return st.tuples(st.just(method), st.dictionaries(names, NUMBERS | SCALARS, min_size=1, max_size=2))


@settings(max_examples=EXAMPLES, derandomize=EXAMPLES == 24, suppress_health_check=list(HealthCheck))
@given(drawn=st.sampled_from(sorted(METHODS)).flatmap(odd))
def test_odd_values_train_or_are_answered_by_one_line(
    drawn: tuple[str, dict[str, object]],
    tiny_policy_dir: Path,
    tiny_reward_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    method, options = drawn
    answers = '"chosen": " sat", "rejected": " big"'
    rows = [f'{{"prompt": "the {word}", {answers}}}\n' for word in ("cat", "dog", "big", "red")]
    Path("rows.jsonl").write_text("".join(rows), encoding="utf-8")
    Path("odd.yaml").write_text(yaml.safe_dump(nested(options), allow_unicode=True), encoding="utf-8")
    runs = ["--config", method, "--model.model", str(tiny_policy_dir), "--data.path", "rows.jsonl"]
    if "reward" in inspect.signature(METHODS[method]).parameters:
        runs += ["--model.reward.path", str(tiny_reward_dir)]
    if "sampling" in inspect.signature(METHODS[method]).parameters:
        runs += ["--model.sampling.max_new_tokens", "4"]
    capsys.readouterr()
    note(f"{method} {options}")
    code = main(["fit", *runs, "--trainer.max_steps", "1", "--config", "odd.yaml"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert (code == 0 and not errors) or (code in (1, 2) and len(errors) == 1 and errors[0].startswith("error: "))
