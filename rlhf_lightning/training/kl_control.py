"""The KL penalty: its coefficient, fixed or adaptive, and the estimate that it is charged on.

Shapes: ``B`` rows of this process, ``T`` response tokens.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rlhf_lightning.algorithms.kl import Estimator, adapt_kl_coefficient, kl_estimate
from rlhf_lightning.errors import InputError
from rlhf_lightning.options import NonNegativeFloat, Options, PositiveFloat
from rlhf_lightning.training.experience import ResponseScores


@dataclass(frozen=True, kw_only=True)
class KLOptions(Options):
    """How the policy is held near its reference.

    Args:
        coef: penalty per nat in the reward; the starting value where ``target`` is set.
        estimator: k1, k2 or k3, of the penalty in the reward.
        target: nats per response that the coefficient is adapted to hold; None keeps it fixed.
        horizon: responses over which the adaptive coefficient corrects its error; None takes 10000.
        loss_coef: weight of a KL term in the loss, beside or instead of the one in the reward.
        loss_estimator: k2 or k3; k1 is no choice, since its gradient is zero in expectation. None takes the method's
            own.
        stop: leave out the rest of an iteration's updates once a minibatch's approximate KL to the policy that
            sampled passes this many nats per token; None never does.

    Raises:
        InputError: options contradict each other.
    """

    coef: NonNegativeFloat = 0.05
    estimator: Estimator = "k1"
    target: PositiveFloat | None = None
    horizon: PositiveFloat | None = None
    loss_coef: NonNegativeFloat = 0.0
    loss_estimator: Literal["k2", "k3"] | None = None
    stop: PositiveFloat | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.target is not None and self.coef == 0:
            raise InputError("model.kl.target: adapts kl.coef by factors, which leave 0 at 0; set a coef to start from")
        if self.horizon is not None and self.target is None:
            raise InputError(f"model.kl.horizon: {self.horizon} has no effect without kl.target; set both, or none")
        if self.loss_estimator is not None and self.loss_coef == 0:
            raise InputError(
                f"model.kl.loss_estimator: {self.loss_estimator} has no effect without a weight; set kl.loss_coef, or "
                "leave it out"
            )


class KLController:
    """The coefficient of the KL penalty, fixed or adaptive, and the penalty itself.

    Attributes:
        coef: the penalty per nat, now.
    """

    def __init__(self, options: KLOptions) -> None:
        self.options = options
        self.coef: float = options.coef

    def per_token(self, old: ResponseScores) -> Tensor:
        """``[B, T]`` nats, before the coefficient."""
        return kl_estimate(old.log_probs, old.reference_log_probs, self.options.estimator)

    def per_response(self, old: ResponseScores, mask: Tensor) -> Tensor:
        """``[B]`` nats, summed over the tokens of ``mask`` ``[B, T]``: the response as a single action."""
        return self.per_token(old).masked_fill(~mask, 0.0).sum(1)

    def exceeds_stop(self, approx_kl: float) -> bool:
        """Whether a minibatch's approximate KL, nats per token, has passed ``stop``."""
        return self.options.stop is not None and approx_kl > self.options.stop

    def adapt(self, kl: float, responses: int) -> None:
        """Moves an adaptive coefficient, by an iteration's mean KL in nats per response and its number of responses."""
        if self.options.target is not None:
            horizon = self.options.horizon or 10000.0
            self.coef = adapt_kl_coefficient(self.coef, kl, self.options.target, horizon, responses)

    def state(self) -> dict[str, float]:
        """The part that a checkpoint holds."""
        return {"coef": self.coef}

    def load(self, state: dict[str, float]) -> None:
        """Continues from a checkpoint; a fixed coefficient is the config's."""
        if self.options.target is not None:
            self.coef = state["coef"]
