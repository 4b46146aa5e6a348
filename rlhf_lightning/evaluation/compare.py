"""Compares policies on the same held-out prompts: answers, rewards, KL to a reference, win rates over a baseline.

Every policy answers every prompt once, from the same random draws. So two equal policies give the same answers and tie
on every prompt. Best-of-n is one more way of answering: it takes the one of n answers that a reward, the judge, scores
highest.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.evaluation.measures import kl_to_reference, mean_and_error, perplexity, repetition
from rlhf_lightning.evaluation.winrate import WinRate, length_controlled_win_rate, preferences, win_rate
from rlhf_lightning.models.loading import eos_ids, load_tokenizer, same_vocabulary
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.answering import batches_by_length, check_long_prompts, check_longest_prompt, load_policy
from rlhf_lightning.rollout.best_of import best_of_kl, best_responses
from rlhf_lightning.rollout.engine import Sampling
from rlhf_lightning.rollout.fitting import fitting_engine


@dataclass(frozen=True)
class Settings:
    """How the policies answer."""

    max_new_tokens: int = 128  # an answer that reaches it without EOS counts as cut off
    temperature: float = 1.0  # 0 takes the most probable token
    seed: int = 0
    batch_size: int = 32
    chat: bool = False  # put plain prompts through the chat template too
    device: str = "cpu"
    trust_remote_code: bool = False


@dataclass
class Answers:
    """One policy's answers to the N prompts, and the measurements of them. All tensors are on the CPU."""

    responses: list[str]
    lengths: Tensor  # [N] int64 response tokens, EOS included
    truncated: Tensor  # [N] bool, cut off at max_new_tokens
    repetition: Tensor  # [N] float64, the share of repeated 4-grams
    scores: dict[str, Tensor] = field(default_factory=dict)  # by reward: [N] float32
    k1: Tensor | None = None  # [N] float64, nats; None without a reference of the same vocabulary
    k3: Tensor | None = None
    best_of: int = 1  # n of best-of-n; k1 and k3 are then the policy's own values for the chosen answers
    perplexity: float | None = None  # on the held-out text; None without one
    seconds: float = 0.0

    @property
    def kl(self) -> float | None:
        """KL to the reference in nats: the mean of k1; for best-of-n an upper bound, since its log-probs are unknown.

        KL(best-of-n || reference) is the sum of KL(best-of-n || policy), at most `best_of_kl`, and the mean k1 of the
        chosen answers.
        """
        return None if self.k1 is None else float(self.k1.mean()) + best_of_kl(self.best_of)


@dataclass
class Comparison:
    """The answers of all policies to the same prompts."""

    prompts: list[str]
    answers: dict[str, Answers]  # by policy, in the order given
    baseline: str  # the policy that win rates are over
    rewards: tuple[str, ...]
    settings: Settings

    def win_rate(self, policy: str, reward: str) -> WinRate:
        """The win rate of ``policy`` over the baseline, by this reward. A tie counts half."""
        return win_rate(self._preferences(policy, reward))

    def length_controlled(self, policy: str, reward: str) -> WinRate:
        """The win rate if the answers were equally long. Lengths are in characters, which compare across tokenizers."""
        own_lengths, base_lengths = (
            torch.tensor([float(len(response)) for response in self.answers[name].responses])
            for name in (policy, self.baseline)
        )
        return length_controlled_win_rate(self._preferences(policy, reward), own_lengths, base_lengths)

    def _preferences(self, policy: str, reward: str) -> Tensor:
        return preferences(self.answers[policy].scores[reward], self.answers[self.baseline].scores[reward])

    def summary(self) -> dict[str, dict[str, Any]]:
        """The numbers of each policy, ready for JSON. Numbers that are not finite become null."""
        return {name: _finite(self._summary(name, answers)) for name, answers in self.answers.items()}

    def _summary(self, name: str, answers: Answers) -> dict[str, Any]:
        numbers: dict[str, Any] = {
            "tokens": float(answers.lengths.double().mean()),
            "truncated": float(answers.truncated.double().mean()),
            "repetition": float(answers.repetition.mean()),
            "perplexity": answers.perplexity,
            "seconds": round(answers.seconds, 2),
            "rewards": {reward: _spread(scores) for reward, scores in answers.scores.items()},
        }
        if answers.best_of > 1:
            numbers["best_of"], numbers["kl_bound"] = answers.best_of, answers.kl
        elif answers.k1 is not None and answers.k3 is not None:
            numbers["kl"], numbers["kl_standard_error"] = mean_and_error(answers.k1)
            numbers["kl_k3"] = float(answers.k3.mean())
        if name != self.baseline:
            numbers["win_rates"] = {reward: self._rates(name, reward) for reward in self.rewards}
        return numbers

    def _rates(self, name: str, reward: str) -> dict[str, Any]:
        plain, controlled = self.win_rate(name, reward), self.length_controlled(name, reward)
        return {
            "over": self.baseline,
            "win_rate": plain.value,
            "win_rate_ci": [plain.low, plain.high],
            "length_controlled": controlled.value,
            "length_controlled_ci": [controlled.low, controlled.high],
        }


