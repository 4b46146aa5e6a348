"""Reward at equal KL on the built-in demo task: our PPO and TRL 1.12.0's, from the same models and data, over seeds.

    python benchmarks/demo_against_trl.py [--seeds 0 1 2 3 4] [--quick] [--out runs/against_trl] [--json FILE]

For each seed the demo's SFT and reward model are trained once (`rlhf_lightning demo`'s own stages). Both sides then
start from them, with the settings of configs/demo/ppo.yaml less its penalties on answers that are long or have no end,
which TRL's PPO lacks in part; for TRL, which takes raw scores, the reward model's mean and deviation are put into its
head. Reward at equal KL is read from the training's own samples: all iterations after
the first, in bins of half a nat of their KL; in each bin that both sides visited the difference of their mean scores,
and of these the mean, each bin counting alike. Beside it score, KL and what both maximise over the last iterations, and
the trained policies on held-out questions: KL to the SFT model, proxy and gold reward, from the same draws. Writes
FILE, and beside it a page (.md) and a plot (.png). A seed that is in FILE already is not run again.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml
from harness import report
from harness.report import ROOT, STYLES
from harness.worker import Refused, once
from peers.install import missing
from training.entrants import ENTRANTS, TRL_PPO

from rlhf_lightning.data.batching import prompt_batches
from rlhf_lightning.data.records import load_records
from rlhf_lightning.demo import stages
from rlhf_lightning.evaluation.compare import Settings, compare
from rlhf_lightning.evaluation.curves import read_curves
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.rewards import FunctionReward, ModelReward

CONFIG = yaml.safe_load((ROOT / "configs" / "demo" / "ppo.yaml").read_text(encoding="utf-8"))
# Both sides learn from the bare score of the reward model.
BARE = [
    word
    for name in ("missing_eos_penalty", "length_threshold", "length_penalty")
    for word in (f"--model.scores.{name}", "0")
]
BIN = 0.5  # nats
LAST = 10  # iterations
OURS, TRL = "ours", TRL_PPO
FOLDER = ENTRANTS[TRL].folder


def run(seed: int, root: Path, size: stages.Size, threads: int) -> dict[str, Any]:
    """Both sides of one seed."""
    folder = stages.Folder(root)
    size = replace(size, options={**size.options, "ppo": (*size.options.get("ppo", ()), *BARE)})
    shutil.rmtree(root, ignore_errors=True)
    stages.prepare(folder, size, seed)
    stages.train("sft", folder, size, seed)
    stages.rank(folder, size, seed)
    stages.train("reward_model", folder, size, seed)
    settings = _settings(folder, size, seed, threads)
    seconds = {}
    began = time.monotonic()
    stages.train("ppo", folder, size, seed)
    seconds[OURS] = time.monotonic() - began
    began = time.monotonic()
    theirs = once("training.trl_sides", settings, threads=threads, folder=FOLDER)["curve"]
    seconds[TRL] = time.monotonic() - began
    ours = read_curves(root / "ppo" / "metrics.jsonl")
    curves = {
        OURS: [
            {"score": score, "kl": kl}
            for score, kl in zip(ours["objective/scores"][1], ours["objective/kl"][1], strict=True)
        ],
        TRL: theirs,
    }
    held_out = compare(
        {"sft": folder.model("sft"), OURS: folder.model("ppo"), TRL: root / "trl" / "model"},
        load_records(str(folder.data("demonstrations_held_out"))).rows,
        {
            "gold": FunctionReward("rlhf_lightning.demo.gold:gold_reward"),
            "proxy": ModelReward(str(folder.model("reward_model"))),
        },
        Settings(stages.MAX_NEW_TOKENS, stages.TEMPERATURE, seed, batch_size=128),
    ).summary()
    points = {
        name: {"kl": found.get("kl", 0.0), **{kind: spread["mean"] for kind, spread in found["rewards"].items()}}
        for name, found in held_out.items()
    }
    return {"seconds": seconds, "curves": curves, "held_out": points}


def compared(curves: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """What one seed's curves say: our score less TRL's at equal KL, and each side's means over the last iterations.

    ``at_equal_kl``: ``bins`` that both sides visited, and ``difference``, None where there is no such bin.
    """
    ours, theirs = _binned(curves[OURS]), _binned(curves[TRL])
    gains = [ours[place] - theirs[place] for place in ours.keys() & theirs.keys()]
    last = {}
    for name, points in curves.items():
        means = {key: statistics.fmean(point[key] for point in points[-LAST:]) for key in ("score", "kl")}
        last[name] = {**means, "objective": means["score"] - CONFIG["model"]["init_args"]["kl"]["coef"] * means["kl"]}
    equal = {"bins": len(gains), "difference": statistics.fmean(gains) if gains else None}
    return {"at_equal_kl": equal, "last": last}


def _binned(points: list[dict[str, float]]) -> dict[int, float]:
    """The mean score of the iterations in each bin; the first is left out, both sides being the SFT model there."""
    scores: dict[int, list[float]] = {}
    for point in points[1:]:
        scores.setdefault(math.floor(point["kl"] / BIN), []).append(point["score"])
    return {place: statistics.fmean(found) for place, found in scores.items()}


def _settings(folder: stages.Folder, size: stages.Size, seed: int, threads: int) -> dict[str, Any]:
    """What TRL's side is told: the numbers of configs/demo/ppo.yaml, as the demo's size changes them."""
    own = CONFIG["model"]["init_args"]
    changed = dict(zip(*[iter(size.options.get("ppo", ()))] * 2, strict=True))
    tokenizer = load_tokenizer(folder.model("sft"))
    batches = prompt_batches(load_records(str(folder.data("demonstrations"))), tokenizer, batch_size=256)
    prompts = [
        row[:length].tolist()
        for batch in batches
        for row, length, weight in zip(batch.tokens, batch.lengths, batch.weights, strict=True)
        if weight > 0
    ]
    return {
        "learning_rate": own["optimizer"]["learning_rate"],
        "critic_learning_rate": own["critic"]["learning_rate"],
        "kl_coef": own["kl"]["coef"],
        **own["update"],
        "iterations": int(changed.get("--model.iterations", own["iterations"])),
        "rows": int(changed.get("--data.batch_size", CONFIG["data"]["batch_size"])),
        "max_new_tokens": stages.MAX_NEW_TOKENS,
        "policy": str(folder.model("sft")),
        "reward": str(folder.model("reward_model")),
        "prompts": prompts,
        "seed": seed,
        "threads": threads,
        "out": str(folder.root / "trl"),
    }


def write(results: dict[str, Any], path: Path, picture: Path | None) -> None:
    """The JSON at ``path``, the page beside it."""
    head = ["seed", "equal KL: ours less TRL's (bins)", f"ours, last {LAST}", f"TRL, last {LAST}"]
    rows = [[*head, "ours held out", "TRL held out"]]
    for seed, found in results["seeds"].items():
        equal = found["at_equal_kl"]
        cells = [f"{equal['difference']:+.3f} ({equal['bins']})" if equal["bins"] else "no common bin"]
        for kind, keys in (("last", ("score", "kl", "objective")), ("held_out", ("proxy", "kl", "gold"))):
            cells += [" / ".join(f"{found[kind][name][key]:.2f}" for key in keys) for name in (OURS, TRL)]
        rows.append([seed, *cells])
    report.write(
        results,
        path,
        "Our PPO and TRL 1.12.0's on the demo task",
        f"Size: {results['size']}. {NOTES}",
        DIFFERENCES.splitlines(),
        report.markdown(rows),
        [f"- {line}" for line in verdict(results)],
        "Points: iterations. Lines: means of the bins that both sides visited." if picture else "",
        [f"![Score against KL, a panel for each seed]({picture.name})"] if picture else "",
    )


def verdict(results: dict[str, Any]) -> list[str]:
    """Means of ours less TRL's over the seeds, with their standard errors."""
    seeds = list(results["seeds"].values())
    gains = {
        "score at equal KL": [d for found in seeds if (d := found["at_equal_kl"]["difference"]) is not None],
        f"objective over the last {LAST} iterations": [_gain(found["last"], "objective") for found in seeds],
        "held-out proxy reward": [_gain(found["held_out"], "proxy") for found in seeds],
        "held-out gold reward": [_gain(found["held_out"], "gold") for found in seeds],
        "held-out KL": [_gain(found["held_out"], "kl") for found in seeds],
    }
    said = []
    for what, values in gains.items():
        if values:
            over = "one seed" if len(values) == 1 else f"{len(values)} seeds"
            error = f"standard error {statistics.stdev(values) / len(values) ** 0.5:.3f}, " if len(values) > 1 else ""
            said.append(f"Ours less TRL's, {what}: {statistics.fmean(values):+.3f} ({error}{over}).")
    return said


