"""Prepares a policy and the prompts that it answers outside of training: loads, checks that they fit, makes batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import PromptBatch
from rlhf_lightning.data.choices import Kind
from rlhf_lightning.data.collate import collate, column_names
from rlhf_lightning.data.lengths import surely_over
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.models.loading import check_length, check_vocabularies, load_causal_lm, most_tokens, token_ids
from rlhf_lightning.models.policy import Policy


def load_policy(
    folder: str | Path, tokenizer: PreTrainedTokenizerBase, device: str, trust_remote_code: bool = False
) -> Policy:
    """The policy of a model folder, frozen, in evaluation mode, on the device.

    Raises:
        InputError: the folder has no causal LM, or one of another vocabulary than the tokenizer's.
    """
    model = load_causal_lm(folder, trust_remote_code=trust_remote_code)
    check_vocabularies(tokenizer, model, folder)
    return Policy(model, ids=token_ids(tokenizer)).eval().requires_grad_(False).to(device)


def batches_by_length(
    encoder: Encoder, records: Sequence[Record], kind: Kind, batch_size: int, every_row: bool = False
) -> list[Any]:
    """Batches of rows of similar length, on the CPU. ``every_row``: see `Encoder.encode`."""
    examples, _ = encoder.encode(records, kind, every_row=every_row)
    columns = column_names(examples)
    ordered = sorted(examples, key=lambda example: max(example.widths))
    parts = [ordered[i : i + batch_size] for i in range(0, len(ordered), batch_size)]
    return [collate(part, kind, encoder.pad_id, columns) for part in parts]


def check_long_prompts(
    encoder: Encoder, prompts: Sequence[Record], policy: Policy, folder: str | Path, max_new_tokens: int
) -> None:
    """Refuses prompts that are far too long, recognised by their beginnings, before megabytes are tokenised.

    Raises:
        InputError: names the first such row.
    """
    limit = most_tokens(policy.model)
    if limit is None:
        return
    for record in prompts:
        parts = [record.prompt] if isinstance(record.prompt, str) else [turn.content for turn in record.prompt]
        for part in parts:
            if tokens := surely_over(part, limit, lambda text: len(encoder.ids.plain([text])[0])):
                _check_prompt(record, tokens, policy, folder, max_new_tokens)


def check_longest_prompt(
    batches: Sequence[PromptBatch],
    prompts: Sequence[Record] | Mapping[int, Record],
    policy: Policy,
    folder: str | Path,
    max_new_tokens: int,
) -> None:
    """Refuses a longest prompt that leaves no room for an answer. ``prompts`` are the records by the batches' ``rows``.

    Raises:
        InputError: names the row.
    """
    widest = max(batches, key=lambda batch: batch.tokens.shape[1])
    row = int(widest.rows[widest.lengths.argmax()])
    _check_prompt(prompts[row], int(widest.lengths.max()), policy, folder, max_new_tokens)


def _check_prompt(record: Record, tokens: int, policy: Policy, folder: str | Path, max_new_tokens: int) -> None:
    where = f"{record.where}: {folder}"
    check_length(policy.model, tokens + max_new_tokens, where, "--max_new_tokens")