def compare(
    policies: Mapping[str, str | Path],
    prompts: Sequence[Record],
    rewards: Mapping[str, Reward],
    settings: Settings,
    *,
    baseline: str | None = None,
    reference: str | Path | None = None,
    text: Sequence[Record] = (),
    best_of: Mapping[str, int] | None = None,
    judge: str | None = None,
    say: Callable[[str], object] = lambda line: None,
) -> Comparison:
    """Lets every policy answer the prompts, and measures the answers.

    Args:
        policies: model folders by name; only one of them, and the reference, is in memory at a time.
        prompts: records with the prompts; a prompt that occurs twice is answered once.
        rewards: rewards by name; each scores every policy's answers.
        baseline: the policy that win rates are over; None for the first.
        reference: the folder of the model that KL is measured to; None for the baseline's.
        text: held-out records with responses, for perplexity.
        best_of: by policy, the n of best-of-n; adds one more policy to the comparison, named by `best_of_name`.
        judge: the reward that chooses the best answer; None for the first.
        say: called with one line for each policy that has answered.

    Raises:
        InputError: the baseline is unknown, a folder has no model, a prompt is too long for a policy's positions, or a
            named reference has another vocabulary than a policy.
    """
    names = list(policies)
    baseline = names[0] if baseline is None else baseline
    if baseline not in policies:
        raise InputError(f"--baseline {baseline}: no such policy: it must be one of {', '.join(names)}")
    reference_folder = str(policies[baseline] if reference is None else reference)
    reference_tokenizer = load_tokenizer(reference_folder, settings.trust_remote_code)
    # All tokenizers first, so that a mistyped folder is found before the first policy has answered for an hour.
    tokenizers = {name: load_tokenizer(folder, settings.trust_remote_code) for name, folder in policies.items()}
    comparable = {name: same_vocabulary(each, reference_tokenizer) for name, each in tokenizers.items()}
    if reference is not None:
        _check_reference(reference, policies, comparable)
    reference_policy = load_policy(reference_folder, reference_tokenizer, settings.device, settings.trust_remote_code)
    texts: list[str] = []
    found = {}
    ways = [(name, 1) for name in names] + [(name, count) for name, count in (best_of or {}).items()]
    for name, count in ways:
        start = time.perf_counter()
        folder, tokenizer = policies[name], tokenizers[name]
        policy = load_policy(folder, tokenizer, settings.device, settings.trust_remote_code)
        encoder = Encoder(tokenizer, chat=settings.chat, columns="--columns")
        check_long_prompts(encoder, prompts, policy, folder, settings.max_new_tokens)
        batches = _batches(encoder, prompts, "prompts", settings)
        check_longest_prompt(batches, prompts, policy, folder, settings.max_new_tokens)
        texts = texts or _in_order(batches, [p for batch in batches for p in batch.prompts])
        known = reference_policy if comparable[name] else None
        measured = _answers(
            policy, known, tokenizer, batches, rewards, judge or next(iter(rewards), ""), settings, count
        )
        if text and count == 1:  # best-of-n has no probabilities
            measured.perplexity = perplexity(policy, _batches(encoder, text, "demonstrations", settings))
        measured.seconds = time.perf_counter() - start
        shown = best_of_name(name, count)
        found[shown] = measured
        say(f"{shown}: {len(measured.responses)} prompts answered in {measured.seconds:.1f} s")
    return Comparison(texts, found, baseline, tuple(rewards), settings)


def best_of_name(policy: str, count: int) -> str:
    """The comparison's name for a policy that answers with the best of ``count``; its own name for 1."""
    return policy if count == 1 else f"{policy} best of {count}"


