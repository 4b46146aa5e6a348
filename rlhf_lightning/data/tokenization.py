"""Text to token ids: prompt and response apart, so that a boundary never merges into one token.

The ids of a sequence are ``prompt ids + response ids``. A response ends in exactly one EOS. A plain prompt begins with
BOS where the tokenizer adds one by itself; a chat prompt is what the chat template renders, generation prompt included.
Text in user data that spells a special token (``<|im_end|>``) stays text: it is never given the special token's id.
"""

from __future__ import annotations

import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.data.rows import Record
from rlhf_lightning.errors import InputError

Kind = Literal["demonstrations", "pairs", "labels", "prompts"]
LongPrompts = Literal["error", "drop", "truncate_left"]
LongResponses = Literal["error", "drop"]


@dataclass(frozen=True)
class Example:
    """One encoded demonstration, pair, labelled response or prompt."""

    prompt: Tensor  # [prompt tokens] int32
    # each [response tokens] int32, EOS included: none; the one to imitate, or labelled; or chosen, rejected
    responses: tuple[Tensor, ...]
    margin: float
    weight: float
    row: int  # number in the whole set
    record: Record
    # each [response tokens] bool, True where the assistant speaks, or None where it does all through; () for None alone
    masks: tuple[Tensor | None, ...] = ()

    @property
    def widths(self) -> tuple[int, ...]:
        """The tokens of each sequence that the example becomes."""
        return tuple(len(self.prompt) + len(response) for response in self.responses) or (len(self.prompt),)


