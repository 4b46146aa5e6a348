"""``python -m rlhf_lightning evaluate``: compares policies on held-out prompts.

It writes report.html, report.json and samples.jsonl at the end, so that a run that fails leaves no incomplete file.
"""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_lightning import __version__
from rlhf_lightning.errors import CommandParser, InputError, out_of_memory
from rlhf_lightning.models.policy_arguments import (
    add_answer_arguments,
    check_numbers,
    check_temperature,
    chosen_device,
    is_function,
    named,
)
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.text import plain_warnings, say

if TYPE_CHECKING:
    from rlhf_lightning.data.asked import Asked
    from rlhf_lightning.evaluation.compare import Comparison
    from rlhf_lightning.evaluation.html_report import Report
    from rlhf_lightning.rewards.base import Reward

_EXAMPLE = """example:
  python -m rlhf_lightning evaluate --policies sft=runs/sft/model ppo=runs/ppo/model --prompts held_out.jsonl \\
      --reward proxy=runs/reward_model/model gold=my_rewards.py:brevity --text demonstrations.jsonl
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 when the report is written; raises an InputError if options or files are at fault."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    options = _parser().parse_args(arguments)
    policies = dict(named(options.policies, "--policies"))
    if options.baseline is not None and options.baseline not in policies:
        raise InputError(f"--baseline {options.baseline}: no such policy: it must be one of {', '.join(policies)}")
    check_numbers(options)
    proxy = _proxy(options)
    best_of = _best_of(options, policies)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file, where a folder is expected")
    judges = [what.rpartition(":")[0] if is_function(what) else what for _, what in named(options.reward, "--reward")]
    read = [*options.prompts, *options.text, *judges, *policies.values(), *filter(None, [options.reference])]
    for name in ("samples.jsonl", "report.json", "report.html"):
        check_output(out / name, "--out", read)

    # Imported here, so that --help and wrong options answer at once.
    from rich.console import Console

    from rlhf_lightning.data.asked import asked
    from rlhf_lightning.data.columns import Columns, columns_of
    from rlhf_lightning.data.records import load_records
    from rlhf_lightning.evaluation.compare import Settings, compare
    from rlhf_lightning.evaluation.exploitation import warnings
    from rlhf_lightning.evaluation.present import comparison_tables, terminal_table
    from rlhf_lightning.models.passes import explain

    plain_warnings()
    columns = Columns(columns_of(options.columns), "--columns")
    check_temperature(options.temperature)
    device = chosen_device(options.device)
    rewards = _rewards(options.reward, options.trust_remote_code)
    prompts = asked(options.prompts, options.max_prompts, columns, final=not options.text)
    say(f"prompts: {prompts.summary()}")
    text_records = load_records(options.text, columns=columns) if options.text else None
    text = [] if text_records is None else text_records.rows
    if text_records is not None and text_records.dropped:
        dropped = ", ".join(f"{reason} {count:,}" for reason, count in sorted(text_records.dropped.items()))
        say(f"text: {len(text):,} of {text_records.read:,} rows; left out: {dropped}")
    start = time.perf_counter()
    settings = Settings(
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        batch_size=options.batch_size,
        chat=options.chat,
        device=device,
        trust_remote_code=options.trust_remote_code,
    )
    try:
        comparison = compare(
            policies,
            prompts.prompts,
            rewards,
            settings,
            baseline=options.baseline,
            reference=options.reference,
            text=text,
            best_of=best_of,
            judge=proxy,
            say=say,
        )
    except RuntimeError as error:
        if out_of_memory(error):
            sizes = f"lower --batch_size ({options.batch_size}) or --max_new_tokens ({options.max_new_tokens})"
            explain(error, "evaluate", [sizes])
        raise
    seconds = time.perf_counter() - start
    notes = _provenance(options, arguments, comparison, device, len(text), prompts) | {"wall time": f"{seconds:.1f} s"}
    warned = warnings(comparison, proxy) if proxy else []
    _write(comparison, notes, out, seconds, warned, prompts)
    for warning in warned:
        say(f"WARNING: {warning}")
    console = Console(width=None if sys.stdout.isatty() else 200)
    for table in comparison_tables(comparison):
        console.print(terminal_table(table))
        console.print()
    say(f"{out / 'report.html'}")
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m rlhf_lightning evaluate",
        description="Compare policies on held-out prompts: reward, KL to a reference, win rates with intervals.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_answer_arguments(add)
    add(
        "--reward",
        nargs="+",
        default=[],
        metavar="NAME=WHAT",
        help="reward model folders, and functions as file.py:function (the file is run: name only code you trust)",
    )
    add(
        "--proxy",
        metavar="NAME",
        help="the --reward that the policies were trained against. There is a warning about each policy that pleases "
        "only this one (default: the only reward model among the rewards, else the first)",
    )
    add("--baseline", metavar="NAME", help="the policy that win rates are over (default: the first)")
    add(
        "--best_of",
        nargs="+",
        default=[],
        metavar="NAME=N",
        help="policies that also answer with the best of N by the --proxy; each gets one more row",
    )
    add("--reference", metavar="DIR", help="the model that KL is measured to (default: the baseline)")
    add(
        "--text",
        nargs="+",
        default=[],
        metavar="FILE",
        help="demonstrations to measure perplexity on, which shows forgetting",
    )
    add("--out", default="runs/evaluation", metavar="DIR", help="folder of the report (default: %(default)s)")
    return parser


def _proxy(options: argparse.Namespace) -> str | None:
    """The reward that policies were trained against; None if there is no reward."""
    rewards = named(options.reward, "--reward")
    names = [name for name, _ in rewards]
    if options.proxy is None:
        models = [name for name, what in rewards if not is_function(what)]
        return models[0] if len(models) == 1 else next(iter(names), None)
    if options.proxy not in names:
        given = f"it must be one of {', '.join(names)}" if names else "no --reward is given"
        raise InputError(f"--proxy {options.proxy}: no such reward: {given}")
    return str(options.proxy)


def _best_of(options: argparse.Namespace, policies: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, count in named(options.best_of, "--best_of"):
        if name not in policies:
            raise InputError(f"--best_of {name}={count}: no such policy: it must be one of {', '.join(policies)}")
        if not (count.isascii() and count.isdigit() and int(count) > 1):
            raise InputError(f"--best_of {name}={count}: expected a number of at least 2")
        counts[name] = int(count)
    if counts and not options.reward:
        raise InputError("--best_of: there is no --reward to tell which answer is the best")
    if counts and options.temperature == 0:
        raise InputError("--best_of: at --temperature 0 all answers to a prompt are the same")
    return counts


def _rewards(given: Sequence[str], trust_remote_code: bool) -> dict[str, Reward]:
    from rlhf_lightning.rewards.function import FunctionReward
    from rlhf_lightning.rewards.model import ModelReward

    rewards: dict[str, Reward] = {}
    for name, what in named(given, "--reward"):
        function = is_function(what)
        rewards[name] = FunctionReward(what) if function else ModelReward(what, trust_remote_code=trust_remote_code)
    return rewards


def _provenance(
    options: argparse.Namespace,
    arguments: Sequence[str],
    comparison: Comparison,
    device: str,
    text_rows: int,
    prompts: Asked,
) -> dict[str, str]:
    policies = dict(named(options.policies, "--policies"))
    return {
        "command": f"python -m rlhf_lightning evaluate {shlex.join(arguments)}",
        "seed": str(options.seed),
        "policies": "\n".join(f"{name}: {folder}" for name, folder in policies.items()),
        "reference for KL": options.reference or policies[comparison.baseline],
        "rewards": "\n".join(options.reward) or "none",
        "prompts": f"{prompts.summary()}; from {', '.join(options.prompts)}",
        "held-out text": f"{text_rows} rows from {', '.join(options.text)}" if options.text else "none",
        "device": device,
        "versions": ", ".join(f"{name} {version}" for name, version in _versions().items()),
    }


def _versions() -> dict[str, str]:
    found = {"rlhf_lightning": __version__, "python": platform.python_version()}
    return found | {name: metadata.version(name) for name in ("torch", "transformers")}


def _write(
    comparison: Comparison,
    settings: dict[str, str],
    out: Path,
    seconds: float,
    warned: Sequence[str],
    prompts: Asked,
) -> None:
    from rlhf_lightning.evaluation.html_report import write_report

    out.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {
        "seed": comparison.settings.seed,
        "versions": _versions(),
        "wall_seconds": {"total": round(seconds, 2)},
        "prompts": len(comparison.prompts),
        "rows_read": prompts.read,
        "left_out": prompts.left_out,
        "baseline": comparison.baseline,
        "warnings": list(warned),
        "settings": settings,
        "policies": comparison.summary(),
    }
    rows = [
        {
            "row": row,
            "prompt": prompt,
            "answers": {
                name: {
                    "response": answers.responses[row],
                    "tokens": int(answers.lengths[row]),
                    "truncated": bool(answers.truncated[row]),
                    "scores": {reward: float(scores[row]) for reward, scores in answers.scores.items()},
                }
                for name, answers in comparison.answers.items()
            },
        }
        for row, prompt in enumerate(comparison.prompts)
    ]
    write_whole(out / "samples.jsonl", "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    write_whole(out / "report.json", json.dumps(summary, indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    write_report(_report(comparison, settings, warned), out / "report.html")


def _report(comparison: Comparison, settings: dict[str, str], warned: Sequence[str]) -> Report:
    from rlhf_lightning.evaluation.html_report import Report
    from rlhf_lightning.evaluation.present import listed, sections

    names = list(comparison.answers)
    lines = []
    for name in names:
        if name != comparison.baseline and comparison.rewards:
            rate = comparison.win_rate(name, comparison.rewards[0])
            lines.append(
                f"{name} is preferred to {comparison.baseline} on {100 * rate.value:.1f}% of the prompts "
                f"({100 * rate.low:.1f} to {100 * rate.high:.1f}) by {comparison.rewards[0]}"
            )
    summary = f"{listed(names)} on {len(comparison.prompts)} held-out prompts." + "".join(f" {line}." for line in lines)
    return Report(f"Evaluation of {listed(names)}", summary, sections(comparison), provenance=settings, warnings=warned)
