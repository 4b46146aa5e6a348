"""What a chat template writes for the beginnings of a conversation, told from one rendering of the whole.

A conversation is rendered up to each of its turns, and most rows of a file differ in their words alone. So the template
is asked once for marks in the words' place, for each order of roles. The words of a row are put in the marks' place, if

- the template cannot tell them from marks: they have no blanks at their ends, and nothing that it looks for in texts;
- what this gives for the whole conversation is what the template renders for it.

All other rows are rendered up to each turn.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from functools import cached_property
from typing import Any

from rlhf_lightning.models.template import MARK, ChatTemplate, TemplateRefuses

Place = tuple[int, bool]  # how many messages, and whether with the generation prompt
_LONGEST = 64  # messages; the marks of longer conversations would take longer than they save
_MOST = 1000  # orders of roles that are kept
# With letters of both cases, so that a template that changes texts changes marks.
_WORD = MARK + "aZ{}" + MARK
_FOUND = re.compile(f"{MARK}aZ(\\d+){MARK}")
_EDGES = ("strip", "lstrip", "rstrip", "trim")  # do nothing to a text without blanks at its ends, if given blanks
_GENERATION = re.compile(r"{%-?\s*(end)?generation\s*-?%}")


class Skeletons:
    """Those of one template.

    Args:
        template: the chat template.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._seen: Counter[tuple[str, ...]] = Counter()
        self._parts: dict[tuple[str, ...], dict[Place, list[str]]] = {}  # words' numbers at the odd places

    def renderings(self, messages: list[dict[str, Any]], places: Iterable[Place]) -> dict[Place, str]:
        """What the template renders for beginnings of the messages, where that follows from the whole; else no more
        than the whole, or nothing.

        Args:
            messages: role and text each.
            places: the beginnings.
        """
        if len(messages) > _LONGEST or not all(set(m) == {"role", "content"} for m in messages):
            return {}
        words, roles = [message["content"] for message in messages], tuple(message["role"] for message in messages)
        if not all(isinstance(word, str) and self._is_plain(word) for word in words):
            return {}
        self._seen[roles] += 1
        if self._seen[roles] < 2:  # what is there once is rendered sooner than its marks
            return {}
        try:
            whole = self.template.render(messages)
        except TemplateRefuses:
            return {}  # said with the row's messages
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
            if not any(MARK in piece for piece in found):  # none is changed or cut
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
        """The texts that the template may look for in others, and that it may compare with; None for any."""
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
        inside |= {text for part in given for text in _texts(part) if text.strip()}  # a name's may be looked for
        inside.discard("")
        return inside, set(_texts(tree))


def _texts(node: Any) -> Iterable[str]:
    from jinja2 import nodes

    found = [node] if isinstance(node, nodes.Const) else list(node.find_all(nodes.Const))
    return [item.value for item in found if isinstance(item.value, str)]


def _cuts(node: Any) -> bool:
    """Whether an index or a slice may be of a text, whose letters it looks at."""
    from jinja2 import nodes

    if not isinstance(node.arg, nodes.Slice) and not (
        isinstance(node.arg, nodes.Const | nodes.Neg) and not isinstance(getattr(node.arg, "value", 0), str)
    ):
        return False
    name = getattr(node.node, "name", getattr(node.node, "attr", ""))
    return not (isinstance(node.node, nodes.Call) or "messages" in name or "tool" in name)


def _filled(parts: list[str], words: list[str]) -> str:
    return "".join(words[int(part)] if i % 2 else part for i, part in enumerate(parts))
