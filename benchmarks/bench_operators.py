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
from pathlib import Path
from typing import Any

from harness import report
from harness.report import RESULTS, STYLES, number
from operators import cases
from operators.cases import LIMIT, OPERATORS, OURS
from operators.measure import Workers, measure

LEFT_OUT = "left out by --quick: it must be compiled"
TURNS, CALLS = 4, 20  # of a row
SWEEP_TURNS, SWEEP_CALLS = 2, 6  # of a point of the plots
# The keys of a row in the JSON; what else is known of it is in the list beside, at the same index.
ROW = ("operator", "shape", "dtype", "pass", "ours_ms", "limit_ms", "peers")
DETAILS = {"rows": "details", "sweeps": "sweep_details"}
NOTES = """\
Milliseconds: the median of the calls counted under `details` in the JSON, after warm-up, in turns with all others of
the same table, on random inputs drawn anew for each turn. "x": how many times as long as ours; beside "limit": how many
times as long ours takes as the limit: the bytes that this implementation moves, at the copy bandwidth, or the matrix
products that it takes, alone, into results that are already there. MiB: held at the peak of a call beyond its inputs
and its results. Error: the largest distance of a result or gradient from float64, relative to its norm, checked before
timing. Points of the plots are medians of fewer calls, at least 6. """
CPU_NOTES = """\
Large results of ours reuse the memory of earlier ones, as in training; "first call" is ours without any
such memory, each page given by the system anew, as peers get theirs in every call."""
GPU_NOTES = """\
GAE and the losses are captured in CUDA graphs, on inputs that together exceed the L2 cache, and so are their copies;
the Python loops are timed as they are used, launch by launch."""


def options() -> argparse.Namespace:
    where = "the results (default, of the whole: under benchmarks/results, by hardware and date)"
    parser = report.parser(f"{__doc__}\n{report.CODES}", where)
    parser.add_argument("--only", nargs="+", choices=OPERATORS, default=OPERATORS, metavar="OPERATOR")
    parser.add_argument("--no-peers", action="store_true", help="ours and the limit alone")
    parser.add_argument("--no-sweeps", action="store_true", help="leave out the points of the plots")
    parser.add_argument("--quick", action="store_true", help="tiny sizes: does the benchmark itself work?")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> int:
    chosen = options()
    about = {**report.about(chosen.device, chosen.threads), "quick": chosen.quick}
    table = cases.cpu_cases() if chosen.device == "cpu" else cases.cuda_cases()
    points = [] if chosen.no_sweeps else cases.sweeps(chosen.device)
    if chosen.quick:
        table, points = cases.quick(table), cases.quick(points)
    if chosen.no_peers:
        table, points = cases.alone(table), cases.alone(points)
    table = [case for case in table if case.operator in chosen.only]
    points = [case for case in points if case.operator in chosen.only]

    whole = not (chosen.quick or chosen.no_peers or chosen.no_sweeps) and set(chosen.only) == set(OPERATORS)
    path = chosen.json or (RESULTS / f"operators_{report.slug(about)}.json" if whole else None)
    workers = Workers(table + points, chosen.device, chosen.threads)
    if chosen.quick:
        workers.missing.update(dict.fromkeys(cases.COMPILES, LEFT_OUT))
    results = {"about": {**about, "peers": workers.versions}, "rows": [], "missing": workers.missing, "sweeps": []}
    try:
        for case in table:
            results["rows"].append(measure(case, workers, TURNS, CALLS, chosen.seed))
            print("\n".join(section(results["rows"][-1])), end="\n\n", flush=True)
        if path:
            write(results, path, [])  # kept should the sweeps be stopped
        for case in points:
            results["sweeps"].append(measure(case, workers, SWEEP_TURNS, SWEEP_CALLS, chosen.seed))
            row = results["sweeps"][-1]
            print(f"{title(row)}: ours {number(row['ours_ms'])} ms, {LIMIT} {number(row['limit_ms'])} ms", flush=True)
    finally:
        workers.close()
    if path:
        write(results, path, draw(results, path))
    goals = [goal["met"] for row in results["rows"] for goal in row["goals"]]
    print(f"goals: {goals.count(True)} met, {goals.count(False)} missed, {goals.count(None)} not measured")
    print(report.closing(results["missing"], path, "not the whole, and no --json"))
    return exit_code(results)