class Encoder:
    """Encodes records for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token.
        chat: put plain prompts (and transcripts' turns) through the chat template too.
        chat_template: a file with a Jinja chat template, used in place of the tokenizer's own.
        max_prompt_tokens: longest prompt, template included; None for no limit.
        max_response_tokens: longest response, EOS included; None for no limit.
        long_prompts: what to do with longer prompts; ``truncate_left`` keeps BOS and the last tokens.
        long_responses: what to do with longer responses; they are never cut.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool = False,
        chat_template: str | None = None,
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        long_prompts: LongPrompts = "error",
        long_responses: LongResponses = "error",
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token to end responses with; set eos_token in its folder")
        self.tokenizer = tokenizer
        self.chat = chat
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.long_prompts = long_prompts
        self.long_responses = long_responses
        self.template = _read_template(chat_template) if chat_template else tokenizer.chat_template
        self._turn_end_checked = False
        added = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self._special_ids = (added | set(tokenizer.all_special_ids)) - {tokenizer.unk_token_id}
        probe = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self._bos = [bos] if bos is not None and probe and probe[0] == bos else []

    @property
    def pad_id(self) -> int:
        """What fills the space past the lengths; any id is right, since masks come from lengths."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    def encode(
        self, records: Sequence[Record], kind: Kind, demonstrations: bool = False, every_row: bool = False
    ) -> tuple[list[Example], Counter[str]]:
        """The examples of one kind in the records' order, and what was dropped, by reason.

        ``demonstrations``: each record's best response. ``pairs``: every pair. ``labels``: each labelled response.
        ``prompts``: each distinct prompt once, with the columns of the first row that has it; with ``demonstrations``
        also that row's best response, where it has one that is not too long. With ``every_row`` a prompt is there as
        often as rows have it, and each example has its record's number.

        Raises:
            InputError: a record without what ``kind`` needs, chat rows without a template, or an over-long text whose
                policy is ``error``.
        """
        dropped: Counter[str] = Counter()
        for record in records:
            _check_encodable(record, bool(self._bos))
        if kind == "prompts" and not every_row:
            records = list({record.key: record for record in reversed(records)}.values())[::-1]
        wanted = [(record, _wanted(record, kind, demonstrations)) for record in records]
        prompts = self._prompt_ids(records, dropped)
        texts = {
            (record.form.transcript and self.chat, str(record.responses[i]))
            for record, choices in wanted
            for choice in choices
            for i in choice
        }
        stripped = {text: text[1].strip() if text[0] else text[1] for text in texts}
        encoded = dict(zip(texts, self._response_ids(stripped[text] for text in texts), strict=True))
        examples: list[Example] = []
        too_long: list[tuple[Record, int]] = []
        pairs = 0
        for record, choices in wanted:
            prompt = prompts.get(self._source(record))
            if prompt is None:
                continue
            for choice in choices:
                pairs += 1
                key = record.form.transcript and self.chat
                responses = tuple(encoded[key, str(record.responses[i])] for i in choice)
                longest = max(map(len, responses), default=0)
                if self.max_response_tokens is not None and longest > self.max_response_tokens:
                    if kind == "prompts":
                        dropped["demonstration over max_response_tokens, its prompt kept"] += 1
                        examples.append(Example(prompt, (), record.margin, record.weight, len(examples), record))
                        continue
                    too_long.append((record, longest))
                    continue
                examples.append(Example(prompt, responses, record.margin, record.weight, len(examples), record))
        if too_long and self.long_responses == "error":
            record, length = too_long[0]
            raise InputError(
                f"{record.where}: a response of {length} tokens, EOS included, is over data.max_response_tokens "
                f"{self.max_response_tokens} ({len(too_long)} of {pairs} are); raise it, or set data.long_responses "
                "to drop"
            )
        if too_long:
            dropped["response over max_response_tokens"] += len(too_long)
        if every_row:
            examples = [replace(example, row=example.record.number) for example in examples]
        return examples, dropped

    def _source(self, record: Record) -> tuple[Any, bool]:
        """What a prompt's ids depend on."""
        return record.prompt, record.form.transcript

    def _prompt_ids(self, records: Sequence[Record], dropped: Counter[str]) -> dict[tuple[Any, bool], Tensor]:
        """Token ids by ``_source``; a prompt that the policy drops is absent."""
        distinct = {self._source(record): record for record in reversed(records)}
        plain = {key: r.prompt for key, r in distinct.items() if isinstance(r.prompt, str) and not self.chat}
        chats = {key: record for key, record in distinct.items() if key not in plain}
        ids = {key: self._bos + row for key, row in zip(plain, self._plain(list(plain.values())), strict=True)}
        ids.update(zip(chats, self._chats(list(chats.values())), strict=True))
        limit = self.max_prompt_tokens
        too_long = {key for key, row in ids.items() if limit is not None and len(row) > limit}
        rows = [record for record in records if self._source(record) in too_long]
        if rows and self.long_prompts == "error":
            raise InputError(
                f"{rows[0].where}: key 'prompt': {len(ids[self._source(rows[0])])} tokens are over "
                f"data.max_prompt_tokens {limit} ({len(rows)} of {len(records)} rows are); raise it, or set "
                "data.long_prompts to drop or truncate_left"
            )
        if rows and self.long_prompts == "drop":
            dropped["prompt over max_prompt_tokens"] += len(rows)
            ids = {key: row for key, row in ids.items() if key not in too_long}
        elif rows:
            dropped["prompt cut on the left"] += len(rows)
            ids = {key: self._cut_left(row) if key in too_long else row for key, row in ids.items()}
        for key, row in ids.items():
            if not row:
                raise InputError(
                    f"{distinct[key].where}: key 'prompt': the tokenizer makes no token of it; delete the row"
                )
        return {key: torch.tensor(row, dtype=torch.int32) for key, row in ids.items()}

    def _cut_left(self, prompt: list[int]) -> list[int]:
        assert self.max_prompt_tokens is not None
        bos = prompt[:1] if prompt[0] == self.tokenizer.bos_token_id and self.max_prompt_tokens > 1 else []
        return bos + prompt[len(prompt) - self.max_prompt_tokens + len(bos) :]

    def _response_ids(self, texts: Iterable[str]) -> list[Tensor]:
        """Each text's ids and one EOS. An EOS that the text itself spells at its end is taken as that one."""
        eos = self.tokenizer.eos_token
        ids = self._plain([text.removesuffix(eos) for text in texts])
        return [torch.tensor([*row, self.tokenizer.eos_token_id], dtype=torch.int32) for row in ids]

    def _plain(self, texts: Sequence[Any]) -> list[list[int]]:
        """Ids of user text: no special token is added, and none is recognised in it."""
        return self._call(list(texts), split_special_tokens=True)

    def _call(self, texts: list[str], **options: Any) -> list[list[int]]:
        if not texts:
            return []
        # verbose=False: a long text is no mistake here, lengths are our own policy.
        encoded = self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False, **options)
        return encoded.input_ids

    # -- chat templates ------------------------------------------------------------------------------------------------

    def _chats(self, records: list[Record]) -> list[list[int]]:
        if not records:
            return []
        if self.template is None:
            raise InputError(
                f"{records[0].where}: chat messages, or data.chat, need a chat template and the tokenizer has none; "
                "set data.chat_template to a Jinja file, or give plain-text rows"
            )
        self._check_turn_end(records[0].where)
        chats = [self._turns(record) for record in records]
        contents = sorted({turn["content"] for chat in chats for turn in chat})
        spelled = {
            text
            for text, ids in zip(contents, self._call(contents), strict=True)
            if self._special_ids.intersection(ids)
        }
        safe = [i for i, chat in enumerate(chats) if not any(turn["content"] in spelled for turn in chat)]
        rendered = [self._render(chats[i], records[i].where) for i in safe]
        found = dict(zip(safe, self._call(rendered), strict=True))
        return [found[i] if i in found else self._apart(chat, records[i].where) for i, chat in enumerate(chats)]

    def _turns(self, record: Record) -> list[dict[str, Any]]:
        if not record.messages:
            raise InputError(f"{record.where}: key 'chosen': the transcript has no Human turn; delete the row")
        return [message.turn() for message in record.messages]

    def _render(self, turns: list[dict[str, Any]], where: str, generation_prompt: bool = True) -> str:
        try:
            return self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=generation_prompt
            )
        except Exception as error:  # a template is a program: it may raise anything
            reason = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise InputError(f"{where}: the chat template refuses the messages ({reason}); repair either") from None

    def _apart(self, turns: list[dict[str, Any]], where: str) -> list[int]:
        """Ids of a chat whose texts spell special tokens: template and texts are tokenised apart.

        Each text is rendered as a placeholder from Unicode's private use area, so that the template's special tokens
        can be told from the ones that a user typed.
        """
        hidden = [{**turn, "content": f"\ue000{i}\ue001"} for i, turn in enumerate(turns)]
        pieces = re.split("\ue000([0-9]+)\ue001", self._render(hidden, where))
        ids: list[int] = []
        for i, piece in enumerate(pieces):
            if i % 2:
                ids += self._plain([turns[int(piece)]["content"]])[0]
            elif piece:
                ids += self._call([piece])[0]
        return ids

    def _check_turn_end(self, where: str) -> None:
        """Warns once where the template ends an answer with another token than the EOS that training appends."""
        if self._turn_end_checked:
            return
        self._turn_end_checked = True
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "\ue000"}]
        end = self._render(chat, where, generation_prompt=False).rpartition("\ue000")[2]
        special = [id for id in self._call([end])[0] if id in self._special_ids] if end else []
        if special and special[0] != self.tokenizer.eos_token_id:
            token = self.tokenizer.convert_ids_to_tokens(special[0])
            warnings.warn(
                f"the chat template ends an answer with {json.dumps(token)}, but the tokenizer's EOS is "
                f"{json.dumps(self.tokenizer.eos_token)}, and responses are ended with that",
                stacklevel=2,
            )


