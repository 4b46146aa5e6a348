"""Checks the Trainer's options: adapts them to this library's modules, or refuses them in one line."""

from __future__ import annotations

import re
from typing import Any

from jsonargparse import Namespace

from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.base import RLHFModule

# Strategies of Lightning's registry that give the modules correct gradients.
_SUPPORTED = ("auto", "single_device", "fsdp2")
_REFUSED = {
    "fsdp_cpu_offload": "FSDP2 keeps its shards on the devices here",
    "spawn": "its processes start inside of this one, and take neither the models nor the signals with them",
    "fork": "its processes start inside of this one, and take neither the models nor the signals with them",
    "notebook": "its processes start inside of this one, and take neither the models nor the signals with them",
    "deepspeed": "DeepSpeed scales and clips gradients by itself, and the losses here are sums",
    "model_parallel": "it splits layers over the devices, which the models here are not written for",
    "xla": "the operators have no XLA kernels",
    "hpu": "the operators have no kernels for it",
}
_REMEDY = {
    "fsdp_cpu_offload": "use fsdp2 with --model.network.gradient_checkpointing true, lora.yaml, or more devices",
    "deepspeed": "use fsdp2 to shard the model",
    "model_parallel": "use fsdp2 to shard the model",
}
# Numbers that Trainer takes without a word, or refuses by a name of its own: the least one, and what -1 stands for.
_LEAST = {
    "max_epochs": (1, "no limit"),
    "max_steps": (1, "no limit"),
    "devices": (1, "all"),
    "accumulate_grad_batches": (1, ""),
    "check_val_every_n_epoch": (1, ""),
    "log_every_n_steps": (0, ""),
    "gradient_clip_val": (0, ""),
}
# Trainer's options that have no effect on modules that step their optimizers themselves, and the modules' own options.
_MANUAL = {
    "gradient_clip_val": "model.update.max_grad_norm, the bound on the gradient norm of each network",
    "gradient_clip_algorithm": "model.update.max_grad_norm, the bound on the gradient norm of each network",
    "accumulate_grad_batches": "model.update.micro_batch_tokens, the tokens in a forward and backward pass",
}


def fit_trainer(options: Namespace, module: type, subcommand: str, epochs_given: bool) -> list[str]:
    """Checks the options of ``trainer``, replaces other libraries' values by ours, and returns notes about changes.

    If ``max_steps`` is set and ``max_epochs`` is not, only ``max_steps`` ends the run, as in Lightning: the default of
    one epoch is then no limit. For modules that sample, an epoch is the whole training and stays a limit, as does a
    ``max_epochs`` that somebody set (``epochs_given``).

    Raises:
        InputError: an option that Trainer accepts would fail later, or silently train wrongly.
    """
    notes = _fit_strategy(options)
    if subcommand == "fit" and options.precision in ("bf16-true", "16-true"):
        raise InputError(
            f"trainer.precision: {options.precision} keeps the weights in 16 bits, where most updates round to "
            "nothing; use bf16-mixed"
        )
    if options.val_check_interval == 0:
        raise InputError("trainer.val_check_interval: expected a number above 0; trainer.limit_val_batches 0 skips it")
    _check_numbers(options)
    if subcommand == "fit" and options.limit_train_batches == 0:
        raise InputError(
            "trainer.limit_train_batches: 0 trains nothing; give a number of batches, or a share up to 1.0"
        )
    if subcommand == "fit" and issubclass(module, RLHFModule) and not module.automatic:
        for name, instead in _MANUAL.items():
            if options[name] not in (None, 1) or (name == "gradient_clip_val" and options[name] is not None):
                raise InputError(
                    f"trainer.{name}: {module.__name__} steps its optimizer itself, so Trainer cannot; leave it out "
                    f"and set {instead}"
                )
    elif options.gradient_clip_algorithm is not None and not options.gradient_clip_val:
        raise InputError(
            f"trainer.gradient_clip_algorithm: {options.gradient_clip_algorithm} clips nothing without a bound; set "
            "trainer.gradient_clip_val too, or leave it out"
        )
    if issubclass(module, RLHFModule) and module.automatic and options.max_steps > 0 and not epochs_given:
        options.max_epochs = -1
    if options.barebones:
        notes += _strip(options)
    return notes


def _check_numbers(options: Namespace) -> None:
    for name, (least, minus_one) in _LEAST.items():
        given = str(options[name])
        if re.fullmatch(r"-?\d+(\.\d*)?", given) and float(given) < least and not (minus_one and given == "-1"):
            all_of_it = f", or -1 for {minus_one}" if minus_one else ""
            raise InputError(f"trainer.{name}: expected a number from {least}{all_of_it}, got {given}")
    if isinstance(options.max_time, str) and not re.fullmatch(r"\d+(:\d\d){3}", options.max_time):
        wanted = "days:hours:minutes:seconds in quotes, as '00:02:30:00'"
        raise InputError(f"trainer.max_time: expected {wanted}, got {options.max_time}")


def _fit_strategy(options: Namespace) -> list[str]:
    name = options.strategy
    if isinstance(name, Namespace):
        if str(name.get("class_path", "")).endswith("FSDPStrategy"):
            raise InputError(
                "trainer.strategy: FSDPStrategy is FSDP1, which cannot step several times in a batch; use fsdp2 (or "
                "class_path: rlhf_lightning.distributed.FSDP2Strategy)"
            )
        return []
    if name == "fsdp" or name.rsplit(".", 1)[-1] == "FSDPStrategy":
        options.strategy = "fsdp2"
        return [f"trainer.strategy: {name} is run as fsdp2, PyTorch's FSDP2 (fully_shard)"]
    if name in _SUPPORTED:
        return []
    for part, why in _REFUSED.items():
        if part in name:
            raise InputError(
                f"trainer.strategy: {name} is not supported: {why}; {_REMEDY.get(part, 'use ddp or fsdp2')}"
            )
    return []  # ddp and its variants, or no strategy at all: then Trainer's error lists those that exist


def _strip(options: Namespace) -> list[str]:
    """Removes what this command line adds by itself and ``barebones`` does not allow."""
    required: dict[str, Any] = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    for name, value in required.items():
        if options[name] not in (None, value):
            raise InputError(
                f"trainer.barebones: does without {name}, and {options[name]} is given; leave one of them out"
            )
        options[name] = value
    options.log_every_n_steps = options.num_sanity_val_steps = 0
    return ["trainer.barebones: no logs, no checkpoints and no progress; the model is written at the end"]
