"""Records to token ids: prompts and responses, what carries loss in them, and what is dropped.

The ids of a sequence are ``prompt ids + response ids``, and no token crosses the border between them. A plain prompt
begins with BOS where the tokenizer adds one by itself, and a plain response ends in one EOS. A chat's ids are what the
chat template renders for the whole conversation, up to the token that ends its last turn (EOS where none does). Text in
user data that spells a special token (``<|im_end|>``) stays text, unless ``special_tokens`` says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rlhf_lightning.data.choices import Kind, check_fit, wanted
from rlhf_lightning.data.conversations import Conversations, Rendered
from rlhf_lightning.data.hints import COLUMNS
from rlhf_lightning.data.ids import SpecialTokens, TextIds
from rlhf_lightning.data.lengths import far_over, long_prompt, long_response, surely_over
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.sequences import Pieces, common_prompt, split
from rlhf_lightning.data.spelling import count_spelled, without_end
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.template import ChatTemplate, template_text
from rlhf_lightning.text import counted, notice

LongPrompts = Literal["error", "drop", "truncate_left"]
LongResponses = Literal["error", "drop"]
TrainOn = Literal["all_assistant", "last_assistant"]

REPEATED = "repeated prompt"
SAME_TOKENS = "responses of equal tokens"
NO_COMMON = "pair that parts before its last max_prompt_tokens tokens"
_TOO_LONG = "prompt without its demonstration, which is over max_response_tokens"
OTHER_PROMPT = "prompt without its demonstration, which stands behind another than is sampled from"


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
    chat: bool = False  # of a prompt to answer: whether the chat template wrote it

    @property
    def widths(self) -> tuple[int, ...]:
        """The tokens of each sequence that the example becomes."""
        return tuple(len(self.prompt) + len(response) for response in self.responses) or (len(self.prompt),)


@dataclass(frozen=True)
class _Asked:
    """What becomes an example: a record's prompt, with the sides to learn from behind it."""

    record: Record
    prompt: Rendered | None  # as sampling is given it, where it is sampled from
    sides: tuple[Rendered, ...]

    @property
    def sequences(self) -> tuple[Rendered, ...]:
        return (*([self.prompt] if self.prompt is not None else []), *self.sides)


