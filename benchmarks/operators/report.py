"""A row of the results, and the results for people: the table on the terminal, the JSON, the page, the plots."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from harness import report
from harness.report import STYLES, number

from operators.cases import LIMIT, OURS, Case, work

# The keys of a row in the JSON; what else is known of it is in the list beside, at the same index.
ROW = ("operator", "shape", "dtype", "pass", "ours_ms", "limit_ms", "peers")
DETAILS = {"rows": "details", "sweeps": "sweep_details"}
NOTES = """\
Milliseconds: the median of the calls counted under `details` in the JSON, after warm-up, in turns with all others of
the same table, on random inputs drawn anew for each turn. "x": how many times as long as ours; beside "limit": how many
times as long ours takes as the limit: the bytes that this implementation moves, at the copy bandwidth, or the matrix
products that it takes, alone, into results that are already there. MiB: held at the peak of a call beyond its inputs
and its results. Error: the largest distance of a result or gradient from float64, relative to its norm, checked before
timing. Points of the plots are medians of fewer calls, at least 6."""
CPU_NOTES = """\
Large results of ours reuse the memory of earlier ones, as in training; "first call" is ours without any
such memory, each page given by the system anew, as peers get theirs in every call."""
GPU_NOTES = """\
GAE and the losses are captured in CUDA graphs, on inputs that together exceed the L2 cache, and so are their copies;
the Python loops are timed as they are used, launch by launch."""


def as_row(
    case: Case,
    device: str,
    times: dict[str, list[float]],
    held: dict[str, float | None],
    errors: dict[str, dict[str, float]],
    not_timed: dict[str, str],
) -> dict[str, Any]:
    """One row of the results: medians of the ``times``, MiB ``held``, goals, and why an entrant was not timed."""
    median = {name: statistics.median(of_entrant) for name, of_entrant in times.items()}
    peers = {name: median[name] for name in case.peers if name in median}
    row: dict[str, Any] = {
        "operator": case.operator,
        "shape": case.shape,
        "dtype": case.dtype,
        "pass": case.passes,
        "ours_ms": median.get(OURS),
        "limit_ms": median.get(LIMIT),
        "peers": peers,
        "environment": case.environment,
        "limit_does": work(case, device),
        "ours_mb": held.get(OURS),
        "peers_mb": {name: held[name] for name in peers},
        "quartiles_ms": {name: _quartiles(times[name]) for name in median},
        "samples": {name: len(times[name]) for name in median},
        "errors": {name: errors[name] for name in median if errors.get(name)},
        "not_timed": not_timed,
    }
    row["goals"] = list(_goals(case, row))
    return row


def _quartiles(times: list[float]) -> list[float]:
    lower, _, upper = statistics.quantiles(times, n=4)
    return [lower, upper]


def _goals(case: Case, row: dict[str, Any]) -> Iterable[dict[str, Any]]:
    """Each goal with what was reached: None where there was nothing to compare."""
    ours = row["ours_ms"]
    for name, goal in case.goals.items():
        other = row["limit_ms"] if name == LIMIT else row["peers"].get(name)
        if not ours or not other:
            yield {"against": name, "goal": goal, "reached": None, "met": None}
        elif name == LIMIT:
            yield {"against": name, "goal": goal, "reached": ours / other, "met": ours / other <= goal}
        else:
            yield {"against": name, "goal": goal, "reached": other / ours, "met": other / ours >= goal}
    if case.memory_goal is not None:
        reached = row["ours_mb"]
        met = None if reached is None else reached <= case.memory_goal
        yield {"against": "memory", "goal": case.memory_goal, "reached": reached, "met": met}


def title(row: dict[str, Any]) -> str:
    shape = " ".join(f"{name}={size}" for name, size in row["shape"].items())
    environment = "".join(f", {name}={value}" for name, value in row["environment"].items())
    return f"{row['operator']}, {shape}, {row['dtype']}, {row['pass']}{environment}"


def lines(row: dict[str, Any]) -> list[dict[str, str]]:
    """A row's lines: ours, the limit, each peer, with ratio, goal and verdict."""
    goals = {goal["against"]: goal for goal in row["goals"]}
    found = []
    for name in ("ours", LIMIT, *row["peers"], *(name for name in row["not_timed"] if name not in ("ours", LIMIT))):
        ms = {"ours": row["ours_ms"], LIMIT: row["limit_ms"]}.get(name, row["peers"].get(name))
        ratio = ""
        if row["ours_ms"] and ms and name != "ours":
            ratio = f"{row['ours_ms'] / ms:.2f}x of it" if name == LIMIT else f"{number(ms / row['ours_ms'])}x"
        mb = {"ours": row["ours_mb"], LIMIT: None}.get(name, row["peers_mb"].get(name))
        goal = goals.get("memory" if name == "ours" else name)
        error = max(row["errors"].get(name, {}).values(), default=None)
        found.append(
            {
                "name": name,
                "ms": number(ms),
                "ratio": ratio + (f" ({_rate(row)})" if name == LIMIT and ms else ""),
                "mb": "" if mb is None else number(mb),
                "error": "" if error is None else f"{error:.0e}",
                "goal": _goal(goal) if goal else "",
                "why": row["not_timed"].get(name, ""),
            }
        )
    return found


