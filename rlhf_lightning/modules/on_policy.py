"""The loop of every method that learns from its own samples: sample, score, collect, and a few passes of updates.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. One ``training_step`` is one
iteration. A method says what it keeps of a rollout (`collect`) and what a micro-batch of that costs (`counts`, `loss`).
"""

from __future__ import annotations

import math
from typing import Any, Protocol, TypeVar

import torch
from jsonargparse.typing import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.algorithms.kl import Estimator
from rlhf_lightning.batches import PromptBatch, Rollout, View
from rlhf_lightning.collectives import all_reduce_sum, largest, rank, scale_grads, world_size
from rlhf_lightning.distributed import gradient_sync
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.balancing import router_loss
from rlhf_lightning.modules.on_policy_metrics import count_rollout, iteration_metrics
from rlhf_lightning.modules.sampling import SamplingModule
from rlhf_lightning.modules.shaping import ScoreShaping
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.randomness import MINIBATCHES, permutation
from rlhf_lightning.rewards.base import Reward

# The iteration number that validation's draws are made under: no training iteration has it.
_VALIDATION = -1

_Own = TypeVar("_Own", bound="Learnable")


class Learnable(Protocol):
    """What `OnPolicyModule.learn` asks of an experience: rows of this process that can be taken in micro-batches."""

    weights: Tensor  # [B] float32; rows of weight 0 are in no minibatch

    @property
    def sizes(self) -> Tensor:
        """[B] int64, the tokens that a row puts into a forward pass."""

    def take(self: _Own, rows: Tensor) -> _Own:
        """The given rows."""

    def uncounted(self: _Own) -> _Own:
        """The same rows, none of which counts in any loss or metric."""


