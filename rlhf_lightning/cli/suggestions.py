"""Finds the known name that is nearest to an unknown one, for ``did you mean`` hints."""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_lightning.text import nearest

# Names of our options in TRL, transformers and peft, and their former names here, from before there were groups. The
# right side is the end of our dotted name.
_ELSEWHERE = {
    "adam_beta1": "optimizer.beta1",
    "adam_beta2": "optimizer.beta2",
    "adam_eps": "optimizer.eps",
    "adam_epsilon": "optimizer.eps",
    "bf16": "precision",
    "cliprange": "objective.clip_low",
    "clip_value": "critic.clip",
    "cliprange_value": "critic.clip",
    "critic": "critic.kind",
    "critic_from": "critic.model",
    "critic_lr": "critic.learning_rate",
    "dataset_name": "data.path",
    "ent_coef": "objective.entropy_coef",
    "epsilon": "objective.clip_low",
    "epsilon_high": "objective.clip_high",
    "eval_steps": "val_check_interval",
    "file": "data.path",
    "fp16": "precision",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "gae_lambda": "advantages.lam",
    "init_kl_coef": "kl.coef",
    "kl_beta": "kl.coef",
    "kl_penalty_coef": "kl.coef",
    "logging_steps": "log_every_n_steps",
    "lora_r": "lora.rank",
    "lora_target_modules": "lora.targets",
    "loss": "loss_type",
    "loss_normalisation": "objective.normalisation",
    "lr": "optimizer.learning_rate",
    "lr_scheduler_type": "optimizer.schedule",
    "max_completion_length": "sampling.max_new_tokens",
    "max_grad_norm": "gradient_clip_val",
    "max_prompt_length": "max_prompt_tokens",
    "model_name_or_path": "model.model",
    "normalise_scores": "scores.normalise",
    "normalize_scores": "scores.normalise",
    "num_generations": "group_size",
    "num_mini_batches": "update.minibatches",
    "num_ppo_epochs": "update.epochs",
    "num_train_epochs": "max_epochs",
    "output_dir": "runs",
    "per_device_eval_batch_size": "val_batch_size",
    "per_device_train_batch_size": "batch_size",
    "report_to": "logger",
    "response_length": "sampling.max_new_tokens",
    "resume_from_checkpoint": "ckpt_path",
    "run_name": "run",
    "save_steps": "every_n_batches",
    "score_clip": "scores.clip",
    "seed": "seed_everything",
    "target_kl": "kl.stop",
    "value_clip": "critic.clip",
    "value_coef": "critic.coef",
    "vf_coef": "critic.coef",
    "warmup_ratio": "optimizer.warmup_steps",
    "vf_loss_coef": "critic.coef",
    "warmup": "optimizer.warmup_steps",
    "whiten_advantages": "advantages.whiten",
}


def did_you_mean(name: str, known: Iterable[str], prefix: str = "") -> str:
    """`` (did you mean X?)`` for the known name nearest to ``name``, or nothing if no name is near.

    The first choice is the same key in another place, in a group (``kl_coef`` finds ``model.kl.coef``) or a section.
    Then come another library's name for an option (``lr``), the nearest last part, and the nearest whole name. If the
    first part is wrong, the hint corrects that part.
    """
    known = list(known)
    head, _, rest = name.partition(".")
    heads = {candidate.partition(".")[0] for candidate in known if "." in candidate}
    if rest and head not in heads and (near_head := nearest(head, heads)):
        near: str | None = f"{near_head}.{rest}" if f"{near_head}.{rest}" in known else near_head
    else:
        near = _in_section(name, known) or _elsewhere(name, known) or _nearest_end(name, known) or nearest(name, known)
    return f" (did you mean {prefix}{near}?)" if near else ""


def _in_section(name: str, known: list[str]) -> str | None:
    """The known name of another section than the model's with ``name``'s last part as its last word.

    ``trainer.epochs`` finds ``trainer.max_epochs``, and not an option of PPO.
    """
    head, _, last = name.partition(".")
    if head == "model":
        return None
    return next((other for other in known if other.startswith(f"{head}.") and other.endswith(f"_{last}")), None)


def _elsewhere(name: str, known: list[str]) -> str | None:
    """The known name that ends like ``name``, or like our name for another library's ``name``.

    A name in the typed group comes first (``critic.lr`` means the critic's), then the name with the fewest parts. Among
    those with equally many parts, the critic's comes last.
    """
    *groups, last = name.split(".")
    ours = _ELSEWHERE.get(last, last)
    for wanted in (last, ours.rpartition(".")[2]) if groups and groups != ["model"] else ():
        for other in known:
            *place, end = other.split(".")
            if end == wanted and place[-len(groups) :] == groups:
                return other
    for wanted in (last, ours):
        ends = [other for other in known if f".{other}".endswith(f".{wanted}") or _squashed(other, wanted)]
        if ends:
            return min(ends, key=lambda other: (other.count("."), ".critic." in f".{other}"))
    return None


def _squashed(known: str, name: str) -> bool:
    """Whether ``name`` is the known dotted one with an underscore in place of its last dot: ``kl_coef``."""
    parts = known.split(".")
    return len(parts) > 1 and "_".join(parts[-2:]) == name


def _nearest_end(name: str, known: list[str]) -> str | None:
    """The first known name whose last part is nearest to that of ``name``."""
    ends: dict[str, str] = {}
    for candidate in known:
        ends.setdefault(candidate.rsplit(".", 1)[-1], candidate)
        ends.setdefault("_".join(candidate.split(".")[-2:]), candidate)
    return ends.get(nearest(name.rsplit(".", 1)[-1], ends) or "")
