"""A module without a named engine takes one that can run its model; a failing table of samples ends no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from small_data import SmallData, train
from transformers import AutoTokenizer, FalconConfig, FalconForCausalLM

from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.rollout import NativeEngine, TransformersEngine
from rlhf_lightning.training.sampler import SamplingOptions


@pytest.fixture
def falcon(tmp_path: Path, tiny_policy_dir: Path) -> Path:
    """A model that the own decode loop cannot run."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_policy_dir)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": len(tokenizer)}
    ids = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    FalconForCausalLM(FalconConfig(**sizes, alibi=False, **ids)).save_pretrained(tmp_path / "falcon")
    tokenizer.save_pretrained(tmp_path / "falcon")
    return tmp_path / "falcon"


def fit(module: SFTModule, model: Path, root: Path) -> None:
    data = SmallData(model, [[0, 1], [2, 3]], held_out=True)
    train(module, data, callbacks=[SampleTable(rows=1)], default_root_dir=root)


def test_the_engine_that_can_run_the_model_is_taken_and_said(falcon: Path, tmp_path: Path) -> None:
    module = SFTModule(str(falcon), sampling=SamplingOptions(max_new_tokens=3))
    with pytest.warns(UserWarning, match="FalconForCausalLM: this library's decode loop cannot run this model"):
        fit(module, falcon, tmp_path)
    assert type(module.sampler.engine) is TransformersEngine
    assert (tmp_path / "samples.jsonl").exists()


def test_an_engine_that_cannot_costs_the_table_and_not_the_training(
    falcon: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    module = SFTModule(str(falcon), engine=NativeEngine(), sampling=SamplingOptions(max_new_tokens=3))
    fit(module, falcon, tmp_path)
    assert module.trainer.global_step == 2
    said = capsys.readouterr().err
    assert "the table of samples cannot be written (InputError: FalconForCausalLM" in said
    assert "the table of samples: 1 writes failed (the last: InputError: FalconForCausalLM" in said  # at the end
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_policy_that_has_diverged_is_no_fault_of_the_tables(
    tiny_policy_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverged(*args: Any, **kwargs: Any) -> None:
        raise TrainingDiverged("logits were NaN")

    module = SFTModule(str(tiny_policy_dir))
    monkeypatch.setattr(module, "generate", diverged)
    with pytest.raises(TrainingDiverged):
        fit(module, tiny_policy_dir, tmp_path)
