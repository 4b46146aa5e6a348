"""What SFT and DPO share: a policy, trained on given responses, and how it answers prompts."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveInt

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.rollout.engine import RolloutEngine


class PolicyModule(RLHFModule):
    """Builds the policy; its sampling options serve ``predict`` and the sample tables, not the training.

    Args:
        model: folder (or hub id) of the policy to train.
        max_new_tokens: response tokens at most.
        temperature: of sampling; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 from all.
        top_p: sample from the smallest set of tokens that has this probability; 1 from all.
        seed: of the sampling.
        engine: what answers prompts; None takes this library's own decode loop, or transformers'
            generation where that cannot run the model, see docs/rollout.md.
        kwargs: the optimizer's and the model's options, see `RLHFModule`.
    """

    def __init__(
        self,
        model: str,
        max_new_tokens: PositiveInt = 64,
        temperature: NonNegativeFloat = 1.0,
        top_k: NonNegativeInt = 0,
        top_p: float = 1.0,
        seed: NonNegativeInt = 0,
        engine: RolloutEngine | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        if not 0.0 < top_p <= 1.0:
            raise InputError(f"model.top_p: expected a probability in (0, 1], got {top_p}")
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.seed = seed
        self.engine = engine

    def configure_model(self) -> None:
        """Load (and shard) the policy; called again for every stage, so only the first time counts."""
        if self.policy is None:
            self.policy = self.build_policy(self.model)
