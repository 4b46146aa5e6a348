"""The nearest known name to one that is not."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_lightning.text import nearest

# What TRL, transformers and peft call options of ours; by the last part of our name.
_ELSEWHERE = {
    "bf16": "precision",
    "cliprange": "clip_low",
    "dataset_name": "path",
    "eval_steps": "val_check_interval",
    "fp16": "precision",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "init_kl_coef": "kl_coef",
    "logging_steps": "log_every_n_steps",
    "lora_r": "lora_rank",
    "lora_target_modules": "lora_targets",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule",
    "max_completion_length": "max_new_tokens",
    "max_grad_norm": "gradient_clip_val",
    "max_prompt_length": "max_prompt_tokens",
    "model_name_or_path": "model",
    "num_generations": "group_size",
    "num_ppo_epochs": "epochs",
    "num_train_epochs": "max_epochs",
    "output_dir": "runs",
    "per_device_eval_batch_size": "val_batch_size",
    "per_device_train_batch_size": "batch_size",
    "report_to": "logger",
    "response_length": "max_new_tokens",
    "resume_from_checkpoint": "ckpt_path",
    "run_name": "run",
    "save_steps": "every_n_batches",
    "seed": "seed_everything",
    "warmup_ratio": "warmup_steps",
}


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)`` for the known name nearest to ``name``, or nothing where none is near.

    For dotted names the right key in the wrong place comes first (``kl_coef`` finds ``model.kl_coef``), then another
    library's name for one of ours (``lr``), then the nearest whole name, then the nearest last part. Where the first
    part is wrong, that is what is said.
    """
    known = list(known)
    by_last: dict[str, str] = {}
    for candidate in known:
        by_last.setdefault(candidate.rsplit(".", 1)[-1], candidate)
    head, _, rest = name.partition(".")
    heads = {candidate.partition(".")[0] for candidate in known if "." in candidate}
    near: str | None
    last = name.rsplit(".", 1)[-1]
    if rest and head not in heads and (near_head := nearest(head, heads)):
        near = f"{near_head}.{rest}" if f"{near_head}.{rest}" in known else near_head
    else:
        near = by_last.get(last) or by_last.get(_ELSEWHERE.get(last, ""))
        near = near or nearest(name, known) or by_last.get(nearest(last, by_last) or "")
    return f" (did you mean {prefix}{near}?)" if near else ""
