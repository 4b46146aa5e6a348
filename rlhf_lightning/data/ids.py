"""Encodes texts piece by piece: each piece gets the ids that it has after the piece before it.

Some tokenizers (SentencePiece's, by a normaliser or by Metaspace) begin every text with a word mark, a space that is
not there. So a piece is tokenised together with the piece before it, whose ids are then taken off. If these ids change,
a merge would cross the border between the pieces. It is prevented: the piece is then tokenised after a character that
does not merge with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import groupby
from typing import Any, Literal

from rlhf_lightning.data.conversations import Rendered
from rlhf_lightning.data.hidden import unhidden
from rlhf_lightning.errors import check_choice
from rlhf_lightning.models.template import tokens_pattern

SpecialTokens = Literal["text", "tokens"]
Ids = list[int]
AT_ONCE = 4096  # texts; what the tokenizer makes of one takes many times its memory for a moment
_ANCHORS = ("\n", ":", ".", "|", "x")


class TextIds:
    """The ids of pieces of text.

    Args:
        tokenizer: a Hugging Face tokenizer.
        special: whether special tokens that a user's text spells stay ``text`` or become ``tokens``.
    """

    def __init__(self, tokenizer: Any, special: SpecialTokens = "text") -> None:
        check_choice("special_tokens", special, SpecialTokens)
        self.tokenizer = tokenizer
        self.special = special
        self._once: dict[int, int] = {}  # every id that came up, as the one object that stands for it
        self._added = {str(token): token for token in tokenizer.added_tokens_decoder.values() if token.special}
        known = {*self._added, *map(str, tokenizer.all_special_tokens)} - {str(tokenizer.unk_token)}
        # Whether some special token removes the blanks beside it.
        self._strip = any(token.rstrip or token.lstrip for token in self._added.values())
        self.known = sorted(token for token in known if token.strip())
        self.pattern = tokens_pattern(self.known)  # the special tokens, as texts spell them
        probe = tokenizer("a").input_ids
        bos = tokenizer.bos_token_id
        self.bos: Ids = [bos] if bos is not None and probe and probe[0] == bos else []

    @cached_property
    def marked(self) -> bool:
        """Whether the tokenizer begins a text with a word mark or a space that is not there."""
        return self._words("a") != "a"

    @cached_property
    def _marked_after_special(self) -> bool:
        special = next((text for text in self._added if text.strip()), None)
        return special is not None and self._words(special + "a") != special + "a"

    def _words(self, text: str) -> str:
        return "".join(map(str, self.tokenizer.convert_ids_to_tokens(self._call([text])[0])))

    def plain(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of users' texts, each on its own, without added tokens."""
        return self._as_text(list(texts)) if self.special == "text" else self._call(list(texts))

    def rendered(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of texts that a template rendered. Special tokens are recognised."""
        return self._call(list(texts))

    def _as_text(self, texts: Sequence[str]) -> list[Ids]:
        """Ids without special tokens, whatever the texts spell."""
        found = self._call(list(texts), split_special_tokens=True)
        return [
            self._broken(text) if self.pattern.search(text) and self._special_ids.intersection(ids) else ids
            for text, ids in zip(texts, found, strict=True)
        ]

    @cached_property
    def _special_ids(self) -> set[int]:
        return set(self.tokenizer.convert_tokens_to_ids(self.known))

    def _broken(self, text: str) -> Ids:
        """For tokenizers that make a special token even of plain text: splits each spelled token into two parts."""
        cuts = [found.start() + 1 for found in self.pattern.finditer(text)]
        parts = [text[start:end] for start, end in zip([0, *cuts], [*cuts, len(text)], strict=True)]

        def function(words: Sequence[str]) -> list[Ids]:
            return self._call(list(words), split_special_tokens=True)

        return function(parts[:1])[0] + [id for part in parts[1:] for id in self._anchored(part, function)]

    def _call(self, texts: list[str], **options: Any) -> list[Ids]:
        # verbose=False: no warning about long texts, since the data options limit lengths.
        options = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False, **options}
        found: list[Ids] = []
        for start in range(0, len(texts), AT_ONCE):
            encoded = self.tokenizer(texts[start : start + AT_ONCE], **options).input_ids
            # The tokenizer makes an object of 28 bytes for each token that it returns: one for each id is kept.
            found += [[self._once.setdefault(id, id) for id in ids] for ids in encoded]
        return found

    def pieces(self, sequences: Sequence[Rendered]) -> list[list[Ids]]:
        """The ids of every piece of every sequence, without BOS and EOS around a sequence."""
        found: dict[int, list[Ids]] = {}
        for chat, function in ((False, self.plain), (True, self.rendered)):
            numbers = [i for i, s in enumerate(sequences) if s.chat == chat and not s.hidden]
            if numbers:
                behind = self._behind((sequences[i].pieces for i in numbers), function)
                found.update((i, [behind[pair] for pair in _pairs(sequences[i].pieces)]) for i in numbers)
        for i, sequence in enumerate(sequences):
            if sequence.hidden:
                found[i] = self._apart(sequence.pieces, dict(sequence.hidden))
        return [found[i] for i in range(len(sequences))]

    def _behind(
        self, sequences: Iterable[tuple[str, ...]], function: Callable[[Sequence[str]], list[Ids]]
    ) -> dict[tuple[str, str], Ids]:
        """Maps (the piece before, or "" for the first piece; the piece) to the piece's ids."""
        pairs = list(dict.fromkeys(pair for pieces in sequences for pair in _pairs(pieces)))
        if not self.marked and not self._strip:
            texts = list(dict.fromkeys(text for _, text in pairs))
            alone = dict(zip(texts, function(texts), strict=True))
            return {pair: alone[pair[1]] for pair in pairs}
        texts = list(dict.fromkeys(text for before, piece in pairs for text in (before, before + piece)))
        ids = dict(zip(texts, function(texts), strict=True))
        found = {}
        for before, piece in pairs:
            whole, begun = ids[before + piece], ids[before] if before else []
            clean = whole[: len(begun)] == begun
            found[before, piece] = whole[len(begun) :] if clean else self._anchored(piece, function)
        return found

    def _anchored(self, piece: str, function: Callable[[Sequence[str]], list[Ids]]) -> Ids:
        anchors = function(_ANCHORS)
        for anchor, ids in zip(anchors, function([anchor + piece for anchor in _ANCHORS]), strict=True):
            if anchor and ids[: len(anchor)] == anchor:
                return ids[len(anchor) :]
        return function([piece])[0]

    def _apart(self, pieces: Sequence[str], hidden: dict[str, str]) -> list[Ids]:
        """Ids of rendered pieces in which a user spells special tokens. The user's stay text, the template's do not."""
        found: list[Ids] = []
        first, before = True, None  # whether nothing was encoded yet, and the special token right before the words
        for piece in pieces:
            ids: Ids = []
            begin = 0
            for match in [*self.pattern.finditer(piece), None]:
                words = piece[begin : match.start() if match else len(piece)]
                if before is not None and before.rstrip:
                    words = words.lstrip()
                token = self._added.get(match[0]) if match else None
                if token is not None and token.lstrip:
                    words = words.rstrip()
                if words:
                    ids += self._words_behind(unhidden(words, hidden), first, before is not None)
                    first, before = False, None
                if match:
                    ids.append(self.tokenizer.convert_tokens_to_ids(match[0]))
                    begin, first, before = match.end(), False, token
            found.append(ids)
        return found

    def _words_behind(self, text: str, first: bool, after_special: bool) -> Ids:
        marked = first or (after_special and self._marked_after_special)
        return self._anchored(text, self._as_text) if self.marked and not marked else self._as_text([text])[0]

    def merges(self, sequences: Sequence[Rendered], pieces: Sequence[list[Ids]]) -> Counter[str]:
        """Counts the sequences that are ``compared``, and those ``merged``: they have other ids as one text.

        In a merged sequence a token would cross the border between two pieces. Sequences in which users spell special
        tokens cannot be compared.
        """
        borders: Counter[str] = Counter()
        for chat, function in ((False, self.plain), (True, self.rendered)):
            numbers = [i for i, s in enumerate(sequences) if s.chat == chat and not s.hidden and len(s.pieces) > 1]
            wholes = function(["".join(sequences[i].pieces) for i in numbers])
            borders["compared"] += len(numbers)
            borders["merged"] += sum(
                [id for ids in pieces[i] for id in ids] != whole for i, whole in zip(numbers, wholes, strict=True)
            )
        return borders


def _pairs(pieces: tuple[str, ...]) -> list[tuple[str, str]]:
    """Each piece with the one before it."""
    return list(zip(("", *pieces[:-1]), pieces, strict=True))


def readable(tokenizer: Any, ids: Ids) -> str:
    """The ids as text. Letters that only spell a special token are marked as ``[text: ...]``."""
    texts = TextIds(tokenizer)
    special = set(tokenizer.convert_tokens_to_ids(texts.known))
    whole = str(tokenizer.decode(ids))
    if len(texts.pattern.findall(whole)) <= sum(id in special for id in ids):
        return whole
    runs = [list(run) for _, run in groupby(ids, lambda id: id in special)]
    return "".join(
        str(tokenizer.decode(run))
        if run[0] in special
        else texts.pattern.sub(lambda found: f"[text: {found[0]}]", str(tokenizer.decode(run)))
        for run in runs
    )
