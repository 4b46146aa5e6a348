"""Turns a study's guidelines from Markdown into HTML that is safe to show.

HTML inside the Markdown is shown as text. A fenced block named ``example`` shows a good and a bad answer side by side:

    ```example
    prompt: What is the capital of France?
    good: Paris.
    bad: France has many cities.
    why: The good answer says what was asked.
    ```
"""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

import yaml

from rlhf_lightning.data.files import whole_file
from rlhf_lightning.errors import InputError

_NEEDED, _ALLOWED = ("good", "bad"), ("prompt", "good", "bad", "why")
_TITLES = {"prompt": "Prompt", "good": "Good", "bad": "Bad", "why": "Why"}


def read_guidelines(path: str) -> str:
    """The file as HTML.

    Raises:
        InputError: the file cannot be read, is empty or no UTF-8, or an example in it is broken; with file and line.
    """
    try:
        from markdown_it import MarkdownIt
    except ImportError:
        raise InputError("--guidelines needs markdown-it-py; run: pip install 'rlhf-lightning[annotate]'") from None
    try:
        text = whole_file(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not UTF-8 (byte {error.start}); save the file as UTF-8") from None
    if not text.strip():
        raise InputError(f"{path}: is empty; write what makes an answer good, with examples")
    markdown = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = markdown.parse(text)
    for token in tokens:
        if token.type == "fence" and token.info.strip() == "example":
            line = (token.map or [0])[0] + 1
            token.type, token.content = "html_block", _example(token.content, path, line)
    return str(markdown.renderer.render(tokens, markdown.options, {}))


def _example(text: str, path: str, line: int) -> str:
    where = f"{path}:{line}: the example"
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)  # every value is the text that stands there: `yes`, `12`
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = line + 1 + mark.line if mark is not None else line
        problem = getattr(error, "problem", None) or "not valid YAML"
        remedy = "put texts with a colon in quotes"
        raise InputError(f"{path}:{place}: the example is broken ({problem}); {remedy}") from None
    except RecursionError:
        raise InputError(f"{where} is nested too deeply; give lines like 'good: TEXT' and 'bad: TEXT'") from None
    if not isinstance(node, yaml.MappingNode):
        raise InputError(f"{where} must have lines like 'good: TEXT' and 'bad: TEXT'")
    content: dict[str, str] = {}
    for key, value in node.value:
        name = str(key.value)
        if name not in _ALLOWED:
            raise InputError(f"{where} has an unknown key {name[:40]!r}; there is {', '.join(_ALLOWED)}")
        if name in content:
            raise InputError(f"{where} has '{name}' twice; keep one")
        if not isinstance(value, yaml.ScalarNode):
            raise InputError(f"{where}: '{name}' is a list or an object, not text; put it in quotes")
        content[name] = value.value
    missing = [key for key in _NEEDED if not content.get(key, "").strip()]
    if missing:
        raise InputError(f"{where} lacks {' and '.join(missing)}; give a good and a bad answer")
    return f'<div class="example">{_parts(content, ("prompt", "good", "bad", "why"))}</div>\n'


def _parts(content: dict[str, str], keys: Sequence[str]) -> str:
    return "".join(
        f'<section class="{key}"><strong>{_TITLES[key]}</strong><p dir="auto">{escape(content[key])}</p></section>'
        for key in keys
        if content.get(key)
    )
