"""Saves renderings: finds what a chat template writes for all beginnings of a conversation from one rendering of it.

A conversation must be rendered up to each of its turns, and most rows of a file differ only in their words. So for each
order of roles the template renders marks in place of the words, once. The words of a row then replace the marks, if

- the template cannot tell them from marks: they have no blanks at their ends, and nothing that it looks for in texts;
- the result for the whole conversation is what the template renders for it.

All other rows are rendered up to each turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from rlhf_lightning.models.template import MARK, ChatTemplate, TemplateRefuses

Place = tuple[int, bool]  # the number of messages, and whether the generation prompt follows
_LONGEST = 64  # messages; for longer conversations, rendering marks would take longer than it saves
_MOST = 1000  # most orders of roles to remember
# The mark has letters of both cases, so that a template that changes texts changes marks, too.
_WORD = MARK + "aZ{}" + MARK
_FOUND = re.compile(f"{MARK}aZ(\\d+){MARK}")
# With blanks as argument, these change only blanks at the ends of a text.
_EDGES = ("strip", "lstrip", "rstrip", "trim")
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


class Skeletons:
    """The renderings of one template with marks in place of words.

    Args:
        template: the chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._parts: dict[tuple[str, ...], dict[Place, list[str]]] = {}  # the odd elements are numbers of words

    def renderings(self, messages: list[dict[str, Any]], places: Iterable[Place]) -> dict[Place, str]:
        """The renderings of the beginnings and of the whole; or of the whole alone, or none, if they do not follow.

        Args:
            messages: messages with role and text only.
            places: the beginnings.
        """
        if len(messages) > _LONGEST or not all(set(m) == {"role", "content"} for m in messages):
            return {}
        words, roles = [message["content"] for message in messages], tuple(message["role"] for message in messages)
        if not all(isinstance(word, str) and self._is_plain(word) for word in words):
            return {}
        self._seen[roles] += 1
        if self._seen[roles] < 2:  # for a single conversation, marks save nothing
            return {}
        try:
            whole = self.template.render(messages)
        except TemplateRefuses:
            return {}  # rendering the row's messages will report it
        known = {(len(messages), False): whole}
        wanted = [*known, *places]
        parts = self._of(roles, wanted)
        if not all(place in parts for place in wanted) or _filled(parts[wanted[0]], words) != whole:
            return known
        return {place: _filled(parts[place], words) for place in wanted}

    def _of(self, roles: tuple[str, ...], places: Iterable[Place]) -> dict[Place, list[str]]:
        if len(self._parts) > _MOST:
            self._parts.clear()
        parts = self._parts.setdefault(roles, {})
        marked = [{"role": role, "content": _WORD.format(number)} for number, role in enumerate(roles)]
        for count, generation in places:
            if (count, generation) in parts:
                continue
            try:
                found = _FOUND.split(self.template.render(marked[:count], generation_prompt=generation))
            except TemplateRefuses:
                continue
            if not any(MARK in piece for piece in found):  # no mark was changed or cut
                parts[count, generation] = found
        return parts

    def _is_plain(self, word: str) -> bool:
        """Whether the template cannot tell a text from a mark."""
        looked_for = self._looked_for
        if looked_for is None or not word or word != word.strip() or MARK in word:
            return False
        inside, equal = looked_for
        return word not in equal and not any(text in word for text in inside)

    @cached_property
    def _looked_for(self) -> tuple[set[str], set[str]] | None:
        """The texts that the template may look for in other texts, and those it may compare with; None if unknown."""
        from jinja2 import Environment, TemplateError, nodes

        try:
            options = {"trim_blocks": True, "lstrip_blocks": True, "extensions": ["jinja2.ext.loopcontrols"]}
            tree = Environment(**options).parse(_GENERATION.sub("", self.template.text))  # type: ignore[arg-type]
        except TemplateError:
            return None
        if any(_cuts(node) for node in tree.find_all(nodes.Getitem)):
            return None
        inside: set[str] = set()
        node: Any
        for node in tree.find_all((nodes.Call, nodes.Filter, nodes.Test, nodes.Compare)):
            name = node.node.attr if isinstance(node, nodes.Call) and isinstance(node.node, nodes.Getattr) else ""
            name = node.name if isinstance(node, nodes.Filter | nodes.Test) else name
            within = [node.expr, *node.ops] if isinstance(node, nodes.Compare) else [*node.args, *node.kwargs]
            if isinstance(node, nodes.Compare) and not any(op.op in ("in", "notin") for op in node.ops):
                continue
            texts = {text for part in within for text in _texts(part)}
            inside |= {text for text in texts if text.strip() or name not in _EDGES}
        given = [node.node for node in tree.find_all(nodes.Assign)] + [node.iter for node in tree.find_all(nodes.For)]
        given += [default for node in tree.find_all(nodes.Macro) for default in node.defaults]
        inside |= {text for part in given for text in _texts(part) if text.strip()}  # it may look for a variable
        inside.discard("")
        return inside, set(_texts(tree))


def _texts(node: Any) -> Iterable[str]:
    from jinja2 import nodes

    found = [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))
    return [item.value for item in found if isinstance(item.value, str)]


def _cuts(node: Any) -> bool:
    """Whether an index or a slice may look at the letters of a text."""
    from jinja2 import nodes

    if not isinstance(node.arg, nodes.Slice) and not (
        isinstance(node.arg, nodes.Const | nodes.Neg) and not isinstance(getattr(node.arg, "value", 0), str)
    ):
        return False
    name = getattr(node.node, "name", getattr(node.node, "attr", ""))
    return not (isinstance(node.node, nodes.Call) or "messages" in name or "tool" in name)


def _filled(parts: list[str], words: list[str]) -> str:
    return "".join(words[int(part)] if i % 2 else part for i, part in enumerate(parts))
