"""Makes a chart a file of its own, as the pages show it."""

from __future__ import annotations

import re

from rlhf_lightning.evaluation.charts import Figure
from rlhf_lightning.evaluation.style import STYLE


def stand_alone(figure: Figure) -> str:
    """The chart as a file of its own: with its namespace, its background and the part of the style sheet it needs."""
    at_rules = re.findall(r"@media.*?\n\}", STYLE, re.DOTALL)
    plain = STYLE
    for rule in at_rules:
        plain = plain.replace(rule, "")
    rules = [
        rule
        for rule in re.findall(r"[^{}]+\{[^{}]*\}", plain)
        if rule.strip().startswith(("svg .", "svg text", ":root"))
    ]
    style = "".join(rules + [rule for rule in at_rules if "dark" in rule])
    head = '<svg xmlns="http://www.w3.org/2000/svg" font-family="system-ui, sans-serif" '
    background = '<rect width="100%" height="100%" rx="6" style="fill: var(--card)"/>'
    opened = figure.svg.replace("<svg ", head, 1)
    return re.sub(r"(<svg [^>]*>)", rf"\1<style>{style}</style>{background}", opened, count=1) + "\n"
