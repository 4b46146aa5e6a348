"""The base of every module: Lightning's hooks, which call the parts that a module holds."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout, View
from rlhf_lightning.collectives import scale_grads
from rlhf_lightning.distributed import FSDP2Strategy
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.building import LoRAOptions, ModelFactory, NetworkOptions, Place
from rlhf_lightning.models.export import export_policy, export_scalar, try_export
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.ops.extension import keep_memory
from rlhf_lightning.options import arguments_again, arguments_of, check_arguments, plain
from rlhf_lightning.training.balancing import check_taken
from rlhf_lightning.training.gradient_step import GradientStep
from rlhf_lightning.training.last_checkpoint import naming_checkpoint
from rlhf_lightning.training.made_with import check_bases, check_made_with, own_part, wrong_weights
from rlhf_lightning.training.memory import ExplainMemory
from rlhf_lightning.training.optimizer import AdamWOptions, decay_groups, make_adamw, steps_of_training
from rlhf_lightning.training.sampler import Sampler
from rlhf_lightning.training.totals import Totals


class RLHFModule(LightningModule):
    """The base of all modules; a subclass builds its models in ``configure_model`` and names them in `networks`.

    Args:
        model: folder (or hub id) of the model to train.
        optimizer: AdamW and its learning rate.
        lora: low-rank adapters.
        network: how the models are loaded, run and written.
        seed: of everything that is drawn.
        sampler: what answers prompts with the policy; None where there is no policy.

    Attributes:
        step: the optimizer step that is being made; a ``training_step`` counts its loss there.
    """

    data_view: View
    tokenizer: PreTrainedTokenizerBase
    automatic = True  # whether Lightning steps the optimizer; on-policy methods do it themselves

    def __init__(
        self,
        model: str,
        *,
        optimizer: AdamWOptions,
        lora: LoRAOptions,
        network: NetworkOptions,
        seed: int,
        sampler: Sampler | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = self.automatic
        self.model_folder = model
        self.optimizer_options = optimizer
        self.lora_options = lora
        self.network_options = network
        self.seed = seed
        self.sampler = sampler
        self.step = GradientStep()
        self.held_out_totals = Totals()  # what is logged after validation
        self._configured: list[dict[str, Any]] = []  # the options of the optimizer's groups, lr at its peak
        self._step_began = time.monotonic()
        self._bases: list[tuple[str, str]] = []  # under LoRA: folder and fingerprint of the weights beside the adapters
        self._made_by = "otherwise"  # who made the checkpoint that is loaded, for messages
        self._set_hparams(getattr(self, "_given", {}))

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        """Remembers the arguments for ``hparams``, in whichever subclass they are named."""
        self = super().__new__(cls)
        if args or kwargs:  # a copy is made without
            given = arguments_of(cls, args, kwargs)
            check_arguments(cls, given)
            object.__setattr__(self, "_given", {name: plain(value) for name, value in given.items()})
        return self

    @classmethod
    def load_from_checkpoint(cls, checkpoint_path: Any, *args: Any, **kwargs: Any) -> Self:
        """Lightning's, with the options that the checkpoint was made with; ``kwargs`` win over them.

        Weights that are not trained are read from the folder in ``hparams.model``. Objects such as a reward are in no
        checkpoint: give them again.

        Raises:
            InputError: the checkpoint is a folder of shards, or was made with an object that is not given again.
        """
        if not Path(checkpoint_path).is_file():
            raise InputError(f"{checkpoint_path}: no checkpoint file; shards are read by trainer.fit(ckpt_path=...)")
        made = torch.load(checkpoint_path, map_location="cpu", weights_only=True, mmap=True)
        options = arguments_again(cls, made.get("hyper_parameters", {}), kwargs)
        return super().load_from_checkpoint(checkpoint_path, *args, **options)

    def forward(self, *inputs: Any, **options: Any) -> Any:
        """What the trained network gives: see `Policy.forward`, or `ScalarModel.forward`."""
        return self.exported()(*inputs, **options)

    def exported(self) -> Policy | ScalarModel:
        """`model`; InputError before ``configure_model``."""
        if self.model is None:
            raise InputError(f"{type(self).__name__}: there is no model yet; call configure_model() first")
        return self.model

    # Setting up

    def setup(self, stage: str) -> None:
        """Refuses strategies whose gradients this module would get wrong, and takes the DataModule's tokenizer.

        Raises:
            InputError: FSDP1, DeepSpeed and others; the message names ``fsdp2``.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
            raise InputError(
                f"trainer.strategy: {type(strategy).__name__} is not supported; use ddp, or fsdp2 to shard the model"
            )
        # A batch's only floats are weights and margins. Lightning's bf16-true would round them.
        self.trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        if self.sampler is not None:
            self.sampler.forget()  # a checkpoint may be loaded next
        given = getattr(self.datamodule, "tokenizer", None)
        self.tokenizer = given if given is not None else self.load_tokenizer(self.model_folder)

    def configure_callbacks(self) -> list[Callback]:
        """A callback that explains out-of-memory errors."""
        return [ExplainMemory()]

    @property
    def datamodule(self) -> Any:
        """The Trainer's DataModule; None where there is no Trainer, or where it has loaders alone."""
        return getattr(self._trainer, "datamodule", None)

    def load_tokenizer(self, folder: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a model's folder."""
        return load_tokenizer(folder, self.network_options.trust_remote_code)

    def longest_sequence(self) -> int:
        """Tokens of the longest sequence that the models will see, what may be sampled included; 0 where unknown."""
        longest = int(getattr(self.datamodule, "longest_sequence", 0))
        return longest if self.sampler is None else self.sampler.longest(self.datamodule, longest)

    def factory(self) -> ModelFactory:
        """The factory that loads the models; without a Trainer they run on the CPU, in float32."""
        if not hasattr(self, "tokenizer"):
            self.tokenizer = self.load_tokenizer(self.model_folder)
        place = Place(torch.device("cpu"))
        if self._trainer is not None:
            mesh = None if self.device_mesh is None else self.device_mesh["data_parallel"]
            place = Place(self.trainer.strategy.root_device, mesh, self.trainer.precision_plugin.convert_module)
        options = (self.network_options, self.lora_options, self.seed)
        return ModelFactory(*options, self.tokenizer, self.longest_sequence(), place, self._bases)

    def networks(self) -> dict[str, Policy | ScalarModel]:
        """The trained networks by name, the exported one first; empty before ``configure_model``."""
        return {}

    @property
    def model(self) -> Policy | ScalarModel | None:
        """The network that is exported; None before ``configure_model``."""
        return next(iter(self.networks().values()), None)

    # The optimizer

    def parameter_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups; a group's ``lr`` is its peak learning rate. Frozen parameters are left out."""
        trained = [p for p in self.parameters() if p.requires_grad]
        return decay_groups(trained, self.optimizer_options.learning_rate, self.optimizer_options.weight_decay)

    def configure_optimizers(self) -> Any:
        """AdamW, and the schedule, stepped once an optimizer step."""
        # A fused optimizer takes the scale of fp16 gradients off inside its step. That is too late:
        # `on_before_optimizer_step` measures and clips before it.
        optimizer = make_adamw(self.parameter_groups(), self.optimizer_options, fused=not self._scaled)
        options = ("lr", "weight_decay", "betas", "eps")
        self._configured = [{name: group[name] for name in options} for group in optimizer.param_groups]
        # LambdaLR saves the attributes of anything that is not a plain function, so this is a lambda.
        scheduler = LambdaLR(optimizer, lambda step: self.optimizer_options.factor(step, self.total_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def total_steps(self) -> int | None:
        """Optimizer steps of the whole training, over which the learning-rate schedule runs; None without an end."""
        return steps_of_training(self.trainer)

    @property
    def _scaled(self) -> bool:
        """Whether a scaler of fp16 gradients steps the optimizer."""
        return getattr(self.trainer.precision_plugin, "scaler", None) is not None

    def on_fit_start(self) -> None:
        """On a CPU, keep the memory of large tensors from step to step."""
        if self.device.type == "cpu":
            keep_memory(True)

    def on_fit_end(self) -> None:
        """Gives that memory back."""
        if self.device.type == "cpu":
            keep_memory(False)

    def on_train_start(self) -> None:
        """Lets the configured optimizer options win over a checkpoint's; checks schedule and warm-up.

        Raises:
            InputError: the schedule needs an end, and the training has none.
        """
        options = self.optimizer_options
        if 0 < (total := options.checked(self.total_steps())) < options.warmup_steps:
            rank_zero_warn(
                f"model.optimizer.warmup_steps: {options.warmup_steps:,} are more than the training's {total:,}: the "
                f"learning rate ends at {options.factor(total - 1, self.total_steps):.0%} of its peak"
            )
        schedulers = self.lr_schedulers()
        if isinstance(schedulers, LambdaLR):
            schedulers.base_lrs = [configured["lr"] for configured in self._configured]
            factor = self.optimizer_options.factor(schedulers.last_epoch, self.total_steps)
            for group, configured in zip(schedulers.optimizer.param_groups, self._configured, strict=True):
                group.update(configured, initial_lr=configured["lr"], lr=configured["lr"] * factor)
        self._step_began = time.monotonic()

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Divides the gradients by the step's count, checks them and measures their norms; Lightning clips after this.

        Raises:
            TrainingDiverged: the loss or a gradient is NaN or infinite. All processes raise it together, before the
                step. The message names the last checkpoint.
        """
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        accumulated = self.trainer.accumulate_grad_batches if self.automatic_optimization else 1
        networks = {} if self.automatic_optimization else self.networks()
        check_taken(self.modules())
        with naming_checkpoint(self._trainer):
            tokens = self.step.finish(parameters, networks, accumulated, self.moment, overflows=self._scaled)
        if self.automatic_optimization:
            self._log_step(optimizer, tokens)

    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clips to ``trainer.gradient_clip_val`` by the norm that is already measured; Lightning clips by value.

        A subclass that overrides ``on_before_optimizer_step`` must call ``super()``'s, which measures the norm.
        """
        if not gradient_clip_val or gradient_clip_algorithm not in (None, "norm"):
            super().configure_gradient_clipping(optimizer, gradient_clip_val, gradient_clip_algorithm)
        elif self.step.norm > gradient_clip_val:
            parameters = (p for group in optimizer.param_groups for p in group["params"])
            scale_grads(parameters, gradient_clip_val / self.step.norm)

    @property
    def moment(self) -> str:
        """Where the training is, for error messages."""
        return f"optimizer step {self.trainer.global_step + 1}"

    def _log_step(self, optimizer: Optimizer, tokens: float) -> None:
        means = self.step.means()
        began, self._step_began = self._step_began, time.monotonic()
        means["train/tokens_per_second"] = tokens / max(self._step_began - began, 1e-9)
        rates = {"train/grad_norm": self.step.norm, "train/learning_rate": optimizer.param_groups[0]["lr"]}
        self.log_dict(means | rates)

    # What a checkpoint holds

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights; under LoRA only the trained ones, since ``model``'s folder has the others."""
        state = super().state_dict(*args, **kwargs)
        for name in self._loaded_from_folders() & state.keys():
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The counterpart of `state_dict`.

        Raises:
            InputError: the checkpoint is of another model, or under LoRA its adapters are of other layers.
        """
        expected = self._loaded_from_folders()
        try:
            keys = super().load_state_dict(state_dict, strict=strict and not expected, assign=assign)
        except RuntimeError as error:
            raise wrong_weights(error, type(self).__name__, self.model_folder, self._made_by) from error
        wrong = [*sorted(set(keys.missing_keys) - expected), *keys.unexpected_keys]
        if strict and wrong:
            raise InputError(
                f"the checkpoint does not fit the model ({wrong[0]}): resume with the lora.rank, lora.targets and "
                "other options that it was made with"
            )
        return keys

    def shape_options(self) -> dict[str, Any]:
        """The options, by name, that decide which weights exist. A checkpoint resumes only with the same values."""
        return {"lora.rank": self.lora_options.rank}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Saves the options that the weights depend on, and under LoRA which weights the adapters belong to."""
        checkpoint["made_with"] = {"module": type(self).__name__, "model": self.model_folder, **self.shape_options()}
        if self._bases:
            checkpoint["bases"] = [list(base) for base in self._bases]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Checks that the checkpoint fits this module.

        Raises:
            InputError: its run had other `shape_options`, or its adapters were trained beside other weights.
        """
        made = checkpoint.get("made_with", {})
        self._made_by = f"by {made['module']} of {made['model']}" if made else "by another module or of another model"
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        check_made_with(made, self.shape_options(), type(self).__name__ if goes_on else None)
        check_bases(checkpoint.get("bases", []), self._bases)

    def own_part(self, checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
        """What a method saved under ``key``; InputError where the checkpoint is of another method."""
        return own_part(checkpoint, key, type(self).__name__, self._made_by)

    def _loaded_from_folders(self) -> set[str]:
        named = () if self.lora_options.rank is None else self.named_parameters(remove_duplicate=False)
        return {name for name, p in named if not p.requires_grad}

    # Held-out metrics

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As ``validation_step``, logged as ``test/...``."""
        self.validation_step(batch, batch_idx)

    def on_validation_epoch_end(self) -> None:
        """Logs ``val/...``."""
        self._log_held_out("val")
        self._step_began = time.monotonic()  # the time that validation took is no training time

    def on_test_epoch_end(self) -> None:
        """Logs ``test/...``."""
        self._log_held_out("test")

    def held_out_metrics(self, totals: Totals) -> dict[str, float]:
        """The metrics of a validation, by names without their stage; override this for other metrics."""
        return totals.means()

    def _log_held_out(self, stage: str) -> None:
        totals, self.held_out_totals = self.held_out_totals, Totals()
        metrics = self.held_out_metrics(totals)
        # The same numbers everywhere already; syncing tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in metrics.items()}, sync_dist=True)

    # What callbacks hear

    def report_phase(self, phase: str, done: int, total: int) -> None:
        """Tells the callbacks' ``on_phase(trainer, module, phase, done, total)`` how far a part of the step is."""
        self._tell("on_phase", phase, done, total)

    def report_samples(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Tells the callbacks' ``on_samples(trainer, module, rollout, scores)``; each score is ``[B]``."""
        self._tell("on_samples", rollout, scores)

    def _tell(self, hook: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks if self._trainer is not None else ():  # type: ignore[attr-defined]
            if (method := getattr(callback, hook, None)) is not None:
                method(self.trainer, self, *arguments)

    # The exported model

    def export(self, folder: str | Path, card: str | None = None) -> None:
        """Writes the trained model as a Hugging Face folder; every process calls it, the first one writes.

        Args:
            folder: where to.
            card: the folder's README.md; None writes none.
        """
        model, dtype = self.exported(), self.network_options.export_dtype
        if isinstance(model, ScalarModel):
            export_scalar(model, self.tokenizer, folder, dtype, card)
        else:
            export_policy(model, self.tokenizer, folder, dtype, card)

    def try_export(self, folder: str | Path) -> list[str]:
        """See `models.export.try_export`; one process calls it, before there is anything to lose."""
        options = self.network_options
        return try_export(self.exported(), self.tokenizer, folder, options.export_dtype, options.trust_remote_code)


# `__new__` comes first where Python looks for a class's signature; the constructor's is the one to show.
RLHFModule.__new__.__signature__ = inspect.signature(RLHFModule.__init__, eval_str=True)  # type: ignore[attr-defined]
