"""Small chat templates in the ways of well-known families, written for these tests."""

from __future__ import annotations

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# The generation prompt opens the reasoning; a conversation has the assistant's words as they are.
OPENS = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
# Reasoning of earlier turns is dropped, and the last turn always has some.
DROPS = (
    "{% for m in messages %}{% set text = m.content.split('</think>')[-1].lstrip('\n') %}"
    "{% if m.role == 'assistant' and loop.last %}"
    "{% set thought = m.content.split('</think>')[0].split('<think>')[-1] if '</think>' in m.content else '' %}"
    "{% set thought = thought.strip('\n') %}"
    "{{ '<|im_start|>assistant\n<think>\n' + thought + '\n</think>\n\n' + text + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)
# No system message, and the texts between brackets; the turn ends in EOS behind a space.
BRACKETS = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}"
    "{% elif m.role == 'user' %}{{ '[I] ' + m.content.strip() + ' [/I]' }}"
    "{% else %}{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TOOLS = "{% if tools %}{{ 'TOOLS ' + tools | tojson + '\n' }}{% endif %}" + CHATML.replace(
    "(m.content or '')", "(m.content or '') + (m.tool_calls | tojson if m.tool_calls else '')"
)
DATED = "{{ 'Today is ' + strftime_now('%d %B %Y') + '.\n' }}" + CHATML
# As Qwen3's: what is said since the user's last question keeps its reasoning, and the last turn always has some.
SINCE_QUERY = (
    "{%- set ns = namespace(last=messages|length - 1, open=true) %}"
    "{%- for m in messages[::-1] %}{%- set index = (messages|length - 1) - loop.index0 %}"
    "{%- if ns.open and m.role == 'user' and not (m.content.startswith('<tool_response>')) %}"
    "{%- set ns.open = false %}{%- set ns.last = index %}{%- endif %}{%- endfor %}"
    "{%- for m in messages %}{%- set text = m.content %}"
    "{%- if m.role != 'assistant' %}{{- '<|im_start|>' + m.role + '\n' + text + '<|im_end|>\n' }}"
    "{%- else %}{%- set thought = '' %}{%- if '</think>' in text %}"
    "{%- set thought = text.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}"
    "{%- set text = text.split('</think>')[-1].lstrip('\n') %}{%- endif %}"
    "{%- if loop.index0 > ns.last and (loop.last or thought) %}"
    "{{- '<|im_start|>assistant\n<think>\n' + thought.strip('\n') + '\n</think>\n\n' + text.lstrip('\n') }}"
    "{%- else %}{{- '<|im_start|>assistant\n' + text }}{%- endif %}{{- '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
# As gpt-oss' Harmony: the last answer ends in another token than earlier ones, the generation prompt in the role.
HARMONY = (
    "{% for m in messages %}{% if m.role != 'assistant' %}{{ '<|im_start|>' + m.role + '<s>' + m.content + '<s>' }}"
    "{% elif loop.last and not add_generation_prompt %}"
    "{% if m.thinking %}{{ '<|im_start|>assistant analysis<s>' + m.thinking + '<s>' }}{% endif %}"
    "{{ '<|im_start|>assistant final<s>' + m.content + '<|im_end|>' }}"
    "{% else %}{{ '<|im_start|>assistant final<s>' + m.content + '<s>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant' }}{% endif %}"
)
