"""An engine that calls transformers' ``generate``, for models whose caches hold more than keys and values."""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList, PreTrainedModel

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import computed_in, nearly_equal
from rlhf_lightning.models.loading import check_length
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.sharding import unsharded
from rlhf_lightning.models.vocabulary import Vocabulary
from rlhf_lightning.ops.sample_tokens import sample_tokens
from rlhf_lightning.rollout.engine import Progress, Responses, RolloutEngine, Sampling, ready_to_decode


class TransformersEngine(RolloutEngine):
    """Generation by transformers, for state-space and hybrid models, or to compare with.

    Prompts of the same length are answered together, so that no model ever sees padding. Tokens are drawn as in the
    native engine, so both engines give the same responses, up to rounding.
    """

    exact = True

    def __init__(self) -> None:
        self._checked: weakref.WeakSet[Policy] = weakref.WeakSet()

    def generate(
        self, policy: Policy, prompts: PromptBatch, sampling: Sampling, progress: Progress | None = None
    ) -> Responses:
        """See `RolloutEngine`.

        Raises:
            InputError: the model's generation computes other log-probs than its training pass.
        """
        if policy not in self._checked:
            self._check(policy)
            self._checked.add(policy)
        return self._generate(policy, prompts, sampling, progress)

    def _check(self, policy: Policy) -> None:
        """Lets the policy answer two prompts of three tokens, and compares the log-probs with its training pass."""
        device = next(policy.parameters()).device
        one = torch.ones(2, dtype=torch.int64, device=device)
        tokens = torch.arange(6, device=device).view(2, 3) % policy.model.config.get_text_config().vocab_size
        prompts = PromptBatch(tokens, 3 * one, one.cumsum(0), one.float(), [], {})
        found = self._generate(policy, prompts, Sampling(max_new_tokens=5, eos_ids=[]))
        with torch.no_grad(), unsharded(policy), ready_to_decode(policy):
            expected = policy(torch.cat([tokens, found.tokens], dim=1), 8 * one, 3 * one).log_probs
        if bool(expected.isfinite().all()) and not nearly_equal(found.log_probs, expected, computed_in(policy)):
            apart = float((found.log_probs - expected).abs().max())
            raise InputError(
                f"{type(policy.model).__name__}: transformers' generation gives other log-probs than the model's "
                f"training pass, by up to {apart:.2g}: this library cannot sample from the model"
            )

    @torch.no_grad()
    def _generate(
        self, policy: Policy, prompts: PromptBatch, sampling: Sampling, progress: Progress | None = None
    ) -> Responses:
        count, width = len(prompts), sampling.max_new_tokens
        longest = int(prompts.lengths.max()) if count else 0
        check_length(policy.model, longest + width, policy.model.name_or_path or "model")
        tokens = prompts.tokens.new_zeros(count, width)
        log_probs = torch.zeros(count, width, dtype=torch.float32, device=tokens.device)
        entropy = torch.zeros_like(log_probs)
        lengths = torch.zeros_like(prompts.lengths)
        truncated = torch.ones(count, dtype=torch.bool, device=tokens.device)
        draws = sampling.draws(prompts.rows)
        ends = torch.tensor(list(sampling.eos_ids), dtype=torch.int64, device=tokens.device)
        with unsharded(policy), ready_to_decode(policy), _plain_generation(policy.model):
            for length in prompts.lengths.unique().tolist():
                rows = (prompts.lengths == length).nonzero()[:, 0]
                drawn = _Draws(policy.vocabulary, sampling, draws[rows], length, progress)
                found = policy.generate(
                    prompts.tokens[rows, :length],
                    attention_mask=torch.ones(len(rows), length, dtype=torch.int64, device=rows.device),
                    generation_config=GenerationConfig(
                        max_new_tokens=width, do_sample=False, eos_token_id=ends.tolist() or None, pad_token_id=0
                    ),
                    logits_processor=LogitsProcessorList([drawn]),
                    synced_gpus=False,
                )[:, length:]
                steps = found.shape[1]
                at_end = torch.isin(found, ends)
                before = at_end.cumsum(dim=1) - at_end.long()  # ends before each token
                tokens[rows, :steps] = found
                log_probs[rows, :steps] = torch.stack(drawn.log_probs, dim=1)
                entropy[rows, :steps] = torch.stack(drawn.entropy, dim=1)
                lengths[rows] = (before == 0).sum(dim=1)
                truncated[rows] = ~at_end.any(dim=1)
        return Responses(tokens, log_probs, lengths, truncated, entropy)


class _Draws(LogitsProcessor):
    """Draws the next tokens, and sets all other scores to -inf, so that greedy search takes the drawn ones."""

    def __init__(
        self, vocabulary: Vocabulary, sampling: Sampling, draws: Tensor, prompt: int, progress: Progress | None
    ) -> None:
        self.vocabulary = vocabulary
        self.sampling, self.draws, self.prompt, self.progress = sampling, draws, prompt, progress
        self.log_probs: list[Tensor] = []
        self.entropy: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step, options = input_ids.shape[1] - self.prompt, self.sampling
        tokens, log_probs, entropy = sample_tokens(
            self.vocabulary.logits(scores), self.draws[:, step], options.temperature, options.top_k, options.top_p
        )
        self.log_probs.append(log_probs.float())
        self.entropy.append(entropy.float())
        if self.progress is not None:
            self.progress(step + 1, options.max_new_tokens)
        return torch.full_like(scores, -torch.inf).scatter_(1, tokens[:, None], 0.0)


@contextmanager
def _plain_generation(model: PreTrainedModel) -> Iterator[None]:
    """Removes the model's own generation config, whose penalties and filters would apply by default."""
    config = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = config