class OnPolicyModule(SamplingModule):
    """Samples, scores, and hands the rest to the method that derives from it.

    Args:
        model: folder (or hub id) of the policy to train, usually an SFT run's.
        reward: what scores a response; ``rlhf_lightning.rewards.ModelReward``, ``FunctionReward``, ``WeightedSum``, ...
        learning_rate: peak learning rate of the policy.
        adam_eps: AdamW's epsilon; Stiennon et al. 2020's code takes 1e-5 for PPO.
        iterations: how often to sample; each time takes ``data.batch_size`` prompts.
        epochs: passes over an iteration's responses.
        minibatches: optimizer steps in a pass.
        normalise_scores: give the scores mean 0 and variance 1 over all of the training so far, before anything else.
        missing_eos_penalty: taken off the score of a response that did not end by EOS.
        length_penalty: taken off the score for every response token past ``length_threshold``.
        length_threshold: response tokens that cost nothing; see `ScoreShaping`.
        score_clip: bound on the absolute score that is then left; None for none.
        max_grad_norm: clip the gradient norm, of the policy and of a critic of its own each; None for no clipping.
        eval_temperature: of the samples in validation; 0 is greedy, None the training temperature.
        kwargs: models, sampling, optimizer: see `SamplingModule` and `RLHFModule`.

    Raises: InputError when options contradict each other.
    """

    group_size: int = 1  # responses to each prompt
    kl_coefficient: float = 0.0  # what a nat costs, in the logged objective
    kl_estimator: Estimator = "k1"  # by which estimate

    def __init__(
        self,
        model: str,
        reward: Reward | None = None,
        learning_rate: PositiveFloat = 1e-6,
        adam_eps: PositiveFloat = 1e-5,
        iterations: PositiveInt = 100,
        epochs: PositiveInt = 1,
        minibatches: PositiveInt = 1,
        normalise_scores: bool = False,
        missing_eos_penalty: NonNegativeFloat = 0.0,
        length_penalty: NonNegativeFloat = 0.0,
        length_threshold: NonNegativeInt = 0,
        score_clip: PositiveFloat | None = None,
        max_grad_norm: PositiveFloat | None = 1.0,
        eval_temperature: NonNegativeFloat | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(model, reward, learning_rate=learning_rate, adam_eps=adam_eps, **kwargs)
        self.iterations, self.epochs, self.minibatches = iterations, epochs, minibatches
        self.shaped = ScoreShaping(
            normalise_scores, missing_eos_penalty, length_penalty, length_threshold, score_clip, self.max_new_tokens
        )
        self.max_grad_norm = max_grad_norm
        self.eval_temperature = eval_temperature
        self.data_view = View("prompts", steps=iterations, demonstrations="held_out")
        self._steps_made = 0  # since this process began
        self.iteration = 0  # beside weights and optimizer, what a checkpoint holds; draws are functions of it

    @property
    def rows_per_prompt(self) -> int:
        """Rows of an experience that a prompt makes."""
        return self.group_size

    def checked_group(self, size: int) -> int:
        """InputError where ``size`` responses make no group to compare within."""
        if size < 2:
            raise InputError(f"model.group_size: expected at least 2 responses to each prompt, got {size}")
        return size

    def setup(self, stage: str) -> None:
        """Checks that need the data; see `SamplingModule.setup`.

        Raises: InputError when the minibatches outnumber an iteration's responses.
        """
        super().setup(stage)
        prompts = getattr(getattr(self.trainer, "datamodule", None), "batch_size", None)
        if prompts is not None:
            self.check_minibatches(prompts)

    def check_minibatches(self, prompts: int) -> None:
        """InputError where the responses to ``prompts`` prompts do not make ``minibatches`` minibatches."""
        rows = prompts * self.rows_per_prompt
        if rows < self.minibatches:
            raise InputError(
                f"model.minibatches: {self.minibatches} minibatches cannot be made of {rows} responses; raise "
                "data.batch_size or lower model.minibatches"
            )

    def total_steps(self) -> int:
        """Optimizer steps of the whole training, over which the learning-rate schedule runs."""
        return self.iterations * self.epochs * self.minibatches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {"iteration": self.iteration, **self.shaped.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        own = self.own_part(checkpoint, "on_policy")
        self.iteration = own["iteration"]
        self.shaped.load(own)

    # ------------------------------------------------------------------ an iteration

    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration: sample, score, keep what the method learns from, and learn it."""
        self.check_minibatches(int(all_reduce_sum((batch.weights > 0).sum())))
        totals = Totals()
        with self.timed("rollout"):
            rollout = self.generate(batch.repeat(self.group_size), iteration=self.iteration)
        with self.timed("score"):
            rollout, scores = self.scored(rollout, totals, self.group_size)
            self.shaped.observe(scores, rollout.prompts.weights > 0)
            experience = self.collect(rollout, scores, totals)
        with self.timed("update"):
            steps = self.learn(experience, totals)
        self._steps_made += steps
        self.finish(rollout, scores, totals, steps)

    def collect(self, rollout: Rollout, scores: Tensor, totals: Totals) -> Learnable:
        """What stays fixed during the update; the rows of prompt i are ``i * rows_per_prompt`` and those after it."""
        raise NotImplementedError(f"{type(self).__name__} must define collect(rollout, scores, totals)")

    def counts(self, experience: Any, rows: Tensor) -> Tensor:
        """``[n]``: what the given rows add to the counts that a minibatch's losses are divided by."""
        raise NotImplementedError(f"{type(self).__name__} must define counts(experience, rows)")

    def loss(self, micro: Any, counts: Tensor, totals: Totals, moved: Totals) -> Tensor:
        """The loss of a micro-batch, divided by the counts of its whole minibatch; a scalar."""
        raise NotImplementedError(f"{type(self).__name__} must define loss(micro, counts, totals, moved)")

    def router_losses(self, micro: Any, totals: Totals) -> Tensor | float:
        """The routers' auxiliary loss of each network that was run on the micro-batch, see `balancing`.

        Each with the micro-batch's share in the policy's loss; the first of its `counts` is what it adds to it.
        """
        networks = {n: part for n, part in self.networks().items() if isinstance(part, Policy | ScalarModel)}
        if all(part.routers is None for part in networks.values()):
            return 0.0
        rows = torch.arange(len(micro.weights), device=micro.weights.device)
        amount = self.counts(micro, rows)[0]
        counted = (micro.weights > 0).repeat_interleave(micro.lengths.numel() // len(rows))  # both rows of a pair
        return sum(router_loss(part, counted, amount, totals, f"loss/{n}_router") for n, part in networks.items())

    def too_far(self, moved: Totals) -> bool:
        """Whether the minibatch's policy has moved so far that its step, and all that follow, are to be left out."""
        return False

    def networks(self) -> dict[str, nn.Module]:
        """What is trained, by the name in the metrics; the gradient of each is clipped alone."""
        assert self.policy is not None
        return {"policy": self.policy}

    def learn(self, experience: Learnable, totals: Totals) -> int:
        """``epochs`` passes of ``minibatches`` optimizer steps each; a pass is a fresh permutation of all rows.

        Returns: the steps made, fewer than epochs x minibatches only where `too_far` ended them, or where a minibatch
            has nothing that counts: fewer rows with a weight than minibatches, or no token in any of its responses.
        """
        group, world = self.rows_per_prompt, world_size()
        # Prompt i of the iteration lies with process i % world: the minibatches are the same for any number of them.
        local = torch.arange(len(experience.weights))
        numbers = (local // group * world + rank()) * group + local % group
        everywhere = largest(len(local)) * world
        weighted = torch.zeros(everywhere, dtype=torch.int64)
        weighted[numbers] = (experience.weights > 0).long().cpu()
        counted = all_reduce_sum(weighted).nonzero()[:, 0]
        steps = 0
        for epoch in range(self.epochs):
            order = counted[permutation(len(counted), self.seed, MINIBATCHES, self.iteration, epoch)]
            for minibatch in torch.tensor_split(order, self.minibatches):
                prompts = minibatch // group
                own = (prompts // world * group + minibatch % group)[prompts % world == rank()]
                own = own.to(experience.weights.device)
                counts = all_reduce_sum(self.counts(experience, own))
                if not bool(counts.any()):
                    continue  # a step without a loss would still move the weights, by the optimizer's momentum
                if not self.step(experience, own, counts, totals):
                    if steps == 0:
                        rank_zero_warn(
                            f"iteration {self.iteration}: before its first step the policy is already past "
                            "model.kl_stop, so no step was made: the rollout's log-probs are not the training pass's; "
                            "set model.old_log_probs to recompute, or raise kl_stop"
                        )
                    return steps
                steps += 1
        return steps

    def step(self, experience: Learnable, rows: Tensor, counts: Tensor, totals: Totals) -> bool:
        """One optimizer step on a minibatch; False, and no step, where the policy has moved `too_far`.

        ``rows``: those of this process; ``counts``: what all processes' rows add up to, see `counts`.
        """
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(scheduler, LRScheduler)
        optimizer.zero_grad()
        counts = torch.where(counts > 0, counts, 1)
        moved = Totals()
        for group, counted, last in self.rounds(experience.sizes, rows, "update"):
            micro = experience.take(group)
            with gradient_sync(self, last):
                # The strategies average gradients over processes; ours are sums over a global count.
                micro = micro if counted else micro.uncounted()
                loss = self.loss(micro, counts, totals, moved) + self.router_losses(micro, totals) / counts[0]
                loss = world_size() * loss
                self.check(loss)
                self.manual_backward(loss)
        if self.too_far(moved):
            optimizer.zero_grad()
            return False
        optimizer.step()
        scheduler.step()
        for name, norm in self.grad_norms.items():
            totals.add(f"{name}/grad_norm", torch.tensor(norm))
        return True

    # ------------------------------------------------------------------ around it

    @property
    def moment(self) -> str:
        """See `OptimisedModule.moment`."""
        return f"{super().moment} in iteration {self.iteration}"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Check (see `OptimisedModule`), then clip the gradients of each network, the critic's apart from the policy's.

        Here and not before the step, because a scaler of fp16 gradients has taken its scale off by now.
        """
        super().on_before_optimizer_step(optimizer)
        for name, network in self.networks().items():
            if self.max_grad_norm is not None and self.grad_norms[name] > self.max_grad_norm:
                scale_grads(network.parameters(), self.max_grad_norm / self.grad_norms[name])

    def finish(self, rollout: Rollout, scores: Tensor, totals: Totals, steps: int) -> dict[str, float]:
        """Log the iteration, and count it as done; returns what was logged."""
        metrics = iteration_metrics(totals, rollout, scores)
        metrics["policy/steps"] = float(steps)
        metrics["objective/kl_coef"] = self.kl_coefficient
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        metrics["lr"] = optimizer.param_groups[0]["lr"]
        metrics |= {f"time/{phase}": seconds for phase, seconds in self.phase_seconds.items()}
        metrics["rollout/tokens_per_second"] = metrics.pop("rollout/tokens") / self.phase_seconds["rollout"]
        if not bool(all_reduce_sum((rollout.prompts.weights > 0).sum())):
            rank_zero_warn(f"iteration {self.iteration}: the reward left no response to learn from; no step was made")
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.log_dict(metrics)
        self.report_samples(rollout, {"score": scores})
        self.iteration += 1
        return metrics

    def on_train_end(self) -> None:
        """A run that learnt nothing at all is told once more, where it is seen."""
        if not self._steps_made:
            rank_zero_warn("no step was made in this run: the model is the one that it began with")

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Held-out prompts, always answered with the same draws, so that two validations differ by the policy alone."""
        temperature = self.temperature if self.eval_temperature is None else self.eval_temperature
        rollout = self.generate(batch, iteration=_VALIDATION, temperature=temperature)
        rollout, scores = self.scored(rollout, self.held_out_totals)
        # Greedy samples have no KL: they are of no distribution that log-probs could be taken under.
        now = self.evaluate(rollout, temperature or self.temperature)
        count_rollout(self.held_out_totals, rollout, scores, now, self.kl_coefficient, self.kl_estimator)
        if batch.demonstrations is not None:
            self.watch(batch.demonstrations, self.held_out_totals)
        self.report_samples(rollout, {"score": scores})

    def _log_held_out(self, stage: str) -> None:
        names = {"objective/scores": "scores", "rollout/length": "length", "rollout/truncated": "truncated"}
        if self.eval_temperature != 0:
            names |= {"objective/kl": "kl", "objective/kl_k3": "kl_k3"}
        totals, self.held_out_totals = self.held_out_totals, Totals()
        means = totals.means()
        prefix = "eval" if stage == "val" else stage
        # The same numbers everywhere already; syncing tells Lightning so.
        measured = {f"{prefix}/{new}": means[old] for old, new in names.items()}
        if "reward/skipped" in means:
            measured[f"{prefix}/skipped"] = totals.total("reward/skipped")
        if "demonstrations/loss" in means:
            measured[f"{prefix}/perplexity"] = math.exp(min(means["demonstrations/loss"], 700.0))
        self.log_dict(measured, sync_dist=True)

    # `test` and `validate` measure the same things, on the split that each names.
    test_step = validation_step
