"""The results of the demo: report.json, report.html and a table in the terminal."""

from __future__ import annotations

import json
import math
import platform
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from rich.table import Table as TerminalTable

from rlhf_lightning import __version__
from rlhf_lightning.demo.gold import BEST
from rlhf_lightning.demo.methods import BEST_OF, DEFAULT, METHODS
from rlhf_lightning.evaluation.charts import Figure, Series, line_chart, trajectory_chart
from rlhf_lightning.evaluation.compare import Comparison, best_of_name
from rlhf_lightning.evaluation.curves import Curves, path_over, read_curves, series
from rlhf_lightning.evaluation.exploitation import warnings
from rlhf_lightning.evaluation.html_report import Highlight, Report, Section, write_report
from rlhf_lightning.evaluation.present import sections

# The name of each method's policy in the comparison.
_POLICIES = {name: best_of_name("sft", BEST_OF) if name == "best_of_n" else name for name in METHODS}
_METHOD = {policy: name for name, policy in _POLICIES.items()}
LABELS = {"sft": "SFT", "gold": "gold", "proxy": "reward model"} | {
    policy: METHODS[name].label for name, policy in _POLICIES.items()
}


@dataclass(frozen=True)
class Results:
    """All measurements of a demo."""

    seed: int
    seconds: dict[str, float]  # by stage
    comparison: Comparison  # of the policies, by the rewards "gold" and "proxy"
    curves: dict[str, Curves]  # by training stage
    label_ceiling: float
    notes: dict[str, str]  # command, times and annotator, for the end of the page

    def warnings(self) -> list[str]:
        """A sentence for every policy whose score rose by the reward model and fell by the gold reward."""
        return warnings(self.comparison, "proxy", {**LABELS, "proxy": "the reward model", "gold": "the gold reward"})

    def numbers(self) -> dict[str, Any]:
        """The content of report.json. All numbers are for held-out prompts."""
        answers = self.comparison.answers
        reward_model = self.curves["reward_model"]
        found: dict[str, Any] = {
            "seed": self.seed,
            "warnings": self.warnings(),
            "versions": versions(),
            "wall_seconds": {stage: round(seconds, 2) for stage, seconds in self.seconds.items()},
            "sft": {"perplexity": answers["sft"].perplexity, "gold_reward": _mean(self.comparison, "sft", "gold")},
            "reward_model": {
                "accuracy": reward_model["val/accuracy"][1][-1],
                "label_ceiling": self.label_ceiling,
                "calibration_error": reward_model["val/calibration_error"][1][-1],
            },
        }
        for policy in answers:
            if policy == "sft":
                continue
            rate, kl = self.comparison.win_rate(policy, "gold"), answers[policy].kl
            assert kl is not None  # the demo's policies all have one vocabulary
            found[_METHOD[policy]] = {
                "gold_reward": _mean(self.comparison, policy, "gold"),
                "proxy_reward": _mean(self.comparison, policy, "proxy"),
                "kl": kl,  # for best-of-n an upper bound
                "win_rate_vs_sft": rate.value,
                "win_rate_ci": [rate.low, rate.high],
            }
        return found


def read_all_curves(root: Path, methods: Sequence[str]) -> dict[str, Curves]:
    """The metrics of the training runs, by stage."""
    return {stage: read_curves(root / stage / "metrics.jsonl") for stage in ("sft", "reward_model", *methods)}


def write(results: Results, folder: Path) -> None:
    """Writes ``report.json`` and ``report.html``."""
    text = json.dumps(results.numbers(), indent=2, allow_nan=False) + "\n"
    (folder / "report.json").write_text(text, encoding="utf-8")
    write_report(page(results), folder / "report.html")


def page(results: Results) -> Report:
    """The report's page, ready to render."""
    numbers = results.numbers()
    ppo, dpo, reward_model = numbers["ppo"], numbers["dpo"], numbers["reward_model"]
    ceiling = reward_model["label_ceiling"]
    count = len(results.comparison.prompts)
    return Report(
        title="From demonstrations to an aligned model",
        summary=(
            "A tiny Llama learned to answer questions about pot plants from gardeners of mixed skill (SFT). Its "
            "answers were ranked by a simulated annotator, a reward model learned from the rankings, and PPO and DPO "
            "trained the SFT model further. The gold reward, known here and never trained on, prefers PPO's answer to "
            f"SFT's on {ppo['win_rate_vs_sft']:.0%} of {count} held-out questions, and DPO's on "
            f"{dpo['win_rate_vs_sft']:.0%}."
        ),
        highlights=[
            _win_rate("PPO over SFT", ppo),
            _win_rate("DPO over SFT", dpo),
            Highlight("PPO's distance from SFT", f"{ppo['kl']:.1f} nats", "mean KL of an answer"),
            Highlight(
                "Reward model",
                f"{reward_model['accuracy']:.1%}",
                f"right on noisy labels; {ceiling:.1%} is the most possible",
            ),
        ],
        sections=[*sections(results.comparison, LABELS), _over_optimisation(results), _learning(results.curves)],
        provenance={**results.notes, "versions": ", ".join(f"{k} {v}" for k, v in versions().items())},
        warnings=results.warnings(),
    )


def _win_rate(label: str, numbers: dict[str, Any]) -> Highlight:
    low, high = numbers["win_rate_ci"]
    return Highlight(label, f"{numbers['win_rate_vs_sft']:.1%}", f"win rate, 95% interval {low:.1%} to {high:.1%}")


