"""The language-model head: it turns the trunk's last states into logits, whatever the architecture."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import embedding_weight, nearly_equal
from rlhf_lightning.models.vocabulary import Vocabulary
from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs
from rlhf_lightning.ops.token_log_probs import token_log_probs


class Head:
    """The head of a causal LM, run on states that are given; tried on a few of them at construction.

    Args:
        model: the causal LM.
        vocabulary: the rows of the head that count.

    Attributes:
        scale: see ``Policy.logit_scale``.
        width: H, of the trunk's last states (OPT-350m's are narrower than its layers).
        alone: whether the head can be run on states. False where only the model's own forward, from tokens to logits,
            is known to be right: then no method here may be called.

    Raises:
        InputError: the model's weights are not finite, or it is no causal model.
    """

    def __init__(self, model: PreTrainedModel, vocabulary: Vocabulary) -> None:
        self._model, self._vocabulary = model, vocabulary
        self._trunk_at: tuple[nn.Module, str] | None = None  # what has the trunk, and under which name
        self._output_type: type[ModelOutput] = ModelOutput
        training = [module for module in model.modules() if module.training]
        model.eval()  # tried without dropout, which would make the same tokens differ
        try:
            self.scale = self._find_scale()
        finally:
            for module in training:
                module.training = True

    @property
    def alone(self) -> bool:
        """See the class."""
        return self._trunk_at is not None

    def score(self, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """``[N, H]``, ``[N]`` -> log-probs and entropies ``[N]``."""
        if self.scale is None:
            return token_log_probs(self._vocabulary.logits(self.own(states)), tokens, temperature)
        operands = self._operands(states)
        return linear_token_log_probs(*operands, self._vocabulary.places(tokens), temperature / self.scale)

    def cross_entropy(self, states: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        """``[N, H]``, ``[N]``, ``[N]`` -> the weighted sum of negative log-likelihoods, and log-probs ``[N]``."""
        if self.scale is None:
            return weighted_loss(token_log_probs(self._vocabulary.logits(self.own(states)), tokens)[0], weights)
        operands = self._operands(states)
        return linear_cross_entropy(*operands, self._vocabulary.places(tokens), weights, 1.0 / self.scale)[:2]

    def logits(self, states: Tensor) -> Tensor:
        """``[N, H]`` -> ``[N, V]``, -inf where an id has no token."""
        if self.scale is None:
            return self._vocabulary.logits(self.own(states))
        # Not cut beforehand: autocast keeps its copy of a weight from step to step, and none of a part of one.
        logits = functional.linear(states, self._model.get_output_embeddings().weight)
        return self._vocabulary.logits(logits if self.scale == 1.0 else logits * self.scale)

    def own(self, states: Tensor) -> Tensor:
        """What the model itself makes of final hidden states ``[N, H]``: its forward, with the trunk's output given."""
        assert self._trunk_at is not None
        parent, name = self._trunk_at
        trunk = parent._modules[name]
        parent._modules[name] = _Given(self._output_type(last_hidden_state=states[None]))
        try:
            return self._model(inputs_embeds=states[None], use_cache=False).logits[0]
        finally:
            parent._modules[name] = trunk

    def _operands(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states ``[N, H]`` and the head's weight ``[U, H]``, of one dtype."""
        weight = self._vocabulary.weight(self._model.get_output_embeddings().weight)
        device = states.device.type
        if torch.is_autocast_enabled(device):
            states, weight = (x.to(torch.get_autocast_dtype(device)) for x in (states, weight))
        return states.to(weight.dtype), weight

    @torch.no_grad()
    def _find_scale(self) -> float | None:
        """``scale``, by trying the head on a few states; also finds where the trunk is, or that it cannot be told."""
        model, name = self._model, type(self._model).__name__
        tokens = probe(model)
        expected = model(input_ids=tokens, use_cache=False).logits[0]
        if not bool(torch.isfinite(expected).all()):
            raise InputError(f"{model.name_or_path}: its weights are NaN or infinite; take an earlier model")
        if not _close(model(input_ids=tokens[:, :-1], use_cache=False).logits[0], expected[:-1]):
            raise InputError(f"{model.name_or_path}: {name} sees the tokens to come: give a causal language model")
        output = model.base_model(input_ids=tokens, use_cache=False)
        states = getattr(output, "last_hidden_state", None)  # none where that is the whole model, as Llama 4's
        self.width = embedding_weight(model).shape[1] if states is None else states.shape[-1]
        self._output_type = type(output)
        if states is None or not self._find_trunk(states := states[0], expected):
            warnings.warn(
                f"{name}: its head cannot be run apart from its trunk, so log-probs take the slowest way: the model's "
                "own pass over padded rows, which holds the logits of prompts too",
                stacklevel=4,
            )
            return None
        head = model.get_output_embeddings()
        reason = "its head is not one plain linear layer"
        if type(head) is nn.Linear and head.bias is None:
            scale = self._configured(_ratio(expected, functional.linear(states, head.weight)))
            # Soft-capping only shows on large logits, so the states are magnified until the largest is 100.
            larger = states * (100.0 / expected.abs().max().clamp(min=1e-3))
            products = ((x, functional.linear(x, head.weight)) for x in (states, larger))
            if scale > 0.0 and all(_close(self.own(x), scale * product) for x, product in products):
                return scale
            reason = "its logits are capped, or are no multiple of the states' products with its weight"
        warnings.warn(
            f"{name}: {reason}, so log-probs take the slower way, which holds all logits",
            stacklevel=4,
        )
        return None

    def _find_trunk(self, states: Tensor, expected: Tensor) -> bool:
        """Finds where the trunk is that the model's forward calls: whether its logits follow from the states there."""
        for place in _trunks(self._model):
            self._trunk_at = place
            # Whatever a model's forward makes of a trunk that is not what it calls.
            try:
                if _close(self.own(states), expected):
                    return True
            except Exception:
                continue
        self._trunk_at = None
        return False

    def _configured(self, scale: float) -> float:
        """The scale as the model's config has it, where it has one: the fitted number is that but for rounding."""
        config = self._model.config.get_text_config()
        named = [getattr(config, "logit_scale", None), 1 / (getattr(config, "logits_scaling", None) or 1.0)]
        return next((c for c in named if c is not None and abs(c - scale) <= 1e-2 * abs(c)), scale)


def head_rows(model: PreTrainedModel) -> int:
    """R, the ids that a model's logits are of."""
    head = model.get_output_embeddings()
    return int(embedding_weight(model).shape[0] if head is None else head.weight.shape[0])


def weighted_loss(log_probs: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """``[N]``, ``[N]`` -> the weighted sum of negative log-likelihoods, and the log-probs."""
    return -(weights * log_probs).sum(), log_probs


def probe(model: PreTrainedModel) -> Tensor:
    """``[1, 3]`` tokens to try a model on."""
    embeddings = embedding_weight(model)
    return torch.arange(min(3, embeddings.shape[0]), device=embeddings.device)[None]


class _Given(nn.Module):
    """Stands where the trunk was and returns the output it was given."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output


def _trunks(model: PreTrainedModel) -> Iterator[tuple[nn.Module, str]]:
    """Where a model's forward may have the trunk that it calls: its base model, or the decoder in that (OPT)."""
    wanted = [model.base_model, model.get_decoder()]
    for trunk in wanted:
        for name, module in model.named_modules():
            if module is trunk and name:
                parent, _, own = name.rpartition(".")
                yield model.get_submodule(parent), own


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return nearly_equal(ours, theirs, theirs.dtype)


def _ratio(ours: Tensor, theirs: Tensor) -> float:
    """The c of the least squares fit ``ours = c * theirs``, its rounding averaged out; 1 where they are the same."""
    if _close(ours, theirs):
        return 1.0
    ours, theirs = ours.double(), theirs.double()
    return float((ours * theirs).sum() / theirs.square().sum())