def _rate(row: dict[str, Any]) -> str:
    does, seconds = row["limit_does"], row["limit_ms"] / 1e3
    if "bytes" in does:
        return f"{number(does['bytes'] / seconds / 1e9)} GB/s"
    return f"{does['products']} products, {number(does['flops'] / seconds / 1e12)} TFLOP/s"


def _goal(goal: dict[str, Any]) -> str:
    bound = {LIMIT: "at most {:.2f}x", "memory": "at most {:.1f} MiB"}.get(goal["against"], "at least {:.1f}x")
    verdict = {True: "met", False: "missed", None: "not measured"}[goal["met"]]
    return f"{bound.format(goal['goal'])}: {verdict}"


def block(row: dict[str, Any]) -> str:
    """A row for the terminal."""
    text = [title(row)]
    for line in lines(row):
        memory = f"{line['mb']} MiB" if line["mb"] else ""
        rest = line["why"] or f"{line['ratio']:<42} {memory:>11}  {line['goal']}"
        text.append(f"  {line['name']:<34} {line['ms']:>8} ms  {rest}".rstrip())
    if "first_call_ms" in row:
        text.append(f"  {'ours, first call':<34} {number(row['first_call_ms']):>8} ms")
    return "\n".join(text)


def line(row: dict[str, Any]) -> str:
    """A point of the plots for the terminal."""
    times = {"ours": row["ours_ms"], LIMIT: row["limit_ms"], **row["peers"]}
    return f"{title(row)}: " + ", ".join(f"{name} {number(ms)} ms" for name, ms in times.items())


def closing(results: dict[str, Any], path: Path | None) -> str:
    goals = [goal["met"] for row in results["rows"] for goal in row["goals"]]
    text = [f"goals: {goals.count(True)} met, {goals.count(False)} missed, {goals.count(None)} not measured"]
    return "\n".join([*text, *report.closing(results["missing"], path, "not the whole, and no --json")])


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
    report.write(published(results), path, page(results, path, pictures))


def page(results: dict[str, Any], path: Path, pictures: list[Path]) -> list[str]:
    """The facts of the JSON in Markdown."""
    facts = results["about"]
    text = [
        f"# The operators on {'a GPU' if 'gpu' in facts else 'a CPU'}",
        "",
        *report.header(facts, path),
        "Peers: " + (", ".join(sorted(set(facts["peers"].values()))) or "none") + ".",
        "",
    ]
    text += [f"Not there: {name} ({reason})." for name, reason in results["missing"].items()]
    text += ["", f"{NOTES} {GPU_NOTES if 'gpu' in facts else CPU_NOTES}", ""]
    if facts["quick"]:
        text += ["**Tiny sizes (`--quick`): these times mean nothing.**", ""]
    for row in results["rows"]:
        text += [f"### {title(row)}", "", "| | ms | | MiB | error | goal |", "|---|---:|---|---:|---:|---|"]
        for cells in lines(row):
            middle = f"not timed: {cells['why']}".replace("|", "/") if cells["why"] else cells["ratio"]
            text.append(
                f"| {cells['name']} | {cells['ms']} | {middle} | {cells['mb']} | {cells['error']} | {cells['goal']} |"
            )
        if "first_call_ms" in row:
            text.append(f"| ours, first call | {number(row['first_call_ms'])} | | | | |")
        text.append("")
    for picture in pictures:
        text += [f"![Time and memory against size: {picture.stem}]({picture.name})", ""]
    if not pictures:
        text += ["No plots: matplotlib is not installed (the extra `plot`), or the sweeps were left out.", ""]
    return text


