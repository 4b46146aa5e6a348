"""Families with a recurrent state: their training pass is the stock model's, and transformers' generation agrees or is
refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from rollouts import sample, small_prompts

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import TransformersEngine

_IDS = {"vocab_size": 40, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
_SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 4, "max_position_embeddings": 64}
_DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_conv_kernel_dim": 3, "num_hidden_layers": 4}
_DELTA |= {"linear_key_head_dim": 4, "linear_value_head_dim": 4, "num_key_value_heads": 2, "head_dim": 4}
_EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
    "shared_expert_intermediate_size": 8,
}
_MAMBA = {"mamba_d_state": 4, "mamba_d_conv": 3, "num_key_value_heads": 4, "initializer_range": 0.3}
_TWO = {"n_mamba_heads": 4, "mamba_headdim": 8, "num_mem_blocks": 1, "adapter_rank": 4, "hybrid_layer_ids": [1, 3]}
_LAYERS = {"layer_types": ["linear_attention", "hybrid", "linear_attention", "hybrid"], "num_hidden_layers": 4}
# Its states are float32 in every dtype, and its sizes are rounded up.
_XLSTM = {"hidden_size": 128, "num_hidden_layers": 2, "num_blocks": 2, "num_heads": 2, "chunk_size": 8}
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_next": ("Qwen3NextConfig", "Qwen3NextForCausalLM", {**_SIZES, **_DELTA, **_EXPERTS}),
    "qwen3_5": ("Qwen3_5TextConfig", "Qwen3_5ForCausalLM", {**_SIZES, **_DELTA}),
    "zamba": (
        *("ZambaConfig", "ZambaForCausalLM"),
        {**_SIZES, **_MAMBA, "num_hidden_layers": 6, "attn_layer_period": 2, "attn_layer_offset": 1},
    ),
    "zamba2": (
        *("Zamba2Config", "Zamba2ForCausalLM"),
        {**_SIZES, **_MAMBA, **_LAYERS, **_TWO, "use_mem_rope": True, "chunk_size": 8, "mamba_ngroups": 1},
    ),
    "xlstm": ("xLSTMConfig", "xLSTMForCausalLM", _XLSTM),
}


def hybrid(name: str) -> Policy:
    """A policy of the family, in float64 where its layers compute in it."""
    config, model, sizes = FAMILIES[name]
    if not hasattr(transformers, model):
        pytest.skip(f"this transformers has no {model}")
    torch.manual_seed(3)
    made = getattr(transformers, config)(**_IDS, **sizes)
    made._experts_implementation = "eager"
    return Policy(getattr(transformers, model)(made).double()).eval()


@torch.no_grad()
@pytest.mark.parametrize("name", FAMILIES)
def test_families_with_a_recurrent_state_are_scored_and_sampled_from_or_refused(name):
    policy, batch = hybrid(name), small_prompts(4)
    # The oracle: the prompts unpadded, one by one, through the stock model.
    scores = policy(batch.tokens, batch.lengths, torch.ones_like(batch.lengths))
    for row, length in enumerate(batch.lengths.tolist()):
        tokens = batch.tokens[row, :length]
        table = policy.model(input_ids=tokens[None]).logits[0].double().log_softmax(-1)
        expected = table[:-1].gather(1, tokens[1:, None])[:, 0]
        torch.testing.assert_close(scores.log_probs[row, : length - 1].double(), expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(InputError, match=r"caches only keys and values.*set model.engine to rlhf_lightning.rollout.Tr"):
        sample(policy, batch, max_new_tokens=6)
    if name == "zamba2":  # whose generation computes its state otherwise than its training pass, in transformers 5
        refused = (
            r"Zamba2ForCausalLM: transformers' generation gives .* by up to 0\.\d+: this library cannot sample from"
        )
        with pytest.raises(InputError, match=refused):
            sample(policy, batch, TransformersEngine(), max_new_tokens=6)
        return
    rollout = sample(policy, batch, TransformersEngine(), temperature=0.9, max_new_tokens=6)
    scores = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths, 0.9)
    torch.testing.assert_close(rollout.log_probs.double(), scores.log_probs.double(), rtol=1e-4, atol=1e-4)
