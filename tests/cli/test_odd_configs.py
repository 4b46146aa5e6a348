"""Whatever a config file holds, the run trains, or the answer is one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlhf_lightning.cli import main

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


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
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
    "model.init_args": [
        "optimizer.learning_rate",
        "optimizer.betas",
        "optimizer.eps",
        "optimizer.warmup_steps",
        "optimizer.weight_decay",
        "lora.rank",
        "sampling.temperature",
        "sampling.max_new_tokens",
        "model",
        "seed",
    ],
    "checkpoint": ["every_n_batches", "keep"],
    "samples": ["rows"],
}
NAMED = [f"{section}.{name}" for section, names in OPTIONS.items() for name in names] + ["seed_everything", "run"]
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


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(options=st.dictionaries(st.sampled_from(NAMED), NUMBERS | SCALARS, min_size=1, max_size=2))
def test_odd_values_train_or_are_answered_by_one_line(
    options: dict[str, object],
    tiny_policy_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [f'{{"prompt": "the {word}", "completion": " sat"}}\n' for word in ("cat", "dog", "big", "red")]
    Path("rows.jsonl").write_text("".join(rows), encoding="utf-8")
    Path("odd.yaml").write_text(yaml.safe_dump(nested(options), allow_unicode=True), encoding="utf-8")
    runs = ["--config", "sft.yaml", "--model.model", str(tiny_policy_dir), "--data.path", "rows.jsonl"]
    capsys.readouterr()
    code = main(["fit", *runs, "--trainer.max_steps", "1", "--config", "odd.yaml"])
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith(("error: ", "Traceback"))]
    assert (code == 0 and not errors) or (code in (1, 2) and len(errors) == 1 and errors[0].startswith("error: "))