def exit_code(results: dict[str, Any]) -> int:
    """`report.exit_code` of the results: a peer that could not run is missing, or was not timed in a row."""
    rows = [*results["rows"], *results["sweeps"]]
    reasons = dict(reason for row in rows for reason in row["not_timed"].items()) | results["missing"]
    asked = [name for name, reason in reasons.items() if name not in (OURS, LIMIT) and reason != LEFT_OUT]
    return report.exit_code(any(OURS in row["not_timed"] for row in results["rows"]), asked)


# The results for people


def title(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    environment = "".join(f", {name}={value}" for name, value in row["environment"].items())
    return f"{row['operator']}, {shape}, {row['dtype']}, {row['pass']}{environment}"


def section(row: dict[str, Any]) -> list[str]:
    """A row in Markdown: ours, the limit and each peer, with ratio, memory, error, goal and verdict."""
    goals = {goal["against"]: goal for goal in row["goals"]}
    lines = [["", "ms", "", "MiB", "error", "goal"]]
    for name in dict.fromkeys((OURS, LIMIT, *row["peers"], *row["not_timed"])):
        ms = {OURS: row["ours_ms"], LIMIT: row["limit_ms"], **row["peers"]}.get(name)
        mb = {OURS: row["ours_mb"], **row["peers_mb"]}.get(name)
        error = max(row["errors"].get(name, {}).values(), default=None)
        goal = goals.get("memory" if name == OURS else name)
        cells = [number(ms), _beside(row, name, ms), "" if mb is None else number(mb)]
        lines.append([name, *cells, "" if error is None else f"{error:.0e}", _goal(goal) if goal else ""])
    if "first_call_ms" in row:
        lines.append(["ours, first call", number(row["first_call_ms"]), *[""] * 4])
    return [f"### {title(row)}", "", *report.markdown(lines)]


def _beside(row: dict[str, Any], name: str, ms: float | None) -> str:
    """What is said of an entrant's time: how it compares with ours, what the limit moved, or why there is none."""
    ours = row["ours_ms"]
    if name in row["not_timed"] or ms is None:
        return f"not timed: {row['not_timed'].get(name, '')}".replace("|", "/")
    if name != LIMIT:
        return f"{number(ms / ours)}x" if ours and name != OURS else ""
    does, share = row["limit_does"], f"{ours / ms:.2f}x of it " if ours else ""
    if "bytes" in does:
        return f"{share}({number(does['bytes'] / ms / 1e6)} GB/s)"
    return f"{share}({does['products']} products, {number(does['flops'] / ms / 1e9)} TFLOP/s)"


def _goal(goal: dict[str, Any]) -> str:
    bound = {LIMIT: "at most {:.2f}x", "memory": "at most {:.1f} MiB"}.get(goal["against"], "at least {:.1f}x")
    verdict = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
    return f"{bound.format(goal['goal'])}: {verdict}"


def published(results: dict[str, Any]) -> dict[str, Any]:
    """The results as the JSON has them: rows and points have the keys in `ROW` alone, each list its details beside."""
    found: dict[str, Any] = {}
    for name, value in results.items():
        if name not in DETAILS:
            found[name] = value
            continue
        found[name] = [{key: row[key] for key in ROW} for row in value]
        found[DETAILS[name]] = [{key: row[key] for key in row if key not in ROW} for row in value]
    return found


def write(results: dict[str, Any], path: Path, pictures: list[Path]) -> None:
    """The JSON at ``path``, the page beside it."""
    facts = results["about"]
    shown = "No plots: matplotlib is not installed (the extra `plot`), or the sweeps were left out."
    report.write(
        published(results),
        path,
        f"The operators on {'a GPU' if 'gpu' in facts else 'a CPU'}",
        "Peers: " + (", ".join(sorted(set(facts["peers"].values()))) or "none") + ".",
        [f"Not there: {name} ({reason})." for name, reason in results["missing"].items()],
        NOTES + (GPU_NOTES if "gpu" in facts else CPU_NOTES),
        "**Tiny sizes (`--quick`): these times mean nothing.**" if facts["quick"] else "",
        *(section(row) for row in results["rows"]),
        [f"![Time and memory against size: {picture.stem}]({picture.name})" for picture in pictures] or shown,
    )


# Time and memory against N, V and T, one picture an operator


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """The pictures written beside ``path``; none where matplotlib is not installed or nothing was swept."""
    if (pyplot := report.pyplot()) is None:
        return []
    operators = dict.fromkeys(row["operator"] for row in results["sweeps"])
    return [_picture(pyplot, operator, results["sweeps"], path) for operator in operators]


def _picture(pyplot: Any, operator: str, points: list[dict[str, Any]], path: Path) -> Path:
    rows = [row for row in points if row["operator"] == operator]
    sizes = [size for size in rows[0]["shape"] if len({row["shape"][size] for row in rows}) > 1]
    figure, axes = pyplot.subplots(2, len(sizes), figsize=(5.2 * len(sizes) + 0.6, 6.6), squeeze=False)
    for (upper, lower), size in zip(axes.T, sizes, strict=True):
        along = _points(rows, size)
        fixed = ", ".join(f"{name} = {value}" for name, value in along[0]["shape"].items() if name != size)
        upper.set_title(f"against {size}  ({fixed})", fontsize=11)
        _lines(upper, along, size, "ms", "milliseconds")
        _lines(lower, along, size, "mb", "MiB beyond inputs and results")
        upper.set_yscale("log")
        lower.set_yscale("symlog", linthresh=1.0)  # linear from 0 to 1, where a logarithm has no place for 0
        lower.set_ylim(0, max(1.0, 1.3 * lower.get_ylim()[1]))
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(f"{operator}, {rows[0]['dtype']}, {rows[0]['pass']}", fontsize=13, y=0.985)
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, bbox_to_anchor=(0.5, 0.955))
    return report.save_plot(figure, path.with_name(f"{path.stem}_{operator}.png"), top=0.915)