def _gain(sides: dict[str, dict[str, float]], key: str) -> float:
    return sides[OURS][key] - sides[TRL][key]


def draw(results: dict[str, Any], path: Path) -> Path | None:
    """Score against KL, a panel for each seed; None where matplotlib is not installed."""
    if (pyplot := report.pyplot()) is None:
        return None
    seeds = results["seeds"]
    figure, panels = pyplot.subplots(
        1, len(seeds), figsize=(4.0 * len(seeds) + 0.6, 4.0), squeeze=False, sharex=True, sharey=True
    )
    for panel, (seed, found) in zip(panels[0], seeds.items(), strict=True):
        binned = {name: _binned(found["curves"][name]) for name in (OURS, TRL)}
        common = sorted(binned[OURS].keys() & binned[TRL].keys())
        for name, (colour, marker) in zip((OURS, TRL), STYLES, strict=False):
            kls, scores = ([point[key] for point in found["curves"][name][1:]] for key in ("kl", "score"))
            panel.plot(kls, scores, color=colour, marker=marker, markersize=4, alpha=0.4, linestyle="none")
            middles = [(place + 0.5) * BIN for place in common]
            panel.plot(middles, [binned[name][place] for place in common], color=colour, label=name)
        panel.set_title(f"seed {seed}", fontsize=11)
        report.tidy(panel)
    figure.supxlabel("KL to the SFT model, nats", fontsize=10)
    figure.supylabel("score of the iteration's samples, deviations", fontsize=10)
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc="upper center", ncol=2, frameon=False)
    return report.save_plot(figure, path.with_suffix(".png"), top=0.92)


