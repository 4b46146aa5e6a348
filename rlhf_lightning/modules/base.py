"""What every module shares: models that are loaded, sharded and frozen; held-out metrics; generation; export."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from jsonargparse.typing import PositiveFloat, PositiveInt, restricted_number_type
from lightning.pytorch import Callback
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch, Rollout, View
from rlhf_lightning.collectives import failing_together
from rlhf_lightning.distributed import FSDP2Strategy
from rlhf_lightning.errors import InputError, TrainingDiverged
from rlhf_lightning.models.compilation import compile_layers
from rlhf_lightning.models.export import ExportDtype, export_policy, try_export
from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import (
    check_length,
    check_vocabularies,
    eos_ids,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    token_ids,
)
from rlhf_lightning.models.lora import add_adapter, base_fingerprint
from rlhf_lightning.models.policy import Policy, Reference
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import shard
from rlhf_lightning.modules.balancing import balance
from rlhf_lightning.modules.made_with import check_made_with, own_part
from rlhf_lightning.modules.memory import ExplainMemory
from rlhf_lightning.modules.optimisation import OptimisedModule
from rlhf_lightning.modules.totals import Totals
from rlhf_lightning.rollout.engine import RolloutEngine, Sampling
from rlhf_lightning.rollout.fitting import told_fitting_engine

# Half or more would say that the labels are worthless or the wrong way round.
LabelSmoothing = restricted_number_type("LabelSmoothing", float, [(">=", 0), ("<", 0.5)])


class RLHFModule(OptimisedModule):
    """The base of all modules; subclasses build their models in ``configure_model``.

    Args:
        model: folder (or hub id) of the model to train.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile_layers: let torch.compile make the layers of all models but the reward's: less time a step, after some
            ten seconds or more in the first ones. Not with gradient checkpointing.
        trust_remote_code: let transformers run Python code that comes with the model.
        lora_rank: train low-rank adapters of this rank instead of the weights (LoRA); None trains all weights. A head
            that gives scores or values is trained too. Checkpoints hold what is trained, and resume beside the same
            weights alone; exported models have the adapter added to their weights.
        lora_alpha: the adapters' output is scaled by lora_alpha / lora_rank; None takes twice the rank.
        lora_targets: endings of the names of the layers to adapt (``q_proj``); None: all linear layers but the head.
        export_dtype: of the exported model's weights; ``auto`` is that of ``model``'s folder. Training is in float32.
        kwargs: the optimizer's options, see `OptimisedModule`.

    Raises: InputError when options contradict each other.
    """

    automatic = True  # automatic optimisation; PPO turns it off
    data_view: View
    tokenizer: PreTrainedTokenizerBase

    # How `generate` samples; modules with a policy take these as options.
    max_new_tokens: int = 64
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    engine: RolloutEngine | None = None  # None until the first `generate` chooses

    def __init__(
        self,
        model: str,
        gradient_checkpointing: bool = False,
        compile_layers: bool = False,
        trust_remote_code: bool = False,
        lora_rank: PositiveInt | None = None,
        lora_alpha: PositiveFloat | None = None,
        lora_targets: list[str] | None = None,
        export_dtype: ExportDtype = "auto",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        for name, value in (("lora_alpha", lora_alpha), ("lora_targets", lora_targets)):
            if value is not None and lora_rank is None:
                raise InputError(f"model.{name}: {value} has no meaning without model.lora_rank; set both, or none")
        if compile_layers and gradient_checkpointing:
            raise InputError(
                "model.compile_layers: layers that are checkpointed cannot be compiled; set it or "
                "model.gradient_checkpointing to false"
            )
        self.lora_rank, self.lora_alpha, self.lora_targets = lora_rank, lora_alpha, lora_targets
        self.automatic_optimization = self.automatic
        self.model = model
        self.gradient_checkpointing = gradient_checkpointing
        self.compile_layers = compile_layers
        self.trust_remote_code = trust_remote_code
        self.export_dtype = export_dtype
        self.policy: Policy | None = None
        self.scalar: ScalarModel | None = None
        self.held_out_totals = Totals()  # what is logged after validation
        self._bases: list[tuple[str, str]] = []  # under LoRA: folder and fingerprint of the weights beside the adapters
        self._made_by = "otherwise"  # who made the checkpoint that is loaded, for messages
        self._handed_over: int | None = None  # the optimizer step whose weights the engine has

    # Setting up

    def setup(self, stage: str) -> None:
        """Refuse strategies whose gradients this module would get wrong, and take the DataModule's tokenizer.

        Raises:
            InputError: FSDP1, DeepSpeed and others; the message names ``fsdp2``.
        """
        strategy = self.trainer.strategy
        if not isinstance(strategy, SingleDeviceStrategy | DDPStrategy | FSDP2Strategy):
            raise InputError(
                f"trainer.strategy: {type(strategy).__name__} is not supported; use ddp, or fsdp2 to shard the model"
            )
        # Lightning's bf16-true would round a batch's weights and margins, and nothing else in it is a float.
        self.trainer.precision_plugin.convert_input = lambda data: data  # type: ignore[method-assign]
        given = getattr(getattr(self.trainer, "datamodule", None), "tokenizer", None)
        self.tokenizer = given if given is not None else load_tokenizer(self.model, self.trust_remote_code)
        self._handed_over = None  # a checkpoint may be loaded next

    def configure_callbacks(self) -> list[Callback]:
        """What explains the memory that a pass did not get."""
        return [ExplainMemory()]

    def build_policy(self, folder: str, critic: Literal["head"] | int | None = None, frozen: bool = False) -> Policy:
        """Load a policy, shard it where the strategy does, and ready it for training, or freeze it.

        A frozen model is on this process's device already. Keep it with `keep_frozen`, outside the module tree.
        """
        model = load_causal_lm(folder, trust_remote_code=self.trust_remote_code)
        check_vocabularies(self.tokenizer, model, folder)
        check_length(model, self.longest_sequence(sampled=True), folder)
        if not frozen:
            self._add_adapter(model, folder)
        with torch.device("cpu"):  # its checks run the model where it is; Lightning's default device is another
            policy = Policy(model, critic, self.seed, token_ids(self.tokenizer))
        return self._prepare(policy, frozen)

    def build_scalar(self, folder: str, *, fresh_head: bool, seed: int = 0, frozen: bool = False) -> ScalarModel:
        """The same for a model with one scalar per token: a reward model, or a critic."""
        model = load_scalar_model(folder, fresh_head=fresh_head, seed=seed, trust_remote_code=self.trust_remote_code)
        check_vocabularies(self.tokenizer, model, folder)
        check_length(model, self.longest_sequence(sampled=self.data_view.kind == "prompts"), folder)
        if not frozen:
            self._add_adapter(model, folder)
            model.score.requires_grad_(True)
        return self._prepare(ScalarModel(model), frozen)

    def build_reference(self, folder: str | None) -> Reference:
        """What a KL or a log-ratio is measured against; keep it with `keep_frozen`.

        The frozen model in ``folder``. None: the trained one as it is at the start, which under LoRA is the policy with
        its adapter switched off, so that no second copy of the weights is held.
        """
        if folder is None and self.lora_rank is not None:
            assert self.policy is not None
            return partial(self.policy, adapted=False)
        return self.build_policy(folder or self.model, frozen=True)

    def _add_adapter(self, model: PreTrainedModel, folder: str) -> None:
        if self.lora_rank is not None:
            self._bases.append((folder, base_fingerprint(model)))
            add_adapter(model, self.lora_rank, self.lora_alpha or 2.0 * self.lora_rank, self.lora_targets, self.seed)

    def longest_sequence(self, sampled: bool) -> int:
        """Tokens of the longest sequence in the data, or to be sampled; 0 where the data cannot tell."""
        data = getattr(self.trainer, "datamodule", None)
        answered = getattr(data, "longest_prompt", 0) + self.max_new_tokens if sampled else 0
        return max(getattr(data, "longest_sequence", 0), answered)

    def _prepare(self, built: Any, frozen: bool) -> Any:
        if frozen:
            built.requires_grad_(False).eval()
        else:
            balance(built, self.compile_layers)
            built.train()  # dropout is off; this is for gradient checkpointing, which HF does in train mode alone
            if self.gradient_checkpointing:
                checkpoint_activations(built.model)
        if self.compile_layers:
            compile_layers(built)
        if self.device_mesh is not None:
            built = shard(built, self.device_mesh["data_parallel"])
        if frozen:
            built = self.trainer.precision_plugin.convert_module(built).to(self.trainer.strategy.root_device)
        return built

    def keep_frozen(self, name: str, module: nn.Module | Reference | None) -> None:
        """Set an attribute outside the module tree: it is in no checkpoint, no optimizer and no gradient reduction."""
        object.__setattr__(self, name, module)

    # What a checkpoint holds

    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """All weights; under LoRA those that are trained, because the others are in ``model``'s folder."""
        state = super().state_dict(*args, **kwargs)
        for name in self._loaded_from_folders() & state.keys():
            del state[name]
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """The counterpart of `state_dict`.

        Raises:
            InputError: under LoRA, the checkpoint's adapters are of other layers.
            InputError: the checkpoint is of another model.
        """
        expected = self._loaded_from_folders()
        try:
            keys = super().load_state_dict(state_dict, strict=strict and not expected, assign=assign)
        except RuntimeError as error:  # torch names every parameter, a line each
            first = " ".join((str(error).splitlines()[1:2] or [str(error)])[0].split())[:200]
            raise InputError(
                f"--ckpt_path: it does not fit {type(self).__name__} of {self.model} ({first}): it was made "
                f"{self._made_by}; give the config and the options that it was made with, or leave --ckpt_path out"
            ) from error
        wrong = [*sorted(set(keys.missing_keys) - expected), *keys.unexpected_keys]
        if strict and wrong:
            raise InputError(
                f"the checkpoint does not fit the model ({wrong[0]}): resume with the lora_rank, lora_targets and "
                "other options that it was made with"
            )
        return keys

    def shape_options(self) -> dict[str, Any]:
        """The options, by name, that decide which weights there are: a checkpoint resumes with the same alone."""
        return {"lora_rank": self.lora_rank}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """What it was made with, and under LoRA which weights the adapters belong to."""
        checkpoint["made_with"] = {"module": type(self).__name__, "model": self.model, **self.shape_options()}
        if self._bases:
            checkpoint["bases"] = [list(base) for base in self._bases]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The counterpart.

        Raises:
            InputError: the run it was made in had other `shape_options`, or its adapters were trained beside other
                weights than those that were loaded.
        """
        made = checkpoint.get("made_with", {})
        self._made_by = f"by {made['module']} of {made['model']}" if made else "by another module or of another model"
        goes_on = self._trainer is not None and self.trainer.state.fn == "fit"
        check_made_with(made, self.shape_options(), type(self).__name__ if goes_on else None)
        for (then, expected), (folder, found) in zip(checkpoint.get("bases", []), self._bases, strict=False):
            if found != expected:
                now = "changed since" if then == folder else f"are not those of {folder}"
                raise InputError(
                    f"the checkpoint's adapters were trained beside the weights of {then}, which {now}: they are worth "
                    "nothing beside others; resume with the weights that the run was started from"
                )

    def own_part(self, checkpoint: dict[str, Any], key: str) -> dict[str, Any]:
        """What a method saved under ``key``; InputError where the checkpoint is of another method."""
        return own_part(checkpoint, key, type(self).__name__, self._made_by)

    def _loaded_from_folders(self) -> set[str]:
        if self.lora_rank is None:
            return set()
        return {name for name, p in self.named_parameters(remove_duplicate=False) if not p.requires_grad}

    # Measuring

    def measure(self, batch: Any, totals: Totals) -> None:
        """Add a held-out batch to ``totals``, under names without the ``val/`` that they are logged with."""
        raise InputError(f"{type(self).__name__} measures nothing on held-out data; run fit, or override measure()")

    def summary(self, means: dict[str, float]) -> dict[str, float]:
        """What is logged, of the means that `measure` added up; override it to add what is made of several."""
        return means

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Measure; the means over all batches and processes are logged at the end."""
        self.measure(batch, self.held_out_totals)

    def test_step(self, batch: Any, batch_idx: int) -> None:
        """As `validation_step`, logged as ``test/...``."""
        self.measure(batch, self.held_out_totals)

    def on_validation_epoch_end(self) -> None:
        """Log ``val/...``."""
        self._log_held_out("val")
        self.restart_clock()  # the time that validation took is no training time

    def on_test_epoch_end(self) -> None:
        """Log ``test/...``."""
        self._log_held_out("test")

    def _log_held_out(self, stage: str) -> None:
        means = self.summary(self.held_out_totals.means())
        self.held_out_totals = Totals()
        # The same numbers everywhere already; syncing tells Lightning so.
        self.log_dict({f"{stage}/{name}": value for name, value in means.items()}, sync_dist=True)

    # What callbacks hear

    def report_phase(self, phase: str, done: int, total: int) -> None:
        """Tell the callbacks' ``on_phase(trainer, module, phase, done, total)`` how far a part of the step is."""
        self._tell("on_phase", phase, done, total)

    def report_samples(self, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Tell the callbacks' ``on_samples(trainer, module, rollout, scores)``; each score is ``[B]``."""
        self._tell("on_samples", rollout, scores)

    def _tell(self, hook: str, *arguments: Any) -> None:
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if (method := getattr(callback, hook, None)) is not None:
                method(self.trainer, self, *arguments)

    # The policy's answers

    def generate(self, prompts: PromptBatch, iteration: int = 0, **overrides: Any) -> Rollout:
        """One response to every prompt by ``engine``; ``overrides`` are fields of `rollout.Sampling`.

        Raises:
            InputError: the module trains no policy, or a process has no prompt.
            TrainingDiverged: logits were NaN or infinite, on whichever process; names the last checkpoint.
        """
        if self.policy is None:
            raise InputError(f"{type(self).__name__} has no policy to answer prompts with; use a policy's module")
        options: dict[str, Any] = {
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "top_k": self.top_k,
            "top_p": self.top_p,
            "eos_ids": eos_ids(self.policy.model, self.tokenizer),
            "seed": self.seed,
        }
        # Before the engine's work, which the processes may have to do together, and after it.
        with failing_together():
            if len(prompts) == 0:
                raise InputError(
                    "data: a batch without prompts; give every process at least one row, of weight 0 where none is "
                    "left, as PreferenceDataModule does"
                )
        sampling = Sampling(iteration=iteration, **{**options, **overrides})
        self._report_tokens(0, sampling.max_new_tokens)
        if self.engine is None:
            self.engine = told_fitting_engine(self.policy)
        if self._handed_over != self.trainer.global_step:
            self.engine.receive(self.policy)
            self._handed_over = self.trainer.global_step
        with failing_together():
            try:
                return self.engine.rollout(self.policy, prompts, self.tokenizer, sampling, self._report_tokens)
            except TrainingDiverged as error:
                raise TrainingDiverged(f"{error}; {self.last_checkpoint()}") from error

    def _report_tokens(self, done: int, total: int) -> None:
        self.report_phase("rollout", done, total)

    def answer(self, prompts: PromptBatch) -> Rollout:
        """What ``predict`` says to the prompts."""
        return self.generate(prompts)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """A response to every prompt, as rows for a JSONL file."""
        rollout = self.answer(batch)
        return [
            {
                "row": int(batch.rows[index]),
                "prompt": batch.prompts[index],
                "response": rollout.responses[index],
                "tokens": int(rollout.response_lengths[index]),
                "truncated": bool(rollout.truncated[index]),
            }
            for index in range(len(batch))
            if batch.weights[index] > 0
        ]

    def export(self, folder: str | Path, card: str | None = None) -> None:
        """Write the trained model as a Hugging Face folder; every process calls it, the first one writes.

        Args:
            folder: where to.
            card: the folder's README.md; None writes none.
        """
        assert self.policy is not None
        export_policy(self.policy, self.tokenizer, folder, self.export_dtype, card)

    def try_export(self, folder: str | Path) -> list[str]:
        """See `models.export.try_export`; one process calls it, before there is anything to lose."""
        model = self.policy if self.policy is not None else self.scalar
        assert model is not None
        return try_export(model, self.tokenizer, folder, self.export_dtype, self.trust_remote_code)
