"""A comparison as tables, charts and samples of a report, and as a table for the terminal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rich.table import Table as TerminalTable
from rich.text import Text

from rlhf_lightning.evaluation.charts import Estimate, Figure, histogram_chart, interval_chart
from rlhf_lightning.evaluation.compare import Comparison
from rlhf_lightning.evaluation.report import Answer, Cell, Interval, Sample, Section, Table, number
from rlhf_lightning.evaluation.svg import COLORS
from rlhf_lightning.evaluation.winrate import WinRate

_MOST_SAMPLES = 24
_MOST_HISTOGRAMS = 3  # over each other in one chart, with room for their names


def comparison_table(comparison: Comparison, labels: Mapping[str, str] | None = None) -> Table:
    """One row a policy: rewards, win rates over the baseline with intervals, KL, length, repetition, perplexity.

    Args:
        labels: what to call a policy or a reward in the table; its own name where there is none.
    """
    labels = labels or {}
    base = labels.get(comparison.baseline, comparison.baseline)
    columns = ["policy"]
    for reward in comparison.rewards:
        columns.append(f"{labels.get(reward, reward)} reward")
        if len(comparison.answers) > 1:
            columns += [f"win rate over {base}, by {labels.get(reward, reward)}", "length-controlled"]
    answers = comparison.answers.values()
    has_kl, has_text = any(a.k1 is not None for a in answers), any(a.perplexity is not None for a in answers)
    columns += ["KL, nats"] * has_kl + ["tokens", "cut off", "repeated 4-grams"] + ["perplexity"] * has_text
    rows = [[labels.get(name, name), *_cells(comparison, name, has_kl, has_text)] for name in comparison.answers]
    note = (
        "Intervals hold with 95% confidence, and the dashed line is one half; a tie counts half. Length-controlled: "
        "the win rate at equal length in characters. KL: mean over answers of the summed k1, to the reference; of the "
        "best of n a bound, log n - (n - 1) / n more. Cut "
        f"off: the answer reached {comparison.settings.max_new_tokens} tokens without an end."
    )
    return Table(columns, rows, note=note)


def _cells(comparison: Comparison, name: str, has_kl: bool, has_text: bool) -> list[Cell]:
    answers = comparison.answers[name]
    cells: list[Cell] = []
    for reward in comparison.rewards:
        cells.append(float(answers.scores[reward].double().mean()))
        if len(comparison.answers) > 1:
            own = name == comparison.baseline
            cells.append(None if own else _interval(comparison.win_rate(name, reward)))
            cells.append(None if own else _interval(comparison.length_controlled(name, reward)))
    if has_kl:
        bounded = answers.kl is not None and answers.best_of > 1
        cells.append(f"at most {answers.kl:.2f}" if bounded else answers.kl)
    cells += [f"{float(answers.lengths.double().mean()):.1f}", _share(float(answers.truncated.double().mean()))]
    cells.append(_share(float(answers.repetition.mean())))
    return cells + [answers.perplexity] * has_text


def win_rate_chart(comparison: Comparison, reward: str, labels: Mapping[str, str] | None = None) -> Figure:
    """Win rates over the baseline by one reward, with their intervals."""
    labels = labels or {}
    estimates = []
    for place, name in enumerate(comparison.answers):
        if name != comparison.baseline:
            rate = comparison.win_rate(name, reward)
            estimates.append(Estimate(labels.get(name, name), rate.value, rate.low, rate.high, color=place % COLORS))
    judge, base = labels.get(reward, reward), labels.get(comparison.baseline, comparison.baseline)
    return interval_chart(
        f"Win rate over {base}, by {judge}",
        estimates,
        "share of prompts",
        reference=0.5,
        percent=True,
        caption=f"{len(comparison.prompts)} prompts, one answer each; a tie counts half; 95% Wilson intervals.",
    )


def reward_histogram(comparison: Comparison, reward: str, labels: Mapping[str, str] | None = None) -> Figure:
    """How the policies' rewards are spread: of many policies, those of the baseline and of the best by their mean."""
    labels = labels or {}
    scores = {name: answers.scores[reward] for name, answers in comparison.answers.items()}
    best = sorted(scores, key=lambda name: (name != comparison.baseline, -float(scores[name].double().mean())))
    shown = best[:_MOST_HISTOGRAMS]
    groups = {labels.get(name, name): own.tolist() for name, own in scores.items() if name in shown}
    judge = labels.get(reward, reward)
    caption = "" if len(shown) == len(scores) else "Of the baseline, and of the best by their mean."
    colors = [place % COLORS for place, name in enumerate(scores) if name in shown]
    return histogram_chart(f"Rewards by {judge}", groups, "reward", caption, colors=colors)


def samples(
    comparison: Comparison, count: int = _MOST_SAMPLES, labels: Mapping[str, str] | None = None
) -> list[Sample]:
    """``count`` prompts, evenly spread over the set rather than chosen, with every policy's answer and its scores."""
    labels = labels or {}
    total = len(comparison.prompts)
    shown = sorted({round(i * (total - 1) / max(count - 1, 1)) for i in range(min(count, total))})
    return [
        Sample(
            comparison.prompts[row],
            [
                Answer(
                    labels.get(name, name),
                    answers.responses[row],
                    {labels.get(reward, reward): float(scores[row]) for reward, scores in answers.scores.items()},
                    f"cut off at {int(answers.lengths[row])} tokens" if answers.truncated[row] else "",
                    color=place % COLORS,
                )
                for place, (name, answers) in enumerate(comparison.answers.items())
            ],
        )
        for row in shown
    ]


def sections(comparison: Comparison, labels: Mapping[str, str] | None = None) -> list[Section]:
    """The comparison as sections of a report: table and charts, then samples."""
    charts = []
    for reward in comparison.rewards:
        if len(comparison.answers) > 1:
            charts.append(win_rate_chart(comparison, reward, labels))
        charts.append(reward_histogram(comparison, reward, labels))
    settings = comparison.settings
    asked = (
        f"{len(comparison.prompts)} held-out prompts, each answered once by every policy at temperature "
        f"{settings.temperature:g}, at most {settings.max_new_tokens} tokens long, from the same random draws."
    )
    even = "Prompts evenly spread over the set, not chosen; every policy's answer to each."
    return [
        Section("The comparison", asked, tables=[comparison_table(comparison, labels)], figures=charts),
        Section("Samples", even, samples=samples(comparison, labels=labels)),
    ]


def terminal_table(table: Table) -> TerminalTable:
    """The same table for a terminal; intervals are written out."""
    shown = TerminalTable(caption=None, header_style="bold", box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for place, column in enumerate(table.columns):
        shown.add_column(Text(column), justify="left" if place == 0 else "right", overflow="fold")
    for row in table.rows:
        shown.add_row(*(Text(_written(cell)) for cell in row))
    return shown


def _written(cell: Cell) -> str:
    if isinstance(cell, Interval):
        return f"{cell.value:.3f} [{cell.low:.3f}, {cell.high:.3f}]" if math.isfinite(cell.value) else "\u2013"
    return cell if isinstance(cell, str) else number(cell)


def _interval(rate: WinRate) -> Interval:
    return Interval(rate.value, rate.low, rate.high)


def _share(value: float) -> str:
    return f"{100 * value:.1f}%"


def listed(names: Sequence[str]) -> str:
    """``a``, ``a and b``, ``a, b and c``."""
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
