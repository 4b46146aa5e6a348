"""The actors of a method that samples: policy, reference and critic, and their passes over responses.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. A critic is asked about
``T + 1`` states: before each response token, and after the last one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from rlhf_lightning.batches import DemonstrationBatch, Rollout
from rlhf_lightning.models.policy import Policy, Reference, TokenScores
from rlhf_lightning.models.positions import response_states
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.training.experience import ResponseScores
from rlhf_lightning.training.minibatches import Report, micro_rounds, silent
from rlhf_lightning.training.totals import Totals


class Actors(nn.Module):
    """The networks of an on-policy method, of which policy and critic are trained.

    Args:
        policy: what is trained; it may have a critic's head on its trunk.
        reference: frozen; outside of the module tree, so it is in no checkpoint.
        critic: a critic that is a model of its own; None without one.
        temperature: of log-probs.
        micro_batch_tokens: padded tokens in one forward pass at most.

    Attributes:
        resting: whether the critic learns alone while the policy rests. The policy's passes then build no graph.
    """

    reference: Reference

    def __init__(
        self,
        policy: Policy,
        reference: Reference,
        critic: ScalarModel | None = None,
        *,
        temperature: float = 1.0,
        micro_batch_tokens: int = 8192,
    ) -> None:
        super().__init__()
        self.policy = policy
        self.critic = critic
        object.__setattr__(self, "reference", reference)
        self.temperature = temperature
        self.micro_batch_tokens = micro_batch_tokens
        self.resting = False

    def networks(self) -> dict[str, Policy | ScalarModel]:
        """What is trained, by its name in the metrics."""
        return {"policy": self.policy} | ({} if self.critic is None else {"critic": self.critic})

    # Passes

    def forward(
        self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor, temperature: float | None = None
    ) -> TokenScores:
        """The policy's log-probs and entropies of right-padded rows ``[B, S]``, and a critic's values with them."""
        temperature = self.temperature if temperature is None else temperature
        scores: TokenScores = self.policy(tokens, lengths, prompt_lengths, temperature, trained=not self.resting)
        return scores if self.critic is None else scores._replace(values=self.values(tokens, lengths, prompt_lengths))

    def values(self, tokens: Tensor, lengths: Tensor, prompt_lengths: Tensor) -> Tensor | None:
        """The values ``[B, T + 1]`` of a critic that is a model of its own; None without one."""
        if self.critic is None:
            return None
        # A bootstrap needs the state after the last token too, so there is one state more than response tokens.
        return response_states(self.critic(tokens, lengths), prompt_lengths, lengths + 1)

    @torch.no_grad()
    def evaluate(
        self,
        rollout: Rollout,
        temperature: float | None = None,
        known: Tensor | None = None,
        report: Report = silent,
    ) -> ResponseScores:
        """Log-probs of policy and reference, and a critic's values, in micro-batches; no gradient.

        Args:
            rollout: the responses.
            temperature: of the log-probs; None is the training temperature.
            known: the policy's log-probs ``[B, T]``, taken instead of a pass of its own; None where they are not known.
            report: told how far it is.
        """
        temperature = self.temperature if temperature is None else temperature
        rows, width = len(rollout), rollout.log_probs.shape[1]
        log_probs, reference_log_probs, values = (rollout.log_probs.new_zeros(rows, width + n) for n in (0, 0, 1))
        valued = False
        for part, real, _ in self._rounds(rollout.lengths, "score", report):
            longest = int(rollout.lengths[part].max())
            inputs = rollout.tokens[part, :longest], rollout.lengths[part], rollout.prompt_lengths[part]
            if known is None or self.policy.critic_head is not None:  # a critic on the trunk needs the policy's pass
                own, _, state_values = self(*inputs, temperature)
            else:
                own, state_values = None, self.values(*inputs)
            reference = self.reference(*inputs, temperature).log_probs
            if real:
                steps = reference.shape[1]
                if own is not None:
                    log_probs[part, :steps] = own
                reference_log_probs[part, :steps] = reference
                if state_values is not None:
                    values[part, : steps + 1], valued = state_values, True
        return ResponseScores(log_probs if known is None else known, reference_log_probs, values if valued else None)

    @torch.no_grad()
    def measure_demonstrations(
        self, demonstrations: DemonstrationBatch, totals: Totals, report: Report = silent
    ) -> None:
        """Adds the policy's negative log-likelihood of what people answered, a token, to ``totals``.

        It rises as the policy forgets. At temperature 1, as in supervised fine-tuning.
        """
        for rows, real, _ in self._rounds(demonstrations.lengths, "perplexity", report):
            part = demonstrations.take(rows)
            weights = part.response_weights if real else torch.zeros_like(part.response_weights)
            log_probs = self.policy(part.tokens, part.lengths, part.prompt_lengths).log_probs
            totals.add("demonstrations/loss", -log_probs, weights)

    def _rounds(self, sizes: Tensor, phase: str, report: Report) -> Any:
        rows = torch.arange(len(sizes), device=sizes.device)
        return micro_rounds(sizes, rows, self.micro_batch_tokens, phase, report)

    # Whose parameters are whose

    def own_parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """The trained parameters: the policy's, with a shared trunk, and the critic's own."""
        parts = [part for part in (self.critic, self.policy.critic_head) if part is not None]
        critic = [p for part in parts for p in part.parameters() if p.requires_grad]
        own = {id(p) for p in critic}
        return [p for p in self.parameters() if p.requires_grad and id(p) not in own], critic

    def no_loss(self) -> Tensor | float:
        """0; while the policy rests, with a gradient of 0 for each of its parameters, because DDP waits for those."""
        if not self.resting:
            return 0.0
        return torch.stack([(0.0 * parameter).sum() for parameter in self.own_parameters()[0]]).sum()

    def rest(self, optimizer: Optimizer) -> None:
        """Leaves a policy that rests as it is in the coming step.

        Its gradients become None and not 0, because AdamW skips parameters without a gradient and would decay the
        others. Their optimizer state is created all the same, since a sharded checkpoint needs every parameter's.
        """
        if not self.resting:
            return
        if isinstance(self.policy, FSDPModule):
            self.policy.reshard()  # as a backward pass would have; the optimizer knows the shards alone
        for parameter in self.own_parameters()[0]:
            parameter.grad = None
            if parameter not in optimizer.state:
                place = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
                optimizer.state[parameter] = {
                    "step": torch.zeros((), dtype=torch.float32, device=place),
                    "exp_avg": torch.zeros_like(parameter),
                    "exp_avg_sq": torch.zeros_like(parameter),
                }
