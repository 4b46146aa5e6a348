"""KTO: each response is desirable or not by itself, and is weighed against how far the policy has moved in general."""

from __future__ import annotations

from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from jsonargparse.typing import PositiveFloat
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlhf_lightning.algorithms.losses import kto_loss
from rlhf_lightning.batches import PreferenceBatch
from rlhf_lightning.distributed import all_gather_objects, all_reduce_sum, rank
from rlhf_lightning.modules.pairs import Rows, as_rows
from rlhf_lightning.modules.preference import PairTerms, ReferencedModule


class KTOModule(ReferencedModule):
    """Kahneman-Tversky optimisation: Ethayarajh et al. 2024, arXiv 2402.01306, eq. 8.

    A pair is two examples, its chosen response a desirable one and its rejected response an undesirable one; the loss
    is the mean over examples. Neither sees the other: they meet in the baseline ``z0`` alone, an estimate of
    ``KL(policy || reference)``, held constant in the gradient. It is the mean log-ratio of responses to prompts they do
    not belong to, at least 0: every prompt of the batch with the response of the next row that has another prompt.

    The batch is that of a training step, ``data.batch_size`` pairs over all processes together, so ``z0`` and the
    gradient are the same for any number of processes. Batches that ``accumulate_grad_batches`` adds up have a ``z0``
    each, as the paper's micro-batches have. A batch with one prompt alone has no other responses: its ``z0`` is 0.

    What is logged: see `PreferenceModule`, and ``train/baseline``, ``val/baseline``, the ``z0``. Rewards are ``beta``
    times the summed log-ratio to the reference.

    Args:
        model: folder of the policy to train: usually the SFT policy.
        reference: folder of the frozen model that the policy is kept near; None takes ``model`` as it is at the start.
        beta: how strongly.
        desirable_weight: weight of the chosen responses' losses, the paper's lambda_D.
        undesirable_weight: weight of the rejected responses' losses, the paper's lambda_U.
        kwargs: sampling, the optimizer's and the model's options, see `PolicyModule` and `RLHFModule`.
    """

    def __init__(
        self,
        model: str,
        reference: str | None = None,
        beta: PositiveFloat = 0.1,
        desirable_weight: PositiveFloat = 1.0,
        undesirable_weight: PositiveFloat = 1.0,
        **kwargs: Any,
    ) -> None:
        super().__init__(model=model, reference=reference, **kwargs)
        self.beta = beta
        self.desirable_weight = desirable_weight
        self.undesirable_weight = undesirable_weight

    def terms(self, batch: PreferenceBatch) -> PairTerms:
        """The mean of a pair's two losses."""
        scores = self.row_scores(as_rows(batch))
        ratios = self.log_ratios(scores)
        baseline = self.baseline(scores.rows, batch.weights)
        chosen, rejected = ratios.chunk(2)
        desirable = self.desirable_weight * kto_loss(chosen, baseline, self.beta, desirable=True)
        undesirable = self.undesirable_weight * kto_loss(rejected, baseline, self.beta, desirable=False)
        more = {"baseline": baseline.expand(len(batch))}
        return PairTerms(0.5 * (desirable + undesirable), self.beta * ratios, scores.log_probs, more)

    def longest_sequence(self, sampled: bool) -> int:
        """Any prompt may meet any response."""
        data = getattr(self.trainer, "datamodule", None)
        mixed = getattr(data, "longest_prompt", 0) + getattr(data, "longest_response", 0)
        return max(super().longest_sequence(sampled), mixed)

    @torch.no_grad()
    def baseline(self, rows: Rows, weights: Tensor) -> Tensor:
        """``z0``, a scalar: the same on every process, each of which calls it.

        Args:
            rows: this process's pairs.
            weights: ``[B]``, theirs.
        """
        others, counted = mismatched(rows, weights)
        log_ratios = self.log_ratios(self.row_scores(others))
        sums = all_reduce_sum(torch.stack([(log_ratios * counted).sum(), counted.sum()]).double())
        mean = sums[0] / sums[1] if sums[1] > 0 else sums[0]
        return mean.clamp(min=0.0).to(log_ratios.dtype)


class _Pair(NamedTuple):
    process: int
    prompt: list[int]
    responses: tuple[list[int], list[int]]
    weight: float


def mismatched(rows: Rows, weights: Tensor) -> tuple[Rows, Tensor]:
    """Each of this process's prompts with the two responses of the next pair of the batch that has another prompt.

    The batch is that of all processes, in the order in which it was dealt to them row by row; after its last pair comes
    its first.

    Args:
        rows: ``[2B]``, this process's pairs.
        weights: ``[B]``, theirs; a pair of weight 0 lends its responses to none.

    Returns: ``[2B]`` rows, and their weights ``[2B]``: 0 where there is no such pair, and the row is the prompt's own.
    """
    number = rank()
    own = [_Pair(number, *texts, weight) for texts, weight in zip(_unpadded(rows), weights.tolist(), strict=True)]
    dealt = zip_longest(*all_gather_objects(own))
    batch = [pair for turn in dealt for pair in turn if pair is not None]
    sides: tuple[list[list[int]], list[list[int]]] = ([], [])
    prompts, counted = [], []
    for place, pair in enumerate(batch):
        if pair.process != number:
            continue
        following = batch[place + 1 :] + batch[:place]
        other = next((one for one in following if one.weight > 0 and one.prompt != pair.prompt), None)
        prompts.append(len(pair.prompt))
        counted.append(0.0 if other is None else pair.weight)
        for side, response in zip(sides, (other or pair).responses, strict=True):
            side.append(pair.prompt + response)
    sequences = [torch.tensor(sequence) for side in sides for sequence in side]
    device = rows.tokens.device
    mixed = Rows(
        tokens=pad_sequence(sequences, batch_first=True).to(device),
        lengths=torch.tensor([len(sequence) for sequence in sequences], device=device),
        prompt_lengths=torch.tensor(prompts * 2, device=device),
    )
    return mixed, torch.tensor(counted * 2, device=device)


def _unpadded(rows: Rows) -> list[tuple[list[int], tuple[list[int], list[int]]]]:
    """Prompt and responses of each pair."""
    tokens, prompts = rows.tokens.tolist(), rows.prompt_lengths.tolist()
    whole = [row[:length] for row, length in zip(tokens, rows.lengths.tolist(), strict=True)]
    pairs = len(whole) // 2
    return [
        (whole[b][: prompts[b]], (whole[b][prompts[b] :], whole[pairs + b][prompts[pairs + b] :])) for b in range(pairs)
    ]
