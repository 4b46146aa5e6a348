"""The load balancing of a mixture of experts in training: each pass's share of the step's auxiliary loss."""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.routers import find_routers
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.totals import Totals


def balance(model: Policy | ScalarModel, compiled: bool) -> None:
    """Train the model's routers too, where its config asks for it.

    Raises:
        InputError: it asks for what is not known of this model, or not possible with other options.
    """
    model.routers = find_routers(model.model)
    if model.routers is None:
        return
    way_out = f"or set output_router_logits to false in the config.json of {model.model.name_or_path}"
    if compiled:
        raise InputError(
            "model.compile_layers: the routers' auxiliary loss, which the model's config asks for, needs layers that "
            f"are not compiled; set it to false, {way_out}"
        )
    if isinstance(model, Policy) and model.branch is not None:
        raise InputError(
            "model.critic: a branch of the policy's layers has no auxiliary loss of its routers, which the model's "
            f"config asks for; use critic: model or head, {way_out}"
        )


def router_loss(
    model: Policy | ScalarModel, counted: Tensor, amount: Tensor, totals: Totals, name: str = "train/router_loss"
) -> Tensor | float:
    """What a summed loss gets added for the newest pass of ``model``: amount x coefficient x load-balancing loss.

    A step's summed losses are divided by the step's amount (its tokens, pairs or rows), so the step's auxiliary loss is
    the mean over its passes, each with the weight that it has in the loss beside it, as under transformers' gradient
    accumulation. One pass a step: exactly the model's own loss. It depends on the split into passes, see `Routers`.

    Args:
        counted: ``[B]`` bool, rows of the pass that count.
        amount: scalar; what the summed loss of the pass will be divided by, if it were alone.
        totals: where the loss is logged, without its coefficient.
        name: under which name.

    Returns: a scalar; 0 where the model trains no routers, or the pass had no gradient.
    """
    if model.routers is None or not model.routers.untaken:
        return 0.0
    loss = model.routers.loss(counted)
    totals.add(name, loss[None], amount[None])
    return amount * model.routers.coefficient * loss


def check_taken(parts: Iterable[nn.Module]) -> None:
    """Refuse a step that has left out the routers' loss of a pass.

    Raises:
        InputError: a module of the user's own does not add it.
    """
    for part in parts:
        if isinstance(part, Policy | ScalarModel) and part.routers is not None and part.routers.untaken:
            raise InputError(
                "router_aux_loss_coef: the model's config asks for the routers' auxiliary loss, and this module adds "
                "none; add modules.balancing.router_loss after each pass, or set output_router_logits to false in the "
                "model's config.json"
            )
