"""Adapters beside frozen weights: peft's own model is the oracle, and the model without an adapter."""

from __future__ import annotations

import sys
import warnings
from pathlib import Path

import pytest
import torch
from architectures import build
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedTokenizerBase

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.export import export_policy, export_scalar
from rlhf_lightning.models.loading import load_causal_lm, load_scalar_model
from rlhf_lightning.models.lora import adapted_layers, add_adapter, base_fingerprint
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import gathered

LENGTHS, PROMPTS = torch.tensor([9, 5, 6, 4]), torch.tensor([4, 2, 1, 3])
TOKENS = torch.randint(3, 40, (4, 9), generator=torch.Generator().manual_seed(5))


def fill(module: nn.Module) -> None:
    """Adapters that change something: B is not 0 any more; the same numbers for the same shapes in the same order."""
    generator = torch.Generator().manual_seed(7)
    for name, parameter in module.named_parameters():
        if ".lora_" in name:
            drawn = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter.data.copy_(0.2 * drawn)


def adapted(name: str, critic: object = None, filled: bool = True) -> Policy:
    model = build(name)
    add_adapter(model, rank=3, alpha=7.0)
    if filled:
        fill(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gemma's capped logits
        return Policy(model, critic)


def response_log_probs(model: nn.Module) -> Tensor:
    """The oracle's sum of all response tokens' log-probs, row by row."""
    total = torch.zeros((), dtype=torch.float64)
    for row, (length, prompt) in enumerate(zip(LENGTHS.tolist(), PROMPTS.tolist(), strict=True)):
        ids = TOKENS[row : row + 1, :length]
        log_probs = model(input_ids=ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        total = total + log_probs[prompt - 1 :].sum()
    return total


@pytest.mark.parametrize("name", ["llama", "llama-tied", "qwen2", "gemma2", "gpt2"])
def test_gradients_are_pefts(name: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peft's own, about transformers' names
        oracle = get_peft_model(build(name), LoraConfig(r=3, lora_alpha=7.0, target_modules="all-linear"))
    fill(oracle)
    response_log_probs(oracle).backward()
    expected = {n: p for n, p in oracle.named_parameters() if p.grad is not None}
    policy = adapted(name)
    policy(TOKENS, LENGTHS, PROMPTS).log_probs.sum().backward()
    got = {n: p for n, p in policy.named_parameters() if p.grad is not None}
    assert {n for n, p in policy.named_parameters() if p.requires_grad} == got.keys()
    assert {f"base_model.{n}" for n in got} == expected.keys() and len(got) > 10
    rounding = {"rtol": 1e-5, "atol": 1e-5} if name == "gemma2" else {}  # its norms compute in float32
    for n, parameter in got.items():
        theirs = expected[f"base_model.{n}"].grad
        torch.testing.assert_close(parameter.grad, theirs, **rounding, msg=lambda m, n=n: f"{n}: {m}")


def test_the_fused_head_stays_in_use() -> None:
    for name in ("llama", "llama-tied", "cohere", "gpt2"):
        policy = adapted(name)
        assert policy.logit_scale == Policy(build(name)).logit_scale is not None
        assert type(policy.model.get_output_embeddings()) is nn.Linear


@pytest.mark.parametrize(("name", "critic"), [("llama", None), ("llama", "head"), ("gpt2", "head")])
def test_without_its_adapter_it_is_the_loaded_model_bit_for_bit(name: str, critic: object) -> None:
    policy, loaded = adapted(name, critic), Policy(build(name))
    with torch.no_grad():
        expected = loaded(TOKENS, LENGTHS, PROMPTS, 0.7)
        got = policy(TOKENS, LENGTHS, PROMPTS, 0.7, adapted=False)
        trained = policy(TOKENS, LENGTHS, PROMPTS, 0.7)
    assert torch.equal(got.log_probs, expected.log_probs) and torch.equal(got.entropy, expected.entropy)
    assert got.values is None
    assert (trained.log_probs - expected.log_probs).abs().max() > 0.1  # switched on again


def test_a_fresh_adapter_changes_nothing_and_is_the_same_everywhere() -> None:
    first, second = adapted("llama", filled=False), adapted("llama", filled=False)
    with torch.no_grad():
        expected = Policy(build("llama"))(TOKENS, LENGTHS, PROMPTS).log_probs
        assert torch.equal(first(TOKENS, LENGTHS, PROMPTS).log_probs, expected)
    for name, value in first.state_dict().items():
        assert torch.equal(second.state_dict()[name], value), name


def test_what_is_trained() -> None:
    policy = adapted("llama", "head")
    trained = {name for name, p in policy.named_parameters() if p.requires_grad}
    assert trained >= {"critic_head.weight", "critic_head.bias"}
    assert all(".lora_" in name or name.startswith("critic_head.") for name in trained)
    assert len(adapted_layers(policy)) == 3 * 7  # seven linear layers in each of three blocks
    chosen = build("llama")
    add_adapter(chosen, 2, 4.0, ["q_proj", "v_proj"])
    assert {name.rsplit(".", 1)[1] for name in adapted_layers(chosen)} == {"q_proj", "v_proj"}


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2"])
def test_exported_policies_have_it_in_their_weights(
    name: str, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    policy = adapted(name, "head")
    export_policy(policy, tiny_tokenizer, tmp_path / "model")
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits, policy.model(TOKENS).logits)
    assert not adapted_layers(load_causal_lm(tmp_path / "model"))
    handed = dict(gathered(policy.model))  # what an engine of its own gets
    assert handed.keys() == {name for name, _ in stock.named_parameters()}
    assert all(torch.equal(handed[name], value) for name, value in stock.named_parameters())


def test_exported_reward_models_have_it_in_their_weights(
    tiny_reward_dir: Path, pad_is_eos_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = load_scalar_model(tiny_reward_dir, fresh_head=False)
    add_adapter(model, 3, 7.0)
    fill(model)
    scalar = ScalarModel(model)
    export_scalar(scalar, pad_is_eos_tokenizer, tmp_path / "reward")
    stock = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32)
    full = torch.full((4,), 9)
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits[:, 0], at_last_token(scalar(TOKENS, full), full))


@pytest.mark.parametrize("targets", [None, ["q_proj", "down_proj"]])
def test_fused_experts_are_adapted_and_merged(
    targets: list[str] | None, tiny_tokenizer: PreTrainedTokenizerBase, tmp_path: Path
) -> None:
    model = build("mixtral")
    add_adapter(model, 2, 4.0, targets)
    names = {name.split(".", 2)[2] for name in adapted_layers(model.base_model)}
    assert names >= ({"mlp.experts", "mlp.experts.base_layer"} if targets is None else {"mlp.experts"})
    assert targets is None or names == {"self_attn.q_proj", "mlp.experts"}
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS).logits, build("mixtral")(TOKENS).logits)  # fresh, it changes nothing
    fill(model)
    policy = Policy(model)
    policy(TOKENS, LENGTHS, PROMPTS).log_probs.sum().backward()
    assert all((p.grad is not None and p.grad.abs().max() > 0) == p.requires_grad for p in model.parameters())
    export_policy(policy, tiny_tokenizer, tmp_path / "model")
    stock, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", dtype=torch.float64, output_loading_info=True, experts_implementation="eager"
    )
    assert not info["missing_keys"] and not info["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(stock(TOKENS).logits, model(TOKENS).logits, rtol=1e-5, atol=1e-5)
        plain = policy(TOKENS, LENGTHS, PROMPTS, adapted=False).log_probs
        assert torch.equal(plain, Policy(build("mixtral"))(TOKENS, LENGTHS, PROMPTS).log_probs)
    handed = dict(gathered(model))
    assert all(torch.equal(handed[name], value) for name, value in stock.named_parameters())


def test_weights_have_one_fingerprint_whatever_the_default_device() -> None:
    """Lightning builds models under the training device, for which ``meta`` stands in, and they are on the CPU yet."""
    model = build("llama")
    with torch.device("meta"):
        found = base_fingerprint(model)
    assert found == base_fingerprint(model) != base_fingerprint(build("qwen2"))


def test_a_rank_above_that_of_any_weight_is_refused() -> None:
    model = build("llama")
    most = max(min(weight.shape) for weight in model.model.parameters() if weight.ndim == 2)
    with pytest.raises(InputError, match=f"model.lora.rank: {most + 1} is above {most}, the highest rank"):
        add_adapter(model, most + 1, 4.0)
    add_adapter(model, most, 4.0)


def test_targets_that_cannot_be_adapted_are_refused() -> None:
    with pytest.raises(InputError, match=r"model.lora.targets: .*no_such_layer"):
        add_adapter(build("llama"), 2, 4.0, ["no_such_layer"])
    with pytest.raises(InputError, match=r"no layer's name ends with 'vproj'; did you mean v_proj\?"):
        add_adapter(build("llama"), 2, 4.0, ["q_proj", "vproj"])
    with pytest.raises(InputError, match=r"no layer's name ends with 'mlp'; there are down_proj, .*, up_proj, v_proj$"):
        add_adapter(build("llama"), 2, 4.0, ["mlp"])
    with pytest.raises(InputError, match=r"model.lora.targets: embed_tokens is Embedding; name linear layers"):
        add_adapter(build("llama"), 2, 4.0, ["embed_tokens"])


def test_without_peft_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"model.lora.rank: .*rlhf-lightning\[lora\]"):
        add_adapter(build("llama"), 2, 4.0)
