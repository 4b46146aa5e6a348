"""What a stage reads that another one leaves: the commands that lead to it, and a newer run of the same name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlhf_lightning.cli import main
from rlhf_lightning.cli.configs import shipped_configs
from rlhf_lightning.cli.stage_inputs import check_inputs, newer_models, what_to_try
from rlhf_lightning.errors import InputError

ALONE = [name for name in shipped_configs() if "/" not in name and name not in ("lora.yaml", "fsdp.yaml")]


@pytest.fixture(autouse=True)
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)


def leave(run: str, started: float) -> None:
    """What a finished run leaves."""
    Path(run, "model").mkdir(parents=True)
    Path(run, "metrics.jsonl").write_text(json.dumps({"time": started}) + "\n", encoding="utf-8")


def reading(model: str, **others: Any) -> dict[str, Any]:
    return {"model": {"class_path": "X", "init_args": {"model": model, **others}}, "data": {"init_args": {}}}


def test_a_shipped_config_typed_alone_says_what_leads_to_it(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["fit", "--config", "ppo.yaml"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "data.path: required" in line and line.endswith(what_to_try([shipped_configs()["ppo.yaml"]]))
    assert not Path("runs").exists()


@pytest.mark.parametrize("name", ALONE)
def test_what_comes_before_a_shipped_config(name: str) -> None:
    line = what_to_try([shipped_configs()[name]])
    assert "`python -m rlhf_lightning demo` leaves" in line
    assert f"`fit --config demo/{name}`" in line
    assert ("`fit --config sft.yaml --model.model MODEL --data.path FILE`" in line) == (name != "sft.yaml")
    sampled = "reward:" in shipped_configs()[name].read_text(encoding="utf-8")
    assert ("`fit --config reward_model.yaml --data.path FILE`" in line) == sampled


def test_stages_that_are_there_are_not_asked_for() -> None:
    config = [shipped_configs()["ppo.yaml"]]
    leave("runs/sft", 1.0)
    text = what_to_try(config)
    assert "sft.yaml" not in text and "the stages before it are `fit --config reward_model.yaml" in text
    leave("runs/reward_model", 2.0)
    assert "stages before" not in what_to_try(config)
    leave("runs/demo/sft", 3.0)
    assert what_to_try(config) == "try it on the demo's models and data: `fit --config demo/ppo.yaml`"
    assert what_to_try([Path("mine.yaml")]) == ""


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (
            reading("runs/sft/model"),
            "--model.model runs/sft/model: is not there yet; run `fit --config sft.yaml --model.model MODEL",
        ),
        (
            reading("x", reward={"init_args": {"path": "runs/reward_model/model"}}),
            "--model.reward.path runs/reward_model/model: is not there yet; run `fit --config sft.yaml .* FILE`, `fit "
            "--config reward_model.yaml --data.path FILE` first, or try it on .* demo/reward_model.yaml`",
        ),
        (reading("runs/demo/sft/model"), "`python -m rlhf_lightning demo` leaves the models and data of configs/demo"),
        (reading("models/smollm2"), "`make smollm2` fetches it"),
        (reading("runs/smollm2-sft/model"), "run `fit --config smollm2/sft.yaml --data.path FILE` first"),
    ],
)
def test_what_another_stage_leaves_is_asked_for_with_its_command(options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        check_inputs(options)


def test_what_no_stage_leaves_is_left_to_its_reader() -> None:
    check_inputs(reading("my/model", reference="hub/name"))
    leave("runs/sft", 1.0)
    check_inputs(reading("runs/sft/model"))


def test_a_run_that_failed_is_no_model_but_a_newer_one_is() -> None:
    leave("runs/sft-2", 1.0)
    with pytest.raises(InputError, match=r"is not there yet; runs/sft-2/model is; or run `fit --config sft.yaml"):
        check_inputs(reading("runs/sft/model"))


def test_a_newer_model_is_said() -> None:
    leave("runs/sft", 1.0)
    assert list(newer_models(reading("runs/sft/model"))) == []
    leave("runs/sft-2", 2.0)
    options = reading("runs/sft/model", reference="runs/sft/model", reward={"init_args": {"path": "runs/sft-2/model"}})
    assert list(newer_models(options)) == [
        "runs/sft/model is read, and runs/sft-2/model is newer (--model.model runs/sft-2/model)",
        "runs/sft/model is read, and runs/sft-2/model is newer (--model.reference runs/sft-2/model)",
    ]
    Path("runs/sft-3").mkdir()
    Path("runs/sft-3/metrics.jsonl").write_text('{"time": 3.0}\n', encoding="utf-8")  # unfinished
    assert "sft-2" in next(newer_models(options))
    # The first was made anew since.
    Path("runs/sft/metrics.jsonl").write_text('{"time": 9.0}\n', encoding="utf-8")
    assert [line for line in newer_models(options) if "reference" in line or "model.model" in line] == []
