"""Encodes a policy's prompts and responses for a reward model, in that model's own vocabulary and chat template."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.batches import Rollout
from rlhf_lightning.data.conversations import Conversations, Rendered
from rlhf_lightning.data.forms import DEMONSTRATION
from rlhf_lightning.data.hidden import hide
from rlhf_lightning.data.messages import checked_messages, checked_tools
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import same_vocabulary
from rlhf_lightning.models.template import default_text

_GIVEN = "conversations go through its own tokenizer and chat template, not the policy's"
_AS_PROMPTED = "responses that its chat template refuses or leaves out follow its generation prompt as they are"


class OwnTokens:
    """Encodes rollouts for a reward model.

    If vocabulary and chat template are the policy's, the policy's ids are used as they are. Else the reward model's own
    template renders each whole conversation. A reward model without a template reads the policy's ids if the vocabulary
    is the same. With another vocabulary, plain texts are decoded without special tokens and encoded again.

    Args:
        path: the reward model's folder, for messages.
        own: the reward model's tokenizer.
        policy: the policy's tokenizer, with the chat template that made the prompts.
        to_turn_end: whether the reward model was trained on conversations up to the token that ends the last turn, as
            in this library, or up to the end of the rendering, as in transformers. If no token ends a turn, EOS is
            added only in the first case.
        tell: gets one line at a time for the user; a line may come more than once.
        date: today's date for the reward model's chat template, as YYYY-MM-DD; None for the real date.
    """

    def __init__(
        self,
        path: str,
        own: PreTrainedTokenizerBase,
        policy: PreTrainedTokenizerBase,
        to_turn_end: bool,
        tell: Callable[[str], None],
        date: str | None = None,
    ) -> None:
        self.path = path
        self.policy = policy
        self.encoder = Encoder(own, date=date)
        self.to_turn_end = to_turn_end
        self._tell = tell
        self._same_ids = same_vocabulary(policy, own)
        template = self.encoder.template
        same = self._same_ids and template is not None and template.text == default_text(policy)
        self._chats: Conversations | None = None if same else self.encoder.conversations

    def encoded(self, rollout: Rollout) -> tuple[Tensor, Tensor]:
        """Prompts with their responses: ``[B, S]`` int64, right-padded, and their lengths ``[B]`` int64.

        Raises:
            InputError: the chat template refuses a prompt, or has no place for its tools.
        """
        conversations = rollout.prompts.conversations or []
        chats = [i for i, chat in enumerate(conversations) if chat is not None and self._chats is not None]
        if self._same_ids and not chats:
            return rollout.tokens, rollout.lengths
        texts = sorted(set(range(len(rollout))) - set(chats))
        found = dict(zip(chats, self._rendered(rollout, chats), strict=True))
        found.update(zip(texts, self._texts(rollout, texts), strict=True))
        ids = [found[i].long() for i in range(len(rollout))]
        lengths = torch.tensor([len(row) for row in ids], device=rollout.tokens.device)
        return pad_sequence(ids, batch_first=True).to(rollout.tokens.device, torch.int64), lengths

    # -- conversations -------------------------------------------------------------------------------------------------

    def _rendered(self, rollout: Rollout, rows: Sequence[int]) -> list[Tensor]:
        if not rows:
            return []
        self._tell(_GIVEN)
        cut = rollout.truncated.tolist()
        sequences = [self._sequence(rollout, row, cut[row]) for row in rows]
        for note in self.encoder.noted:
            self._tell(note)
        for part in self._chats.lost if self._chats is not None else ():
            self._tell(f"its chat template drops {part} of responses, which are scored without it")
        pieces = self.encoder.ids.pieces(sequences)
        eos = self.encoder.tokenizer.eos_token_id
        found = []
        for row, sequence, parts in zip(rows, sequences, pieces, strict=True):
            bare = self.to_turn_end and not (sequence.ended or cut[row])
            found.append(torch.tensor([id for part in parts for id in part] + [eos] * bare))
        return found

    def _sequence(self, rollout: Rollout, row: int, cut: bool) -> Rendered:
        """The conversation up to its end, or up to the place where the token limit cut the response off."""
        template = self.encoder.template
        assert template is not None and self._chats is not None and rollout.prompts.conversations is not None
        record = self._record(rollout.prompts.conversations[row], rollout.responses[row], rollout, row)
        try:
            sequence = self._chats.answered(record, 0)[0]
        except InputError as refusal:
            sequence = self._as_prompted(record, refusal)
        prompt, said = sequence.pieces
        end, rest = template.ending
        if cut:
            if said.endswith(end):
                said = said.removesuffix(end)
            elif sequence.ended:
                said = said[: list(template.tokens.finditer(said))[-1].start()]
        elif said.endswith(end) and not self.to_turn_end:
            said += rest
        return replace(sequence, pieces=(prompt, said))

    def _record(self, chat: Any, response: str, rollout: Rollout, row: int) -> Record:
        where = f"reward {self.path}: row {int(rollout.prompts.rows[row])}"
        messages = checked_messages(chat["messages"], where, "messages")
        tools = checked_tools(chat.get("tools"), where, "tools")
        return Record(messages, (response,), (), where, DEMONSTRATION, tools=tools)

    def _as_prompted(self, record: Record, refusal: InputError) -> Rendered:
        """The response after the template's generation prompt, since a policy may say what no row has, like nothing."""
        template = self.encoder.template
        assert template is not None and self._chats is not None
        try:
            prompt = self._chats.prompt(record)
        except InputError:
            raise InputError(
                f"{str(refusal).partition(';')[0]}; give the reward model a chat_template that renders it, or delete "
                "the row"
            ) from None
        self._tell(_AS_PROMPTED)
        said, _, hidden = hide([{"content": str(record.responses[0])}], None, self._chats.special, dict(prompt.hidden))
        text = said[0]["content"] + template.ending[0]
        return Rendered((*prompt.pieces, text), ended=bool(template.turn_end), hidden=tuple(hidden.items()))

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _texts(self, rollout: Rollout, rows: Sequence[int]) -> list[Tensor]:
        if self._same_ids:
            return [rollout.tokens[row, : rollout.lengths[row]].cpu() for row in rows]
        records = []
        for row in rows:
            prompt = rollout.tokens[row, : rollout.prompt_lengths[row]].tolist()
            text = str(self.policy.decode(prompt, skip_special_tokens=True))
            records.append(Record(text, (rollout.responses[row],), (), f"reward {self.path}", DEMONSTRATION))
        examples, _ = self.encoder.encode(records, "demonstrations")
        cut = rollout.truncated.tolist()
        return [
            torch.from_numpy(np.concatenate([example.prompt, example.responses[0][: -1 if cut[row] else None]]))
            for row, example in zip(rows, examples, strict=True)
        ]
