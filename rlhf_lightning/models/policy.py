"""The policy: a causal LM that scores response tokens, with an optional critic on the same trunk, and decodes.

Everything goes through ``forward``, ``cross_entropy``, ``decode`` and ``generate``: their hooks gather sharded
parameters (FSDP2), so nothing outside may touch ``policy.model``'s weights to compute with them.
"""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn import functional
from transformers import Cache, PreTrainedModel
from transformers.utils import ModelOutput

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import decoder_layers, embedding_weight, linear_in_full_precision, nearly_equal
from rlhf_lightning.models.loading import draw_head
from rlhf_lightning.models.lora import adapter_off
from rlhf_lightning.models.packing import can_pack, hidden_states, takes_positions
from rlhf_lightning.models.passes import note
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.ops.linear_cross_entropy import linear_cross_entropy
from rlhf_lightning.ops.linear_token_log_probs import linear_token_log_probs
from rlhf_lightning.ops.token_log_probs import token_log_probs


class TokenScores(NamedTuple):
    """What the policy says about each response token, zeros past the end; float32 (float64 for float64 models)."""

    log_probs: Tensor  # [B, T] nats, of softmax(logits / temperature) at the tokens
    entropy: Tensor  # [B, T] nats, of the same distribution
    values: Tensor | None  # [B, T + 1] the critic before each token, and after the last; None without a critic


Reference = Callable[..., TokenScores]  # called as a policy: a frozen one, or the trained one without its adapter


