"""What every module that samples holds: a policy, its frozen reference and a reward, and passes over responses.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, Literal, NamedTuple

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, PromptBatch, Rollout, micro_batches
from rlhf_lightning.collectives import failing_together, rounds
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Reference, TokenScores
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rewards.base import Reward, check_scores
from rlhf_lightning.rollout.best_of import best_responses
from rlhf_lightning.rollout.engine import RolloutEngine


class ResponseScores(NamedTuple):
    """What the frozen passes over a rollout give, all float32 (float64 under ``64-true``)."""

    log_probs: Tensor  # [B, T] of the policy
    reference_log_probs: Tensor  # [B, T]
    values: Tensor | None  # [B, T + 1] of a critic: before each response token, and after the last; None without one


class SamplingModule(RLHFModule):
    """Builds and shards policy, reference and reward, samples, and evaluates responses in micro-batches.

    Args:
        model: folder (or hub id) of the policy to train.
        reward: what scores a response; None where a subclass's ``score`` needs none.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start; under LoRA that is the policy with its adapter switched off, with no weights of its own.
        max_new_tokens: response tokens at most.
        temperature: of sampling, and of every log-prob that is trained on or measured.
        top_k: sample from the k most probable tokens only; 0 from all. Log-probs stay those of the full distribution.
        top_p: sample from the smallest set of tokens that has this probability; 1 from all. Log-probs likewise.
        micro_batch_tokens: padded tokens in one forward pass at most: what bounds the memory. It does not change
            results.
        seed: of the sampling and of the order of minibatches.
        best_of: in ``predict`` each answer is the best by reward of so many; training does not use it.
        engine: what answers prompts; None takes this library's own decode loop, or transformers'
            generation where that cannot run the model, see docs/rollout.md.
        kwargs: the optimizer's and the model's options, see `RLHFModule`.
    """

    automatic = False
    reward: Reward | None  # both frozen, and kept out of the module tree
    reference: Reference
    trunk_critic: Literal["head"] | int | None = None  # a critic that shares the policy's trunk

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        reference: str | None = None,
        max_new_tokens: PositiveInt = 64,
        temperature: PositiveFloat = 1.0,
        top_k: NonNegativeInt = 0,
        top_p: PositiveFloat = 1.0,
        micro_batch_tokens: PositiveInt = 8192,
        seed: NonNegativeInt = 0,
        best_of: PositiveInt = 1,
        engine: RolloutEngine | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, **kwargs)
        if top_p > 1.0:
            raise InputError(f"model.top_p: expected a probability in (0, 1], got {top_p}")
        self.keep_frozen("reward", reward)
        self.reference_folder = reference
        self.max_new_tokens = max_new_tokens
        self.temperature = temperature
        self.top_k = top_k
        self.top_p = top_p
        self.micro_batch_tokens = micro_batch_tokens
        self.seed = seed
        self.best_of = best_of
        self.engine = engine
        self.phase_seconds: dict[str, float] = {}  # of the last iteration, by phase
        self.keep_frozen("reference", None)

    # ------------------------------------------------------------------ building the models

    def configure_model(self) -> None:
        """Load, shard and ready policy, reference and reward; called again for every stage, does it once."""
        if self.policy is not None:
            return
        self.policy = self.build_policy(self.model, critic=self.trunk_critic)
        self.keep_frozen("reference", self.build_reference(self.reference_folder))
        if self.reward is not None:
            mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
            self.reward.prepare(self.tokenizer, self.trainer.strategy.root_device, mesh)
            for part in self.reward.modules():
                if isinstance(part, ScalarModel):  # of a `ModelReward`; a reward of one's own has its own precision
                    self.trainer.precision_plugin.convert_module(part)

    def setup(self, stage: str) -> None:
        """Checks that need the tokenizer; see `RLHFModule.setup`.

        Raises: InputError when the reference's vocabulary is not the policy's: their log-probs would be of different
            tokens.
        """
        super().setup(stage)
        if self.reward is None and type(self).score is SamplingModule.score:
            raise InputError(
                "model.reward: none is given; name one (class_path: rlhf_lightning.rewards.ModelReward, ...) or "
                "override score() in a subclass"
            )
        if self.top_k > 0 or self.top_p < 1.0:
            rank_zero_warn(
                "model.top_k and model.top_p sample from a narrower distribution than the log-probs are of: expect a "
                "rollout/logprob_gap, a KL that may be negative, and ratios that leave the cut tokens out; set them to "
                "0 and 1 unless that is meant"
            )
        if self.reference_folder is not None:
            reference = load_tokenizer(self.reference_folder, self.trust_remote_code)
            if not (same_vocabulary(self.tokenizer, reference) and same_vocabulary(reference, self.tokenizer)):
                raise InputError(
                    f"model.reference: the vocabulary of {self.reference_folder} is not that of {self.model}; "
                    f"the KL needs "
                    "log-probs of the same tokens, so take a reference of the same tokenizer"
                )

    def score(self, rollout: Rollout) -> Tensor:
        """One score a response, ``[B]``; asks ``reward``. Override it for a reward of your own."""
        assert self.reward is not None
        return self.reward(rollout)

    def answer(self, prompts: PromptBatch) -> Rollout:
        """What ``predict`` says to the prompts: the best of ``best_of`` responses to each."""
        if self.best_of == 1:
            return super().answer(prompts)
        rollout = self.generate(prompts.repeat(self.best_of))
        scores = self.checked_scores(rollout)
        return best_responses(rollout, scores.masked_fill(torch.isnan(scores), -torch.inf), prompts)

    def checked_scores(self, rollout: Rollout) -> Tensor:
        """The scores ``[B]``, finite, or NaN for none where the reward may skip.

        Raises: InputError on all processes when the scores of one are wrong.
        """
        may_skip = self.reward is not None and self.reward.may_skip
        date = getattr(getattr(self._trainer, "datamodule", None), "date", None)
        for part in self.reward.modules() if self.reward is not None and date is not None else ():
            if isinstance(part, Reward):
                part.date = date
        with failing_together():
            return check_scores(self.score(rollout), rollout, f"{type(self).__name__}.score", may_skip)

    def scored(self, rollout: Rollout, totals: Totals, group_size: int = 1) -> tuple[Rollout, Tensor]:
        """The rollout with its checked scores ``[B]``, and what the reward noted added to ``totals``.

        Where the reward may skip, a response without a score has score 0 and weight 0 from here on, and with it the
        others to the same prompt: a group is compared as a whole. ``reward/skipped`` counts them.
        """
        scores = self.checked_scores(rollout)
        if self.reward is not None and self.reward.may_skip:
            weights = rollout.prompts.weights
            missing = torch.isnan(scores).reshape(-1, group_size).any(dim=1).repeat_interleave(group_size)
            totals.add("reward/skipped", missing, weights > 0)
            rollout = replace(rollout, prompts=replace(rollout.prompts, weights=weights.masked_fill(missing, 0.0)))
            scores = scores.masked_fill(missing, 0.0)
        for part in self.reward.modules() if self.reward is not None else ():
            for name, values in part.noted.items() if isinstance(part, Reward) else ():
                totals.add(f"reward/{name}", values, rollout.prompts.weights > 0)
        return rollout, scores

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Note the seconds that the block takes under the phase's name."""
        began = time.monotonic()
        yield
        self.phase_seconds[phase] = time.monotonic() - began

    # ------------------------------------------------------------------ passes over responses

    @torch.no_grad()
    def evaluate(
        self, rollout: Rollout, temperature: float | None = None, known: Tensor | None = None
    ) -> ResponseScores:
        """Log-probs of policy and reference, and a critic's values, in micro-batches; no gradient.

        Args:
            rollout: the responses.
            temperature: of the log-probs; None is the training temperature.
            known: the policy's log-probs ``[B, T]``, taken instead of a pass of its own; None where they are not known.
        """
        temperature = self.temperature if temperature is None else temperature
        rows, width = len(rollout), rollout.log_probs.shape[1]
        log_probs, reference_log_probs, values = (rollout.log_probs.new_zeros(rows, width + n) for n in (0, 0, 1))
        valued = False
        everything = torch.arange(rows, device=rollout.lengths.device)
        for part, counted, _ in self.rounds(rollout.lengths, everything, "score"):
            longest = int(rollout.lengths[part].max())
            inputs = rollout.tokens[part, :longest], rollout.lengths[part], rollout.prompt_lengths[part]
            if known is None or self.trunk_critic is not None:  # such a critic has no pass of its own
                own, _, state_values = self.token_scores(*inputs, temperature)
            else:
                own, state_values = None, self.own_values(*inputs)
            reference = self.reference(*inputs, temperature).log_probs
            if counted:
                steps = reference.shape[1]
                if own is not None:
                    log_probs[part, :steps] = own
                reference_log_probs[part, :steps] = reference
                if state_values is not None:
                    values[part, : steps + 1], valued = state_values, True
        return ResponseScores(log_probs if known is None else known, reference_log_probs, values if valued else None)

    @torch.no_grad()
    def watch(self, demonstrations: DemonstrationBatch, totals: Totals) -> None:
        """Add the policy's negative log-likelihood of what people answered, a token, to ``totals``: it rises as the
        policy forgets. At temperature 1, as in supervised fine-tuning."""
        assert self.policy is not None
        everything = torch.arange(len(demonstrations), device=demonstrations.lengths.device)
        for rows, counted, _ in self.rounds(demonstrations.lengths, everything, "perplexity"):
            part = demonstrations.take(rows)
            weights = part.response_weights if counted else torch.zeros_like(part.response_weights)
            log_probs = self.policy(part.tokens, part.lengths, part.prompt_lengths).log_probs
            totals.add("demonstrations/loss", -log_probs, weights)

    def sampled_log_probs(self, rollout: Rollout) -> Tensor | None:
        """The rollout's log-probs ``[B, T]`` where they are the policy's, for metrics; None where they are not.

        They are where the engine is exact and samples from the full distribution.
        """
        whole = self.top_k == 0 and self.top_p == 1.0
        return rollout.log_probs if self.engine is not None and self.engine.exact and whole else None

    def token_scores(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, temperature: float) -> TokenScores:
        """The policy's log-probs and entropies of right-padded rows ``[B, S]``, and a critic's values with them."""
        assert self.policy is not None
        return self.policy(tokens, lengths, prompt_lengths, temperature)

    def own_values(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor | None:
        """The values ``[B, T + 1]`` of a critic that is a model of its own; None without one."""
        return None

    def rounds(self, lengths: Tensor, rows: Tensor, phase: str) -> Iterator[tuple[Tensor, bool, bool]]:
        """The given rows in micro-batches, as (row numbers, whether they count, whether it is the last round).

        As many on every process, see `collectives.rounds`; where one has no rows, its row 0 stands for them, uncounted.
        """
        groups = micro_batches(lengths[rows], self.micro_batch_tokens)
        parts = list(rounds(len(groups)))
        for done, (number, counted, last) in enumerate(parts):
            self.report_phase(phase, done, len(parts))
            yield (rows[groups[number]] if counted else rows.new_zeros(1)), counted, last
        self.report_phase(phase, len(parts), len(parts))
