"""Presents a comparison: as tables, charts and samples of a report, and as tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from rich.table import Table as TerminalTable
from rich.text import Text

from rlhf_lightning.evaluation.charts import Estimate, Figure, histogram_chart, interval_chart
from rlhf_lightning.evaluation.compare import Comparison
from rlhf_lightning.evaluation.html_report import Answer, Cell, Interval, Sample, Section, Table, number
from rlhf_lightning.evaluation.svg import COLORS
from rlhf_lightning.evaluation.winrate import WinRate

_MOST_SAMPLES = 24
_MOST_HISTOGRAMS = 3  # most histograms in one chart, so that there is room for their names


def comparison_tables(comparison: Comparison, labels: Mapping[str, str] | None = None) -> list[Table]:
    """Two tables with one row for each policy: the main results, and further numbers.

    The first has rewards, win rates over the baseline with intervals, KL and length, and is narrow enough for a page.
    The second has the win rates at equal length, the answers without an end, repetition, and perplexity.

    Args:
        labels: names of policies and rewards to show; by default their own.
    """
    return [_main_table(comparison, labels or {}), _second_table(comparison, labels or {})]


def _main_table(comparison: Comparison, labels: Mapping[str, str]) -> Table:
    base, several = labels.get(comparison.baseline, comparison.baseline), len(comparison.answers) > 1
    measured = any(answers.k1 is not None for answers in comparison.answers.values())
    columns = ["policy"]
    for reward in comparison.rewards:
        columns += [f"score by {labels.get(reward, reward)}"]
        columns += [f"win rate over {base}, by {labels.get(reward, reward)}"] * several
    columns += ["KL, nats"] * measured + ["tokens"]
    rows: list[list[Cell]] = []
    for name, answers in comparison.answers.items():
        row: list[Cell] = [labels.get(name, name)]
        for reward in comparison.rewards:
            row.append(float(answers.scores[reward].double().mean()))
            row += [_over_baseline(comparison, name, comparison.win_rate, reward)] * several
        bounded = answers.kl is not None and answers.best_of > 1
        row += [f"at most {answers.kl:.2f}" if bounded else answers.kl] * measured
        rows.append([*row, f"{float(answers.lengths.double().mean()):.1f}"])
    note = (
        "Scores are means. Intervals have 95% confidence, and the dashed line is one half; a tie counts half. KL is "
        "the mean over answers of the summed k1, to the reference. For best of n it is an upper bound, higher by "
        "log n - (n - 1) / n."
    )
    return Table(columns, rows, note=note)


def _second_table(comparison: Comparison, labels: Mapping[str, str]) -> Table:
    base, several = labels.get(comparison.baseline, comparison.baseline), len(comparison.answers) > 1
    has_text = any(answers.perplexity is not None for answers in comparison.answers.values())
    controlled = [f"win rate at equal length, by {labels.get(reward, reward)}" for reward in comparison.rewards]
    columns = ["policy", *controlled * several, "cut off", "repeated 4-grams"] + ["perplexity"] * has_text
    rows: list[list[Cell]] = []
    for name, answers in comparison.answers.items():
        rates = [
            _over_baseline(comparison, name, comparison.length_controlled, reward)
            for reward in comparison.rewards * several
        ]
        shares = [_share(float(answers.truncated.double().mean())), _share(float(answers.repetition.mean()))]
        rows.append([labels.get(name, name), *rates, *shares, *[answers.perplexity] * has_text])
    note = (
        f"At equal length: the win rate over {base} if answers were equally long in characters. "
        f"Cut off: the answer reached {comparison.settings.max_new_tokens} tokens without an end."
    )
    return Table(columns, rows, title="Length, endings and repetition", note=note)


def _over_baseline(comparison: Comparison, name: str, rate: Callable[[str, str], WinRate], reward: str) -> Cell:
    return None if name == comparison.baseline else _interval(rate(name, reward))


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
    """Histograms of the policies' rewards; of many policies, only the baseline's and those with the highest means."""
    labels = labels or {}
    scores = {name: answers.scores[reward] for name, answers in comparison.answers.items()}
    best = sorted(scores, key=lambda name: (name != comparison.baseline, -float(scores[name].double().mean())))
    shown = best[:_MOST_HISTOGRAMS]
    groups = {labels.get(name, name): values.tolist() for name, values in scores.items() if name in shown}
    judge = labels.get(reward, reward)
    caption = "" if len(shown) == len(scores) else "Only the baseline and the policies with the highest means."
    colors = [place % COLORS for place, name in enumerate(scores) if name in shown]
    return histogram_chart(f"Rewards by {judge}", groups, "reward", caption, colors=colors)


def samples(
    comparison: Comparison, count: int = _MOST_SAMPLES, labels: Mapping[str, str] | None = None
) -> list[Sample]:
    """``count`` prompts, evenly spread over the set and not hand-picked, with every policy's answer and its scores."""
    labels = labels or {}
    total = len(comparison.prompts)
    count = min(count, total)
    shown = [round(i * (total - 1) / max(count - 1, 1)) for i in range(count)]
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
    even = "Prompts evenly spread over the set, not hand-picked, with every policy's answer to each."
    return [
        Section("The comparison", asked, tables=comparison_tables(comparison, labels), figures=charts),
        Section("Samples", even, samples=samples(comparison, labels=labels)),
    ]


def terminal_table(table: Table) -> TerminalTable:
    """The table for a terminal, with intervals in digits."""
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