# Time and memory against N, V and T, one picture an operator


def draw(results: dict[str, Any], path: Path) -> list[Path]:
    """The pictures written beside ``path``; none where matplotlib is not installed or nothing was swept."""
    if (pyplot := report.pyplot()) is None:
        return []
    operators = dict.fromkeys(row["operator"] for row in results["sweeps"])
    path.parent.mkdir(parents=True, exist_ok=True)
    return [_picture(pyplot, operator, results, path) for operator in operators]


def _picture(pyplot: Any, operator: str, results: dict[str, Any], path: Path) -> Path:
    rows = [row for row in results["sweeps"] if row["operator"] == operator]
    sizes = [size for size in rows[0]["shape"] if len({row["shape"][size] for row in rows}) > 1]
    figure, axes = pyplot.subplots(2, len(sizes), figsize=(5.2 * len(sizes) + 0.6, 6.6), squeeze=False)
    for column, size in enumerate(sizes):
        points = _points(rows, size)
        fixed = ", ".join(f"{name} = {value}" for name, value in points[0]["shape"].items() if name != size)
        axes[0, column].set_title(f"against {size}  ({fixed})", fontsize=11)
        _lines(axes[0, column], points, size, "ms")
        _lines(axes[1, column], points, size, "mb")
        axes[0, column].set_yscale("log")
        axes[1, column].set_yscale("symlog", linthresh=1.0)  # linear from 0 to 1, where a logarithm has no place for 0
        axes[1, column].set_ylim(0, max(1.0, 1.3 * axes[1, column].get_ylim()[1]))
        for axis, label in zip(axes[:, column], ("milliseconds", "MiB beyond inputs and results"), strict=True):
            axis.set_xlabel(size)
            axis.set_xscale("log", base=2)
            axis.set_xticks([point["shape"][size] for point in points])
            axis.set_xticklabels([f"{point['shape'][size]}" for point in points])
            axis.minorticks_off()
            axis.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
            axis.set_ylabel(label if column == 0 else "")
            axis.grid(True, color="#dddddd", linewidth=0.6)
            axis.spines[["top", "right"]].set_visible(False)
    facts = results["about"]
    machine = facts.get("gpu") or f"{facts['cpu']}, {facts['threads']} threads"
    handles, labels = axes[0, 0].get_legend_handles_labels()
    figure.suptitle(f"{operator}, {rows[0]['dtype']}, {rows[0]['pass']}", fontsize=13, y=0.985)
    figure.legend(handles, labels, loc="upper center", ncol=len(labels), frameon=False, bbox_to_anchor=(0.5, 0.955))
    figure.text(
        0.5, 0.008, f"{machine}, torch {facts['torch']}, {facts['date']}", ha="center", color="#666666", fontsize=8
    )
    figure.tight_layout(rect=(0, 0.025, 1, 0.915))
    target = path.with_name(f"{path.stem}_{operator}.png")
    figure.savefig(target, dpi=130)
    pyplot.close(figure)
    return target


def _points(rows: list[dict[str, Any]], size: str) -> list[dict[str, Any]]:
    """The rows along which ``size`` alone varies: all but the most frequent value of each other size are left out."""
    others = [name for name in rows[0]["shape"] if name != size]
    usual = {name: max(values := [row["shape"][name] for row in rows], key=values.count) for name in others}
    along = [row for row in rows if all(row["shape"][name] == usual[name] for name in others)]
    return sorted(along, key=lambda row: row["shape"][size])


def _lines(axis: Any, points: list[dict[str, Any]], size: str, kind: str) -> None:
    names, peers = ["ours", *points[0]["peers"]], {"ms": "peers", "mb": "peers_mb"}[kind]
    for name, (colour, marker) in zip(names, STYLES, strict=False):
        along = [
            (point["shape"][size], value)
            for point in points
            if (value := point[f"ours_{kind}"] if name == "ours" else point[peers].get(name)) is not None
        ]
        if along:
            axis.plot(*zip(*along, strict=True), color=colour, marker=marker, markersize=5, label=name)
    if kind == "ms":
        limits = [(point["shape"][size], point["limit_ms"]) for point in points if point["limit_ms"]]
        if limits:
            axis.plot(*zip(*limits, strict=True), color="#333333", linestyle=":", label=f"{LIMIT} of the machine")
