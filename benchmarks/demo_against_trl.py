"""Reward at equal KL on the built-in demo task: our PPO and TRL 1.12.0's, from the same models and data, over seeds.

    python benchmarks/demo_against_trl.py [--seeds 0 1 2 3 4] [--quick] [--out runs/against_trl] [--json FILE]

For each seed the demo's SFT and reward model are trained once (`rlhf_lightning demo`'s own stages). Both sides then
start from them, with the settings of configs/demo/ppo.yaml; for TRL, which takes raw scores, the reward model's mean
and deviation are put into its head. Reward at equal KL is read from the training's own samples: the score, averaged
over a few iterations, where the KL first passes the largest value that both sides reach. Beside it the trained
policies on held-out questions: KL to the SFT model, proxy and gold reward, from the same draws. A seed that is in
FILE already is not run again.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import provenance
import torch
import yaml
from installed import INSTALLED
from training.entrants import ENTRANTS, TRL_PPO

from rlhf_lightning.data.batching import prompt_batches
from rlhf_lightning.data.records import load_records
from rlhf_lightning.demo import stages
from rlhf_lightning.evaluation.compare import Settings, compare
from rlhf_lightning.evaluation.curves import read_curves
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.rewards import FunctionReward, ModelReward

HERE = Path(__file__).resolve().parent
WINDOW = 5  # iterations that a point of a curve is the mean of
OURS, TRL = "ours", TRL_PPO


def run(seed: int, root: Path, size: stages.Size, threads: int) -> dict[str, Any]:
    """Both sides of one seed."""
    folder = stages.Folder(root)
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
    _train_trl(root, settings)
    seconds[TRL] = time.monotonic() - began
    ours = read_curves(root / "ppo" / "metrics.jsonl")
    curves = {
        OURS: [
            {"score": score, "kl": kl}
            for score, kl in zip(ours["objective/scores"][1], ours["objective/kl"][1], strict=True)
        ],
        TRL: json.loads((root / "trl" / "curve.json").read_text()),
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
    return {"seconds": seconds, "curves": curves, "held_out": points, "at_equal_kl": equal_kl(curves)}


def equal_kl(curves: dict[str, list[dict[str, float]]]) -> dict[str, float]:
    """``{"kl": ..., side: score}``: the scores where each smoothed curve first passes the largest common KL."""
    smooth = {name: _smoothed(points) for name, points in curves.items()}
    common = min(max(point["kl"] for point in points) for points in smooth.values())
    return {"kl": common, **{name: _score_at(points, common) for name, points in smooth.items()}}


def _smoothed(points: list[dict[str, float]]) -> list[dict[str, float]]:
    windows = [points[start : start + WINDOW] for start in range(len(points) - WINDOW + 1)]
    return [{key: statistics.fmean(point[key] for point in window) for key in ("kl", "score")} for window in windows]


def _score_at(points: list[dict[str, float]], kl: float) -> float:
    before = points[0]
    for point in points:
        if point["kl"] >= kl:
            share = 1.0 if point["kl"] == before["kl"] else (kl - before["kl"]) / (point["kl"] - before["kl"])
            return before["score"] + share * (point["score"] - before["score"])
        before = point
    return before["score"]


def _settings(folder: stages.Folder, size: stages.Size, seed: int, threads: int) -> dict[str, Any]:
    """What TRL's side is told: the numbers of configs/demo/ppo.yaml, as the demo's size changes them."""
    config = yaml.safe_load((HERE.parent / "configs" / "demo" / "ppo.yaml").read_text())
    own = config["model"]["init_args"]
    changed = dict(zip(*[iter(size.options.get("ppo", ()))] * 2, strict=True))
    tokenizer = load_tokenizer(folder.model("sft"))
    batches = prompt_batches(load_records(str(folder.data("demonstrations"))), tokenizer, batch_size=256)
    prompts = [
        row[:length].tolist()
        for batch in batches
        for row, length, weight in zip(batch.tokens, batch.lengths, batch.weights, strict=True)
        if weight > 0
    ]
    names = ("learning_rate", "critic_learning_rate", "epochs", "minibatches", "kl_coef")
    return {
        **{name: own[name] for name in names},
        "iterations": int(changed.get("--model.iterations", own["iterations"])),
        "rows": int(changed.get("--data.batch_size", config["data"]["batch_size"])),
        "max_new_tokens": stages.MAX_NEW_TOKENS,
        "policy": str(folder.model("sft")),
        "reward": str(folder.model("reward_model")),
        "prompts": prompts,
        "seed": seed,
        "threads": threads,
        "out": str(folder.root / "trl"),
    }


def _train_trl(root: Path, settings: dict[str, Any]) -> None:
    (root / "trl").mkdir(parents=True)
    path = root / "trl" / "settings.json"
    path.write_text(json.dumps(settings))
    folders = [str(INSTALLED / "trl_ppo"), str(HERE), str(HERE.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": str(settings["threads"])}
    done = subprocess.run([sys.executable, "-m", "training.trl_demo", str(path)], env=variables, capture_output=True)
    if done.returncode != 0:
        raise SystemExit(f"{TRL} failed: {done.stderr.decode()[-2000:]}")


def page(results: dict[str, Any], path: Path) -> str:
    """The facts of the JSON in Markdown."""
    seeds = results["seeds"]
    text = ["# Our PPO and TRL 1.12.0's on the demo task", "", *provenance.header(results["about"], path)]
    text += [
        f"Size: {results['size']}. Scores and proxy are in deviations of the reward model's scores, gold is in points.",
        "",
    ]
    text += ["| seed | equal KL, nats | ours: score | TRL: score | ours held out: KL / proxy / gold | TRL held out |"]
    text += ["|---|---:|---:|---:|---:|---:|"]
    for seed, found in seeds.items():
        equal = found["at_equal_kl"]
        ends = [
            " / ".join(f"{found['held_out'][name][k]:.2f}" for k in ("kl", "proxy", "gold")) for name in (OURS, TRL)
        ]
        text.append(f"| {seed} | {equal['kl']:.2f} | {equal[OURS]:.3f} | {equal[TRL]:.3f} | {ends[0]} | {ends[1]} |")
    return "\n".join([*text, "", verdict(results), ""])


def verdict(results: dict[str, Any]) -> str:
    """The mean difference at equal KL, and its standard error over the seeds."""
    gains = [found["at_equal_kl"][OURS] - found["at_equal_kl"][TRL] for found in results["seeds"].values()]
    if len(gains) < 2:
        return f"Ours less TRL's at equal KL: {gains[0]:+.3f} (one seed)."
    error = statistics.stdev(gains) / math.sqrt(len(gains))
    mean = statistics.fmean(gains)
    return f"Ours less TRL's at equal KL: {mean:+.3f}, standard error {error:.3f} over {len(gains)} seeds."


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--quick", action="store_true", help="the demo's reduced size")
    parser.add_argument("--out", type=Path, default=Path("runs/against_trl"))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    if reason := ENTRANTS[TRL].missing():
        print(f"demo_against_trl: {TRL} is {reason}", file=sys.stderr)
        return 1
    torch.set_num_threads(chosen.threads)
    size = "quick" if chosen.quick else "full"
    results: dict[str, Any] = {"about": provenance.about("cpu", chosen.threads), "size": size, "seeds": {}}
    if chosen.json and chosen.json.exists():
        old = json.loads(chosen.json.read_text(encoding="utf-8"))
        results["seeds"] = old["seeds"] if old["size"] == size else {}
    for seed in chosen.seeds:
        if str(seed) not in results["seeds"]:
            sizes = stages.QUICK if chosen.quick else stages.FULL
            results["seeds"][str(seed)] = run(seed, chosen.out / str(seed), sizes, chosen.threads)
        if chosen.json:
            chosen.json.parent.mkdir(parents=True, exist_ok=True)
            chosen.json.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
            chosen.json.with_suffix(".md").write_text(page(results, chosen.json), encoding="utf-8")
        print(f"seed {seed}: {json.dumps(results['seeds'][str(seed)]['at_equal_kl'])}", flush=True)
    print(verdict(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
