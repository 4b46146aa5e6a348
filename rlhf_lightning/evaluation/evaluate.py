"""``python -m rlhf_lightning evaluate``: compares policies on held-out prompts.

It writes report.html, report.json and samples.jsonl at the end, so that a run that fails leaves no incomplete file.
"""

from __future__ import annotations

import argparse
import json
import math
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
from rlhf_lightning.evaluation.asked import Asked, asked
from rlhf_lightning.outputs import check_output, write_whole
from rlhf_lightning.text import plain_warnings, say

if TYPE_CHECKING:
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
    policies = dict(_named(options.policies, "--policies"))
    if options.baseline is not None and options.baseline not in policies:
        raise InputError(f"--baseline {options.baseline}: no such policy: it must be one of {', '.join(policies)}")
    _check_numbers(options)
    proxy = _proxy(options)
    best_of = _best_of(options, policies)
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out}: a file, where a folder is expected")
    judges = [what.rpartition(":")[0] if _is_function(what) else what for _, what in _named(options.reward, "--reward")]
    read = [*options.prompts, *options.text, *judges, *policies.values(), *filter(None, [options.reference])]
    for name in ("samples.jsonl", "report.json", "report.html"):
        check_output(out / name, "--out", read)

    # Imported here, so that --help and wrong options answer at once.
    import torch
    from rich.console import Console

    from rlhf_lightning.data.columns import Columns, columns_of
    from rlhf_lightning.data.records import load_records
    from rlhf_lightning.evaluation.compare import Settings, compare
    from rlhf_lightning.evaluation.exploitation import warnings
    from rlhf_lightning.evaluation.present import comparison_tables, terminal_table
    from rlhf_lightning.models.passes import explain

    plain_warnings()
    columns = Columns(columns_of(options.columns), "--columns")
    device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            f"--device {device}: no CUDA device here, or torch was built without CUDA: leave the option out"
        )
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
    add("--policies", nargs="+", required=True, metavar="NAME=DIR", help="model folders; the name may be left out")
    add(
        "--prompts",
        nargs="+",
        required=True,
        metavar="FILE",
        help="rows with prompts; anything else in them is ignored",
    )
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
    add(
        "--columns",
        nargs="+",
        default=[],
        metavar="OURS=YOURS",
        help="our name of a key, and the name that your rows have for it: prompt=question",
    )
    add("--max_new_tokens", type=int, default=128, help="longest answer (default: %(default)s)")
    add("--temperature", type=float, default=1.0, help="0 takes the most probable token (default: %(default)s)")
    add("--max_prompts", type=int, help="ask only this many, evenly spread over the file")
    add("--batch_size", type=int, default=32, help="prompts at a time; changes no result (default: %(default)s)")
    add("--seed", type=int, default=0, help="seed of the sampled answers (default: %(default)s)")
    add("--chat", action="store_true", help="put plain prompts through the chat template too")
    add("--device", help="cpu, cuda or cuda:N (default: a GPU if there is one)")
    add("--trust_remote_code", action="store_true", help="run model code that comes with the weights")
    add("--out", default="runs/evaluation", metavar="DIR", help="folder of the report (default: %(default)s)")
    return parser


def _check_numbers(options: argparse.Namespace) -> None:
    for name in ("max_new_tokens", "batch_size", "max_prompts"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: expected a number of at least 1")
    if not (math.isfinite(options.temperature) and options.temperature >= 0):
        raise InputError(f"--temperature {options.temperature}: expected a number of at least 0")


def _named(given: Sequence[str], option: str) -> list[tuple[str, str]]:
    """``NAME=WHAT`` or ``WHAT`` as (name, what). A model folder without a name is named by its run."""
    pairs: list[tuple[str, str]] = []
    for item in given:
        name, separator, what = item.partition("=")
        if not separator:
            name, what = _own_name(item), item
        if not name or not what:
            raise InputError(f"{option} {item}: expected NAME=DIR")
        if any(name == other for other, _ in pairs):
            raise InputError(f"{option}: two are named {name!r}: give each its own, as in NAME=DIR")
        pairs.append((name, what))
    return pairs


def _proxy(options: argparse.Namespace) -> str | None:
    """The reward that policies were trained against; None if there is no reward."""
    rewards = _named(options.reward, "--reward")
    names = [name for name, _ in rewards]
    if options.proxy is None:
        models = [name for name, what in rewards if not _is_function(what)]
        return models[0] if len(models) == 1 else next(iter(names), None)
    if options.proxy not in names:
        given = f"it must be one of {', '.join(names)}" if names else "no --reward is given"
        raise InputError(f"--proxy {options.proxy}: no such reward: {given}")
    return str(options.proxy)


def _best_of(options: argparse.Namespace, policies: dict[str, str]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for name, count in _named(options.best_of, "--best_of"):
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


def _own_name(what: str) -> str:
    """``runs/ppo/model`` is ppo, ``my_rewards.py:brevity`` is brevity."""
    if _is_function(what):
        return what.rpartition(":")[2]
    path = Path(what)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _rewards(given: Sequence[str], trust_remote_code: bool) -> dict[str, Reward]:
    from rlhf_lightning.rewards.function import FunctionReward
    from rlhf_lightning.rewards.model import ModelReward

    rewards: dict[str, Reward] = {}
    for name, what in _named(given, "--reward"):
        function = _is_function(what)
        rewards[name] = FunctionReward(what) if function else ModelReward(what, trust_remote_code=trust_remote_code)
    return rewards


def _is_function(what: str) -> bool:
    return ":" in what and not Path(what).exists()


def _provenance(
    options: argparse.Namespace,
    arguments: Sequence[str],
    comparison: Comparison,
    device: str,
    text_rows: int,
    prompts: Asked,
) -> dict[str, str]:
    policies = dict(_named(options.policies, "--policies"))
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
