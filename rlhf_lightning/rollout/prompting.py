"""Prepares what a command asks of a policy: loads the policy, and makes batches of prompts that it can answer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.collate import collate, column_names
from rlhf_lightning.data.lengths import surely_over
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import check_length, check_vocabularies, load_causal_lm, most_tokens, token_ids
from rlhf_lightning.models.policy import Policy


@dataclass(frozen=True)
class Settings:
    """How the policies answer."""

    max_new_tokens: int = 128  # an answer that reaches it without EOS counts as cut off
    temperature: float = 1.0  # 0 takes the most probable token
    seed: int = 0
    batch_size: int = 32
    chat: bool = False  # put plain prompts through the chat template too
    device: str = "cpu"
    trust_remote_code: bool = False


def chosen_device(given: str | None) -> str:
    """The device of an option; a GPU if there is one and none is given. InputError for a GPU that is not there."""
    there = torch.cuda.is_available()
    if given is not None and given.startswith("cuda") and not there:
        raise InputError(
            f"--device {given}: no CUDA device here, or torch was built without CUDA: leave the option out"
        )
    return given or ("cuda" if there else "cpu")


def load_policy(folder: str | Path, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> Policy:
    """The model of a folder, ready to answer."""
    model = load_causal_lm(folder, trust_remote_code=settings.trust_remote_code)
    check_vocabularies(tokenizer, model, folder)
    return Policy(model, ids=token_ids(tokenizer)).eval().requires_grad_(False).to(settings.device)


def prompt_batches(
    encoder: Encoder, prompts: Sequence[Record], policy: Policy, folder: str | Path, settings: Settings
) -> list[PromptBatch]:
    """Batches of the prompts, which all leave the policy room to answer.

    Raises:
        InputError: a prompt is too long for the policy's positions; names its place.
    """
    _check_long_prompts(encoder, prompts, policy, folder, settings)
    batches = make_batches(encoder, prompts, "prompts", settings)
    widest = max(batches, key=lambda batch: batch.tokens.shape[1])
    row = int(widest.rows[widest.lengths.argmax()])
    _check_prompt(prompts[row], int(widest.lengths.max()), policy, folder, settings)
    return batches


def _check_long_prompts(
    encoder: Encoder, prompts: Sequence[Record], policy: Policy, folder: str | Path, settings: Settings
) -> None:
    """Refuses prompts that are far too long, recognised by their beginnings, before megabytes are tokenised."""
    limit = most_tokens(policy.model)
    if limit is None:
        return
    for record in prompts:
        parts = [record.prompt] if isinstance(record.prompt, str) else [turn.content for turn in record.prompt]
        for part in parts:
            if tokens := surely_over(part, limit, lambda text: len(encoder.ids.plain([text])[0])):
                _check_prompt(record, tokens, policy, folder, settings)


def _check_prompt(record: Record, tokens: int, policy: Policy, folder: str | Path, settings: Settings) -> None:
    where = f"{record.where}: {folder}"
    check_length(policy.model, tokens + settings.max_new_tokens, where, "--max_new_tokens")


def make_batches(encoder: Encoder, records: Sequence[Record], kind: Kind, settings: Settings) -> list[Any]:
    """Batches of rows of similar length. ``rows`` of prompt batches gives the prompts' numbers in their order."""
    examples, _ = encoder.encode(records, kind)
    columns = column_names(examples)
    ordered = sorted(examples, key=lambda example: max(example.widths))
    parts = [ordered[i : i + settings.batch_size] for i in range(0, len(ordered), settings.batch_size)]
    return [collate(part, kind, encoder.pad_id, columns).to(settings.device) for part in parts]


def in_order(batches: Sequence[PromptBatch], values: list[Any]) -> list[Any]:
    """``values``, one for each row, brought from the batches' order into the order of the prompts."""
    rows = [row for batch in batches for row in batch.rows.tolist()]
    return [value for _, value in sorted(zip(rows, values, strict=True), key=lambda pair: pair[0])]
