"""The policy: a causal LM that scores response tokens, with an optional critic on the same trunk, and decodes.

Everything goes through ``forward``, ``cross_entropy``, ``decode`` and ``generate``: their hooks gather sharded
parameters (FSDP2), so nothing outside may touch ``policy.model``'s weights to compute with them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor
from transformers import Cache, PreTrainedModel

from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.head import Head, head_rows, weighted_loss
from rlhf_lightning.models.layers import embedding_weight, linear_in_full_precision
from rlhf_lightning.models.loading import draw_head
from rlhf_lightning.models.lora import adapter_off
from rlhf_lightning.models.packing import can_pack, hidden_states, takes_positions
from rlhf_lightning.models.passes import note
from rlhf_lightning.models.positions import response_mask
from rlhf_lightning.models.routers import Routers, routing
from rlhf_lightning.models.vocabulary import Vocabulary
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
        critic: None; or ``"head"``, one linear layer on the trunk's last hidden state, which starts from
            N(0, 1 / (H + 1)), or from ``load_critic_head``. The critic's loss reaches the shared trunk; scale it, or
            take a critic that is a model of its own.
        seed: of the critic head's draw.
        ids: the ids that have a token (``loading.token_ids``); None: all that the head has rows for. The others are
            never sampled, have no share in any probability, and get no gradient from the head.

    Attributes:
        logit_scale: c, where the model's logits are ``c * states @ weight.T`` with one c > 0 (checked at construction;
            1 for most, not so for Cohere, Granite and others). The fused operator then computes the log-probs without
            holding ``[N, V]`` logits. None where the head is another (bias, capped logits): the model's own head runs;
            or the model's whole forward, where its head cannot be run apart. Both are slower, and a warning says so.
        vocabulary: the rows of the head that count.
        packs: whether passes leave padding and repeated beginnings out (``models/packing.py``); False for models that
            this is not known of.
        routers: who sets them (``routers.find_routers``) has to take their loss after every pass with a gradient.

    Raises:
        InputError: a critic is to share the trunk of a model whose head cannot be run apart.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        critic: Literal["head"] | None = None,
        seed: int = 0,
        ids: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self._trunk_takes_positions = takes_positions(self._trunk)
        self.packs = can_pack(self._trunk)
        self.routers: Routers | None = None
        self.vocabulary = Vocabulary(head_rows(model), ids)
        self.head = Head(model, self.vocabulary)
        self.critic_head: nn.Linear | None = None
        if critic is None:
            return
        check_choice("critic", critic, Literal["head"])
        if not self.head.alone:
            raise InputError(
                f"critic: {type(model).__name__} cannot share its trunk with a critic, because its head cannot be run "
                "apart from it: use model.critic.kind: model, a critic model of its own"
            )
        embeddings = embedding_weight(model)
        self.critic_head = nn.Linear(self.head.width, 1, device=embeddings.device, dtype=embeddings.dtype)
        draw_head(self.critic_head, seed)

    @property
    def logit_scale(self) -> float | None:
        """See the class."""
        return self.head.scale

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
                states, logits = self._pass(tokens, lengths)
            targets = tokens[rows, columns + 1]
            if logits is None:
                log_probs, entropy = self.head.score(states[rows, columns], targets, temperature)
            else:
                log_probs, entropy = token_log_probs(logits[rows, columns], targets, temperature)
        values = None
        if self.critic_head is not None and adapted:
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
        targets = tokens[rows, columns + 1]
        states, logits = self._pass(tokens, lengths)
        if logits is None:
            loss, log_probs = self.head.cross_entropy(states[rows, columns], targets, weights[mask])
        else:
            loss, log_probs = weighted_loss(token_log_probs(logits[rows, columns], targets)[0], weights[mask])
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

        Returns: ``[B, V]`` float32 (float64 for float64 models), V the highest id that has a token, plus 1; -inf at
            ids without a token below it.
        """
        assert not (self.training and self.model.is_gradient_checkpointing), (
            "checkpointed layers drop the cache: eval()"
        )
        note(self.model, tokens)
        arguments = {"position_ids": positions} if self._trunk_takes_positions else {}
        inputs: dict[str, Any] = {
            "input_ids": tokens,
            "past_key_values": cache,
            "use_cache": True,
            **arguments,
            **attention,
        }
        inputs |= routing(self.model, False)
        found = self._trunk(**inputs).last_hidden_state if self.head.alone else self.model(**inputs).logits
        picked = found[:, 0] if last is None else found[torch.arange(found.shape[0], device=found.device), last]
        logits = self.head.logits(picked) if self.head.alone else self.vocabulary.logits(picked)
        return logits if logits.dtype == torch.float64 else logits.float()

    def generate(self, tokens: Tensor, **options: Any) -> Tensor:
        """Transformers' own ``generate``, for models whose caches it alone knows: ``[B, P]`` -> ``[B, P + T]``."""
        note(self.model, tokens)
        generate: Any = self.model.generate
        generated = generate(tokens, **routing(self.model, False), **options)
        assert isinstance(generated, Tensor)
        return generated

    def load_critic_head(self, weight: Tensor, bias: float = 0.0) -> None:
        """Starts the critic head from a reward model's ``score.weight`` ``[1, H]``; sharded, every process calls it.

        For a score that is used as (raw - mean) / std, give ``weight / std`` and ``-mean / std``.

        Raises:
            InputError: there is no critic head, or the reward model has another width.
        """
        if self.critic_head is None:
            raise InputError("the policy has no critic head to initialise: set model.critic.kind to head")
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

    def _pass(self, tokens: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor | None]:
        """The last hidden states ``[B, S, H]`` and None; or twice the logits ``[B, S, V]``."""
        note(self.model, tokens)
        if self.head.alone:
            return hidden_states(self._trunk, tokens, lengths, self.packs, self.routers), None
        places = torch.arange(tokens.shape[1], device=tokens.device).expand(tokens.shape)
        arguments: dict[str, Any] = {"position_ids": places} if self._trunk_takes_positions else {}
        arguments |= routing(self.model, self.routers is not None and torch.is_grad_enabled())
        output = self.model(input_ids=tokens, use_cache=False, **arguments)
        if self.routers is not None:
            self.routers.remember(output, lengths, tokens.shape)
        logits = self.vocabulary.logits(output.logits)
        return logits, logits


def _scatter(values: Tensor, mask: Tensor) -> Tensor:
    return values.new_zeros(mask.shape).masked_scatter(mask, values)