def main() -> int:
    parser = report.parser(f"{__doc__}\n{report.CODES}", device=False)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="the demo's reduced size")
    parser.add_argument("--out", type=Path, default=Path("runs/against_trl"))
    chosen = parser.parse_args()
    if reason := missing(FOLDER):
        return report.exit_code(False, [f"{TRL} ({reason})"])
    torch.set_num_threads(chosen.threads)
    size = "quick" if chosen.quick else "full"
    facts = report.about("cpu", chosen.threads)
    results: dict[str, Any] = {"about": facts, "size": size, "seeds": {}}
    if chosen.json and chosen.json.exists():
        old = json.loads(chosen.json.read_text(encoding="utf-8"))
        if old["size"] != size:
            raise SystemExit(f"{chosen.json}: measured at size {old['size']}: give another file")
        results = old
        commands = [*old["about"]["command"].splitlines(), facts["command"]]
        facts["command"] = "\n".join(dict.fromkeys(commands))  # of all that was run, and not of drawing it again
    for seed in chosen.seeds:
        found = results["seeds"].get(str(seed))
        if found is None:
            sizes = stages.QUICK if chosen.quick else stages.FULL
            try:
                found = run(seed, chosen.out / str(seed), sizes, chosen.threads)
            except Refused as refused:  # by TRL's process, the only one
                return report.exit_code(False, [f"{TRL} ({refused})"])
            results["seeds"][str(seed)], results["about"] = found, facts
        for seen in results["seeds"].values():
            seen.update(compared(seen["curves"]))
        if chosen.json:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            write(results, chosen.json, draw(results, chosen.json))
        print(f"seed {seed}: {json.dumps(found['at_equal_kl'])}", flush=True)
    print("\n".join(verdict(results)))
    return 0


NOTES = """\
Scores, proxy and objective are in deviations of the reward model's scores, KL in nats, gold in points. Equal KL: the
iterations after the first in bins of half a nat of their KL, the mean over the bins that both sides visited of the
difference of the bins' mean scores. The last iterations: mean score / mean KL / objective, which is score - kl.coef KL
and what both sides maximise. Held out: proxy / KL / gold of the trained policies on held-out questions."""
DIFFERENCES = """\
Models, prompts, rates, batches, epochs, clip ranges and KL coefficient are the same. What differs:

- Gradients: ours are clipped to norm 1, policy and critic each (our default); TRL's PPO does not clip them.
- The score: ours is credited to the last token, the EOS; TRL's to the slot after it, which has a value of its own.
- Draws: each side shuffles prompts and samples with its own generator."""


if __name__ == "__main__":
    sys.exit(main())
