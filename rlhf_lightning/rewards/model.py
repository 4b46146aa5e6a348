"""A trained reward model as a reward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout, micro_batches
from rlhf_lightning.data.forms import DEMONSTRATION
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import (
    check_length,
    check_vocabularies,
    load_scalar_model,
    load_tokenizer,
    same_vocabulary,
)
from rlhf_lightning.models.positions import at_last_token
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import most_anywhere, shard
from rlhf_lightning.rewards.base import Reward, check_scores


class ModelReward(Reward):
    """The score that a reward model gives at the last token of prompt + response, minus its mean, over its deviation.

    Args:
        path: a folder saved by the reward model's run, or any ``AutoModelForSequenceClassification`` folder with one
            label.
        micro_batch_tokens: padded tokens in one forward pass at most.
        trust_remote_code: run model code that comes with the weights.

    Where the reward model's vocabulary is not the policy's, prompts and responses are decoded and encoded again with
    its own tokenizer, as its training data was (and EOS put after responses that ended by EOS); special tokens of the
    policy's chat template are left out of the text.

    Raises: InputError when the folder holds no trained reward model, or a sequence is longer than it has positions for.
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
        self._own_encoder: Encoder | None = None
        self._policy_tokenizer: PreTrainedTokenizerBase | None = None

    def prepare(self, tokenizer: PreTrainedTokenizerBase, device: torch.device, mesh: Any | None = None) -> None:
        if self.scalar is None:
            model = load_scalar_model(self.path, fresh_head=False, trust_remote_code=self.trust_remote_code)
            check_vocabularies(load_tokenizer(self.path, self.trust_remote_code), model, self.path)
            scalar = ScalarModel(model).eval().requires_grad_(False)
            self.scalar = (shard(scalar, mesh) if mesh is not None else scalar).to(device)
            self._mesh = mesh
        # An evaluation prepares one reward for policies of several vocabularies in turn.
        own = load_tokenizer(self.path, trust_remote_code=self.trust_remote_code)
        self._policy_tokenizer = tokenizer
        self._own_encoder = None if same_vocabulary(own, tokenizer) else Encoder(own)

    @torch.no_grad()
    def forward(self, rollout: Rollout) -> Tensor:
        assert self.scalar is not None, "prepare() comes before the first score"
        tokens, lengths = rollout.tokens, rollout.lengths
        if self._own_encoder is not None:
            tokens, lengths = self._encoded_again(rollout, self._own_encoder)
        longest = int(lengths.max())
        check_length(
            self.scalar.model, longest if self._mesh is None else most_anywhere(longest, self._mesh), self.path
        )
        groups = micro_batches(lengths, self.micro_batch_tokens)
        rounds = len(groups) if self._mesh is None else most_anywhere(len(groups), self._mesh)
        scores = tokens.new_zeros(len(tokens), dtype=torch.float32)
        for number in range(rounds):
            # A process without rows left repeats one, for as long as others need it to gather the weights with.
            rows = groups[min(number, len(groups) - 1)]
            width = int(lengths[rows].max())
            scores[rows] = at_last_token(self.scalar(tokens[rows, :width], lengths[rows]), lengths[rows]).float()
        return check_scores(scores, rollout, self.path)

    def _encoded_again(self, rollout: Rollout, encoder: Encoder) -> tuple[Tensor, Tensor]:
        policy_tokenizer = self._policy_tokenizer
        assert policy_tokenizer is not None
        records = []
        for row, response in enumerate(rollout.responses):
            prompt = rollout.tokens[row, : rollout.prompt_lengths[row]].tolist()
            text = str(policy_tokenizer.decode(prompt, skip_special_tokens=True))
            records.append(Record(text, (response,), (), f"reward {self.path}", DEMONSTRATION))
        examples, _ = encoder.encode(records, "demonstrations")
        ended = (~rollout.truncated).tolist()
        encoded = [
            torch.cat([example.prompt, example.responses[0] if whole else example.responses[0][:-1]])
            for example, whole in zip(examples, ended, strict=True)
        ]
        lengths = torch.tensor([len(ids) for ids in encoded], device=rollout.tokens.device)
        tokens = pad_sequence(encoded, batch_first=True).to(rollout.tokens.device, torch.int64)
        return tokens, lengths
