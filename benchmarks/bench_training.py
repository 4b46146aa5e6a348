"""How long does a training step take, and how much memory, next to other libraries' on the same work?

    python benchmarks/bench_training.py --task ppo|sft|reward_model|dpo --size 16m|smollm2|1.5b [--device cpu|cuda]
        [--json FILE] [--only SIDE ...] [--rounds 2]

Every side trains the same model on the same rows for the same number of optimizer steps, in a process of its own, the
sides in turns. Prints a table, where the time goes and how far that is from what the machine could do, and writes FILE
and beside it a page with the same facts (.md). With ``--only`` and a FILE that is there, the new rounds are added to
it, so that a machine that is free for a minute at a time can measure one side at a time.

The peers are set up by ``python benchmarks/peers/install.py``; one that is not there is named with the reason. Sides
that did not do the same work count as ours failing.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from harness import report
from harness.worker import Refused
from training.entrants import ENTRANTS, LIMITS, OURS, measure
from training.rounds import breakdown, summary, table, verdicts, write
from training.sizes import PRECISIONS, SIZES, TASKS, prepare

MACHINE = ("cpu", "cores", "threads", "torch", "gpu", "cuda")
SAME = ("task", "size", "device", "precision", "compile")  # for runs that are put in one file


def options() -> argparse.Namespace:
    parser = report.parser(f"{__doc__}\n{report.CODES}")
    parser.add_argument("--task", choices=TASKS, required=True)
    parser.add_argument("--size", choices=tuple(SIZES), required=True, help="tiny: does the benchmark itself work?")
    parser.add_argument(
        "--precision", choices=PRECISIONS, help="of weights and all, or autocast's, on all sides (default: by device)"
    )
    parser.add_argument("--compile", action="store_true", help="layers made by torch.compile, on both sides")
    parser.add_argument("--only", nargs="+", choices=(*ENTRANTS, LIMITS), metavar="SIDE")
    parser.add_argument("--rounds", type=int, default=2, help="processes of each side")
    parser.add_argument("--warm-up", type=int, default=2, help="steps of a process that are not timed")
    parser.add_argument("--timed", type=int, default=5)
    parser.add_argument("--apart", type=int, default=2, help="further steps, timed by phase")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    if chosen.compile and chosen.task == "ppo":
        parser.error("--compile: TRL's PPO has no such option")
    return chosen


def start(chosen: argparse.Namespace, work: dict[str, Any]) -> dict[str, Any]:
    """Results without runs; those of FILE where they are to be added to."""
    facts = report.about(chosen.device, chosen.threads)
    command = facts.pop("command")
    fresh = {
        **{key: work[key] for key in SAME},
        **{"ours": None, "peers": {}, "ratio": {}, "missing": {}, "same_work": True},
        "about": {**facts, "commands": [command]},
        **{"versions": {}, "limits": {}, "runs": {}},
    }
    if chosen.only is None or chosen.json is None or not chosen.json.exists():
        return fresh
    old: dict[str, Any] = json.loads(chosen.json.read_text(encoding="utf-8"))
    same = all(old[key] == fresh[key] for key in SAME)
    if not same or any(old["about"].get(key) != facts.get(key) for key in MACHINE):
        raise SystemExit(f"{chosen.json}: measured with other options or on another machine: give another file")
    commands = old["about"]["commands"]
    old["about"] = {**facts, "commands": commands if command in commands else [*commands, command]}
    return old


def take_part(
    name: str, work: dict[str, Any], folder: Path, steps: tuple[int, int, int], results: dict[str, Any]
) -> None:
    """One process of a side, or the limits, added to the results; or why there is none."""
    try:
        run = measure(name, work, folder, steps)
    except Refused as refused:
        results["missing"][name] = str(refused)
        return
    results["missing"].pop(name, None)
    if name == LIMITS:
        results["limits"] = run
        return
    results["versions"][name] = run.pop("versions")
    results["runs"].setdefault(name, []).append(run)


def keep(results: dict[str, Any], path: Path | None) -> None:
    """What is known by now, also on disk: a later process may fail, or take the time that was left."""
    summary(results)
    if path:
        write(results, path)


def main() -> int:
    chosen = options()
    precision = chosen.precision or ("float32" if chosen.device == "cpu" else "bfloat16")
    names = ("task", "size", "device", "threads", "compile")
    work = {"precision": precision, **{key: getattr(chosen, key) for key in names}}
    results = start(chosen, work)
    folder = prepare(chosen.size, chosen.device)
    wanted = chosen.only or [*(name for name, entrant in ENTRANTS.items() if chosen.task in entrant.tasks), LIMITS]
    sides = [name for name in wanted if name != LIMITS]
    steps = (chosen.warm_up, chosen.timed, chosen.apart)
    for number in range(chosen.rounds):
        for name in sides if number % 2 == 0 else reversed(sides):
            take_part(name, {**work, "seed": chosen.seed + number}, folder, steps, results)
            keep(results, chosen.json)
    if LIMITS in wanted:
        take_part(LIMITS, work, folder, steps, results)
    keep(results, chosen.json)
    for lines in (report.markdown(table(results)), report.markdown(breakdown(results)), verdicts(results)):
        print("\n".join(lines), end="\n\n")
    if not results["same_work"]:
        print(f"NOT THE SAME WORK: {results['work']}")
    print(report.closing(results["missing"], chosen.json))
    ours_failed = OURS in results["missing"] or not results["same_work"]
    return report.exit_code(ours_failed, [name for name in sides if name in results["missing"] and name != OURS])


if __name__ == "__main__":
    sys.exit(main())