def _check_reference(reference: str | Path, policies: Mapping[str, str | Path], comparable: Mapping[str, bool]) -> None:
    for name, same in comparable.items():
        if not same:
            raise InputError(
                f"--reference {reference}: its vocabulary is not that of {name} ({policies[name]}), and KL needs "
                "models of one vocabulary: name the model that the policy was trained from"
            )


def _batches(encoder: Encoder, records: Sequence[Record], kind: Kind, settings: Settings) -> list[Any]:
    """Batches on the device. ``rows`` of prompt batches gives the prompts' numbers in their order."""
    return [batch.to(settings.device) for batch in batches_by_length(encoder, records, kind, settings.batch_size)]


@torch.no_grad()
def _answers(
    policy: Policy,
    reference: Policy | None,
    tokenizer: PreTrainedTokenizerBase,
    batches: Sequence[PromptBatch],
    rewards: Mapping[str, Reward],
    judge: str,
    settings: Settings,
    count: int,
) -> Answers:
    for reward in rewards.values():
        reward.prepare(tokenizer, torch.device(settings.device))
    engine = fitting_engine(policy)
    sampling = Sampling(
        max_new_tokens=settings.max_new_tokens,
        temperature=settings.temperature,
        eos_ids=eos_ids(policy.model, tokenizer),
        seed=settings.seed,
    )
    parts = []
    # With n answers to each prompt, a batch has only an n-th of the prompts.
    for batch in _cut(batches, max(1, settings.batch_size // count)):
        rollout = engine.rollout(policy, batch.repeat(count), tokenizer, sampling)
        if count > 1:
            rollout = best_responses(rollout, rewards[judge](rollout), batch)
        parts.append(_measured(rollout, policy, reference, rewards, settings))
    columns = {key: _in_order(batches, [v for part in parts for v in part[key]]) for key in parts[0]}
    return Answers(
        responses=columns["responses"],
        lengths=torch.tensor(columns["lengths"]),
        truncated=torch.tensor(columns["truncated"]),
        repetition=torch.tensor(columns["repetition"], dtype=torch.float64),
        scores={name: torch.tensor(columns[f"score {name}"]) for name in rewards},
        k1=torch.tensor(columns["k1"], dtype=torch.float64) if "k1" in columns else None,
        k3=torch.tensor(columns["k3"], dtype=torch.float64) if "k3" in columns else None,
        best_of=count,
    )


def _cut(batches: Sequence[PromptBatch], rows: int) -> Iterator[PromptBatch]:
    """The same prompts in the same order, at most so many at a time."""
    for batch in batches:
        for part in torch.arange(len(batch), device=batch.rows.device).split(rows):
            yield batch.take(part)


def _measured(
    rollout: Rollout, policy: Policy, reference: Policy | None, rewards: Mapping[str, Reward], settings: Settings
) -> dict[str, list[Any]]:
    """The values to store of a batch of answers, each a list of B."""
    starts, ends = rollout.prompt_lengths.tolist(), rollout.lengths.tolist()
    rows = rollout.tokens.tolist()
    columns: dict[str, list[Any]] = {
        "responses": list(rollout.responses),
        "lengths": rollout.response_lengths.tolist(),
        "truncated": rollout.truncated.tolist(),
        "repetition": [repetition(row[a:b]) for row, a, b in zip(rows, starts, ends, strict=True)],
    }
    for name, reward in rewards.items():
        columns[f"score {name}"] = reward(rollout).cpu().tolist()
    if reference is not None:
        k1, k3 = kl_to_reference(policy, reference, rollout, settings.temperature)
        columns["k1"], columns["k3"] = k1.tolist(), k3.tolist()
    return columns


def _in_order(batches: Sequence[PromptBatch], values: list[Any]) -> list[Any]:
    """``values``, one for each row, brought from the batches' order into the order of the prompts."""
    rows = [row for batch in batches for row in batch.rows.tolist()]
    return [value for _, value in sorted(zip(rows, values, strict=True), key=lambda pair: pair[0])]


def _spread(scores: Tensor) -> dict[str, float]:
    mean, error = mean_and_error(scores)
    deviation = error * math.sqrt(len(scores))
    return {"mean": mean, "standard_error": error, "standard_deviation": deviation}


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
