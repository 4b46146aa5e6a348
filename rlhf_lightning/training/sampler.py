"""The sampler: it answers prompts with a module's policy, by an engine that it hands new weights when they change."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import eos_ids
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.ops.checks import LEAST_TEMPERATURE, MOST_TEMPERATURE
from rlhf_lightning.options import NonNegativeFloat, NonNegativeInt, Options, PositiveFloat, PositiveInt
from rlhf_lightning.rollout.engine import Progress, RolloutEngine, Sampling
from rlhf_lightning.rollout.fitting import told_fitting_engine


@dataclass(frozen=True, kw_only=True)
class SamplingOptions(Options):
    """How responses are drawn.

    Args:
        max_new_tokens: response tokens at most.
        temperature: logits are divided by it; 0 takes the most probable token.
        top_k: sample from the k most probable tokens only; 0 from all.
        top_p: sample from the smallest set of tokens that has this probability; 1 from all.

    Raises:
        InputError: a value that is no such number.
    """

    max_new_tokens: PositiveInt = 64
    temperature: NonNegativeFloat = 1.0
    top_k: NonNegativeInt = 0
    top_p: PositiveFloat = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_p > 1.0:
            raise InputError(f"model.sampling.top_p: expected a probability in (0, 1], got {self.top_p}")
        for name in ("temperature", "eval_temperature"):
            value = getattr(self, name, None)
            if value and not LEAST_TEMPERATURE <= value <= MOST_TEMPERATURE:
                limits = f"{LEAST_TEMPERATURE:g} to {MOST_TEMPERATURE:g}"
                raise InputError(f"model.sampling.{name}: expected 0 or a number from {limits}, got {value:g}")

    @property
    def whole(self) -> bool:
        """Whether responses are drawn from the full distribution."""
        return self.top_k == 0 and self.top_p == 1.0


@dataclass(frozen=True, kw_only=True)
class RolloutOptions(SamplingOptions):
    """How responses are drawn in training, in validation and in ``predict``.

    Args:
        max_new_tokens: response tokens at most.
        temperature: of sampling, and of every log-prob that is trained on or measured; above 0.
        top_k: sample from the k most probable tokens only; 0 from all. Log-probs stay those of the full distribution.
        top_p: sample from the smallest set of tokens that has this probability; 1 from all. Log-probs likewise.
        eval_temperature: of the samples in validation; 0 is greedy, None the training temperature.
        best_of: in ``predict`` each answer is the best by reward of so many; training does not use it.

    Raises:
        InputError: a value that is no such number.
    """

    eval_temperature: NonNegativeFloat | None = None
    best_of: PositiveInt = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.temperature == 0:
            raise InputError(
                "model.sampling.temperature: 0 leaves nothing to learn from, since every response to a prompt would be "
                "the same; set a number above 0 (eval_temperature 0 makes validation greedy)"
            )


class Answering(Protocol):
    """The object whose policy answers, such as a module."""

    tokenizer: PreTrainedTokenizerBase

    @property
    def policy(self) -> Policy | None:
        """What answers; None before there is one."""

    @property
    def global_step(self) -> int:
        """The optimizer step whose weights the policy has."""

    def report_phase(self, phase: str, done: int, total: int) -> None:
        """Hears how far the sampling is."""


class Sampler:
    """Answers prompts with a policy.

    Args:
        options: how responses are drawn.
        engine: what answers; None takes this library's own decode loop, or transformers' generation where that cannot
            run the model, once there is a policy to ask.
        seed: of the draws.
    """

    def __init__(self, options: SamplingOptions, engine: RolloutEngine | None, seed: int) -> None:
        self.options = options
        self.engine = engine
        self.seed = seed
        self._step: int | None = None  # the optimizer step whose weights the engine has

    def forget(self) -> None:
        """Hands the weights over again before the next answer: a checkpoint may have been loaded."""
        self._step = None

    def __call__(self, host: Answering, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; every process takes part.

        Args:
            host: whose policy answers; the engine takes its weights over where its step is another than before.
            prompts: B prompts.
            iteration: which draws are used; equal numbers give equal responses.
            overrides: fields of `rollout.engine.Sampling`.

        Raises:
            InputError: there is no policy yet, or a process has no prompt.
            TrainingDiverged: logits were NaN or infinite, on whichever process.
            RolloutDropped: the run is to stop.
        """
        if not isinstance(prompts, PromptBatch):
            raise InputError(
                f"generate: takes a PromptBatch, not a {type(prompts).__name__}; PreferenceDataModule(FILE).prepare("
                "module.data_view, module.tokenizer, 'predict').predict_dataloader() gives them"
            )
        policy = host.policy
        if policy is None:
            raise InputError(f"{type(host).__name__}: there is no model yet; call configure_model() first")
        options: dict[str, Any] = {
            "max_new_tokens": self.options.max_new_tokens,
            "temperature": self.options.temperature,
            "top_k": self.options.top_k,
            "top_p": self.options.top_p,
            "eos_ids": eos_ids(policy.model, host.tokenizer),
            "seed": self.seed,
        }
        sampling = Sampling(iteration=iteration, **{**options, **overrides})
        report: Progress = partial(host.report_phase, "rollout")
        # Errors are shared before the engine's work and after it: the processes may have to do that work together.
        with failing_together():
            report(0, sampling.max_new_tokens)
            if len(prompts) == 0:
                raise InputError(
                    "data: a batch without prompts; give every process at least one row, of weight 0 where none is "
                    "left, as PreferenceDataModule does"
                )
        if self.engine is None:
            self.engine = told_fitting_engine(policy)
        if self._step != host.global_step:
            self.engine.receive(policy)
            self._step = host.global_step
        with failing_together():
            return self.engine.rollout(policy, prompts, host.tokenizer, sampling, report)

    def longest(self, data: Any, given: int) -> int:
        """Tokens of the longest sequence: ``given``, or the longest prompt of ``data`` with the longest response."""
        return max(given, int(getattr(data, "longest_prompt", 0)) + self.options.max_new_tokens)

    def policy_log_probs(self, rollout: Rollout) -> Tensor | None:
        """The rollout's log-probs ``[B, T]`` where they equal the policy's, for metrics; None where they do not.

        They equal the policy's where the engine is exact and samples from the full distribution.
        """
        return rollout.log_probs if self.engine is not None and self.engine.exact and self.options.whole else None

    def warn_of_narrowing(self) -> None:
        """Warns where top-k or top-p draw from another distribution than the log-probs are of."""
        if not self.options.whole:
            rank_zero_warn(
                "model.sampling.top_k and top_p sample from a narrower distribution than the log-probs are of: expect "
                "a rollout/logprob_gap, a KL that may be negative, and ratios that leave the cut tokens out; set them "
                "to 0 and 1 unless that is meant"
            )


def answers(batch: PromptBatch, rollout: Rollout) -> list[dict[str, Any]]:
    """The responses as rows for a JSONL file; rows of weight 0 are left out."""
    return [
        {
            "row": int(batch.rows[index]),
            "prompt": batch.prompts[index],
            "response": rollout.responses[index],
            "tokens": int(rollout.response_lengths[index]),
            "truncated": bool(rollout.truncated[index]),
        }
        for index in range(len(batch))
        if batch.weights[index] > 0
    ]
