import json
import shutil
from pathlib import Path

import pytest
import torch
from tiny_models import make_config
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
)

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import (
    check_length,
    check_vocabularies,
    eos_ids,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    same_vocabulary,
)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.fixture
def policy_copy(tiny_policy_dir: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_policy_dir, tmp_path / "policy"))


def one_line(message: object) -> bool:
    return "\n" not in str(message)


def test_weights_come_in_the_dtype_asked_for(tiny_policy_dir: Path) -> None:
    exact = load_causal_lm(tiny_policy_dir)
    half = load_causal_lm(tiny_policy_dir, dtype=torch.bfloat16)
    assert {p.dtype for p in exact.parameters()} == {torch.float32}
    assert {p.dtype for p in half.parameters()} == {torch.bfloat16}
    torch.testing.assert_close(half.lm_head.weight, exact.lm_head.weight.bfloat16())


def test_dropout_is_off_in_train_mode(tmp_path: Path) -> None:
    config = GPT2Config(vocab_size=20, n_embd=8, n_layer=2, n_head=2, n_positions=16, eos_token_id=1, bos_token_id=1)
    assert config.resid_pdrop == config.attn_pdrop == 0.1
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    tokens = torch.arange(10)[None]
    for model in (load_causal_lm(tmp_path), load_scalar_model(tmp_path, fresh_head=True)):
        model.config.pad_token_id = 0
        model.train()
        assert torch.equal(model(tokens).logits, model(tokens).logits)
        assert {m.p for m in model.modules() if isinstance(m, torch.nn.Dropout)} == {0.0}


def test_the_pad_tokens_embedding_learns(tmp_path: Path) -> None:
    """Where pad is EOS its row is a real token's, also between the turns of a chat."""
    config = LlamaConfig(
        vocab_size=20, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2, pad_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path)
    model(torch.tensor([[3, 1, 4]])).logits.sum().backward()
    assert model.get_input_embeddings().weight.grad[1].abs().max() > 0