def _over_optimisation(results: Results) -> Section:
    curves = results.curves["ppo"]
    chart = trajectory_chart(
        "Proxy and gold reward over KL, along PPO",
        [
            path_over(curves, "objective/kl", "objective/scores", "reward model", color=1),
            path_over(curves, "objective/kl", "gold/train", "gold", color=3),
        ],
        "KL to SFT, nats",
        "reward",
        caption="One dot an iteration: mean over its responses. The reward model's scores have mean 0 and deviation 1 "
        "on the SFT model's preferred answers.",
        counting="iteration",
    )
    sampling = [name for name in results.curves if name in METHODS and METHODS[name].kind == "samples"]
    paths = [path_over(results.curves[name], "objective/kl", "gold/train", METHODS[name].label) for name in sampling]
    every = trajectory_chart(
        "Gold reward over KL, along each method",
        paths,
        "KL to SFT, nats",
        "gold reward",
        caption="The methods that sample, one dot an iteration: mean over its responses.",
        counting="iteration",
    )
    return Section(
        "Does the reward model stay right?",
        "".join(f"{warning}\n\n" for warning in results.warnings())
        + "A policy can learn to please the reward model (the proxy) without getting better. As long as both rise with "
        f"the distance from the SFT model, optimising the proxy pays. The best possible gold reward is {BEST:g}.",
        figures=[chart, *([every] if len(paths) > 1 else [])],
    )


def _learning(curves: dict[str, Curves]) -> Section:
    sft, reward_model, ppo, dpo = (curves[stage] for stage in ("sft", "reward_model", "ppo", "dpo"))
    figures = [
        _curves(
            "SFT: loss", [series(sft, "train/loss", "training"), series(sft, "val/loss", "held out")], "nats/token"
        ),
        _curves("Reward model: accuracy", [_smooth(series(reward_model, "train/accuracy"))], "share of pairs"),
        _curves("PPO: score of the reward model", [series(ppo, "objective/scores", color=1)], "score"),
        _curves("PPO: gold reward", [series(ppo, "gold/train", color=3)], "points"),
        _curves("PPO: KL to SFT", [series(ppo, "objective/kl", color=1)], "nats a response"),
        _curves("PPO: length", [series(ppo, "rollout/length", color=1)], "tokens a response"),
        _curves("PPO: explained variance of the critic", [series(ppo, "critic/explained_variance", color=1)], "share"),
        _curves("DPO: accuracy", [_smooth(series(dpo, "train/accuracy", color=2))], "share of pairs"),
    ]
    for name in [name for name in curves if name in METHODS and name not in DEFAULT]:
        method = METHODS[name]
        if method.kind == "samples":
            score = series(curves[name], "objective/scores")
            figures.append(_curves(f"{method.label}: score of the reward model", [score], "score", "iteration"))
        else:
            accuracy = _smooth(series(curves[name], "train/accuracy"))
            figures.append(_curves(f"{method.label}: accuracy", [accuracy], "share of pairs"))
    return Section("Learning curves", "Everything the runs logged is in their metrics.jsonl.", figures=figures)


def _curves(title: str, lines: list[Series], y_label: str, across: str | None = None) -> Figure:
    across = across or ("iteration" if title.startswith("PPO") else "optimizer step")
    return line_chart(title, lines, across, y_label)


def _smooth(line: Series, over: int = 9) -> Series:
    """A running mean, for a metric that is noisy because batches are small."""
    values = list(line.y)
    windows = [values[max(0, i - over // 2) : i + over // 2 + 1] for i in range(len(values))]
    means = [sum(window) / len(window) for window in windows]
    return Series(f"{line.name} (mean of {over})", line.x, means, color=line.color)


def terminal_table(results: Results) -> TerminalTable:
    """The main numbers for the terminal."""
    numbers = results.numbers()
    table = TerminalTable(title=f"{len(results.comparison.prompts)} held-out questions, seed {results.seed}")
    for column in ("", "gold reward", "reward model", "KL, nats", "win rate over SFT", "tokens"):
        table.add_column(column, justify="right" if column else "left")
    for policy, answers in results.comparison.answers.items():
        trained = policy != "sft"
        rate = "\u2013"
        if trained:
            low, high = numbers[_METHOD[policy]]["win_rate_ci"]
            rate = f"{numbers[_METHOD[policy]]['win_rate_vs_sft']:.3f} [{low:.3f}, {high:.3f}]"
        table.add_row(
            LABELS[policy],
            f"{_mean(results.comparison, policy, 'gold'):.2f}",
            f"{_mean(results.comparison, policy, 'proxy'):.2f}",
            f"{'at most ' * (answers.best_of > 1)}{numbers[_METHOD[policy]]['kl']:.1f}" if trained else "\u2013",
            rate,
            f"{float(answers.lengths.double().mean()):.1f}",
        )
    return table


def versions() -> dict[str, str]:
    """The versions of Python and the packages in use."""
    found = {"rlhf_lightning": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "lightning", "transformers", "tokenizers")}


def _mean(comparison: Comparison, policy: str, reward: str) -> float:
    value = float(comparison.answers[policy].scores[reward].double().mean())
    assert math.isfinite(value)  # every reward checks its scores
    return value
