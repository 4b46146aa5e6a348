"""PPO: sample, score, compute advantages, and a few epochs of clipped updates, all in one ``training_step``.

Shapes: ``B`` prompts of this process, ``S`` prompt + response tokens, ``T`` response tokens. `docs/ppo.md` lists every
implementation detail with the test that holds it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, OpenUnitInterval, PositiveFloat, PositiveInt
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.algorithms.advantages import ScorePosition, token_rewards
from rlhf_lightning.algorithms.kl import Estimator, adapt_kl_coefficient, kl_estimate
from rlhf_lightning.algorithms.masked import whiten
from rlhf_lightning.batches import PromptBatch, Rollout, View
from rlhf_lightning.distributed import all_reduce_sum, grad_norm, gradient_sync, rank, scale_grads, world_size
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.actor_critic import ActorCriticModule
from rlhf_lightning.modules.experience import Experience
from rlhf_lightning.modules.ppo_metrics import count_rollout, iteration_metrics, values_at_the_cut
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.ops.clipped_policy_loss import clipped_policy_loss
from rlhf_lightning.ops.clipped_value_loss import clipped_value_loss
from rlhf_lightning.ops.gae import gae
from rlhf_lightning.randomness import MINIBATCHES, permutation
from rlhf_lightning.rewards.base import Reward, check_scores

# The iteration number that validation's draws are made under: no training iteration has it.
_VALIDATION = -1


class PPOModule(ActorCriticModule):
    """Proximal policy optimisation of a language model against a reward, with a KL penalty towards a reference.

    Args:
        model: folder (or hub id) of the policy to train, usually an SFT run's.
        reward: what scores a response; ``rlhf_lightning.rewards.ModelReward``, ``FunctionReward``, ``WeightedSum``, ...
        learning_rate: peak learning rate of the policy.
        adam_eps: AdamW's epsilon; Stiennon et al. 2020's code takes 1e-5 for PPO.
        iterations: PPO iterations; each takes ``data.batch_size`` prompts and one response to each.
        epochs: passes over an iteration's responses.
        minibatches: optimizer steps in a pass.
        gamma: discount per token.
        lam: GAE's lambda.
        kl_coef: penalty per nat in the reward; the starting value where ``kl_target`` is set.
        kl_estimator: k1, k2 or k3, of the penalty in the reward.
        kl_target: nats per response that the coefficient is adapted to hold; None keeps it fixed.
        kl_horizon: responses over which the adaptive coefficient corrects its error.
        kl_loss_coef: weight of a KL term in the loss, beside or instead of the one in the reward.
        kl_loss_estimator: k2 or k3; k1 is no choice, since its gradient is zero in expectation.
        kl_stop: leave out the rest of an iteration's updates once a minibatch's approximate KL to the policy that
            sampled passes this many nats per token; None never does.
        clip_low: the ratio is clipped from below at ``1 - clip_low``.
        clip_high: and from above at ``1 + clip_high``; larger than ``clip_low`` it is DAPO's clip-higher.
        dual_clip: bounds the loss of negative advantages at ``-dual_clip * A``; above 1, None for no bound.
        clip_value: how far a value may move from its old one before its loss is clipped; None for no clipping.
        value_coef: weight of the value loss.
        entropy_coef: weight of an entropy bonus.
        whiten_advantages: give an iteration's advantages mean 0 and variance 1, over all processes.
        whiten_rewards: scale an iteration's token rewards to variance 1 and keep their mean.
        score_clip: bound on the absolute score; None for none.
        score_position: ``last_token``, or ``after_eos`` for one slot later.
        missing_eos_penalty: taken off the score of a response that did not end by EOS.
        bootstrap_truncated: credit such a response with the critic's value of the state it was cut off in.
        old_log_probs: ``recompute`` them by a training pass, so that the first ratio is 1; or take the ``rollout``'s.
        max_grad_norm: clip the gradient norm, of the policy and of a critic of its own each; None for no clipping.
        eval_temperature: of the samples in validation; 0 is greedy, None the training temperature.
        kwargs: models, sampling, optimizer: see `ActorCriticModule` and `RLHFModule`.

    Raises: InputError when options contradict each other.
    """

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        learning_rate: PositiveFloat = 1e-6,
        adam_eps: PositiveFloat = 1e-5,
        iterations: PositiveInt = 100,
        epochs: PositiveInt = 4,
        minibatches: PositiveInt = 4,
        gamma: ClosedUnitInterval = 1.0,
        lam: ClosedUnitInterval = 0.95,
        kl_coef: NonNegativeFloat = 0.05,
        kl_estimator: Estimator = "k1",
        kl_target: PositiveFloat | None = None,
        kl_horizon: PositiveFloat = 10000.0,
        kl_loss_coef: NonNegativeFloat = 0.0,
        kl_loss_estimator: Literal["k2", "k3"] = "k2",
        kl_stop: PositiveFloat | None = None,
        clip_low: OpenUnitInterval = 0.2,
        clip_high: PositiveFloat = 0.2,
        dual_clip: PositiveFloat | None = None,
        clip_value: PositiveFloat | None = 0.2,
        value_coef: NonNegativeFloat = 0.1,
        entropy_coef: NonNegativeFloat = 0.0,
        whiten_advantages: bool = True,
        whiten_rewards: bool = False,
        score_clip: PositiveFloat | None = None,
        score_position: ScorePosition = "last_token",
        missing_eos_penalty: NonNegativeFloat = 0.0,
        bootstrap_truncated: bool = False,
        old_log_probs: Literal["recompute", "rollout"] = "recompute",
        max_grad_norm: PositiveFloat | None = 1.0,
        eval_temperature: NonNegativeFloat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, learning_rate=learning_rate, adam_eps=adam_eps, **kwargs)
        if dual_clip is not None and dual_clip <= 1.0:
            raise InputError(f"model.dual_clip: expected a number above 1, got {dual_clip}; null turns it off")
        if kl_target is not None and kl_coef == 0:
            raise InputError(
                "model.kl_target: adapts kl_coef by factors, which leave 0 at 0; set a kl_coef to start from"
            )
        self.iterations, self.epochs, self.minibatches = iterations, epochs, minibatches
        self.gamma, self.lam = gamma, lam
        self.kl_coef, self.kl_estimator = kl_coef, kl_estimator
        self.kl_target, self.kl_horizon = kl_target, kl_horizon
        self.kl_loss_coef, self.kl_loss_estimator, self.kl_stop = kl_loss_coef, kl_loss_estimator, kl_stop
        self.clip_low, self.clip_high, self.dual_clip, self.clip_value = clip_low, clip_high, dual_clip, clip_value
        self.value_coef, self.entropy_coef = value_coef, entropy_coef
        self.whiten_advantages, self.whiten_rewards = whiten_advantages, whiten_rewards
        self.score_clip, self.score_position = score_clip, score_position
        self.missing_eos_penalty, self.bootstrap_truncated = missing_eos_penalty, bootstrap_truncated
        self.old_log_probs = old_log_probs
        self.max_grad_norm = max_grad_norm
        self.eval_temperature = eval_temperature
        self.data_view = View("prompts", steps=iterations)
        # What a checkpoint holds beside weights and optimizer; all else is a function of the iteration.
        self.iteration = 0
        self.kl_coefficient = kl_coef
        self.grad_norms: dict[str, float] = {}  # of the last optimizer step, by network, before clipping

    def setup(self, stage: str) -> None:
        """Checks that need the data; see `ActorCriticModule.setup`.

        Raises: InputError when the minibatches outnumber an iteration's responses.
        """
        super().setup(stage)
        rows = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if rows is not None:
            self.check_minibatches(rows)

    def check_minibatches(self, rows: int) -> None:
        """InputError where ``rows`` responses do not make ``minibatches`` minibatches."""
        if rows < self.minibatches:
            raise InputError(
                f"model.minibatches: {self.minibatches} minibatches cannot be made of {rows} responses; raise "
                "data.batch_size or lower model.minibatches"
            )

    def total_steps(self) -> int:
        """Optimizer steps of the whole training, over which the learning-rate schedule runs."""
        return self.iterations * self.epochs * self.minibatches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["ppo"] = {"iteration": self.iteration, "kl_coefficient": self.kl_coefficient}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state = checkpoint["ppo"]
        self.iteration = state["iteration"]
        if self.kl_target is not None:
            self.kl_coefficient = state["kl_coefficient"]

    # ------------------------------------------------------------------ the algorithm

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: Schulman et al. 2017, arXiv 1707.06347, algorithm 1; Ouyang et al. 2022, arXiv 2203.02155."""
        totals = Totals()
        with self.timed("rollout"):
            rollout = self.generate(batch, iteration=self.iteration)
        with self.timed("score"):
            scores = check_scores(self.score(rollout), rollout, f"{type(self).__name__}.score")
            experience = self.collect(rollout, scores, totals)
        with self.timed("update"):
            steps = self.learn(experience, totals)
        self.finish(rollout, scores, experience, totals, steps)

    def shaped(self, scores: Tensor, rollout: Rollout) -> Tensor:
        """The scores as they enter the token rewards: less the missing-EOS penalty, then clipped; ``[B]``."""
        scores = scores - self.missing_eos_penalty * rollout.truncated.float()
        return scores if self.score_clip is None else scores.clamp(-self.score_clip, self.score_clip)

    @torch.no_grad()
    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Experience:
        """What stays fixed during the update: old log-probs, values, token rewards, advantages, returns."""
        now = self.evaluate(rollout)
        mask = rollout.response_mask & (rollout.prompts.weights > 0)[:, None]
        old = rollout.log_probs if self.old_log_probs == "rollout" else now.log_probs
        rewards, value_mask = token_rewards(
            scores=self.shaped(scores, rollout),
            kl=kl_estimate(old, now.reference_log_probs, self.kl_estimator),
            lengths=rollout.response_lengths,
            truncated=rollout.truncated,
            weights=rollout.prompts.weights,
            kl_coef=self.kl_coefficient,
            score_position=self.score_position,
        )
        if self.whiten_rewards:
            rewards = whiten(rewards, value_mask, all_reduce_sum, keep_mean=True)
        if self.bootstrap_truncated:
            rewards = rewards + self.gamma * values_at_the_cut(rollout, now.values)
        advantages, returns = gae(rewards, now.values, value_mask, self.gamma, self.lam)
        advantages = advantages[:, :-1]  # the slot after the last token is a state, with no action to credit
        if self.whiten_advantages:
            advantages = whiten(advantages, mask, all_reduce_sum)
        count_rollout(totals, rollout, scores, self.kl_coefficient, now)
        return Experience(
            tokens=rollout.tokens,
            lengths=rollout.lengths,
            prompt_lengths=rollout.prompt_lengths,
            weights=rollout.prompts.weights,
            log_probs=old,
            reference_log_probs=now.reference_log_probs,
            values=now.values,
            value_mask=value_mask,
            advantages=advantages,
            returns=returns,
        )

    def learn(self, experience: Experience, totals: Totals) -> int:
        """``epochs`` passes of ``minibatches`` optimizer steps each; a pass is a fresh permutation of all rows.

        Returns: the steps made, fewer than epochs x minibatches only where ``kl_stop`` ended them.
        """
        rows = int(all_reduce_sum((experience.weights > 0).sum()))
        self.check_minibatches(rows)
        steps = 0
        for epoch in range(self.epochs):
            order = permutation(rows, self.seed, MINIBATCHES, self.iteration, epoch)
            for minibatch in torch.tensor_split(order, self.minibatches):
                # Row i of the iteration lies with process i % world: the minibatches are the same for any number of
                # them.
                own = minibatch[minibatch % world_size() == rank()] // world_size()
                if not self.step(experience, own.to(experience.tokens.device), totals):
                    return steps
                steps += 1
        return steps

    def step(self, experience: Experience, rows: Tensor, totals: Totals) -> bool:
        """One optimizer step on a minibatch; False, and no step, where its approximate KL passes ``kl_stop``."""
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(scheduler, LRScheduler)
        optimizer.zero_grad()
        part = experience.mask[rows].sum(), experience.value_mask[rows].sum()
        tokens, states = all_reduce_sum(torch.stack(part)).clamp(min=1).unbind()
        moved = Totals()
        for group, counted, last in self.rounds(experience.lengths, rows, "update"):
            micro = experience.take(group)
            if not counted:
                micro = replace(
                    micro, weights=torch.zeros_like(micro.weights), value_mask=torch.zeros_like(micro.value_mask)
                )
            with gradient_sync(self, last):
                policy_loss, value_loss = self.losses(micro, totals, moved)
                # The strategies average gradients over processes; ours are sums over a global count.
                loss = world_size() * (policy_loss / tokens + self.value_coef * value_loss / states)
                self.check(loss)
                self.manual_backward(loss)
        if self.kl_stop is not None and moved.means()["approxkl"] > self.kl_stop:
            optimizer.zero_grad()
            return False
        optimizer.step()
        scheduler.step()
        for name, norm in self.grad_norms.items():
            totals.add(f"{name}/grad_norm", torch.tensor(norm))
        return True

    def losses(self, e: Experience, totals: Totals, moved: Totals) -> tuple[Tensor, Tensor]:
        """Sums over a micro-batch: of the policy's loss over its tokens, and of the critic's over its states."""
        log_probs, entropy, values = self.actor_and_critic(e.tokens, e.lengths, e.prompt_lengths, self.temperature)
        mask = e.mask
        policy_loss, clipped = clipped_policy_loss(
            log_probs, e.log_probs, e.advantages, self.clip_low, self.clip_high, self.dual_clip
        )
        value_loss, value_clipped = clipped_value_loss(values, e.values, e.returns, self.clip_value)
        kl = kl_estimate(log_probs, e.reference_log_probs, self.kl_loss_estimator)
        token_loss = policy_loss + self.kl_loss_coef * kl - self.entropy_coef * entropy

        change = log_probs.detach() - e.log_probs
        moved.add("approxkl", 0.5 * change.square(), mask)
        totals.add("policy/approxkl", 0.5 * change.square(), mask)
        totals.add("policy/clipfrac", clipped.float(), mask)
        totals.add("policy/entropy", entropy, mask)
        totals.add("val/ratio", change.exp(), mask)
        totals.add("val/ratio_squared", (2 * change).exp(), mask)
        totals.add("val/clipfrac", value_clipped.float(), e.value_mask)
        totals.add("loss/policy", token_loss, mask)
        totals.add("loss/value", value_loss, e.value_mask)
        return torch.where(mask, token_loss, 0.0).sum(), torch.where(e.value_mask, value_loss, 0.0).sum()

    # ------------------------------------------------------------------ around it

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check (see `OptimisedModule`), then clip the gradients of the policy and of a critic of its own, each alone.

        Here and not before the step, because a scaler of fp16 gradients has taken its scale off by now.
        """
        super().on_before_optimizer_step(optimizer)
        self.grad_norms = {}
        for name, network in (("policy", self.policy), ("critic", self.critic)):
            if network is None:
                continue
            norm = self.grad_norms[name] = grad_norm(network.parameters())
            if self.max_grad_norm is not None and norm > self.max_grad_norm:
                scale_grads(network.parameters(), self.max_grad_norm / norm)

    def finish(self, rollout: Rollout, scores: Tensor, experience: Experience, totals: Totals, steps: int) -> None:
        """Log the iteration, adapt the KL coefficient, and count the iteration as done."""
        metrics = iteration_metrics(totals, rollout, scores, experience)
        metrics["policy/steps"] = float(steps)
        metrics["objective/kl_coef"] = self.kl_coefficient
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.phase_seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics.pop("rollout/tokens") / self.phase_seconds["rollout"]
        self.log_dict(metrics)
        self.report_samples(rollout, {"score": scores})
        if self.kl_target is not None:
            episodes = int(all_reduce_sum((rollout.prompts.weights > 0).sum()))
            self.kl_coefficient = adapt_kl_coefficient(
                self.kl_coefficient, metrics["objective/kl"], self.kl_target, self.kl_horizon, episodes
            )
        self.iteration += 1

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Held-out prompts, always answered with the same draws, so that two validations differ by the policy alone."""
        temperature = self.temperature if self.eval_temperature is None else self.eval_temperature
        rollout = self.generate(batch, iteration=_VALIDATION, temperature=temperature)
        scores = check_scores(self.score(rollout), rollout, f"{type(self).__name__}.score")
        # Greedy samples have no KL: they are of no distribution that log-probs could be taken under.
        now = self.evaluate(rollout, temperature or self.temperature)
        count_rollout(self.held_out_totals, rollout, scores, self.kl_coefficient, now)
        self.report_samples(rollout, {"score": scores})

    def _log_held_out(self, stage: str) -> None:
        names = {"objective/scores": "scores", "rollout/length": "length", "rollout/truncated": "truncated"}
        if self.eval_temperature != 0:
            names |= {"objective/kl": "kl", "objective/kl_k3": "kl_k3"}
        means = self.held_out_totals.means()
        self.held_out_totals = Totals()
        prefix = "eval" if stage == "val" else stage
        # The same numbers everywhere already; syncing tells Lightning so.
        self.log_dict({f"{prefix}/{new}": means[old] for old, new in names.items()}, sync_dist=True)

    # `test` and `validate` measure the same things, on the split that each names.
    test_step = validation_step
