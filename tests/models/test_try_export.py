"""What the exported folder has of the one that training started from, and that a doomed export is known at once."""

from __future__ import annotations

import json
import shutil
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import make_config, make_tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.models import export
from rlhf_lightning.models.export import export_policy, export_scalar, try_export
from rlhf_lightning.models.loading import eos_ids, load_causal_lm, load_scalar_model
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel


def base_folder(
    to: Path, dtype: torch.dtype = torch.float32, generation: dict[str, Any] | None = None, **config: object
) -> Path:
    LlamaForCausalLM(make_config(**config)).to(dtype).save_pretrained(to)
    make_tokenizer("<pad>").save_pretrained(to)
    if generation is not None:
        (to / "generation_config.json").write_text(json.dumps({"bos_token_id": 2, "eos_token_id": 1, **generation}))
    return to


@pytest.mark.parametrize(
    ("generation", "left"),
    [
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, "temperature 0.6, top_p 0.9 would not save"),
        ({"early_stopping": True, "length_penalty": 2.0}, "early_stopping True, length_penalty 2.0 would not save"),
        ({"output_scores": True, "min_p": 0.1}, "min_p 0.1, output_scores True would not save"),
        ({"use_cache": False, "cache_implementation": "static"}, "cache_implementation static would not save"),
        ({"pad_token_id": -1}, None),
        ({"do_sample": True, "temperature": 0.6, "max_new_tokens": 7, "repetition_penalty": 1.5}, None),
    ],
)
def test_any_generation_config_that_loads_is_exported(
    tmp_path: Path, generation: dict[str, Any], left: str | None
) -> None:
    base = base_folder(tmp_path / "base", generation=generation)
    tokenizer = make_tokenizer("<pad>")
    policy = Policy(load_causal_lm(base))
    before = policy.model.generation_config.to_dict()
    told = try_export(policy, tokenizer, tmp_path / "model")
    assert [left in line for line in told] == [True] * (left is not None)
    export_policy(policy, tokenizer, tmp_path / "model")
    assert policy.model.generation_config.to_dict() == before
    saved = GenerationConfig.from_pretrained(tmp_path / "model")
    saved.validate(strict=True)
    kept = {key: value for key, value in generation.items() if left is None or f"{key} " not in left}
    assert all(getattr(saved, key) == value for key, value in kept.items() if key != "pad_token_id")
    assert saved.pad_token_id == 0


def test_a_trial_leaves_nothing_and_touches_nothing(tmp_path: Path) -> None:
    policy, tokenizer = Policy(load_causal_lm(base_folder(tmp_path / "base"))), make_tokenizer("<pad>")
    assert try_export(policy, tokenizer, tmp_path / "runs" / "new" / "model") == []
    assert not (tmp_path / "runs").exists()
    export_policy(policy, tokenizer, tmp_path / "runs" / "new" / "model")
    stands = {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "new" / "model").rglob("*")}
    assert try_export(policy, tokenizer, tmp_path / "runs" / "new" / "model") == []
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "runs" / "new").rglob("*.*")} == stands


