"""The base of every method that learns from its own samples: it samples, scores, and makes a few passes of updates.

Shapes: ``B`` rows of this process, ``S`` prompt + response tokens, ``T`` response tokens. One ``training_step`` is one
iteration. A method writes its ``training_step`` with the methods of this class, and the `loss` of a micro-batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from functools import reduce
from itertools import chain
from operator import add
from typing import Any

import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from rlhf_lightning.batches import PromptBatch, Rollout, View
from rlhf_lightning.collectives import all_reduce_sum, largest, rank, scale_grads, world_size
from rlhf_lightning.distributed import gradient_sync
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, ModelFactory, NetworkOptions
from rlhf_lightning.models.policy import Policy, Reference, TokenScores
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.rewards.base import Reward
from rlhf_lightning.rollout.best_of import best_responses
from rlhf_lightning.rollout.engine import RolloutEngine
from rlhf_lightning.training.actors import Actors
from rlhf_lightning.training.balancing import router_losses
from rlhf_lightning.training.experience import Learnable, ResponseScores
from rlhf_lightning.training.kl_control import KLController, KLOptions
from rlhf_lightning.training.last_checkpoint import naming_checkpoint
from rlhf_lightning.training.minibatches import UpdateOptions, flags_of_all, micro_rounds, minibatches
from rlhf_lightning.training.objective import Loss
from rlhf_lightning.training.optimizer import AdamWOptions
from rlhf_lightning.training.rollout_metrics import Phases, count_rollout, held_out_metrics, iteration_metrics
from rlhf_lightning.training.sampler import RolloutOptions, Sampler, answers
from rlhf_lightning.training.scoring import checked_scores, prepare_reward, settle
from rlhf_lightning.training.shaping import ScoreOptions, ScoreShaping
from rlhf_lightning.training.totals import Totals

# Validation draws its samples under this iteration number, which no training iteration has.
_VALIDATION = -1
_NO_REWARD = "model.reward: none is given; name one (rlhf_lightning.rewards.ModelReward, ...) or override score()"
_STOPPED_AT_ONCE = (
    "iteration {}: before its first step the policy is already past model.kl.stop, so no step was made: the old "
    "log-probs are not those of the training pass; let a pass recompute them, or raise kl.stop"
)


class OnPolicyModule(RLHFModule, ABC):
    """Samples, scores and updates, in the order that a method's ``training_step`` says.

    Args:
        model: folder (or hub id) of the policy to train, usually an SFT run's.
        group_size: responses to each prompt.
        rows_per_prompt: of them, the rows that are learnt from; None for all.
        reward: what scores a response; None where `score` is overridden.
        reference: folder of the frozen model that the KL is measured against; None takes ``model`` as it is at the
            start.
        iterations: how often to sample.
        sampling: how responses are drawn.
        engine: what answers prompts; None chooses one that can run the model.
        scores: from the reward's scores to those that are learnt from.
        kl: the KL penalty.
        update: the optimizer steps of an iteration.
        optimizer, lora, network, seed: see `RLHFModule`.

    Attributes:
        totals: the metrics of this iteration, logged at its end.
        actors: policy, reference and critic; None before ``configure_model``.
        iteration: how many iterations are done. All draws are functions of it, and a checkpoint holds it.
    """

    automatic = False
    sampler: Sampler
    reward: Reward | None  # frozen, and kept out of the module tree

    def __init__(
        self,
        model: str,
        *,
        reward: Reward | None,
        reference: str | None,
        iterations: int,
        sampling: RolloutOptions,
        engine: RolloutEngine | None,
        scores: ScoreOptions,
        kl: KLOptions,
        update: UpdateOptions,
        optimizer: AdamWOptions,
        lora: LoRAOptions,
        network: NetworkOptions,
        seed: int,
        group_size: int = 1,
        rows_per_prompt: int | None = None,
    ) -> None:
        sampler = Sampler(sampling, engine, seed)
        super().__init__(model, optimizer=optimizer, lora=lora, network=network, seed=seed, sampler=sampler)
        object.__setattr__(self, "reward", reward)  # outside of the module tree, and so of checkpoints
        self.reference_folder = reference
        self.group_size, self.rows_per_prompt = group_size, rows_per_prompt or group_size
        self.iterations, self.update_options = iterations, update
        self.sampling_options = sampling
        self.shaping, self.kl = ScoreShaping(scores, sampling.max_new_tokens), KLController(kl)
        self.data_view = View("prompts", steps=iterations, demonstrations="held_out")
        self.actors: Actors | None = None
        self.totals, self.phases = Totals(), Phases()  # of this iteration
        self.iteration, self._steps_made = 0, 0  # the second since this process began

    # Setting up

    @property
    def policy(self) -> Policy | None:
        """The trained policy; None before ``configure_model``."""
        return None if self.actors is None else self.actors.policy

    @property
    def reference(self) -> Reference | None:
        """The frozen reference; None before ``configure_model``."""
        return None if self.actors is None else self.actors.reference

    def networks(self) -> dict[str, Policy | ScalarModel]:
        """See `RLHFModule.networks`; the gradient of each is clipped alone."""
        return {} if self.actors is None else self.actors.networks()

    def setup(self, stage: str) -> None:
        """Checks what needs the tokenizer or the data; see `RLHFModule.setup`.

        Raises:
            InputError: there is no reward, or the minibatches outnumber an iteration's responses.
        """
        super().setup(stage)
        if self.reward is None and type(self).score is OnPolicyModule.score:
            raise InputError(_NO_REWARD)
        self.sampler.warn_of_narrowing()
        prompts = getattr(self.datamodule, "batch_size", None)
        if prompts is not None:
            self.check_minibatches(prompts)

    def check_minibatches(self, prompts: int) -> None:
        """Raises an InputError if the responses to ``prompts`` prompts do not make enough minibatches."""
        self.update_options.check_rows(prompts * self.rows_per_prompt)

    def configure_model(self) -> None:
        """Loads, shards and prepares all models. Every stage calls this; only the first call does the work."""
        if self.actors is None:
            self.actors = self.build_actors(self.factory())

    def build_policy(self, factory: ModelFactory) -> Policy:
        """The policy to train."""
        return factory.policy(self.model_folder)

    def build_actors(self, factory: ModelFactory) -> Actors:
        """Policy and reference; this also prepares the reward's own models."""
        factory.check_reference(self.reference_folder, self.model_folder)
        policy = self.build_policy(factory)
        reference = factory.reference(self.reference_folder, policy, self.model_folder)
        prepare_reward(self.reward, self.tokenizer, factory.place)
        return Actors(
            policy,
            reference,
            temperature=self.sampling_options.temperature,
            micro_batch_tokens=self.update_options.micro_batch_tokens,
        )

    def total_steps(self) -> int:
        """See `RLHFModule.total_steps`."""
        return self.iterations * self.steps_of_iteration

    @property
    def steps_of_iteration(self) -> int:
        """Optimizer steps of an iteration, unless something ends it before."""
        return self.update_options.epochs * self.update_options.minibatches

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """See `RLHFModule.on_save_checkpoint`; with the iteration, the KL coefficient and the scores' moments."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["on_policy"] = {"iteration": self.iteration, "kl": self.kl.state(), "scores": self.shaping.state()}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counterpart."""
        super().on_load_checkpoint(checkpoint)
        own = self.own_part(checkpoint, "on_policy")
        if "kl" not in own:
            raise InputError("--ckpt_path: the checkpoint is of an earlier version; start from its exported model")
        self.iteration = own["iteration"]
        self.kl.load(own["kl"])
        self.shaping.load(own["scores"])

    # The parts of an iteration, in their order

    @abstractmethod
    def training_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """One iteration."""

    def sample(self, batch: PromptBatch) -> tuple[Rollout, Tensor]:
        """``group_size`` responses to every prompt, and their checked scores ``[B]``."""
        self.check_minibatches(int(all_reduce_sum((batch.weights > 0).sum())))
        self.totals, self.phases = Totals(), Phases()
        with self.phases.timed("rollout"):
            rollout = self.generate(batch.repeat(self.group_size), iteration=self.iteration)
        with self.phases.timed("score"):
            rollout, scores = settle(rollout, self.checked_scores(rollout), self.reward, self.totals, self.group_size)
            self.shaping.observe(scores, rollout.prompts.weights > 0)
        return rollout, scores

    def score(self, rollout: Rollout) -> Tensor:
        """One score a response, ``[B]``; asks ``reward``. Override it for a reward of your own."""
        if self.reward is None:
            raise InputError(_NO_REWARD)
        return self.reward(rollout)

    def checked_scores(self, rollout: Rollout) -> Tensor:
        """See `training.scoring.checked_scores`."""
        date = getattr(self.datamodule, "date", None)
        return checked_scores(self.score, rollout, self.reward, f"{type(self).__name__}.score", date)

    def evaluate(self, rollout: Rollout, scores: Tensor, known: Tensor | None = None) -> ResponseScores:
        """The scores of policy, reference and critic before the update; also adds the rollout's metrics to `totals`.

        Args:
            rollout: the responses.
            scores: ``[B]``, the reward's.
            known: the policy's log-probs ``[B, T]``, taken instead of a pass of its own.
        """
        assert self.actors is not None
        old = self.actors.evaluate(rollout, known=known, report=self.report_phase)
        count_rollout(self.totals, rollout, scores, old, self.kl)
        return old

    def learn(self, experience: Learnable) -> int:
        """``epochs`` passes of ``minibatches`` optimizer steps each; a pass is a fresh permutation of all rows.

        Returns: the number of steps made. It is below epochs x minibatches where the KL's ``stop`` ended them, or where
            a minibatch had nothing to learn from (fewer weighted rows than minibatches, or only empty responses).
        """
        options, layout = self.update_options, (self.rows_per_prompt, world_size(), rank())
        weighted = flags_of_all(experience.weights > 0, *layout, largest(len(experience.weights)), all_reduce_sum)
        passes = ((self.seed, self.iteration, epoch) for epoch in range(options.epochs))
        steps = 0
        with self.phases.timed("update"):
            for own in chain.from_iterable(minibatches(weighted, options.minibatches, *layout, *p) for p in passes):
                rows = own.to(experience.weights.device)
                counts = all_reduce_sum(self.counts(experience, rows))
                if not bool(counts.any()):
                    continue  # a step without a loss would still move the weights, by the optimizer's momentum
                if not self.update(experience, rows, counts):
                    if not steps:
                        rank_zero_warn(_STOPPED_AT_ONCE.format(self.iteration))
                    break
                steps += 1
        self._steps_made += steps
        return steps

    @abstractmethod
    def counts(self, experience: Any, rows: Tensor) -> Tensor:
        """``[n]``: the given rows' share of the counts that a minibatch's `Loss.sums` are divided by."""

    @abstractmethod
    def loss(self, new: Any, experience: Any) -> Loss:
        """The loss of a micro-batch: a pure function of the new scores and of the fixed experience."""

    def new_scores(self, micro: Any) -> Any:
        """The first argument of `loss`: the scores of the micro-batch by the policy, and by a critic."""
        assert self.actors is not None
        scores: TokenScores = self.actors(*micro.inputs)
        return scores

    def update(self, experience: Learnable, rows: Tensor, counts: Tensor) -> bool:
        """One optimizer step on a minibatch; False, and no step, where the policy has moved past the KL's ``stop``.

        ``rows``: those of this process; ``counts``: what all processes' rows add up to, see `counts`.
        """
        assert self.actors is not None
        optimizer, scheduler = self.optimizers(), self.lr_schedulers()
        assert isinstance(optimizer, LightningOptimizer) and isinstance(scheduler, LRScheduler)
        optimizer.zero_grad()
        counts = torch.where(counts > 0, counts, 1)
        change = Totals()
        budget = self.update_options.micro_batch_tokens
        for group, real, last in micro_rounds(experience.sizes, rows, budget, "update", self.report_phase):
            micro = experience.take(group)
            with gradient_sync(self, last):
                micro = micro if real else micro.uncounted()
                sums, metrics = self.loss(self.new_scores(micro), micro)
                for name, (values, mask) in metrics.items():
                    self.totals.add(name, values, mask)
                if "policy/approx_kl" in metrics:
                    change.add("approx_kl", *metrics["policy/approx_kl"])
                loss = reduce(add, (total / count for total, count in zip(sums, counts, strict=True)))
                if isinstance(self.trainer.strategy.model, DistributedDataParallel):
                    loss = loss + self.actors.no_loss()
                # The strategies average gradients over processes; ours are sums over a global count.
                loss = world_size() * (loss + self.router_losses(micro) / counts[0])
                self.step.check(loss)
                self.manual_backward(loss)
        if self.kl.options.stop is not None and self.kl.exceeds_stop(change.means()["approx_kl"]):
            optimizer.zero_grad()
            return False
        optimizer.step()
        scheduler.step()
        for name, norm in self.step.norms.items():
            self.totals.add(f"{name}/grad_norm", torch.tensor(norm))
        return True

    def router_losses(self, micro: Any) -> Tensor | float:
        """The routers' losses, each with the micro-batch's share in the policy's loss (the first of `counts`)."""
        networks = self.networks()
        if all(part.routers is None for part in networks.values()):
            return 0.0
        rows = torch.arange(len(micro.weights), device=micro.weights.device)
        counted = (micro.weights > 0).repeat_interleave(len(micro.inputs[1]) // len(rows))  # both rows of a pair
        return router_losses(networks, counted, self.counts(micro, rows)[0], self.totals)

    def finish(self, rollout: Rollout, scores: Tensor, steps: int) -> None:
        """Logs the iteration, adapts the KL coefficient, and counts the iteration as done."""
        metrics = iteration_metrics(self.totals, rollout, scores, self.phases.seconds)
        metrics |= {"policy/steps": float(steps), "objective/kl_coef": self.kl.coef}
        optimizer = self.optimizers()
        assert isinstance(optimizer, LightningOptimizer)
        metrics["train/learning_rate"] = optimizer.param_groups[0]["lr"]
        responses = int(all_reduce_sum((rollout.prompts.weights > 0).sum()))
        if not responses:
            rank_zero_warn(f"iteration {self.iteration}: the reward left no response to learn from; no step was made")
            metrics = {name: value for name, value in metrics.items() if not math.isnan(value)}
        self.log_dict(metrics)
        self.report_samples(rollout, {"score": scores})
        if self.actors is not None and not self.actors.resting and responses:  # not to a policy that rests
            self.kl.adapt(metrics["objective/kl"], responses)
        self.iteration += 1

    # Around it

    @property
    def moment(self) -> str:
        """See `RLHFModule.moment`."""
        return f"{super().moment} in iteration {self.iteration}"

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Checks (see `RLHFModule`), then clips the gradients of each network, the critic's apart from the policy's.

        A scaler of fp16 gradients has taken its scale off by now, so this is the place to clip.
        """
        assert self.actors is not None
        self.actors.rest(optimizer)
        super().on_before_optimizer_step(optimizer)
        bound = self.update_options.max_grad_norm
        for name, network in self.networks().items():
            if bound is not None and self.step.norms[name] > bound:
                scale_grads(network.parameters(), bound / self.step.norms[name])

    def on_train_end(self) -> None:
        """Warns once more, at the end, of a run that made no step."""
        if not self._steps_made:
            rank_zero_warn("no step was made in this run: the model is the one that it began with")

    # Answers and held-out prompts

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt; see `training.sampler.Sampler`."""
        with naming_checkpoint(self._trainer):
            return self.sampler(self, prompts, iteration, **overrides)

    def answer(self, prompts: PromptBatch) -> Rollout:
        """The responses that ``predict`` gives: for each prompt the best of ``best_of``."""
        if self.sampling_options.best_of == 1:
            return self.generate(prompts)
        rollout = self.generate(prompts.repeat(self.sampling_options.best_of))
        scores = self.checked_scores(rollout)
        return best_responses(rollout, scores.masked_fill(torch.isnan(scores), -torch.inf), prompts)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        return answers(batch, self.answer(batch))

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> None:
        """Answers held-out prompts with the same draws each time: two validations differ by the policy alone."""
        assert self.actors is not None
        asked, totals = self.sampling_options.eval_temperature, self.held_out_totals
        temperature = self.sampling_options.temperature if asked is None else asked
        rollout = self.generate(batch, iteration=_VALIDATION, temperature=temperature)
        rollout, scores = settle(rollout, self.checked_scores(rollout), self.reward, totals)
        # Greedy samples come from no distribution that log-probs could be taken under, so they have no KL.
        old = self.actors.evaluate(rollout, temperature or self.sampling_options.temperature, report=self.report_phase)
        count_rollout(totals, rollout, scores, old, self.kl)
        if batch.demonstrations is not None:
            self.actors.measure_demonstrations(batch.demonstrations, totals, self.report_phase)
        self.report_samples(rollout, {"score": scores})

    def held_out_metrics(self, totals: Totals) -> dict[str, float]:
        """See `RLHFModule.held_out_metrics`."""
        return held_out_metrics(totals, with_kl=self.sampling_options.eval_temperature != 0)
