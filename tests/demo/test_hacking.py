"""The recipe that hacks still does: guards and probes are shown on it. And both commands say so before any number."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from rlhf_lightning.demo import stages
from rlhf_lightning.evaluation.evaluate import main as evaluate


@pytest.mark.slow
def test_ppo_exploits_the_weak_reward_model_and_evaluate_says_so_first(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, size = stages.Folder(tmp_path), stages.HACKING
    stages.prepare(folder, size, seed=0)
    stages.train("sft", folder, size, seed=0)
    stages.rank(folder, size, seed=0)
    stages.train("reward_model", folder, size, seed=0)
    stages.train("ppo", folder, size, seed=0)
    capsys.readouterr()
    arguments = ["--policies", *(f"{name}={folder.model(name)}" for name in ("sft", "ppo"))]
    arguments += ["--prompts", str(folder.data("demonstrations_held_out")), "--max_prompts", "128"]
    arguments += ["--reward", "gold=rlhf_lightning.demo.gold:gold_reward", f"proxy={folder.model('reward_model')}"]
    assert evaluate([*arguments, "--max_new_tokens", "64", "--out", str(tmp_path / "evaluation")]) == 0
    report = json.loads((tmp_path / "evaluation" / "report.json").read_text(encoding="utf-8"))
    sft, ppo = (report["policies"][name]["rewards"] for name in ("sft", "ppo"))
    assert ppo["proxy"]["mean"] > sft["proxy"]["mean"] + 1.0
    assert ppo["gold"]["mean"] < sft["gold"]["mean"] - 0.5
    assert report["policies"]["ppo"]["win_rates"]["gold"]["win_rate"] < 0.4
    (warning,) = report["warnings"]
    assert warning.startswith("ppo's score by proxy rose by") and "its score by gold fell by" in warning
    said = capsys.readouterr().out.rpartition("prompts answered")[2].splitlines()
    assert said[1] == f"WARNING: {warning}"