def _check_encodable(record: Record, has_bos: bool) -> None:
    """Refuses what has no tokens here yet: answers of several messages, begun answers, texts that nothing precedes."""
    problem = ""
    if any(not isinstance(response, str) for response in record.responses):
        problem = (
            "an answer of several messages, or with a call of a tool, is not encoded yet; end it at its first text"
        )
    elif not isinstance(record.prompt, str) and record.prompt[-1].role == "assistant":
        problem = "a prompt that ends in the assistant's words is not encoded yet; put them into the response"
    elif record.form.whole and not has_bos:
        problem = "the tokenizer has no BOS token to put before it; give rows with 'prompt' and 'completion'"
    elif record.tools:
        problem = "tools are not given to the chat template yet; delete the key"
    if problem:
        raise InputError(f"{record.where}: key '{'text' if record.form.whole else 'messages'}': {problem}")


def _wanted(record: Record, kind: Kind, demonstrations: bool) -> tuple[tuple[int, ...], ...]:
    """Which of the record's responses each example takes."""
    if kind == "prompts":
        return ((0,),) if demonstrations and record.responses and not record.form.labelled else ((),)
    if kind == "labels":
        if not record.form.labelled:
            problem = "is missing, and other rows have one; give all rows 'completion' and 'label', or none"
            raise InputError(f"{record.where}: key 'label': {problem}")
        return ((0,),)
    if record.form.labelled:
        remedy = {
            "demonstrations": "a demonstration has none; leave out the rows of label false, and the key in the others",
            "pairs": "a comparison has 'chosen' and 'rejected'; responses labelled one by one are for KTOModule, in "
            "data.path and data.val_path alike",
        }[kind]
        raise InputError(f"{record.where}: key 'label': {remedy}")
    if kind == "demonstrations":
        if not record.responses:
            problem = "there is no response to imitate; add key 'completion', or leave the row out"
            raise InputError(f"{record.where}: key 'completion': {problem}")
        return ((0,),)
    if not record.form.compared:
        problem = (
            "there is no comparison; add 'chosen' and 'rejected', or completions with ranks or ratings (for KTOModule "
            "a 'completion' with 'label' true or false does too)"
        )
        raise InputError(f"{record.where}: key 'chosen': {problem}")
    return record.pairs


def _read_template(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.chat_template: {path} cannot be read ({error}); give a Jinja text file") from None
