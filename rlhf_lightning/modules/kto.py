"""KTO: each response is desirable or undesirable by itself, and is compared with mismatched responses."""

from __future__ import annotations

from itertools import zip_longest
from typing import NamedTuple

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.algorithms.losses import kto_loss
from rlhf_lightning.batches import LabelledBatch, PreferenceBatch, View
from rlhf_lightning.collectives import all_gather_objects, all_reduce_sum, rank
from rlhf_lightning.models.building import LoRAOptions, NetworkOptions
from rlhf_lightning.modules.preference import PreferenceModule
from rlhf_lightning.options import NonNegativeInt, PositiveFloat
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.frozen_reference import FrozenReference
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.pairs import JudgedLoss, Rows, as_rows, pair_loss, response_log_probs, wins
from rlhf_lightning.training.sampler import SamplingOptions


class JudgedResponses(NamedTuple):
    """Responses with their labels, and what stays fixed while the policy learns from them."""

    rows: Rows  # n responses
    reference_log_probs: Tensor  # [n] summed over the response
    baseline: Tensor  # scalar, z0
    desirable: Tensor  # [n] bool
    paired: bool  # whether the first half are chosen responses, and the second half the rejected ones beside them


class KTOModule(PreferenceModule):
    """Kahneman-Tversky optimisation: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.

    An example is one response with a label (data of ``prompt, completion, label``); or a pair is two examples, its
    chosen response a desirable one and its rejected response an undesirable one. The loss is the mean over examples,
    however many of them are desirable. Examples share nothing but the baseline ``z0``, an estimate of
    ``KL(policy || reference)`` without a gradient. It is the mean log-ratio of responses to prompts that they do not
    belong to, at least 0: each prompt of the batch is paired with the response of the next row that has another prompt.

    The batch is that of a training step, ``data.batch_size`` rows over all processes together, so ``z0`` and the
    gradient are the same for any number of processes. Batches that ``accumulate_grad_batches`` adds up have a ``z0``
    each, as the paper's micro-batches have. A batch with one prompt alone, which ``data.batch_tokens`` may make of long
    rows, has no other responses: its ``z0`` is 0, and a warning says so.

    What is logged: see `PreferenceModule`, and ``train/baseline``, ``val/baseline``, the ``z0``. Rewards are ``beta``
    times the summed log-ratio to the reference. Labelled responses have no margin. Their accuracy is the share whose
    reward is on the right side of ``beta z0``, and ``chosen`` means desirable. A kind that a step lacks is NaN.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        reference: folder of the frozen model that the policy is kept near; None takes ``model`` as it is at the start.
        beta: how strongly.
        desirable_weight: weight of the desirable responses' losses, the paper's lambda_D.
        undesirable_weight: weight of the undesirable responses' losses, the paper's lambda_U.
        sampling: how ``predict`` and the sample tables draw responses; the training draws none.
        engine: what answers there; see `SFTModule`.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of the sampling, and of adapters.
    """

    data_view = View("pairs", labels=True)
    frozen: FrozenReference

    def __init__(
        self,
        model: str,
        reference: str | None = None,
        beta: PositiveFloat = 0.1,
        desirable_weight: PositiveFloat = 1.0,
        undesirable_weight: PositiveFloat = 1.0,
        sampling: SamplingOptions = SamplingOptions(),
        engine: RolloutEngine | None = None,
        optimizer: AdamWOptions = AdamWOptions(),
        lora: LoRAOptions = LoRAOptions(),
        network: NetworkOptions = NetworkOptions(),
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__(
            model,
            reference=FrozenReference(reference),
            sampling=sampling,
            engine=engine,
            optimizer=optimizer,
            lora=lora,
            network=network,
            seed=seed,
        )
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def experience(self, batch: PreferenceBatch | LabelledBatch) -> JudgedResponses:
        """See `PreferenceModule.experience`; with the baseline and the labels."""
        paired = isinstance(batch, PreferenceBatch)
        if isinstance(batch, PreferenceBatch):
            rows = as_rows(batch)
            desirable = torch.arange(len(rows.lengths), device=rows.lengths.device) < len(batch)
        else:
            given, desirable = batch.responses, batch.desirable
            rows = Rows(given.tokens, given.lengths, given.prompt_lengths, given.response_mask)
        baseline = self.estimate_baseline(rows, batch.weights)
        return JudgedResponses(rows, self.frozen.log_probs(rows), baseline, desirable, paired)

    def loss(self, log_probs: Tensor, experience: JudgedResponses) -> JudgedLoss:
        """Equation 8. The loss of a pair is the mean of its two."""
        baseline, desirable = experience.baseline, experience.desirable
        ratios = log_probs - experience.reference_log_probs
        losses, rewards = self.response_losses(ratios, baseline, desirable), self.beta * ratios
        if experience.paired:
            losses = losses.reshape(2, -1).mean(dim=0)
            return pair_loss(losses, rewards, log_probs, baseline=baseline.expand(len(losses)))
        everything = torch.ones_like(desirable)
        metrics = {
            "accuracy": (torch.where(desirable, wins(ratios, baseline), wins(baseline, ratios)), everything),
            "baseline": (baseline.expand(len(losses)), everything),
        }
        for group, values in (("rewards", rewards), ("logps", log_probs)):
            metrics |= {f"{group}/chosen": (values, desirable), f"{group}/rejected": (values, ~desirable)}
        return JudgedLoss(losses, metrics)

    def response_losses(self, ratios: Tensor, baseline: Tensor, desirable: Tensor) -> Tensor:
        """``[n]``, each response's loss with its weight: of log-ratios ``[n]``, z0 and labels ``[n]``."""
        good = self.desirable_weight * kto_loss(ratios, baseline, self.beta, desirable=True)
        bad = self.undesirable_weight * kto_loss(ratios, baseline, self.beta, desirable=False)
        return torch.where(desirable, good, bad)

    def longest_sequence(self) -> int:
        """See `RLHFModule.longest_sequence`; the baseline pairs any prompt with any response."""
        mixed = getattr(self.datamodule, "longest_prompt", 0) + getattr(self.datamodule, "longest_response", 0)
        return max(super().longest_sequence(), mixed)

    @torch.no_grad()
    def estimate_baseline(self, rows: Rows, weights: Tensor) -> Tensor:
        """``z0``, a scalar: the same on every process, each of which calls it.

        Args:
            rows: this process's pairs, or labelled responses.
            weights: ``[B]``, theirs.
        """
        assert self.policy is not None
        others, weights = mismatched(rows, weights)
        ratios = response_log_probs(self.policy, others) - self.frozen.log_probs(others)
        sums = all_reduce_sum(torch.stack([(ratios * weights).sum(), weights.sum()]).double())
        if sums[1] == 0:
            rank_zero_warn(
                "KTO: a batch has one prompt alone, so its baseline z0 is 0: there is no other response to estimate it "
                "from; raise data.batch_size (of held-out rows data.val_batch_size), or data.batch_tokens where that "
                "leaves a row by itself"
            )
        mean = sums[0] / sums[1] if sums[1] > 0 else sums[0]
        return mean.clamp(min=0.0).to(ratios.dtype)


class _Answered(NamedTuple):
    process: int
    prompt: list[int]
    responses: list[list[int]]
    masks: list[list[bool]]  # of the responses: the tokens that count
    weight: float


def mismatched(rows: Rows, weights: Tensor) -> tuple[Rows, Tensor]:
    """Each of this process's prompts with the responses of the next one in the batch that is another prompt.

    The batch is that of all processes, in the order in which it was dealt to them row by row; after its last row comes
    its first.

    Args:
        rows: ``[nB]``, this process's prompts with n responses each: all first ones, then all second ones (of pairs).
        weights: ``[B]``, the prompts'; one of weight 0 lends its responses to none.

    Returns: ``[nB]`` rows, and their weights ``[nB]``: 0 where there is no such prompt, and the row is its own.
    """
    number = rank()
    own = [
        _Answered(number, *texts, weight) for texts, weight in zip(_texts(rows, weights), weights.tolist(), strict=True)
    ]
    dealt = zip_longest(*all_gather_objects(own))
    batch = [one for turn in dealt for one in turn if one is not None]
    sides: list[list[list[int]]] = [[] for _ in range(len(rows.lengths) // len(weights))]
    masks: list[list[list[bool]]] = [[] for _ in sides]
    prompts, prompt_weights = [], []
    for place, one in enumerate(batch):
        if one.process != number:
            continue
        following = batch[place + 1 :] + batch[:place]
        other = next((o for o in following if o.weight > 0 and o.prompt != one.prompt), None)
        prompts.append(len(one.prompt))
        prompt_weights.append(0.0 if other is None else one.weight)
        for side, response in zip(sides, (other or one).responses, strict=True):
            side.append(one.prompt + response)
        for side_masks, mask in zip(masks, (other or one).masks, strict=True):
            side_masks.append(mask)
    sequences = [torch.tensor(sequence) for side in sides for sequence in side]
    token_masks = [torch.tensor(mask, dtype=torch.bool) for side_masks in masks for mask in side_masks]
    device = rows.tokens.device
    mixed = Rows(
        tokens=pad_sequence(sequences, batch_first=True).to(device),
        lengths=torch.tensor([len(sequence) for sequence in sequences], device=device),
        prompt_lengths=torch.tensor(prompts * len(sides), device=device),
        response_mask=pad_sequence(token_masks, batch_first=True).to(device),
    )
    return mixed, torch.tensor(prompt_weights * len(sides), device=device)


def _texts(rows: Rows, weights: Tensor) -> list[tuple[list[int], list[list[int]], list[list[bool]]]]:
    """Each prompt, its responses, and which of their tokens count."""
    tokens, prompts, lengths = rows.tokens.tolist(), rows.prompt_lengths.tolist(), rows.lengths.tolist()
    responses = [row[start:end] for row, start, end in zip(tokens, prompts, lengths, strict=True)]
    masks = [row[: len(ids)] for row, ids in zip(rows.response_mask.tolist(), responses, strict=True)]
    return [
        (tokens[b][: prompts[b]], responses[b :: len(weights)], masks[b :: len(weights)]) for b in range(len(weights))
    ]
