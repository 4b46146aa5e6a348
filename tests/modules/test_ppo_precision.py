"""PPO under precision 64-true: what it samples, measures and learns from is float64 all through."""

from __future__ import annotations

import pytest
import torch
from ppo_harness import TokenReward, fit, make_module, prompts
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM

from rlhf_lightning.rewards import ModelReward, WeightedSum

FLOAT64 = ("log_probs", "reference_log_probs", "values", "advantages", "returns")


class CountReward(TokenReward):
    """Thirds, which float32 would round."""

    def forward(self, rollout):
        return super().forward(rollout) / 3


def double_log_probs(folder, rollout):
    """Log-probs of each response's tokens, by Hugging Face's model in float64, row by row."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    found = []
    for row in range(len(rollout)):
        start, end = int(rollout.prompt_lengths[row]), int(rollout.lengths[row])
        tokens = rollout.tokens[row, :end]
        with torch.no_grad():
            table = model(tokens[None]).logits[0, start - 1 : end - 1].log_softmax(-1)
        found.append(table.gather(-1, tokens[start:, None])[:, 0])
    return found


@pytest.mark.parametrize("critic", ["model", "head"])
def test_float64_stays_float64_in_training_and_validation(tiny_policy_dir, critic):
    module = make_module(tiny_policy_dir, CountReward(), critic={"kind": critic}, advantages={"whiten": False})
    trainer = fit(module, precision="64-true")
    rollout, experience = module.rollouts[0], module.experiences[0]
    assert {getattr(experience, name).dtype for name in FLOAT64} == {torch.float64}
    assert rollout.log_probs.dtype == torch.float64
    for row, true in enumerate(double_log_probs(tiny_policy_dir, rollout)):
        steps = len(true)
        for found in (rollout.log_probs, experience.log_probs, experience.reference_log_probs):
            torch.testing.assert_close(found[row, :steps], true, rtol=1e-10, atol=1e-12)
    seen = []
    evaluate = module.actors.evaluate
    module.actors.evaluate = lambda *args, **kwargs: seen.append(evaluate(*args, **kwargs)) or seen[-1]
    trainer.validate(module, DataLoader([prompts(8)], batch_size=None), verbose=False)
    assert {scores.dtype for scores in seen[0]} == {torch.float64}
    assert all(torch.isfinite(scores).all() for scores in seen[0])
    assert module.logged[-1]["val/kl"] == pytest.approx(module.logged[-1]["val/kl"])  # not NaN


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_a_reward_model_is_kept_in_the_precision_of_the_others(tiny_policy_dir, tiny_reward_dir, precision):
    reward = WeightedSum([ModelReward(str(tiny_reward_dir)), TokenReward()], [1.0, 0.5])
    module = make_module(tiny_policy_dir, reward)
    fit(module, precision=precision)
    models = {"policy": module.policy, "reference": module.reference, "reward": reward}
    dtypes = {name: {weight.dtype for weight in model.parameters()} for name, model in models.items()}
    expected = torch.float64 if precision == "64-true" else torch.bfloat16
    assert set().union(*dtypes.values()) == {expected}, dtypes
    assert module.rollouts[0].log_probs.isfinite().all()