def _points(rows: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """The rows along which ``size`` alone varies: all but the most frequent value of each other size are left out."""
    others = [name for name in rows[0]["shape"] if name != size]
    usual = {name: max(values := [row["shape"][name] for row in rows], key=values.count) for name in others}
    along = [row for row in rows if all(row["shape"][name] == usual[name] for name in others)]
    return sorted(along, key=lambda row: row["shape"][size])


def _lines(axis: Any, points: list[dict[str, Any]], size: str, kind: str, label: str) -> None:
    sizes = [point["shape"][size] for point in points]
    names, peers = [OURS, *points[0]["peers"]], {"ms": "peers", "mb": "peers_mb"}[kind]
    for name, (colour, marker) in zip(names, STYLES, strict=False):
        values = [point[f"ours_{kind}"] if name == OURS else point[peers].get(name) for point in points]
        axis.plot(sizes, values, color=colour, marker=marker, markersize=5, label=name)
    if kind == "ms":
        limits = [point["limit_ms"] for point in points]
        axis.plot(sizes, limits, color="#333333", linestyle=":", label=f"{LIMIT} of the machine")
    axis.set(xlabel=size, ylabel=label)
    axis.set_xscale("log", base=2)
    axis.set_xticks(sizes, labels=map(str, sizes))
    report.tidy(axis)


if __name__ == "__main__":
    sys.exit(main())
