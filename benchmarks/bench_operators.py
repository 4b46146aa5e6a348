"""How long do the operators take, next to the limit of the machine and to what others ship?

    python benchmarks/bench_operators.py [--device cpu|cuda] [--json FILE] [--only OPERATOR ...]
        [--no-peers] [--no-sweeps] [--quick] [--threads COUNT]

Every operator and every peer, each in a process of its own; each result is checked against float64 before it is
timed; the median of at least 20 calls after warm-up, in turns, on fresh random inputs. The limit is measured in the
same turns: a copy of as many bytes, or the bare matrix products. Prints a table, and writes FILE, beside it a page with
the same facts (.md) and plots of time and memory against N, V and T (.png); a part of the whole (--only, --no-peers,
--no-sweeps, --quick) is written only where --json says. The peers are set up by
``python benchmarks/peers/install.py``; one that is not there is named with the reason.
"""

from __future__ import annotations

import argparse
import sys
from typing import Any

import torch
from harness import report
from harness.report import RESULTS
from operators import cases
from operators.cases import LIMIT, OPERATORS, OURS
from operators.measure import Workers, measure
from operators.report import block, closing, draw, line, write

LEFT_OUT = "left out by --quick: it must be compiled"
TURNS, CALLS = 4, 20  # of a row
SWEEP_TURNS, SWEEP_CALLS = 2, 6  # of a point of the plots


def options() -> argparse.Namespace:
    where = "the results (default, of the whole: under benchmarks/results, by hardware and date)"
    parser = report.parser(f"{__doc__}\n{report.CODES}", where)
    report.add_device(parser)
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="OPERATOR")
    parser.add_argument("--no-peers", action="store_true", help="ours and the limit alone")
    parser.add_argument("--no-sweeps", action="store_true", help="leave out the points of the plots")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the benchmark itself work?")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    chosen = options()
    if chosen.device == "cuda" and not torch.cuda.is_available():
        print("bench_operators: no GPU that torch can use", file=sys.stderr)
        return 1
    table = cases.cpu_cases() if chosen.device == "cpu" else cases.cuda_cases()
    points = [] if chosen.no_sweeps else cases.sweeps(chosen.device)
    if chosen.quick:
        table, points = cases.quick(table), cases.quick(points)
    if chosen.no_peers:
        table, points = cases.alone(table), cases.alone(points)
    table = [case for case in table if case.operator in chosen.only]
    points = [case for case in points if case.operator in chosen.only]

    about = {**report.about(chosen.device, chosen.threads), "quick": chosen.quick}
    whole = not (chosen.quick or chosen.no_peers or chosen.no_sweeps) and set(chosen.only) == set(OPERATORS)
    path = chosen.json or (RESULTS / f"operators_{report.slug(about)}.json" if whole else None)
    workers = Workers(table + points, chosen.device, chosen.threads)
    if chosen.quick:
        workers.missing.update(dict.fromkeys(cases.COMPILES, LEFT_OUT))
    results = {"about": {**about, "peers": workers.versions}, "rows": [], "missing": workers.missing, "sweeps": []}
    try:
        for case in table:
            results["rows"].append(measure(case, workers, TURNS, CALLS, chosen.seed))
            print(block(results["rows"][-1]), flush=True)
        if path:
            write(results, path, [])  # kept should the sweeps be stopped
        for case in points:
            results["sweeps"].append(measure(case, workers, SWEEP_TURNS, SWEEP_CALLS, chosen.seed))
            print(line(results["sweeps"][-1]), flush=True)
    finally:
        workers.close()
    if path:
        write(results, path, draw(results, path))
    print(closing(results, path))
    return exit_code(results)


def exit_code(results: dict[str, Any]) -> int:
    """`report.exit_code` of the results: a peer that could not run is missing, or was not timed in a row."""
    rows = [*results["rows"], *results["sweeps"]]
    reasons = dict(reason for row in rows for reason in row["not_timed"].items()) | results["missing"]
    asked = [name for name, reason in reasons.items() if name not in (OURS, LIMIT) and reason != LEFT_OUT]
    return report.exit_code(any(OURS in row["not_timed"] for row in results["rows"]), asked)


if __name__ == "__main__":
    sys.exit(main())