class Encoder:
    """Encodes records for one tokenizer.

    Args:
        tokenizer: a Hugging Face tokenizer with an EOS token.
        chat: put plain prompts (and transcripts' turns) through the chat template too.
        chat_template: a file with a Jinja chat template, used in place of the tokenizer's own.
        chat_template_name: which of the tokenizer's named templates; None for its default.
        chat_template_kwargs: variables of the template, as ``enable_thinking``.
        date: what ``strftime_now`` says in the template, as YYYY-MM-DD; None for today.
        special_tokens: special tokens that a text spells stay ``text``, or are taken for the ``tokens``.
        train_on: in conversations (`messages`) every turn of the assistant's carries loss, or the last alone.
        max_prompt_tokens: of a prompt, template included, or of a conversation before its last turn; None: any number.
        max_response_tokens: of a response, EOS included, or of each turn of the assistant's; None: any number.
        long_prompts: what to do with longer prompts; ``truncate_left`` keeps BOS and the last tokens.
        long_responses: what to do with longer responses; they are never cut.
        compared: of so many sequences at most, evenly spread, the ids are compared with those of the text as a whole.
        columns: the option that gives columns other names, for messages.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        chat: bool = False,
        chat_template: str | None = None,
        chat_template_name: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        date: str | None = None,
        special_tokens: SpecialTokens = "text",
        train_on: TrainOn = "all_assistant",
        max_prompt_tokens: int | None = None,
        max_response_tokens: int | None = None,
        long_prompts: LongPrompts = "error",
        long_responses: LongResponses = "error",
        compared: int = 0,
        columns: str = COLUMNS,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise InputError("the tokenizer has no EOS token to end responses with; set eos_token in its folder")
        check_choice("train_on", train_on, TrainOn)
        check_choice("long_prompts", long_prompts, LongPrompts)
        check_choice("long_responses", long_responses, LongResponses)
        self.tokenizer = tokenizer
        self.chat = chat
        self.train_on = train_on
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.long_prompts = long_prompts
        self.long_responses = long_responses
        self.compared = compared
        self.columns = columns
        self.ids = TextIds(tokenizer, special_tokens)
        text = template_text(tokenizer, chat_template, chat_template_name)
        self.template = ChatTemplate(tokenizer, text, chat_template_kwargs, date) if text else None
        self.conversations: Conversations | None = None
        if self.template is not None:
            pattern = self.ids.pattern if special_tokens == "text" else None
            self.conversations = Conversations(self.template, pattern, self._far_over)
        elif chat_template_kwargs:
            raise InputError(
                "data.chat_template_kwargs: the tokenizer has no chat template that reads them; leave it out"
            )
        self.borders: Counter[str] = Counter()  # sequences: all, compared, and those where a merge crosses a border
        self.spelled: Counter[str] = Counter()  # special tokens that texts spell, by the rows that do
        self.spelling_rows = 0
        self._kept: Counter[str] = Counter()  # rows that the limits leave a part of

    @property
    def pad_id(self) -> int:
        """What fills the space past the lengths; any id is right, since masks come from lengths."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def noted(self) -> Counter[str]:
        """What the template and the limits made of rows that one would not expect, by how many."""
        return self._kept + Counter(self.conversations.noted if self.conversations is not None else {})

    def encode(
        self, records: Sequence[Record], kind: Kind, demonstrations: bool = False, every_row: bool = False
    ) -> tuple[list[Example], Counter[str]]:
        """The examples of one kind in the records' order, and what was dropped, by reason.

        ``demonstrations``: each record's best response, in one example or in one a turn. ``pairs``: every pair.
        ``labels``: each labelled response. ``prompts``: each distinct prompt once, rows with other columns apart; with
        ``demonstrations`` also the first such row's best response, where it has one that is not too long. With
        ``every_row`` a prompt is there as often as rows have it, and each example has its record's number.

        Raises:
            InputError: a record without what ``kind`` needs, chat rows without a template or that it has no place for,
                or an over-long text whose policy is ``error``.
        """
        check_fit(records, kind, self.columns)
        dropped: Counter[str] = Counter()
        if kind == "prompts" and not every_row:
            distinct: dict[Any, Record] = {}
            for record in records:
                distinct.setdefault(record.identity, record)
            dropped[REPEATED] += len(records) - len(distinct)
            records = list(distinct.values())
        tokens, rows = self.spelled_in(records)
        self.spelled, self.spelling_rows = self.spelled + tokens, self.spelling_rows + rows
        asked: list[_Asked] = []
        for record in counted(records, notice("data", "rows rendered")):
            for choice in wanted(record, kind, demonstrations):
                asked += self._asked(record, choice, kind)
        asked = self._without_long_turns(self._without_long_prompts(asked, dropped), kind, dropped)
        ids = self._pieces(asked)
        kept = self._kept_prompts(asked, ids, dropped)
        examples = self._examples(kept, kind, dropped)
        if every_row:
            examples = [replace(example, row=example.record.number) for example in examples]
        return examples, +dropped

    def spelled_in(self, records: Sequence[Record]) -> tuple[Counter[str], int]:
        """By how many records each special token is spelled, but at the end of a response; and by how many any is."""
        ends = self.conversations.ends if self.conversations is not None else ()
        plain = ends if self.chat else (self.tokenizer.eos_token,)
        return count_spelled(records, self.ids.pattern, plain, ends)

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _asked(self, record: Record, choice: tuple[int, ...], kind: Kind) -> list[_Asked]:
        chat = (self.chat and bool(record.prompt)) or not isinstance(record.prompt, str)
        if not (chat or any(not isinstance(response, str) for response in record.responses)):
            prompt = Rendered((str(record.prompt),), chat=False)
            sides = tuple(Rendered((str(record.prompt), self._without_eos(record, i)), chat=False) for i in choice)
            return [_Asked(record, prompt if kind == "prompts" else None, sides)]
        if self.conversations is None:
            raise InputError(
                f"{record.where}: chat messages, or data.chat, need a chat template and the tokenizer has none; "
                "set data.chat_template to a Jinja file, or give plain-text rows"
            )
        if kind == "prompts":
            sides = tuple(side for i in choice for side in self.conversations.answered(record, i))
            return [_Asked(record, self.conversations.prompt(record), sides)]
        every_turn = kind == "demonstrations" and self.train_on == "all_assistant"
        answered = [self.conversations.answered(record, i, every_turn) for i in choice]
        if kind == "demonstrations":
            return [_Asked(record, None, (side,)) for side in answered[0]]
        return [_Asked(record, None, tuple(side for sides in answered for side in sides))]

    def _without_eos(self, record: Record, number: int) -> str:
        """A plain response; an EOS that it spells at its end is taken as the one that ends it."""
        return without_end(str(record.responses[number]), (self.tokenizer.eos_token,))

    def render(self, record: Record) -> list[Rendered]:
        """The record's responses as texts, each behind its prompt; of a conversation, every turn that is learnt.

        Raises: InputError, see `encode`.
        """
        kind: Kind = "demonstrations" if record.form.conversation else "labels"
        choices = [(i,) for i in range(len(record.responses))]
        return [side for choice in choices for ask in self._asked(record, choice, kind) for side in ask.sides]

    def compare(self, sequences: Sequence[Rendered]) -> None:
        """Count in ``borders`` how the sequences' ids compare with those of the text as a whole."""
        sequences = sequences[:: max(1, -(-len(sequences) // max(1, self.compared)))]
        self._compare(sequences, self.ids.pieces(sequences))

    # -- ids -----------------------------------------------------------------------------------------------------------

    def _pieces(self, asked: Sequence[_Asked]) -> list[tuple[Pieces, ...]]:
        """The ids of each one's sequences, with what begins and ends them."""
        sequences = list(dict.fromkeys(s for ask in asked for s in ask.sequences))
        pieces = self.ids.pieces(sequences)
        self._compare(sequences, pieces)
        ended = {s: Pieces(tuple(self._ended(s, ids))) for s, ids in zip(sequences, pieces, strict=True)}
        return [tuple(ended[s] for s in ask.sequences) for ask in asked]

    def _ended(self, sequence: Rendered, ids: list[list[int]]) -> list[list[int]]:
        first, *rest = ids
        if not sequence.chat:
            first = first if first[:1] == self.ids.bos else self.ids.bos + first
        if not rest:
            return [first]
        if not first and not sequence.pieces[0] and len(rest[0]) > 1:
            # A text without a prompt, and no BOS: nothing can predict its first token.
            first, rest = rest[0][:1], [rest[0][1:]]
        end = self.template.turn_end_id if self.template is not None else None
        closed = sequence.ended or (
            self.ids.special == "tokens" and rest[-1][-1:] in ([self.tokenizer.eos_token_id], [end])
        )
        if not closed:
            rest = [*rest[:-1], [*rest[-1], self.tokenizer.eos_token_id]]
        return [first, *rest]

    def _compare(self, sequences: Sequence[Rendered], pieces: Sequence[list[list[int]]]) -> None:
        joined = [i for i, sequence in enumerate(sequences) if len(sequence.pieces) > 1]
        self.borders["sequences"] += len(joined)
        if not self.compared or not joined:
            return
        step = max(1, -(-len(joined) // self.compared))
        chosen = joined[::step]
        self.borders += self.ids.merges([sequences[i] for i in chosen], [pieces[i] for i in chosen])

    # -- limits --------------------------------------------------------------------------------------------------------

    def _without_long_prompts(self, asked: list[_Asked], dropped: Counter[str]) -> list[_Asked]:
        """Refuses, or drops, those whose prompt is surely over its limit, before all of it is tokenised."""
        limit = self.max_prompt_tokens
        if limit is None or self.long_prompts == "truncate_left":
            return asked
        counts = [self._surely_over(ask.sequences[0], ask.sequences[0].context, limit) for ask in asked]
        long = [(ask.record, count) for ask, count in zip(asked, counts, strict=True) if count]
        rows = len({id(record) for record, _ in long})
        if long and self.long_prompts == "error":
            raise self._long_prompt(long[0][0], f"over {long[0][1]}", rows, asked)
        dropped["prompt over max_prompt_tokens"] += rows
        return [ask for ask, count in zip(asked, counts, strict=True) if not count]

    def _without_long_turns(self, asked: list[_Asked], kind: Kind, dropped: Counter[str]) -> list[_Asked]:
        """Refuses, or drops, responses that are surely over their limit, before all of them is tokenised."""
        limit = self.max_response_tokens
        if limit is None:
            return asked
        kept: list[_Asked] = []
        long: list[tuple[Record, int]] = []
        for ask in asked:
            counts = [self._surely_over(side, turn, limit) for side in ask.sides for turn in side.turns]
            if not any(counts):
                kept.append(ask)
            elif kind == "prompts":
                self._kept[_TOO_LONG] += 1
                kept.append(replace(ask, sides=()))
            else:
                long.append((ask.record, max(counts)))
        if long and self.long_responses == "error":
            raise self._long_response(long[0][0], f"over {long[0][1]}", len(long), len(asked))
        dropped["response over max_response_tokens"] += len(long)
        return kept

    def _surely_over(self, sequence: Rendered, text: str, limit: int) -> int:
        """See `surely_over`; 0 where only the whole text can tell."""
        count = self.ids.rendered if sequence.chat else self.ids.plain
        return surely_over(text, limit, lambda part: len(count([part])[0])) or 0

    def _far_over(self, prompt: str) -> bool:
        """Whether a chat's prompt is surely over its limit, and is not to be cut to it."""
        limit = None if self.long_prompts == "truncate_left" else self.max_prompt_tokens
        return limit is not None and far_over(prompt, limit, lambda part: len(self.ids.rendered([part])[0]))

    def _long_prompt(self, record: Record, tokens: str, rows: int, asked: Sequence[_Asked]) -> InputError:
        return long_prompt(record.where, tokens, self.max_prompt_tokens, rows, len({id(ask.record) for ask in asked}))

    def _long_response(self, record: Record, tokens: str, count: int, total: int) -> InputError:
        return long_response(record.where, tokens, self.max_response_tokens, count, total)

    def _kept_prompts(
        self, asked: Sequence[_Asked], ids: Sequence[tuple[Pieces, ...]], dropped: Counter[str]
    ) -> list[tuple[_Asked, tuple[Pieces, ...]]]:
        """Those whose prompts are within the limit, or were cut to it."""
        limit, kept = self.max_prompt_tokens, []
        over: dict[int, tuple[Record, int]] = {}
        for ask, sides in zip(asked, ids, strict=True):
            if not sides[0].ids[0]:
                problem = "the tokenizer makes no token of it; delete the row"
                raise InputError(f"{ask.record.where}: key 'prompt': {problem}")
            longest = max(side.context for side in sides)
            if limit is not None and longest > limit:
                cut = self.long_prompts == "truncate_left"
                # One cut for both sides of a pair, which keep one prompt: all but one token of it may go, BOS apart.
                if cut and len(sides) > 1 and ask.prompt is None:
                    shared = common_prompt(sides)
                    if longest - limit + (shared[:1] == [self.tokenizer.bos_token_id]) >= len(shared):
                        dropped[NO_COMMON] += 1
                        continue
                over.setdefault(id(ask.record), (ask.record, longest))
                if not cut:
                    continue
                least = longest if ask.prompt is None else 0
                sides = tuple(side.cut(max(side.context, least) - limit, self.tokenizer.bos_token_id) for side in sides)
            kept.append((ask, sides))
        if over and self.long_prompts == "error":
            record, longest = next(iter(over.values()))
            raise self._long_prompt(record, str(longest), len(over), asked)
        cut = self.long_prompts == "truncate_left"
        reason = "prompt cut on the left" if cut else "prompt over max_prompt_tokens"
        (self._kept if cut else dropped)[reason] += len(over)
        return kept

    def _examples(
        self, kept: Sequence[tuple[_Asked, tuple[Pieces, ...]]], kind: Kind, dropped: Counter[str]
    ) -> list[Example]:
        examples: list[Example] = []
        too_long: list[tuple[Record, int]] = []
        for ask, sides in kept:
            learnt = sides if ask.prompt is None else sides[1:]
            longest = max((side.longest_turn for side in learnt), default=0)
            if self.max_response_tokens is not None and longest > self.max_response_tokens:
                if kind != "prompts":
                    too_long.append((ask.record, longest))
                    continue
                self._kept[_TOO_LONG] += 1
                learnt = ()
            prompt = common_prompt(learnt) if ask.prompt is None else sides[0].ids[0]
            if ask.prompt is not None and any(side.ids[0] != prompt for side in learnt):
                self._kept[OTHER_PROMPT] += 1
                learnt = ()
            example = _example(ask, prompt, learnt, len(examples))
            if len(learnt) == 2 and torch.equal(*example.responses):
                dropped[SAME_TOKENS] += 1
                continue
            examples.append(example)
        if too_long and self.long_responses == "error":
            record, length = too_long[0]
            raise self._long_response(record, str(length), len(too_long), len(kept))
        dropped["response over max_response_tokens"] += len(too_long)
        return examples


def _example(ask: _Asked, prompt: list[int], learnt: tuple[Pieces, ...], row: int) -> Example:
    ids, masks = zip(*(split(side, len(prompt)) for side in learnt), strict=True) if learnt else ((), ())
    return Example(
        prompt=torch.tensor(prompt, dtype=torch.int32),
        responses=ids,
        margin=ask.record.margin,
        weight=ask.record.weight,
        row=row,
        record=ask.record,
        masks=masks if any(mask is not None for mask in masks) else (),
        chat=ask.prompt is not None and ask.prompt.chat,
    )
