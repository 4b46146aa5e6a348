"""Encodes records as token ids: prompts and responses, and which tokens carry loss; drops or refuses long ones.

The ids of a sequence are ``prompt ids + response ids``, and no token crosses the border between them. A plain prompt
begins with BOS if the tokenizer adds one by itself, and a plain response ends in one EOS. A chat's ids are those of the
text that the chat template renders, up to the token that ends the last turn (EOS if none does). Text in user data that
spells a special token (``<|im_end|>``) stays text, unless ``special_tokens`` says otherwise.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np

from rlhf_lightning.data.choices import Kind, check_fit, wanted
from rlhf_lightning.data.conversations import Conversations, Rendered
from rlhf_lightning.data.hints import COLUMNS
from rlhf_lightning.data.ids import SpecialTokens, TextIds
from rlhf_lightning.data.lengths import far_over, long_prompt, long_response, surely_over
from rlhf_lightning.data.rows import Record
from rlhf_lightning.data.sequences import Array, Pieces, common_prompt, split
from rlhf_lightning.data.spelling import count_spelled, without_end
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.template import ChatTemplate, template_text
from rlhf_lightning.text import counted, notice

LongPrompts = Literal["error", "drop", "truncate_left"]
LongResponses = Literal["error", "drop"]
TrainOn = Literal["all_assistant", "last_assistant"]

REPEATED = "repeated prompt"
SAME_TOKENS = "responses of equal tokens"
NO_COMMON = "pair that differs before its last max_prompt_tokens tokens"
_TOO_LONG = "prompt without its demonstration, which is over max_response_tokens"
OTHER_PROMPT = "prompt without its demonstration, which follows another prompt than sampling uses"


@dataclass(frozen=True, slots=True)
class Example:
    """One encoded demonstration, pair, labelled response or prompt."""

    prompt: Array  # [prompt tokens] int32
    # each [response tokens] int32, EOS included. Two (chosen, rejected), or one (to imitate, or labelled), or none
    responses: tuple[Array, ...]
    margin: float
    weight: float
    row: int  # number in the whole set
    record: Record
    # each [response tokens] bool, True where the assistant speaks; None if it says all; () if all masks are None
    masks: tuple[Array | None, ...] = ()
    chat: bool = False  # of a prompt to answer: whether the chat template wrote it

    @property
    def widths(self) -> tuple[int, ...]:
        """The number of tokens of each sequence that the example becomes."""
        return tuple(len(self.prompt) + len(response) for response in self.responses) or (len(self.prompt),)


@dataclass(frozen=True, slots=True)
class _Draft:
    """An example before its texts are encoded: a record's prompt, and the sequences to learn from."""

    record: Record
    prompt: Rendered | None  # the prompt to sample from; None if nothing is sampled
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
        date: the date that ``strftime_now`` gives in the template, as YYYY-MM-DD; None for today.
        special_tokens: whether special tokens that a text spells stay ``text`` or become ``tokens``.
        train_on: whether every assistant turn of a conversation (`messages`) carries loss, or only the last one.
        max_prompt_tokens: most tokens of a prompt, template included, or before a conversation's last turn; None: any.
        max_response_tokens: most tokens of a response, EOS included, or of each assistant turn; None: any.
        long_prompts: what to do with longer prompts; ``truncate_left`` keeps BOS and the last tokens.
        long_responses: what to do with longer responses; they are never cut.
        compared: most sequences, evenly spread, whose ids are compared with the ids of their text as a whole.
        columns: the option that renames columns, for messages.
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
        self.borders: Counter[str] = Counter()  # "sequences", "compared", and "merged": a token crosses a border
        self.spelled: Counter[str] = Counter()  # for each special token, the number of rows that spell it
        self.spelling_rows = 0
        self._shortened: Counter[str] = Counter()  # rows of which the limits leave a part

    @property
    def pad_id(self) -> int:
        """The id that fills rows up. Any id would do, since masks come from lengths."""
        pad = self.tokenizer.pad_token_id
        return self.tokenizer.eos_token_id if pad is None else pad

    @property
    def noted(self) -> Counter[str]:
        """Counts of rows that the template or the limits changed in ways that users may not expect."""
        return self._shortened + Counter(self.conversations.noted if self.conversations is not None else {})

    def encode(
        self, records: Sequence[Record], kind: Kind, demonstrations: bool = False, every_row: bool = False
    ) -> tuple[list[Example], Counter[str]]:
        """The examples of one kind in the records' order, and the counts of what was dropped, by reason.

        ``demonstrations`` gives each record's best response, as one example or as one for each turn. ``pairs`` gives
        every pair, ``labels`` each labelled response. ``prompts`` gives each distinct prompt once; rows with different
        columns are distinct. With argument ``demonstrations`` it adds the first such row's best response, if that is
        not too long. With ``every_row`` each row's prompt is an example, and has its record's number.

        Raises:
            InputError: a record lacks what ``kind`` needs; a chat row has no template, or one without a place for it;
                or a text is too long and its policy is ``error``.
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
        drafts: list[_Draft] = []
        for record in counted(records, notice("data", "rows rendered")):
            for choice in wanted(record, kind, demonstrations):
                drafts += self._drafts(record, choice, kind)
        drafts = self._without_long_turns(self._without_long_prompts(drafts, dropped), kind, dropped)
        ids = self._pieces(drafts)
        kept = self._kept_prompts(drafts, ids, dropped)
        examples = self._examples(kept, kind, dropped)
        if every_row:
            examples = [replace(example, row=example.record.number) for example in examples]
        return examples, +dropped

    def spelled_in(self, records: Sequence[Record]) -> tuple[Counter[str], int]:
        """How many records spell each special token, and how many spell any. End tokens of responses do not count."""
        ends = self.conversations.ends if self.conversations is not None else ()
        plain = ends if self.chat else (self.tokenizer.eos_token,)
        return count_spelled(records, self.ids.pattern, plain, ends)

    # -- texts ---------------------------------------------------------------------------------------------------------

    def _drafts(self, record: Record, choice: tuple[int, ...], kind: Kind) -> list[_Draft]:
        chat = (self.chat and bool(record.prompt)) or not isinstance(record.prompt, str)
        if not (chat or any(not isinstance(response, str) for response in record.responses)):
            prompt = Rendered((str(record.prompt),), chat=False)
            sides = tuple(Rendered((str(record.prompt), self._without_eos(record, i)), chat=False) for i in choice)
            return [_Draft(record, prompt if kind == "prompts" else None, sides)]
        if self.conversations is None:
            raise InputError(
                f"{record.where}: chat messages, or data.chat, need a chat template and the tokenizer has none; "
                "set data.chat_template to a Jinja file, or give plain-text rows"
            )
        if kind == "prompts":
            sides = tuple(side for i in choice for side in self.conversations.answered(record, i))
            return [_Draft(record, self.conversations.prompt(record), sides)]
        every_turn = kind == "demonstrations" and self.train_on == "all_assistant"
        answered = [self.conversations.answered(record, i, every_turn) for i in choice]
        if kind == "demonstrations":
            return [_Draft(record, None, (side,)) for side in answered[0]]
        return [_Draft(record, None, tuple(side for sides in answered for side in sides))]

    def _without_eos(self, record: Record, number: int) -> str:
        """A plain response without an EOS that its text spells at its end."""
        return without_end(str(record.responses[number]), (self.tokenizer.eos_token,))

    def render(self, record: Record) -> list[Rendered]:
        """The record's responses as texts, each after its prompt; for a conversation, every turn that is learnt.

        Raises: InputError, see `encode`.
        """
        kind: Kind = "demonstrations" if record.form.conversation else "labels"
        choices = [(i,) for i in range(len(record.responses))]
        return [side for choice in choices for draft in self._drafts(record, choice, kind) for side in draft.sides]

    def compare(self, sequences: Sequence[Rendered]) -> None:
        """Counts in ``borders`` how many sequences have the same ids as their text as a whole."""
        sequences = sequences[:: max(1, -(-len(sequences) // max(1, self.compared)))]
        self._compare(sequences, self.ids.pieces(sequences))

    # -- ids -----------------------------------------------------------------------------------------------------------

    def _pieces(self, drafts: Sequence[_Draft]) -> list[tuple[Pieces, ...]]:
        """The ids of the sequences of each, with BOS and EOS."""
        sequences = list(dict.fromkeys(s for draft in drafts for s in draft.sequences))
        pieces = self.ids.pieces(sequences)
        self._compare(sequences, pieces)
        ended = {s: Pieces(tuple(self._ended(s, ids))) for s, ids in zip(sequences, pieces, strict=True)}
        return [tuple(ended[s] for s in draft.sequences) for draft in drafts]

    def _ended(self, sequence: Rendered, ids: list[list[int]]) -> list[list[int]]:
        first, *rest = ids
        if not sequence.chat:
            first = first if first[:1] == self.ids.bos else self.ids.bos + first
        if not rest:
            return [first]
        if not first and not sequence.pieces[0] and len(rest[0]) > 1:
            # A text without prompt and BOS: its first token becomes the prompt, since nothing can predict it.
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

    def _without_long_prompts(self, drafts: list[_Draft], dropped: Counter[str]) -> list[_Draft]:
        """Refuses or drops prompts that are surely over their limit, before the whole of them is tokenised."""
        limit = self.max_prompt_tokens
        if limit is None or self.long_prompts == "truncate_left":
            return drafts
        counts = [self._surely_over(draft.sequences[0], draft.sequences[0].context, limit) for draft in drafts]
        long = [(draft.record, count) for draft, count in zip(drafts, counts, strict=True) if count]
        rows = len({id(record) for record, _ in long})
        if long and self.long_prompts == "error":
            raise self._long_prompt(long[0][0], f"over {long[0][1]}", rows, drafts)
        dropped["prompt over max_prompt_tokens"] += rows
        return [draft for draft, count in zip(drafts, counts, strict=True) if not count]

    def _without_long_turns(self, drafts: list[_Draft], kind: Kind, dropped: Counter[str]) -> list[_Draft]:
        """Refuses or drops responses that are surely over their limit, before the whole of them is tokenised."""
        limit = self.max_response_tokens
        if limit is None:
            return drafts
        kept: list[_Draft] = []
        long: list[tuple[Record, int]] = []
        for draft in drafts:
            counts = [self._surely_over(side, turn, limit) for side in draft.sides for turn in side.turns]
            if not any(counts):
                kept.append(draft)
            elif kind == "prompts":
                self._shortened[_TOO_LONG] += 1
                kept.append(replace(draft, sides=()))
            else:
                long.append((draft.record, max(counts)))
        if long and self.long_responses == "error":
            raise self._long_response(long[0][0], f"over {long[0][1]}", len(long), len(drafts))
        dropped["response over max_response_tokens"] += len(long)
        return kept

    def _surely_over(self, sequence: Rendered, text: str, limit: int) -> int:
        """See `surely_over`; 0 if the whole text must be tokenised to know."""
        count = self.ids.rendered if sequence.chat else self.ids.plain
        return surely_over(text, limit, lambda part: len(count([part])[0])) or 0

    def _far_over(self, prompt: str) -> bool:
        """Whether a chat's prompt is surely over its limit, and will not be cut to it."""
        limit = None if self.long_prompts == "truncate_left" else self.max_prompt_tokens
        return limit is not None and far_over(prompt, limit, lambda part: len(self.ids.rendered([part])[0]))

    def _long_prompt(self, record: Record, tokens: str, rows: int, drafts: Sequence[_Draft]) -> InputError:
        total = len({id(draft.record) for draft in drafts})
        return long_prompt(record.where, tokens, self.max_prompt_tokens, rows, total)

    def _long_response(self, record: Record, tokens: str, count: int, total: int) -> InputError:
        return long_response(record.where, tokens, self.max_response_tokens, count, total)

    def _kept_prompts(
        self, drafts: Sequence[_Draft], ids: Sequence[tuple[Pieces, ...]], dropped: Counter[str]
    ) -> list[tuple[_Draft, tuple[Pieces, ...]]]:
        """Drops or refuses the ones whose prompts are over the limit, or cuts the prompts to it."""
        limit, kept = self.max_prompt_tokens, []
        over: dict[int, tuple[Record, int]] = {}
        for draft, sides in zip(drafts, ids, strict=True):
            if not sides[0].ids[0]:
                problem = "the tokenizer makes no token of it; delete the row"
                raise InputError(f"{draft.record.where}: key 'prompt': {problem}")
            longest = max(side.context for side in sides)
            if limit is not None and longest > limit:
                cut = self.long_prompts == "truncate_left"
                # Both sides of a pair get the same cut. At least one token of their prompt, besides BOS, must be left.
                if cut and len(sides) > 1 and draft.prompt is None:
                    shared = common_prompt(sides)
                    if longest - limit + (shared[:1] == [self.tokenizer.bos_token_id]) >= len(shared):
                        dropped[NO_COMMON] += 1
                        continue
                over.setdefault(id(draft.record), (draft.record, longest))
                if not cut:
                    continue
                least = longest if draft.prompt is None else 0
                sides = tuple(side.cut(max(side.context, least) - limit, self.tokenizer.bos_token_id) for side in sides)
            kept.append((draft, sides))
        if over and self.long_prompts == "error":
            record, longest = next(iter(over.values()))
            raise self._long_prompt(record, str(longest), len(over), drafts)
        cut = self.long_prompts == "truncate_left"
        reason = "prompt cut on the left" if cut else "prompt over max_prompt_tokens"
        (self._shortened if cut else dropped)[reason] += len(over)
        return kept

    def _examples(
        self, kept: Sequence[tuple[_Draft, tuple[Pieces, ...]]], kind: Kind, dropped: Counter[str]
    ) -> list[Example]:
        examples: list[Example] = []
        too_long: list[tuple[Record, int]] = []
        for draft, sides in kept:
            learnt = sides if draft.prompt is None else sides[1:]
            longest = max((side.longest_turn for side in learnt), default=0)
            if self.max_response_tokens is not None and longest > self.max_response_tokens:
                if kind != "prompts":
                    too_long.append((draft.record, longest))
                    continue
                self._shortened[_TOO_LONG] += 1
                learnt = ()
            prompt = common_prompt(learnt) if draft.prompt is None else sides[0].ids[0]
            if draft.prompt is not None and any(side.ids[0] != prompt for side in learnt):
                self._shortened[OTHER_PROMPT] += 1
                learnt = ()
            example = _example(draft, prompt, learnt, len(examples))
            if len(learnt) == 2 and np.array_equal(example.responses[0], example.responses[1]):
                dropped[SAME_TOKENS] += 1
                continue
            examples.append(example)
        if too_long and self.long_responses == "error":
            record, length = too_long[0]
            raise self._long_response(record, str(length), len(too_long), len(kept))
        dropped["response over max_response_tokens"] += len(too_long)
        return examples


def _example(draft: _Draft, prompt: list[int], learnt: tuple[Pieces, ...], row: int) -> Example:
    ids, masks = zip(*(split(side, len(prompt)) for side in learnt), strict=True) if learnt else ((), ())
    return Example(
        prompt=np.array(prompt, dtype=np.int32),
        responses=ids,
        margin=draft.record.margin,
        weight=draft.record.weight,
        row=row,
        record=draft.record,
        masks=masks if any(mask is not None for mask in masks) else (),
        chat=draft.prompt is not None and draft.prompt.chat,
    )
