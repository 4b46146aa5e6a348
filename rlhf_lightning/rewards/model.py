"""A reward that a trained reward model gives."""

from __future__ import annotations

from typing import Any

import torch
from lightning.pytorch.utilities.rank_zero import rank_zero_info
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout, micro_batches
from rlhf_lightning.collectives import largest, rounds
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import (
    check_length,
    check_vocabularies,
    load_scalar_model,
    load_tokenizer,
)
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import shard
from rlhf_lightning.rewards.base import Reward, check_scores
from rlhf_lightning.rewards.own_tokens import OwnTokens


class ModelReward(Reward):
    """The reward model's score at the last token of prompt + response, minus the scores' mean, over their deviation.

    Args:
        path: a folder that a reward model's run saved, or an ``AutoModelForSequenceClassification`` with one label.
        micro_batch_tokens: most padded tokens in one forward pass.
        trust_remote_code: run model code that comes with the weights.

    If the reward model has another vocabulary or chat template than the policy, it reads conversations in its own
    tokenizer and template. Plain texts are decoded and encoded again like its training data, with EOS after responses
    that ended by EOS. A reward model without a chat template reads everything as plain text, without the special tokens
    of the policy's template.

    Raises: InputError if the folder holds no trained reward model, or a sequence has more tokens than the model has
    positions.
    """

    def __init__(self, path: str, micro_batch_tokens: int = 16384, trust_remote_code: bool = False) -> None:
        super().__init__()
        if micro_batch_tokens < 1:
            raise InputError(f"reward micro_batch_tokens: expected a positive number, got {micro_batch_tokens}")
        self.path = path
        self.micro_batch_tokens = micro_batch_tokens
        self.trust_remote_code = trust_remote_code
        self.scalar: ScalarModel | None = None
        self._mesh: Any | None = None
        self._reader: OwnTokens | None = None
        self._policy: PreTrainedTokenizerBase
        self._read_on: str | None = None
        self._told: set[str] = set()

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        if self.scalar is None:
            model = load_scalar_model(self.path, fresh_head=False, trust_remote_code=self.trust_remote_code)
            check_vocabularies(load_tokenizer(self.path, self.trust_remote_code), model, self.path)
            scalar = ScalarModel(model).eval().requires_grad_(False)
            self.scalar = (shard(scalar, mesh) if mesh is not None else scalar).to(device)
            self._mesh = mesh
        # An evaluation prepares one reward for policies of several vocabularies in turn.
        self._policy = tokenizer
        self._reader = self._make_reader()

    def _make_reader(self) -> OwnTokens:
        assert self.scalar is not None
        own = load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)
        # Only this library and OpenRLHF save a deviation. Both train on conversations up to the token that ends them.
        to_turn_end = hasattr(self.scalar.model.config, "reward_std")
        self._read_on = self.date
        return OwnTokens(self.path, own, self._policy, to_turn_end, self._tell_once, self.date)

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Tensor:
        assert self.scalar is not None and self._reader is not None, "prepare() comes before the first score"
        if self.date != self._read_on:  # a resumed run gets its date only after prepare()
            self._reader = self._make_reader()
        tokens, lengths = self._reader.encoded(rollout)
        longest = int(lengths.max())
        sharded = self._mesh is not None  # then all processes make their passes together
        check_length(self.scalar.model, largest(longest) if sharded else longest, self.path)
        groups = micro_batches(lengths, self.micro_batch_tokens)
        scores = tokens.new_zeros(len(tokens), dtype=torch.float32)
        for number, _, _ in rounds(len(groups), together=sharded):
            rows = groups[number]
            width = int(lengths[rows].max())
            scores[rows] = at_last_token(self.scalar(tokens[rows, :width], lengths[rows]), lengths[rows]).float()
        return check_scores(scores, rollout, self.path)

    def _tell_once(self, line: str) -> None:
        if line not in self._told:
            self._told.add(line)
            rank_zero_info(f"reward {self.path}: {line}")
