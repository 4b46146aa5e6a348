"""What a fit says first and last."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from tiny_models import CHAT_TEMPLATE

from rlhf_lightning.batches import View
from rlhf_lightning.cli.notices import _both_ends, _template, farewell
from rlhf_lightning.cli.runs import Run
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.evaluation.evaluate import _parser
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.ppo import PPOModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rewards.model import ModelReward
from rlhf_lightning.text import notice

RUN = Run(Path("my runs/sft-2"))
MODEL = "my runs/sft-2/model"


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (SFTModule("base"), ["fit", "--config", "reward_model.yaml", "--model.model", MODEL, "--data.path", "PAIRS"]),
        (
            RewardModelModule("a b"),
            [
                *("fit", "--config", "ppo.yaml", "--model.model", "a b", "--model.reward.path", MODEL),
                *("--data.path", "PROMPTS"),
            ],
        ),
        (
            PPOModule("a b", reward=ModelReward("my reward")),
            ["evaluate", "--policies", "a b", MODEL, "--prompts", "PROMPTS", "--reward", "my reward"],
        ),
        (DPOModule("a b"), ["evaluate", "--policies", "a b", MODEL, "--prompts", "PROMPTS"]),
    ],
    ids=["sft", "reward model", "ppo", "dpo"],
)
def test_the_next_command_can_be_copied(module: Any, words: list[str]) -> None:
    *_, curves, following = farewell(RUN, module).splitlines()
    assert shlex.split(curves) == ["curves", "tensorboard", "--logdir", "my runs"]
    assert shlex.split(following) == ["next", "python", "-m", "rlhf_lightning", *words]
    if words[0] == "evaluate":
        _parser().parse_args(words[1:])


def test_a_terminal_breaks_lines_between_words(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "'a question  of  two spaces' | 'an answer<eos>' (7 tokens right of the bar carry the loss)"
    assert notice("example", text) == f"example   {text}"
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "80")
    first, second = notice("example", text).splitlines()
    assert first.startswith("example   'a question  of  two") and second.startswith(" " * 10)
    assert max(len(first), len(second)) <= 80
    assert "\n" not in notice("next", "word " * 40)


@pytest.mark.parametrize(
    ("rows", "chat", "said"),
    [
        ("plain", False, "a chat template that no row goes through: plain rows do with data.chat true"),
        ("both", False, "a chat template that 1 of 2 rows go through: plain rows do with data.chat true"),
        ("plain", True, "a chat template"),
    ],
)
def test_whether_rows_go_through_the_chat_template_is_said(
    rows: str, chat: bool, said: str, tmp_path: Path, tiny_tokenizer: Any
) -> None:
    tiny_tokenizer.chat_template = CHAT_TEMPLATE
    turns = [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "likes fish"}]
    plain = {"prompt": "the cat", "completion": "likes fish"}
    lines = [plain, plain | {"completion": "likes"}] if rows == "plain" else [plain, {"messages": turns}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    data = PreferenceDataModule(str(tmp_path / "rows.jsonl"), chat=chat, validation_fraction=0)
    assert _template(data.prepare(View("demonstrations"), tiny_tokenizer)) == said


def test_a_long_prompt_is_shown_from_both_ends() -> None:
    prompt = "".join(f"{number:04d} " for number in range(100))
    shown = _both_ends(prompt)
    assert shown.startswith("0000 0001 ") and " ... " in shown and shown.endswith(" 0099 ") and len(shown) < 300
    assert _both_ends(prompt[:280]) == prompt[:280]
