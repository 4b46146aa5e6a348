"""What people bring as a model folder: adapters, reward models of other libraries, and what is told in one line."""

from __future__ import annotations

import json
import shutil
import time
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BertConfig, BertLMHeadModel, Gemma3Config, LlamaForCausalLM, T5Config

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model, load_tokenizer
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel

TOKENS = torch.randint(4, 64, (2, 6), generator=torch.Generator().manual_seed(5))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def changed(source: Path, target: Path, **changes: object) -> Path:
    """A copy of a folder with other keys in its config.json; None deletes one."""
    shutil.copytree(source, target)
    config = json.loads((target / "config.json").read_text()) | changes
    (target / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    return target


@pytest.mark.parametrize("path", ["runs/sft/modle", "./nothing", "a/b/c", "runs/modle"])
def test_a_folder_that_is_not_there_is_told_before_any_hub_is_asked(path, here, monkeypatch):
    (here / "runs" / "sft" / "model").mkdir(parents=True)
    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", lambda *a, **b: pytest.fail("the hub was asked"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(InputError, match=f"^{path}: no such folder") as error:
        load_tokenizer(path)
    assert ("did you mean runs/sft/model?" in str(error.value)) == (path == "runs/sft/modle")


def test_a_hub_that_cannot_be_asked_is_told_at_once(here, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    asked = []

    def unreachable(api, name, timeout):
        asked.append((name, timeout))
        raise OSError("no route\nto host")

    monkeypatch.setattr(huggingface_hub.HfApi, "model_info", unreachable)
    start = time.monotonic()
    with pytest.raises(
        InputError, match=r"^some/model: no such folder, and the hub cannot be asked .*\(no route to host\)"
    ):
        load_causal_lm("some/model")
    assert asked == [("some/model", 5.0)] and time.monotonic() - start < 2


def adapter_of(folder: Path, target: Path) -> PeftModel:
    model = get_peft_model(
        LlamaForCausalLM.from_pretrained(folder), LoraConfig(r=2, target_modules=["q_proj", "up_proj"])
    )
    for name, parameter in model.named_parameters():
        if ".lora_B." in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(target)
    return model


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft's, of transformers
def test_an_adapter_s_folder_is_its_model_with_the_adapter_in_its_weights(tiny_policy_dir, tmp_path):
    adapted = adapter_of(tiny_policy_dir, tmp_path / "adapter")
    with pytest.warns(UserWarning, match="adapter: an adapter; its model .* has it added to its weights"):
        model = load_causal_lm(tmp_path / "adapter")
    assert type(model) is LlamaForCausalLM and all(p.requires_grad for p in model.parameters())
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a run that loads it twice says so once
        load_causal_lm(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, adapted(TOKENS).logits)
        assert (model(TOKENS).logits - load_causal_lm(tiny_policy_dir)(TOKENS).logits).abs().max() > 0.01
    assert len(load_tokenizer(tmp_path / "adapter")) == 64  # the base's, where the adapter has none


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_an_adapter_without_its_model_is_told_in_one_line(tiny_policy_dir, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    adapter_of(tiny_policy_dir, tmp_path / "adapter")
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for base, words in (("gone/base", "gone/base: no such folder"), (None, "does not name its model")):
        path.write_text(json.dumps(config | {"base_model_name_or_path": base}))
        with pytest.raises(InputError, match=words) as error:
            load_causal_lm(tmp_path / "adapter")
        assert "\n" not in str(error.value) and "an adapter" in str(error.value)


@pytest.mark.parametrize("name", ["score", "value_head", "v_head.summary"])
def test_reward_heads_of_other_libraries_score_as_they_did(name, tiny_reward_dir, tmp_path):
    """The oracle: the trunk's states times the head's weight, plus its bias, as those libraries have it."""
    labels = {"num_labels": None, "id2label": None, "label2id": None, "architectures": ["LlamaForCausalLM"]}
    folder = changed(tiny_reward_dir, tmp_path / "reward", **labels)
    weights = load_file(folder / "model.safetensors")
    weight = weights[f"{name}.weight"] = weights.pop("score.weight")
    bias = torch.tensor([0.7]) if name == "v_head.summary" else torch.zeros(1)
    if name == "v_head.summary":
        weights[f"{name}.bias"] = bias
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    model = load_scalar_model(folder, fresh_head=False)
    with torch.no_grad():
        states = model.model(TOKENS).last_hidden_state
        got = ScalarModel(model)(TOKENS, torch.full((2,), 6))
    torch.testing.assert_close(got, states @ weight[0] + bias)


def test_openrlhf_s_normalisation_is_taken_over(tiny_reward_dir, tmp_path):
    folder = changed(tiny_reward_dir, tmp_path / "reward", normalize_reward=True, mean=0.3, std=2.0, id2label=None)
    plain, scalar = (ScalarModel(load_scalar_model(f, fresh_head=False)) for f in (tiny_reward_dir, folder))
    lengths = torch.full((2,), 6)
    torch.testing.assert_close(scalar(TOKENS, lengths), (plain(TOKENS, lengths) - 0.3) / 2.0)


def test_two_heads_are_ambiguous(tiny_reward_dir, tmp_path):
    folder = Path(shutil.copytree(tiny_reward_dir, tmp_path / "reward"))
    weights = load_file(folder / "model.safetensors")
    weights["value_head.weight"] = weights["score.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match=r"several heads \(score, value_head\)"):
        load_scalar_model(folder, fresh_head=False)


def test_models_of_other_kinds_are_refused_in_one_line(tiny_policy_dir, tmp_path):
    changed(tiny_policy_dir, tmp_path / "quantised", quantization_config={"quant_method": "gptq", "bits": 4})
    T5Config(d_model=8).save_pretrained(tmp_path / "encoder-decoder")
    Gemma3Config().save_pretrained(tmp_path / "vision")
    for folder, words in (
        ("quantised", r"quantised \(gptq\)"),
        ("encoder-decoder", "decoder-only"),
        ("vision", "gemma3"),
    ):
        with pytest.raises(InputError, match=words) as error:
            load_causal_lm(tmp_path / folder)
        assert "\n" not in str(error.value)
    sizes = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    bert = BertLMHeadModel(BertConfig(**sizes, num_attention_heads=2, initializer_range=0.3)).eval()
    with pytest.raises(InputError, match="BertLMHeadModel sees the tokens to come"):
        Policy(bert)


def test_a_folder_without_a_generation_config_or_in_bfloat16(tiny_policy_dir, tmp_path):
    folder = tmp_path / "policy"
    AutoModelForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.bfloat16).save_pretrained(
        folder, max_shard_size="8KB"
    )
    (folder / "generation_config.json").unlink()
    assert (folder / "model.safetensors.index.json").is_file()  # in shards
    model = load_causal_lm(folder)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    exact = load_causal_lm(tiny_policy_dir)
    assert all(
        torch.equal(p, q.bfloat16().float()) for p, q in zip(model.parameters(), exact.parameters(), strict=True)
    )
