"""Whatever a config file holds, the answer is one line and exit code 2."""

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
