"""The factory of a run's models: it loads, adapts, compiles and shards them, for training or frozen."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.compilation import compile_layers
from rlhf_lightning.models.export import ExportDtype
from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import (
    check_length,
    check_vocabularies,
    load_causal_lm,
    load_scalar_model,
    load_tokenizer,
    same_vocabulary,
    token_ids,
)
from rlhf_lightning.models.lora import add_adapter, base_fingerprint
from rlhf_lightning.models.policy import Policy, Reference
from rlhf_lightning.models.routers import find_routers
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import shard
from rlhf_lightning.options import Options, PositiveFloat, PositiveInt


@dataclass(frozen=True, kw_only=True)
class NetworkOptions(Options):
    """How the models are loaded, run and written.

    Args:
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        compile_layers: compile the layers of all models but the reward's by torch.compile. Steps get faster; the first
            ones take ten seconds or more. It cannot be combined with gradient checkpointing.
        trust_remote_code: let transformers run Python code that comes with the model.
        export_dtype: of the exported model's weights; ``auto`` is that of ``model``'s folder. Training is in float32.

    Raises:
        InputError: options contradict each other.
    """

    gradient_checkpointing: bool = False
    compile_layers: bool = False
    trust_remote_code: bool = False
    export_dtype: ExportDtype = "auto"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.compile_layers and self.gradient_checkpointing:
            raise InputError(
                "model.network.compile_layers: layers that are checkpointed cannot be compiled; set it or "
                "model.network.gradient_checkpointing to false"
            )


@dataclass(frozen=True, kw_only=True)
class LoRAOptions(Options):
    """Low-rank adapters, trained instead of the weights.

    Args:
        rank: train adapters of this rank (LoRA); None trains all weights. A head that gives scores or values is trained
            too. Checkpoints hold the trained weights alone, and resume only beside the same base weights. Exported
            models have the adapter added to their weights.
        alpha: the adapters' output is scaled by alpha / rank; None takes twice the rank.
        targets: endings of the names of the layers to adapt (``q_proj``); None: all linear layers but the head.

    Raises:
        InputError: options contradict each other.
    """

    rank: PositiveInt | None = None
    alpha: PositiveFloat | None = None
    targets: list[str] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "targets"):
            if (value := getattr(self, name)) is not None and self.rank is None:
                raise InputError(
                    f"model.lora.{name}: {value} has no meaning without model.lora.rank; set both, or none"
                )


def _unchanged(module: nn.Module) -> nn.Module:
    return module


@dataclass(frozen=True)
class Place:
    """Where models run.

    Args:
        device: of this process.
        mesh: the device mesh to shard over; None without sharding.
        convert: gives a frozen model the run's precision.
    """

    device: torch.device
    mesh: DeviceMesh | None = None
    convert: Callable[[nn.Module], nn.Module] = _unchanged


@dataclass
class ModelFactory:
    """Loads models for one run.

    Args:
        network: how they are loaded and run.
        lora: the adapters of those that are trained.
        seed: of what is drawn: adapters, and heads where no other seed is given.
        tokenizer: what every model has to read.
        longest: tokens of the longest sequence that they will see; 0 where that is not known.
        place: where they run.
    """

    network: NetworkOptions
    lora: LoRAOptions
    seed: int
    tokenizer: PreTrainedTokenizerBase
    longest: int
    place: Place
    # Under LoRA: folder and fingerprint of the weights that each adapter stands beside.
    bases: list[tuple[str, str]] = field(default_factory=list)

    def policy(self, folder: str, critic: Literal["head"] | None = None, *, frozen: bool = False) -> Policy:
        """A causal LM, for training or frozen.

        A frozen model is on this process's device already. Keep it outside of the module tree: then it is in no
        checkpoint, no optimizer and no gradient reduction.

        Args:
            folder: of the model, or its hub id.
            critic: what values are read from on the policy's trunk, see `Policy`.
            frozen: whether it is not trained.
        """
        model = load_causal_lm(folder, trust_remote_code=self.network.trust_remote_code)
        check_vocabularies(self.tokenizer, model, folder)
        check_length(model, self.longest, folder)
        if not frozen:
            self._add_adapter(model, folder)
        with torch.device("cpu"):  # its checks run the model where it is; Lightning's default device is another
            policy = Policy(model, critic, self.seed, token_ids(self.tokenizer))
        return self._ready(policy, frozen)

    def check_reference(self, folder: str | None, start: str) -> None:
        """Raises an InputError if a reference in ``folder`` has another vocabulary than the model in ``start``."""
        if folder is None or folder == start:
            return
        own = load_tokenizer(folder, self.network.trust_remote_code)
        if not (same_vocabulary(self.tokenizer, own) and same_vocabulary(own, self.tokenizer)):
            raise InputError(
                f"model.reference: {folder} has another vocabulary than {start}; log-probs are compared token by "
                "token, so give a reference with the same tokenizer"
            )

    def scalar(self, folder: str, *, fresh_head: bool) -> ScalarModel:
        """A model with one scalar per token, for training: a reward model, or a critic."""
        remote = self.network.trust_remote_code
        model = load_scalar_model(folder, fresh_head=fresh_head, seed=self.seed, trust_remote_code=remote)
        check_vocabularies(self.tokenizer, model, folder)
        check_length(model, self.longest, folder)
        self._add_adapter(model, folder)
        model.score.requires_grad_(True)
        return self._ready(ScalarModel(model), frozen=False)

    def reference(self, folder: str | None, policy: Policy, start: str) -> Reference:
        """The frozen model that a KL or a log-ratio is measured against; keep it outside of the module tree.

        Args:
            folder: of the frozen model. None: ``policy`` as it is at the start, which under LoRA is itself with its
                adapter switched off, so that no second copy of the weights is held.
            policy: the trained one.
            start: the folder that it was loaded from.
        """
        if folder is None and self.lora.rank is not None:
            return partial(policy, adapted=False)
        return self.policy(folder or start, frozen=True)

    def _add_adapter(self, model: PreTrainedModel, folder: str) -> None:
        if (rank := self.lora.rank) is not None:
            self.bases.append((folder, base_fingerprint(model)))
            add_adapter(model, rank, self.lora.alpha or 2.0 * rank, self.lora.targets, self.seed)

    def _ready(self, built: Any, frozen: bool) -> Any:
        if frozen:
            built.requires_grad_(False).eval()
        else:
            self._train_routers(built)
            built.train()  # dropout is off; this is for gradient checkpointing, which HF does in train mode alone
            if self.network.gradient_checkpointing:
                checkpoint_activations(built.model)
        if self.network.compile_layers:
            compile_layers(built)
        if self.place.mesh is not None:
            built = shard(built, self.place.mesh)
        if frozen:
            built = self.place.convert(built).to(self.place.device)
        return built

    def _train_routers(self, model: Policy | ScalarModel) -> None:
        """Trains the routers of a mixture of experts too, where the model's config asks for it.

        Raises:
            InputError: it asks for what is not known of this model, or not possible with other options.
        """
        model.routers = find_routers(model.model)
        if model.routers is None:
            return
        way_out = f"or set output_router_logits to false in the config.json of {model.model.name_or_path}"
        if self.network.compile_layers:
            raise InputError(
                "model.network.compile_layers: the routers' auxiliary loss, which the model's config asks for, needs "
                f"layers that are not compiled; set it to false, {way_out}"
            )
