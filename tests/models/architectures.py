"""Tiny models of several architectures, in float64 for exact comparisons, with weights large enough to matter."""

from __future__ import annotations

import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

_COMMON = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
    "initializer_range": 0.3,
}
_GPT2 = {"vocab_size": 40, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "initializer_range": 0.3}
_GPT2 |= {"eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
_OPT = {"vocab_size": 40, "hidden_size": 16, "ffn_dim": 24, "num_hidden_layers": 3, "num_attention_heads": 4}
_OPT |= {"max_position_embeddings": 64, "init_std": 0.3, "eos_token_id": 1, "bos_token_id": 2, "pad_token_id": 0}
_ORIGINAL = {"original_max_position_embeddings": 12}

NAMES = ["llama", "llama-tied", "qwen2", "gemma2", "gemma3", "gpt2", "cohere", "granite", "mixtral", "opt", "phi3"]


def build(name: str, sliding_window: int = 64) -> PreTrainedModel:
    """A fresh model, dropout and fallbacks as in loading; ``sliding_window`` is used by the Gemmas."""
    torch.manual_seed(3)
    if name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(**_GPT2, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))
    elif name == "qwen2":
        model = Qwen2ForCausalLM(Qwen2Config(**_COMMON))
    elif name == "gemma2":
        config = Gemma2Config(**_COMMON, sliding_window=sliding_window, query_pre_attn_scalar=4)
        config.final_logit_softcapping = 5.0
        model = Gemma2ForCausalLM(config)
    elif name == "gemma3":
        kinds = ["sliding_attention", "full_attention", "sliding_attention"]
        config = Gemma3TextConfig(**_COMMON, sliding_window=sliding_window, layer_types=kinds, query_pre_attn_scalar=4)
        model = Gemma3ForCausalLM(config)
    elif name == "cohere":
        model = CohereForCausalLM(CohereConfig(**_COMMON, logit_scale=0.0625))  # logits times it
    elif name == "granite":
        model = GraniteForCausalLM(GraniteConfig(**_COMMON, logits_scaling=3.0))  # logits divided by it
    elif name == "mixtral":
        config = MixtralConfig(**_COMMON, num_local_experts=4, num_experts_per_tok=2)
        config._experts_implementation = "eager"  # the only one for float64
        model = MixtralForCausalLM(config)
    elif name == "opt":  # its states are narrower than its layers
        config = OPTConfig(**_OPT, dropout=0.0, word_embed_proj_dim=8, do_layer_norm_before=False)
        model = OPTForCausalLM(config)
    elif name == "phi3":  # long past 12 tokens
        rope = {"rope_type": "longrope", "short_factor": [1.0, 1.0], "long_factor": [8.0, 8.0], "rope_theta": 10000.0}
        model = Phi3ForCausalLM(
            Phi3Config(**_COMMON, original_max_position_embeddings=12, rope_parameters={**rope, **_ORIGINAL})
        )
    else:
        model = LlamaForCausalLM(LlamaConfig(**_COMMON, tie_word_embeddings=name == "llama-tied"))
    return model.double()