def test_tokenizer_without_pad_takes_eos(policy_copy: Path) -> None:
    config = json.loads((policy_copy / "tokenizer_config.json").read_text())
    del config["pad_token"]
    (policy_copy / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(policy_copy)
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 1
    assert len(tokenizer) == 64


def test_tokenizer_without_eos_is_refused(policy_copy: Path) -> None:
    config = json.loads((policy_copy / "tokenizer_config.json").read_text())
    del config["eos_token"]
    (policy_copy / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match="no EOS token"):
        load_tokenizer(policy_copy)


def test_reward_folder_loads_with_its_head(tiny_reward_dir: Path) -> None:
    first, second = (load_scalar_model(tiny_reward_dir, fresh_head=False, seed=s) for s in (1, 2))
    assert torch.equal(first.score.weight, second.score.weight)
    assert first.score.weight.shape == (1, 32)


def test_fresh_head_depends_on_the_seed_alone(tiny_policy_dir: Path) -> None:
    heads = []
    for seed in (1, 1, 2):
        torch.rand(3)  # the global generator plays no part
        heads.append(load_scalar_model(tiny_policy_dir, fresh_head=True, seed=seed).score.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert 0.5 < heads[0].std().item() * 33**0.5 < 1.5


@pytest.mark.parametrize("source", ["policy", "reward"])
def test_fresh_head_keeps_the_trunk(source: str, tiny_policy_dir: Path, tiny_reward_dir: Path) -> None:
    folder = tiny_policy_dir if source == "policy" else tiny_reward_dir
    load = load_causal_lm if source == "policy" else lambda path: load_scalar_model(path, fresh_head=False)
    trained, fresh = load(folder), load_scalar_model(folder, fresh_head=True, seed=5)
    for name, weight in trained.model.state_dict().items():
        assert torch.equal(weight, fresh.model.state_dict()[name]), name
    if source == "reward":
        assert not torch.equal(trained.score.weight, fresh.score.weight)


def test_a_policy_given_as_reward_model_names_the_remedy(tiny_policy_dir: Path) -> None:
    with pytest.raises(InputError, match=r"no trained reward head.*--config reward_model.yaml --model.model") as error:
        load_scalar_model(tiny_policy_dir, fresh_head=False)
    assert str(tiny_policy_dir) in str(error.value) and one_line(error.value)


def test_a_reward_model_given_as_policy(tiny_reward_dir: Path) -> None:
    with pytest.raises(InputError, match=r"LlamaForSequenceClassification lack lm_head.weight"):
        load_causal_lm(tiny_reward_dir)


def test_a_classifier_of_several_labels(tmp_path: Path) -> None:
    LlamaForSequenceClassification(make_config(num_labels=3)).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="3 outputs"):
        load_scalar_model(tmp_path, fresh_head=False)
    assert load_scalar_model(tmp_path, fresh_head=True).score.weight.shape == (1, 32)


def test_folders_that_cannot_be(tiny_policy_dir: Path, tmp_path: Path) -> None:
    cases = {
        tmp_path / "absent": "no such folder",
        "../absent/model": "no such folder",
        tiny_policy_dir / "config.json": "a file, where a model folder",
        tmp_path: r"no config\.json",
    }
    for path, message in cases.items():
        with pytest.raises(InputError, match=message) as error:
            load_causal_lm(path)
        assert str(path) in str(error.value) and one_line(error.value)


def test_a_folder_in_a_folder_that_exists_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "runs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="runs/sft: no such folder"):
        load_tokenizer("runs/sft")


def test_a_name_that_the_hub_does_not_give(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nobody/nothing: no such folder, and no model of that name was") as error:
        load_causal_lm("nobody/nothing")
    assert one_line(error.value)


def test_weights_missing_truncated_or_in_part(policy_copy: Path) -> None:
    weights = policy_copy / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match="no model could be loaded") as error:
        load_causal_lm(policy_copy)
    assert one_line(error.value)
    weights.unlink()
    with pytest.raises(InputError, match=r"no weights in this folder: it needs model\.safetensors"):
        load_causal_lm(policy_copy)
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00002-of-00002.safetensors"}}
    (policy_copy / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(InputError, match=r"model-00002-of-00002\.safetensors is named in"):
        load_causal_lm(policy_copy)


def test_weights_of_another_size(policy_copy: Path) -> None:
    config = json.loads((policy_copy / "config.json").read_text())
    config["vocab_size"] = 99
    (policy_copy / "config.json").write_text(json.dumps(config))
    with pytest.raises(InputError, match=r"is \[64, 32\] in the weights and \[99, 32\] by config\.json") as error:
        load_causal_lm(policy_copy)
    assert one_line(error.value)


def test_ids_beyond_the_embeddings(tiny_policy_dir: Path, tiny_tokenizer: object) -> None:
    model = load_causal_lm(tiny_policy_dir)
    check_vocabularies(tiny_tokenizer, model)
    grown = load_tokenizer(tiny_policy_dir)
    grown.add_tokens(["unheard"])
    with pytest.raises(InputError, match=r"'unheard' with id 64 .* below 64"):
        check_vocabularies(grown, model, "somewhere")


def test_sequences_beyond_the_positions(tiny_policy_dir: Path) -> None:
    model = load_causal_lm(tiny_policy_dir)
    check_length(model, 128)
    with pytest.raises(InputError, match=r"129 tokens .* positions for 128"):
        check_length(model, 129)


def test_same_vocabulary(tiny_tokenizer: object, pad_is_eos_tokenizer: object, tiny_policy_dir: Path) -> None:
    assert same_vocabulary(tiny_tokenizer, pad_is_eos_tokenizer)
    grown = load_tokenizer(tiny_policy_dir)
    grown.add_tokens(["unheard"])
    assert same_vocabulary(tiny_tokenizer, grown) and not same_vocabulary(grown, tiny_tokenizer)


def test_ids_that_end_a_response(tiny_tokenizer: object, tiny_policy_dir: Path) -> None:
    assert eos_ids(load_causal_lm(tiny_policy_dir), tiny_tokenizer) == [1]
    assert eos_ids(GenerationConfig(eos_token_id=[7, 5]), tiny_tokenizer) == [1, 5, 7]
    assert eos_ids(None, tiny_tokenizer) == [1]


def test_a_family_without_a_sequence_classifier_is_refused_in_one_line(tmp_path: Path) -> None:
    tiny = {
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "vocab_size": 10,
    }
    CohereForCausalLM(CohereConfig(**tiny)).save_pretrained(tmp_path)
    with pytest.raises(InputError) as caught:
        load_scalar_model(tmp_path, fresh_head=True)
    assert str(caught.value) == (
        f"{tmp_path}: transformers has no sequence classifier of cohere models: give a reward model of another family; "
        "for a critic, set model.critic.kind to head"
    )