class Policy(nn.Module):
    """A Hugging Face causal LM as a policy over response tokens.

    Args:
        model: the causal LM; kept as ``policy.model``.
        critic: None; ``"head"``: one linear layer on the trunk's last hidden state; an int N: a copy of the last N
            layers that starts from the hidden state below them, and a linear layer on top. Either head starts from
            N(0, 1 / (H + 1)), or from ``load_critic_head``. The critic's loss reaches the shared trunk; scale it, or
            detach by using a critic of its own.
        seed: of the critic head's draw.

    Attributes:
        logit_scale: c, where the model's logits are ``c * states @ weight.T`` with one c > 0 (checked at construction;
            1 for most, not so for Cohere, Granite and others). The fused operator then computes the log-probs without
            holding ``[N, V]`` logits. None where the head is another (bias, capped logits): the model's own head runs.
        packs: whether passes leave padding and repeated beginnings out (``models/packing.py``); False for models that
            this is not known of.

    Raises:
        InputError: the branch does not reproduce the trunk (it adds positions to its inputs, say), or the
            architecture's head cannot be reached.
    """

    def __init__(self, model: PreTrainedModel, critic: Literal["head"] | int | None = None, seed: int = 0) -> None:
        super().__init__()
        self.model = model
        self._trunk_takes_positions = takes_positions(self._trunk)
        self.packs = can_pack(self._trunk)
        self.logit_scale = self._find_logit_scale()
        self._branch_layers = 0
        self.branch: nn.Module | None = None
        self.critic_head: nn.Linear | None = None
        if critic is None:
            return
        if critic != "head":
            self._branch_layers = _checked_depth(critic, len(decoder_layers(self._trunk)[1]))
            self.branch = _branch(self._trunk, self._branch_layers)
            self._check_branch()
        embeddings = embedding_weight(model)
        width = model.config.get_text_config().hidden_size
        self.critic_head = nn.Linear(width, 1, device=embeddings.device, dtype=embeddings.dtype)
        draw_head(self.critic_head, seed)

    @property
    def _trunk(self) -> PreTrainedModel:
        trunk = self.model.base_model
        assert isinstance(trunk, PreTrainedModel)
        return trunk

    def forward(
        self,
        tokens: Tensor,
        lengths: Tensor,
        prompt_lengths: Tensor,
        temperature: float = 1.0,
        *,
        adapted: bool = True,
        trained: bool = True,
    ) -> TokenScores:
        """Log-probs, entropies and values at response positions; the LM head never runs on prompt positions.

        Args:
            tokens: ``[B, S]`` int64, prompt then response, right-padded with any id of the vocabulary.
            lengths: ``[B]`` int64, prompt + response.
            prompt_lengths: ``[B]`` int64, at least 1.
            temperature: logits are divided by it.
            adapted: False: as the model was loaded, with its adapter switched off, and without a critic.
            trained: False: no gradient but that of the critic's own parameters; the trunk's backward pass is not run.

        Returns: ``TokenScores``, T the longest response.

        Raises:
            InputError: a prompt without tokens.
        """
        mask = response_mask(prompt_lengths, lengths)
        rows, slots = mask.nonzero(as_tuple=True)
        columns = prompt_lengths[rows] - 1 + slots
        with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
            with contextlib.nullcontext() if adapted else adapter_off(self):
                below, last = self._states(tokens, lengths)
            log_probs, entropy = self._score(last[rows, columns], tokens[rows, columns + 1], temperature)
        values = None
        if self.critic_head is not None and adapted:
            states = last if self.branch is None else self._branch_states(below, lengths)
            # One state more than there are response tokens: a truncated response is bootstrapped from the one after.
            known = response_mask(prompt_lengths, lengths + 1)
            rows, slots = known.nonzero(as_tuple=True)
            columns = prompt_lengths[rows] - 1 + slots
            values = _scatter(linear_in_full_precision(states[rows, columns], self.critic_head)[:, 0], known)
        return TokenScores(_scatter(log_probs, mask), _scatter(entropy, mask), values)

    def cross_entropy(
        self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, weights: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The weighted negative log-likelihood of response tokens, where the weights are known beforehand.

        The naive equivalent::

            log_probs = policy(tokens, lengths, prompt_lengths).log_probs.masked_fill(weights == 0, 0.0)
            return -(weights * log_probs).sum(), log_probs.detach()

        The fused head makes its gradients in the forward pass then, with one product less.

        Args:
            tokens, lengths, prompt_lengths: as in ``forward``.
            weights: ``[B, T]`` floating point, at least 0, and 0 past a response's end. The head does not run on tokens
                of weight 0.

        Returns: ``(loss, log_probs)``: a scalar in nats, float32 (float64 for float64 models), and ``[B, T]`` without
            gradient, 0 where the weight is.
        """
        mask = weights > 0
        rows, slots = mask.nonzero(as_tuple=True)
        columns = prompt_lengths[rows] - 1 + slots
        states, targets = self._states(tokens, lengths)[1][rows, columns], tokens[rows, columns + 1]
        if self.logit_scale is None:
            log_probs, _ = token_log_probs(self._own_head(states), targets)
            loss = -(weights[mask] * log_probs).sum()
        else:
            loss, log_probs, _ = linear_cross_entropy(
                *self._operands(states), targets, weights[mask], 1.0 / self.logit_scale
            )
        return loss, _scatter(log_probs.detach(), mask)

    def decode(
        self, tokens: Tensor, positions: Tensor, cache: Cache, last: Tensor | None = None, **attention: Any
    ) -> Tensor:
        """One step of generation, a prefill or a single token: logits at one position of each row.

        Args:
            tokens: ``[B, q]`` int64, not yet in the cache; right-padded where rows are of different length.
            positions: ``[B, q]`` int64, their places in the row.
            cache: takes the tokens' keys and values.
            last: ``[B]`` int64, which of the q positions; None where q is 1.
            attention: handed to every layer's attention function.

        Returns: ``[B, V]`` float32 (float64 for float64 models).
        """
        assert not (self.training and self.model.is_gradient_checkpointing), (
            "checkpointed layers drop the cache: eval()"
        )
        note(self.model, tokens)
        arguments = {"position_ids": positions} if self._trunk_takes_positions else {}
        states = self._trunk(
            input_ids=tokens, past_key_values=cache, use_cache=True, **arguments, **attention
        ).last_hidden_state
        picked = states[:, 0] if last is None else states[torch.arange(states.shape[0], device=states.device), last]
        logits = self._logits(picked)
        return logits if logits.dtype == torch.float64 else logits.float()

    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Transformers' own ``generate``, for models whose caches it alone knows: ``[B, P]`` -> ``[B, P + T]``."""
        note(self.model, tokens)
        generate: Any = self.model.generate
        generated = generate(tokens, **options)
        assert isinstance(generated, Tensor)
        return generated

    def load_critic_head(self, weight: Tensor, bias: float = 0.0) -> None:
        """Start the critic head from a reward model's ``score.weight`` ``[1, H]``; sharded, every process calls it.

        For a score that is used as (raw - mean) / std, give ``weight / std`` and ``-mean / std``.

        Raises:
            InputError: there is no critic head, or the reward model has another width.
        """
        if self.critic_head is None:
            raise InputError("the policy has no critic head to initialise: set critic to 'head' or a number of layers")
        if weight.shape != self.critic_head.weight.shape:
            raise InputError(
                f"critic head {list(self.critic_head.weight.shape)} cannot start from score {list(weight.shape)}: "
                "use a reward model of the policy's width, or a fresh critic head"
            )
        own = self.critic_head.weight
        if isinstance(own, DTensor):
            weight = distribute_tensor(weight.to(own.device), own.device_mesh, own.placements)
        with torch.no_grad():
            own.copy_(weight)
            self.critic_head.bias.fill_(bias)

    def _states(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor | None, Tensor]:
        """The hidden state below the branch (None without one) and the last one, each ``[B, S, H]``."""
        note(self.model, tokens)
        below = None if self.branch is None else self._branch_layers
        return hidden_states(self._trunk, tokens, lengths, self.packs, below)

    def _branch_states(self, below: Tensor | None, lengths: Tensor) -> Tensor:
        assert isinstance(self.branch, PreTrainedModel) and below is not None
        return hidden_states(self.branch, below, lengths, self.packs)[1]

    def _score(self, states: Tensor, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        """``[N, H]``, ``[N]`` -> log-probs and entropies ``[N]``."""
        if self.logit_scale is None:
            return token_log_probs(self._own_head(states), tokens, temperature)
        return linear_token_log_probs(*self._operands(states), tokens, temperature / self.logit_scale)

    def _operands(self, states: Tensor) -> tuple[Tensor, Tensor]:
        """The states ``[N, H]`` and the head's weight ``[V, H]``, of one dtype."""
        weight = self.model.get_output_embeddings().weight
        device = states.device.type
        if torch.is_autocast_enabled(device):
            states, weight = (x.to(torch.get_autocast_dtype(device)) for x in (states, weight))
        return states.to(weight.dtype), weight

    def _logits(self, states: Tensor) -> Tensor:
        """``[N, H]`` -> ``[N, V]``."""
        if self.logit_scale is None:
            return self._own_head(states)
        logits = functional.linear(states, self.model.get_output_embeddings().weight)
        return logits if self.logit_scale == 1.0 else logits * self.logit_scale

    def _own_head(self, states: Tensor) -> Tensor:
        """What the model itself makes of final hidden states ``[N, H]``: its forward, with the trunk's output given."""
        name = self.model.base_model_prefix
        trunk = self.model._modules[name]
        self.model._modules[name] = _Given(self._output_type(last_hidden_state=states[None]))
        try:
            return self.model(inputs_embeds=states[None], use_cache=False).logits[0]
        finally:
            self.model._modules[name] = trunk

    @torch.no_grad()
    def _find_logit_scale(self) -> float | None:
        """``logit_scale``, by trying the head on a few states; also checks that ``_own_head`` is right."""
        tokens = _probe(self.model)
        output = self._trunk(input_ids=tokens, use_cache=False)
        self._output_type = type(output)
        states = output.last_hidden_state[0]
        own = self._own_head(states)
        if not bool(torch.isfinite(own).all()):
            raise InputError(f"{self.model.name_or_path}: its weights are NaN or infinite; take an earlier model")
        if not _close(own, self.model(input_ids=tokens, use_cache=False).logits[0]):
            raise InputError(f"{type(self.model).__name__}: logits do not follow from the last hidden state alone")
        head = self.model.get_output_embeddings()
        reason = "its head is not one plain linear layer"
        if type(head) is nn.Linear and head.bias is None:
            scale = self._configured(_ratio(own, functional.linear(states, head.weight)))
            # Soft-capping only shows on large logits, so the states are magnified until the largest is 100.
            larger = states * (100.0 / own.abs().max().clamp(min=1e-3))
            products = ((x, functional.linear(x, head.weight)) for x in (states, larger))
            if scale > 0.0 and all(_close(self._own_head(x), scale * product) for x, product in products):
                return scale
            reason = "its logits are capped, or are no multiple of the states' products with its weight"
        warnings.warn(
            f"{type(self.model).__name__}: {reason}, so log-probs take the slower way, which holds all logits",
            stacklevel=3,
        )
        return None

    def _configured(self, scale: float) -> float:
        """The scale as the model's config has it, where it has one: the fitted number is that but for rounding."""
        config = self.model.config.get_text_config()
        named = [getattr(config, "logit_scale", None), 1 / (getattr(config, "logits_scaling", None) or 1.0)]
        return next((c for c in named if c is not None and abs(c - scale) <= 1e-2 * abs(c)), scale)

    @torch.no_grad()
    def _check_branch(self) -> None:
        tokens = _probe(self.model)
        lengths = torch.full((1,), tokens.shape[1], device=tokens.device)
        below, last = self._states(tokens, lengths)
        if not _close(self._branch_states(below, lengths), last):
            raise InputError(
                f"critic: {self._branch_layers} does not work for {type(self.model).__name__}, whose trunk changes the "
                "hidden states it is given: use critic: head, or a critic model of its own"
            )


class _Given(nn.Module):
    """Stands where the trunk was and returns the output it was given."""

    def __init__(self, output: ModelOutput) -> None:
        super().__init__()
        self.output = output

    def forward(self, *args: Any, **kwargs: Any) -> ModelOutput:
        return self.output


def _branch(trunk: PreTrainedModel, depth: int) -> PreTrainedModel:
    """A copy of the trunk with its last ``depth`` layers and no embeddings."""
    _, layers = decoder_layers(trunk)
    embeddings = trunk.get_input_embeddings()
    # deepcopy takes what the memo holds for these two as their copies: the weights left out are never duplicated.
    memo = {id(layers): nn.ModuleList(copy.deepcopy(layer) for layer in layers[-depth:]), id(embeddings): nn.Identity()}
    branch = copy.deepcopy(trunk, memo)
    config = branch.config.get_text_config()
    config.num_hidden_layers = depth
    if getattr(config, "layer_types", None) is not None:
        config.layer_types = config.layer_types[-depth:]
    return branch


def _checked_depth(critic: Any, layers: int) -> int:
    if isinstance(critic, bool) or not isinstance(critic, int) or not 1 <= critic <= layers:
        raise InputError(f"critic: {critic!r} is not 'head', nor a number of layers from 1 to the model's {layers}")
    return critic


def _probe(model: PreTrainedModel) -> Tensor:
    embeddings = embedding_weight(model)
    return torch.arange(min(3, embeddings.shape[0]), device=embeddings.device)[None]


def _close(ours: Tensor, theirs: Tensor) -> bool:
    return nearly_equal(ours, theirs, theirs.dtype)


def _ratio(ours: Tensor, theirs: Tensor) -> float:
    """The c of the least squares fit ``ours = c * theirs``, its rounding averaged out; 1 where they are the same."""
    if _close(ours, theirs):
        return 1.0
    ours, theirs = ours.double(), theirs.double()
    return float((ours * theirs).sum() / theirs.square().sum())


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
