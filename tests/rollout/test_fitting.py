"""Where nobody chose an engine, one that can run the model answers, as the other would."""

from __future__ import annotations

import torch
from rollouts import sample, small_policy, small_prompts
from transformers import FalconConfig, FalconForCausalLM

from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rollout import NativeEngine, TransformersEngine
from rlhf_lightning.rollout.fitting import fitting_engine


def test_a_model_with_another_cache_is_answered_by_transformers() -> None:
    assert type(fitting_engine(small_policy("llama"))) is NativeEngine
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 40}
    policy = Policy(FalconForCausalLM(FalconConfig(**sizes, alibi=False, bos_token_id=2, eos_token_id=1)).eval())
    engine = fitting_engine(policy)
    assert type(engine) is TransformersEngine
    rollout = sample(policy, small_prompts(), engine)
    again = policy(rollout.tokens, rollout.lengths, rollout.prompt_lengths).log_probs
    torch.testing.assert_close(again, rollout.log_probs, rtol=1e-4, atol=1e-5)


def test_what_a_model_keeps_of_the_trial_can_be_trained_with() -> None:
    """An engine is chosen while Lightning validates, in inference mode; a tensor of that mode takes no gradient."""
    policy, kept = small_policy("llama"), []
    policy.model.get_input_embeddings().register_forward_hook(lambda module, inputs, out: kept.append(out))
    with torch.inference_mode():
        fitting_engine(policy)
    assert kept and not any(tensor.is_inference() for tensor in kept)