def test_what_an_export_would_fail_of_is_said_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, tokenizer = Policy(load_causal_lm(base_folder(tmp_path / "base"))), make_tokenizer("<pad>")

    def refused(folder: Path, said: str) -> None:
        with pytest.raises(InputError, match=said) as caught:
            try_export(policy, tokenizer, folder)
        assert "\n" not in str(caught.value)

    (tmp_path / "file").write_text("mine")
    refused(tmp_path / "file" / "model", "file/model: cannot be written")
    refused(tmp_path / "file", "something that is not a model")
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**6, 10**6, 10))
    refused(tmp_path / "model", "0.0 GB of the disk are free, and the trained model takes 0.0 GB; make room")
    monkeypatch.undo()
    policy.model.generation_config.max_new_tokens = 0
    refused(tmp_path / "model", "could not be saved .*`max_new_tokens` must be greater than 0")
    policy.model.generation_config.max_new_tokens = None
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *a, **k: (_ for _ in ()).throw(TypeError("a\nlock")))
    refused(tmp_path / "model", r"could not be saved \(a lock\)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "file"]


def test_a_tokenizer_that_comes_back_as_another_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, tokenizer = Policy(load_causal_lm(base_folder(tmp_path / "base"))), make_tokenizer("<pad>")
    tokenizer.chat_template = {"default": "a", "other": "b"}
    assert try_export(policy, tokenizer, tmp_path / "model") == []  # named templates survive
    load = AutoTokenizer.from_pretrained

    def other(*args: Any, **options: Any) -> Any:
        found = load(*args, **options)
        found.chat_template = "c"
        return found

    monkeypatch.setattr(export.AutoTokenizer, "from_pretrained", other)
    with pytest.raises(InputError, match="the chat template, saved and loaded again, is another"):
        try_export(policy, tokenizer, tmp_path / "model")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_the_folder_keeps_its_dtype_through_training_in_float32(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    base = base_folder(tmp_path / "base", dtype, tie_word_embeddings=tied)
    policy = Policy(load_causal_lm(base))
    assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
    export_policy(policy, make_tokenizer("<pad>"), tmp_path / "model")
    weights, before = (load_file(folder / "model.safetensors") for folder in (tmp_path / "model", base))
    assert {name: (w.dtype, w.shape) for name, w in weights.items()} == {n: (dtype, w.shape) for n, w in before.items()}
    assert all(torch.equal(weights[name], before[name]) for name in before)
    assert json.loads((tmp_path / "model" / "config.json").read_text())["dtype"] == str(dtype).removeprefix("torch.")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype="auto").dtype == dtype
    assert policy.model.config.dtype == torch.float32 and policy.model.dtype == torch.float32


def test_another_dtype_can_be_asked_for(tmp_path: Path) -> None:
    policy = Policy(load_causal_lm(base_folder(tmp_path / "base")))
    export_policy(policy, make_tokenizer("<pad>"), tmp_path / "model", "bfloat16")
    own = policy.model.state_dict()
    for name, weight in load_file(tmp_path / "model" / "model.safetensors").items():
        assert torch.equal(weight, own[name].to(torch.bfloat16))
    with torch.no_grad():
        policy.model.lm_head.weight[0, 0] = 1e6
    with pytest.warns(UserWarning, match="lm_head.weight holds numbers beyond float16: the model is saved in float32"):
        export_policy(policy, make_tokenizer("<pad>"), tmp_path / "half", "float16")
    assert json.loads((tmp_path / "half" / "config.json").read_text())["dtype"] == "float32"
    assert load_file(tmp_path / "half" / "model.safetensors")["lm_head.weight"][0, 0] == 1e6


def test_a_reward_model_keeps_the_dtype_too(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", torch.bfloat16)
    scalar = ScalarModel(load_scalar_model(base, fresh_head=True))
    assert try_export(scalar, make_tokenizer("<eos>"), tmp_path / "reward") == []
    export_scalar(scalar, make_tokenizer("<eos>"), tmp_path / "reward")
    weights = load_file(tmp_path / "reward" / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert torch.equal(weights["score.weight"], scalar.model.score.weight.to(torch.bfloat16))
    assert load_scalar_model(tmp_path / "reward", fresh_head=False).stored_dtype == torch.bfloat16


def test_a_config_without_a_dtype_takes_that_of_the_weights(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", torch.bfloat16)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    assert load_causal_lm(base).stored_dtype == torch.bfloat16
    weights = load_file(base / "model.safetensors")
    save_file({n: w.half() for n, w in weights.items()}, base / "model.safetensors", {"format": "pt"})
    assert load_causal_lm(base).stored_dtype == torch.float16


def test_a_turn_end_ends_responses_wherever_the_model_goes(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base")
    policy, tokenizer = Policy(load_causal_lm(base)), make_tokenizer("<pad>")
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}<bos>{% endfor %}"
    assert eos_ids(policy.model, tokenizer) == [1, 2]
    export_policy(policy, tokenizer, tmp_path / "model")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert stock.generation_config.eos_token_id == [1, 2]
    only = [token for token in range(64) if token != 2]
    found = stock.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False, suppress_tokens=only)
    assert found.tolist() == [[5, 6, 2]]
    with pytest.raises(InputError, match="eos_token_id is 'x'"):
        eos_ids(GenerationConfig(eos_token_id="x"), tokenizer)


def test_an_adapter_is_added_in_float32_and_then_cast(tmp_path: Path) -> None:
    base = base_folder(tmp_path / "base", torch.bfloat16)
    model = load_causal_lm(base)
    add_adapter(model, rank=2, alpha=4.0)
    layer = model.model.layers[0].self_attn.q_proj
    down, up = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    with torch.no_grad():
        up.normal_(std=0.01)
    expected = (layer.base_layer.weight.double() + 2.0 * up.double() @ down.double()).to(torch.bfloat16)
    assert not torch.equal(expected, layer.base_layer.weight.to(torch.bfloat16))
    export_policy(Policy(model), make_tokenizer("<pad>"), tmp_path / "model")
    saved = load_file(tmp_path / "model" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    # float32 and float64 round alike to bfloat16, but for ties at most.
    assert (saved != expected).float().mean() < 0.01 and saved.dtype == torch.bfloat16
    rounded = layer.base_layer.weight.bfloat16() + (2.0 * up.bfloat16() @ down.bfloat16())
    assert (rounded != expected).float().mean() > 0.01  # what adding in bfloat16 would give
