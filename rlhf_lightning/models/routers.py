"""The load-balancing loss of a mixture of experts' routers, where the model's config asks for it.

Shapes: ``B`` rows of at most ``S`` tokens, ``N`` tokens that the trunk was given, ``E`` experts.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import embedding_weight, nearly_equal

# What configs call the number of experts that a token goes to.
_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_k", "moe_top_k")


class Routed(NamedTuple):
    """The routers' logits of one pass with a gradient."""

    logits: tuple[Tensor, ...]  # [N, E] for each layer with experts
    real: Tensor  # [B, S] bool
    slots: Tensor | None  # [B * S] int64, which of the N a place is; None where N is B * S in order


class Routers:
    """Keeps the routers' logits of training passes, and makes the load-balancing loss of them.

    The loss of a pass is transformers' own, that of the Switch transformer (Fedus et al. 2021, arXiv 2101.03961,
    equations 4 to 6, over all layers together): ``E * sum_e f_e * P_e``, f the share of tokens that go to expert e and
    P its mean probability, over the real tokens of the rows that count. Padding has no part in it; a beginning that
    rows share counts once for each of them, however the pass was packed. No gradient goes through f.

    A pass's loss is a product of means, so the mean over two halves of a batch is not that of the whole: unlike every
    other loss it depends on how rows are split into passes, here as in transformers. What training adds is defined in
    `training.balancing`.

    Args:
        coefficient: the weight that the config gives it, positive.
        top_k: experts that a token goes to.
        function: transformers' ``load_balancing_loss_func`` of the model's family.
    """

    def __init__(self, coefficient: float, top_k: int, function: Callable[..., Any]) -> None:
        self.coefficient = coefficient
        self._top_k, self._function = top_k, function
        self.untaken: list[Routed] = []  # passes whose loss nobody has asked for yet, the newest last

    def remember(self, output: Any, lengths: Tensor, shape: torch.Size, slots: Tensor | None = None) -> None:
        """Keeps what a forward pass returned, if it can be trained.

        Args:
            output: of a trunk, or of a whole model, that was given `routing`'s argument.
            lengths: ``[B]`` int64, real tokens of the rows.
            shape: ``(B, S)``.
            slots: see `Routed`.
        """
        logits = getattr(output, "router_logits", None) or ()
        if not any(x.requires_grad for x in logits):
            return
        real = torch.arange(shape[1], device=lengths.device) < lengths[:, None]
        self.untaken.append(Routed(tuple(x.reshape(-1, x.shape[-1]) for x in logits), real, slots))

    def loss(self, counted: Tensor) -> Tensor:
        """The load-balancing loss of the newest pass, and forget it; a scalar without the coefficient.

        Args:
            counted: ``[B]`` bool, rows that count. If none does, all do, so that the number is finite.
        """
        logits, real, slots = self.untaken.pop()
        rows = torch.where(counted.any(), counted, True)
        uses = (real & rows[:, None]).flatten().float()
        if slots is not None:
            uses = uses.new_zeros(len(logits[0])).index_add(0, slots, uses)
        return self._of(logits, uses)

    def _of(self, logits: tuple[Tensor, ...], uses: Tensor) -> Tensor:
        wide = tuple(x.to(torch.promote_types(x.dtype, torch.float32)) for x in logits)
        # It takes float masks, so a token of several rows can count several times.
        loss = self._function(wide, wide[0].shape[-1], self._top_k, uses[None])
        assert isinstance(loss, Tensor)
        return loss

    @torch.no_grad()
    def check(self, model: PreTrainedModel) -> None:
        """Compares with what the model's own forward says, where it says something.

        Raises:
            ValueError: it is something else; or whatever the model's code raises.
        """
        embeddings = embedding_weight(model)
        tokens = torch.arange(min(7, embeddings.shape[0]), device=embeddings.device)[None]
        with torch.device(tokens.device):
            logits = model.base_model(input_ids=tokens, use_cache=False, **routing(model, True)).router_logits
            own = getattr(model(input_ids=tokens, use_cache=False, **routing(model, True)), "aux_loss", None)
        found = self._of(tuple(x.reshape(-1, x.shape[-1]) for x in logits), torch.ones_like(tokens[0]).float())
        if own is not None and not nearly_equal(found, own.to(found), torch.float32):
            raise ValueError(f"its own auxiliary loss is {float(own):.4g}, not {float(found):.4g}")


def routing(model: PreTrainedModel, wanted: bool) -> dict[str, bool]:
    """The argument of a forward pass that turns the routers' logits on or off.

    It is empty for a model whose config does not ask for them: such a model may not know the argument.
    """
    asks = getattr(model.config, "output_router_logits", False)
    return {"output_router_logits": wanted} if asks else {}


def find_routers(model: PreTrainedModel) -> Routers | None:
    """The `Routers` of a model whose config asks for their loss; None for all others.

    It asks by ``output_router_logits: true`` and a ``router_aux_loss_coef`` above 0.

    Raises:
        InputError: it asks, and the loss of this family of models is not known.
    """
    config: Any = model.config
    coefficient = getattr(config, "router_aux_loss_coef", 0.0) or 0.0
    if not routing(model, True) or coefficient <= 0:
        return None
    reason = "transformers has no load-balancing loss for it"
    function = getattr(sys.modules[type(model.base_model).__module__], "load_balancing_loss_func", None)
    top_k = next((value for name in _TOP_K if (value := getattr(config, name, None))), None)
    if function is not None and top_k is not None:
        routers = Routers(float(coefficient), int(top_k), function)
        try:
            routers.check(model)
            return routers
        # Whatever a family's code makes of arguments that it does not know.
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
    raise InputError(
        f"{model.name_or_path}: config.json asks for the routers' auxiliary loss (output_router_logits, "
        f"router_aux_loss_coef: {coefficient}), which is not known of {type(model).__name__} ({reason}): set "
        "output_router_logits to false there to train without it"
    )
