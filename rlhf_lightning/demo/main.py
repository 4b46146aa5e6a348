"""``python -m rlhf_lightning demo``: runs SFT, reward model, PPO, DPO and more in a built-in world, offline."""

from __future__ import annotations

import argparse
import shlex
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from rlhf_lightning.demo.methods import BEST_OF, DEFAULT, METHODS
from rlhf_lightning.errors import CommandParser, InputError
from rlhf_lightning.text import say

if TYPE_CHECKING:
    from rlhf_lightning.demo.results import Results
    from rlhf_lightning.demo.stages import Size

_R = TypeVar("_R")
_MARK = ".demo"  # a file that marks a folder made by a demo
_LEFT = ("start", "data", "sft", "reward_model", *METHODS, "report.json", "report.html")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command. Returns 0 when the report is written; raises an InputError if the options are at fault."""
    options = _parser().parse_args(list(sys.argv[1:] if argv is None else argv))
    methods = _methods(options.methods)
    root = Path(options.out)
    if options.seed < 0:
        raise InputError(f"--seed {options.seed}: expected a number of at least 0")
    if root.exists() and not root.is_dir():
        raise InputError(f"--out {root}: a file, where a folder is expected")
    _clear(root)

    # Imported here, so that --help and wrong options answer at once.
    from rich.console import Console

    from rlhf_lightning.demo.results import terminal_table
    from rlhf_lightning.demo.stages import FULL, HACKING, QUICK

    size = HACKING if options.hacking else QUICK if options.quick else FULL
    results = run(root, size, options.seed, methods)
    for warning in results.warnings():
        print(f"\nWARNING: {warning}")
    Console(width=None if sys.stdout.isatty() else 120).print(terminal_table(results))
    reward_model = results.numbers()["reward_model"]
    print(
        f"reward model: {reward_model['accuracy']:.3f} of noisy labels right, at most "
        f"{reward_model['label_ceiling']:.3f} possible; total {results.seconds['total']:.0f} s"
    )
    print(f"report: {root / 'report.html'}")
    print(f"go on:  tensorboard --logdir {root}")
    return 0


def _clear(root: Path) -> None:
    """Removes the files of an earlier demo in the folder. Other files are never touched."""
    mark = root / _MARK
    taken = [root / name for name in _LEFT if (root / name).exists()]
    if taken and not mark.exists():
        raise InputError(f"--out {root}: holds {taken[0].name} and is no demo's folder; choose another one")
    for path in taken:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    root.mkdir(parents=True, exist_ok=True)
    mark.touch()


def run(root: Path, size: Size, seed: int, methods: Sequence[str] = DEFAULT) -> Results:
    """Runs all stages in order, and prints each one's heading and time. Runs, models and report are under ``root``."""
    from transformers.utils.logging import disable_progress_bar

    from rlhf_lightning.data.records import load_records
    from rlhf_lightning.demo import stages
    from rlhf_lightning.demo.results import Results, read_all_curves, write
    from rlhf_lightning.evaluation.compare import Settings, compare
    from rlhf_lightning.rewards.function import FunctionReward
    from rlhf_lightning.rewards.model import ModelReward

    disable_progress_bar()  # transformers would show one for every saved model
    began = time.monotonic()
    folder = stages.Folder(root)
    seconds: dict[str, float] = {}

    trained = [name for name in methods if METHODS[name].kind != "untrained"]
    last = 5 + len(trained)

    def stage(name: str, heading: str, work: Callable[[], _R]) -> _R:
        start = time.monotonic()
        print(f"\n=== {len(seconds) + 1}/{last} {heading}", flush=True)
        result = work()
        seconds[name] = time.monotonic() - start
        print(f"=== {name}: {seconds[name]:.1f} s", flush=True)
        return result

    stage("data", "data, tokenizer and an untrained model", lambda: stages.prepare(folder, size, seed))
    stage("sft", "SFT: imitate the demonstrations", lambda: stages.train("sft", folder, size, seed))
    held_out = stage("rankings", "candidates, ranked by a simulated annotator", lambda: stages.rank(folder, size, seed))
    stage("reward_model", "reward model, from the rankings", lambda: stages.train("reward_model", folder, size, seed))
    for name in trained:
        stage(name, METHODS[name].doing, partial(stages.train, name, folder, size, seed))
    questions = load_records(str(folder.data("demonstrations_held_out"))).rows
    comparison = stage(
        "comparison",
        "comparison on held-out questions",
        lambda: compare(
            {name: folder.model(name) for name in ("sft", *trained)},
            questions,
            {
                "gold": FunctionReward("rlhf_lightning.demo.gold:gold_reward"),
                "proxy": ModelReward(str(folder.model("reward_model"))),
            },
            Settings(stages.MAX_NEW_TOKENS, stages.TEMPERATURE, seed, batch_size=512),
            text=questions,
            best_of={"sft": BEST_OF} if "best_of_n" in methods else None,
            judge="proxy",
            say=say,
        ),
    )
    seconds["total"] = time.monotonic() - began
    option = "--quick" if size is stages.QUICK else "--hacking" if size is stages.HACKING else None
    arguments = ["--seed", str(seed), "--out", str(root), *([option] if option else [])]
    arguments += [] if tuple(methods) == DEFAULT else ["--methods", *methods]
    results = Results(
        seed=seed,
        seconds=seconds,
        comparison=comparison,
        curves=read_all_curves(root, trained),
        label_ceiling=stages.annotator(size, seed).label_ceiling(
            [pair for ranking in held_out for pair in ranking.pairs()]
        ),
        notes={
            "command": f"python -m rlhf_lightning demo {shlex.join(arguments)}",
            "wall time": "\n".join(f"{name}: {spent:.1f} s" for name, spent in seconds.items()),
            "annotator": f"Plackett-Luce at temperature {size.annotator_temperature} of gold reward, "
            f"{stages.ANNOTATOR_LAPSE:.0%} of rankings at random",
        },
    )
    write(results, root)
    return results


def _methods(given: Sequence[str]) -> tuple[str, ...]:
    """The default methods and those that the user asked for, in the table's order."""
    unknown = [name for name in given if name not in METHODS and name != "all"]
    if unknown:
        raise InputError(f"--methods {unknown[0]}: no such method: it must be all, or some of {', '.join(METHODS)}")
    return tuple(name for name in METHODS if name in (*DEFAULT, *given) or "all" in given)


def _parser() -> argparse.ArgumentParser:
    parser = CommandParser(
        prog="python -m rlhf_lightning demo",
        description="Train SFT, a reward model, PPO and DPO on a small built-in world, offline, and compare them.",
    )
    parser.add_argument("--seed", type=int, default=0, help="seed of all random draws (default: %(default)s)")
    parser.add_argument(
        "--out", default="runs/demo", metavar="DIR", help="folder of the runs and the report (default: %(default)s)"
    )
    parser.add_argument(
        "--methods",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"more methods to compare, beside {' and '.join(DEFAULT)}, or all: "
        f"{', '.join(name for name in METHODS if name not in DEFAULT)}",
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="a smaller size, to check that everything works")
    size.add_argument(
        "--hacking",
        action="store_true",
        help="the smaller size with a weak reward model and without penalties, to show how PPO exploits it",
    )
    return parser
