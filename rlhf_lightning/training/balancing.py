"""Load balancing of a mixture of experts: the share that each pass has in the step's auxiliary loss."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.training.totals import Totals


def router_loss(
    model: Policy | ScalarModel, counted: Tensor, amount: Tensor, totals: Totals, name: str = "train/router_loss"
) -> Tensor | float:
    """The term to add to a summed loss for the newest pass of ``model``: amount x coefficient x load-balancing loss.

    A step's summed losses are divided by the step's amount (its tokens, pairs or rows), so the step's auxiliary loss is
    the mean over its passes, each with the weight that it has in the loss beside it, as under transformers' gradient
    accumulation. One pass a step: exactly the model's own loss. It depends on the split into passes, see `Routers`.

    Args:
        counted: ``[B]`` bool, rows of the pass that count.
        amount: scalar; what the summed loss of the pass would be divided by if it were the only pass.
        totals: where the loss is logged, without its coefficient.
        name: under which name.

    Returns: a scalar; 0 where the model trains no routers, or the pass had no gradient.
    """
    if model.routers is None or not model.routers.untaken:
        return 0.0
    loss = model.routers.loss(counted)
    totals.add(name, loss[None], amount[None])
    return amount * model.routers.coefficient * loss


def router_losses(
    networks: Mapping[str, Policy | ScalarModel], counted: Tensor, amount: Tensor, totals: Totals
) -> Tensor | float:
    """`router_loss` of each network, logged under its name."""
    return sum(router_loss(part, counted, amount, totals, f"{name}/router_loss") for name, part in networks.items())


def check_taken(parts: Iterable[nn.Module]) -> None:
    """Refuses a step that has left out the routers' loss of a pass.

    Raises:
        InputError: a module of the user's own does not add it.
    """
    for part in parts:
        if isinstance(part, Policy | ScalarModel) and part.routers is not None and part.routers.untaken:
            raise InputError(
                "router_aux_loss_coef: the model's config asks for the routers' auxiliary loss, and this module adds "
                "none; add training.balancing.router_loss after each pass, or set output_router_logits to false in the "
                "model's config.json"
            )
