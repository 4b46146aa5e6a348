"""A long PPO run, killed again and again, beside the same run without a kill: `make soak`; about half an hour.

    python tests/soak.py [--iterations 2000] [--kills 50] [--seed 0] [--out FOLDER]

The first run is watched: its memory after each iteration must not grow. The second is killed by SIGKILL at random
moments, from its start on, and goes on each time with ``--ckpt_path last``. Its weights, optimizer state, metrics and
samples must be those of the first, bit for bit but for times and rates. Writes soak.json and soak.png to ``--out``.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tiny_models import WORDS, make_config, make_tokenizer
from transformers import LlamaForCausalLM

from rlhf_lightning.callbacks.checkpoint_files import batches_of, latest

CLOCK = ("time", "tokens_per_second", "seconds", "memory")
REWARD = '''
"""A reward that depends on the words, and on nothing else."""


def length_of_words(prompts, responses, **columns):
    return [sum(len(word) for word in response.split()) % 7 - 3.0 for response in responses]
'''


def prepare(folder: Path, iterations: int) -> list[str]:
    """Writes a tiny model, prompts and a reward function; returns the command without the run's name."""
    torch.manual_seed(0)
    LlamaForCausalLM(make_config()).save_pretrained(folder / "policy")
    make_tokenizer("<pad>").save_pretrained(folder / "policy")
    words = random.Random(0)
    rows = [{"prompt": " ".join(words.choices(WORDS, k=5))} for _ in range(200)]
    (folder / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "soak_reward.py").write_text(REWARD, encoding="utf-8")
    options = {
        "model.model": "policy",
        "model.reward": "rlhf_lightning.rewards.FunctionReward",
        "model.reward.function": "soak_reward.py:length_of_words",
        "model.iterations": iterations,
        "model.kl.target": 1.0,
        "model.scores.normalise": "true",
        "model.sampling.max_new_tokens": 6,
        "model.update.epochs": 1,
        "model.optimizer.learning_rate": 1e-3,
        "data.path": "prompts.jsonl",
        "data.batch_size": 8,
        "data.validation_fraction": 0.05,
        "trainer.accelerator": "cpu",
        "trainer.val_check_interval": 100,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "checkpoint.every_n_batches": 20,
    }
    given = [part for name, value in options.items() for part in (f"--{name}", str(value))]
    return [sys.executable, "-m", "rlhf_lightning", "fit", "--config", "ppo.yaml", *given]


def lines(run: Path) -> int:
    """How many lines of metrics a run has."""
    path = run / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def memory(process: int) -> float:
    """The resident memory of a process in MB; 0 where it has ended."""
    try:
        text = Path(f"/proc/{process}/status").read_text(encoding="utf-8")
    except OSError:
        return 0.0
    kilobytes = [line.split()[1] for line in text.splitlines() if line.startswith("VmRSS")]
    return int(kilobytes[0]) / 1e3 if kilobytes else 0.0


def watched(command: list[str], folder: Path) -> list[tuple[int, float]]:
    """Runs to the end; returns pairs of iteration and memory, one a second."""
    seen = []
    run = folder / "runs" / "straight"
    with (folder / "straight.log").open("w") as log:
        process = subprocess.Popen([*command, "--run", "straight"], cwd=folder, stdout=log, stderr=log)
        while process.poll() is None:
            if (done := lines(run)) and (used := memory(process.pid)):
                seen.append((done, used))
            time.sleep(1.0)
    if process.returncode:
        sys.exit(f"the uninterrupted run failed:\n{(folder / 'straight.log').read_text()[-2000:]}")
    return seen


def killed(command: list[str], folder: Path, kills: int, seed: int, iterations: int) -> list[dict[str, Any]]:
    """Runs to the end, with SIGKILL at random moments; returns where each attempt began and was ended."""
    draws = random.Random(seed)
    run, attempts = folder / "runs" / "broken", []
    while True:
        newest = latest(run / "checkpoints")
        began = batches_of(newest) if newest else 0
        if newest is None:
            shutil.rmtree(run, ignore_errors=True)
        going = [*command, "--run", "broken", *(["--ckpt_path", "last"] if newest else [])]
        with (folder / "broken.log").open("a") as log:
            process = subprocess.Popen(going, cwd=folder, stdout=log, stderr=log)
            if len(attempts) < kills:
                # Some die while they start; most as far into the run that the kills are spread over all of it.
                share = 2.0 * iterations / kills
                target = min(began + draws.uniform(-0.1, 1.0) * share, iterations - 1)
                while process.poll() is None and reached(run, began) < target:
                    time.sleep(0.02)
                time.sleep(draws.uniform(0.0, 0.2))
                process.kill()
            process.wait()
        attempts.append({"from": began, "to": lines(run), "killed": process.returncode == -9})
        print(f"attempt {len(attempts)}: {attempts[-1]}", flush=True)
        if process.returncode == 0:
            return attempts
        if process.returncode != -9:
            sys.exit(f"an attempt failed:\n{(folder / 'broken.log').read_text()[-2000:]}")


def reached(run: Path, began: int) -> int:
    """The iteration that a run has logged, and ``began`` before it has."""
    return max(lines(run), began)


def records(run: Path, name: str) -> list[Any]:
    """The rows of a run's file, without times and rates."""
    rows = [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]
    return [{key: value for key, value in row.items() if not any(word in key for word in CLOCK)} for row in rows]


def same(a: Any, b: Any) -> bool:
    """Whether two parts of checkpoints are equal, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    return bool(a == b)


def compare(folder: Path) -> dict[str, bool]:
    """What of the two runs is equal."""
    runs = [folder / "runs" / name for name in ("straight", "broken")]
    states = [torch.load(latest(run / "checkpoints"), weights_only=True) for run in runs]  # type: ignore[arg-type]
    equal = {name: same(*(state[name] for state in states)) for name in ("state_dict", "optimizer_states", "on_policy")}
    for name in ("metrics.jsonl", "samples.jsonl"):
        equal[name] = records(runs[0], name) == records(runs[1], name)
    return equal


def plot(seen: list[tuple[int, float]], attempts: list[dict[str, Any]], path: Path) -> None:
    """Memory over the iterations, and how far each attempt came."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        print("no plot: matplotlib is missing; run: pip install 'rlhf-lightning[plot]'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (upper, lower) = pyplot.subplots(2, 1, sharex=True, figsize=(8, 6), layout="constrained")
    upper.plot(*zip(*seen, strict=True))
    upper.set_ylim(0, 1.15 * max(used for _, used in seen))
    upper.set_ylabel("resident memory, MB")
    upper.set_title("The run without a kill")
    for number, attempt in enumerate(attempts, 1):
        lower.plot([attempt["from"], attempt["to"]], [number, number], color="C0")
        if attempt["killed"]:
            lower.plot(attempt["to"], number, "x", color="C3")
    lower.set_ylabel("attempt")
    lower.set_xlabel("rows of metrics.jsonl: one an iteration, one a validation")
    lower.set_title(f"The run with {sum(attempt['killed'] for attempt in attempts)} kills (x), each attempt a line")
    figure.savefig(path, dpi=110)


def growth(seen: list[tuple[int, float]]) -> float:
    """The growth after a tenth of the run: the median of the last tenth over that of the second."""
    tenth = max(1, len(seen) // 10)
    second, last = (sorted(value for _, value in part)[tenth // 2] for part in (seen[tenth : 2 * tenth], seen[-tenth:]))
    return last / second - 1.0


def main() -> int:
    """Run both, compare, and write what was found; 1 where something differs or grows, or too few kills came."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iterations", type=int, default=2000, help="PPO iterations")
    parser.add_argument("--kills", type=int, default=50, help="how often to kill")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--out", type=Path, default=Path("."), help="folder for soak.json and soak.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        command = prepare(folder, options.iterations)
        began = time.monotonic()
        seen = watched(command, folder)
        middle = time.monotonic()
        attempts = killed(command, folder, options.kills, options.seed, options.iterations)
        found = {
            "iterations": options.iterations,
            "kills": sum(attempt["killed"] for attempt in attempts),
            "equal": compare(folder),
            "memory_growth": growth(seen),
            "seconds": {"straight": middle - began, "killed": time.monotonic() - middle},
            "torch": torch.__version__,
            "machine": platform.processor() or platform.machine(),
            "memory_mb": seen,
            "attempts": attempts,
        }
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "soak.json").write_text(json.dumps(found) + "\n", encoding="utf-8")
    plot(seen, attempts, options.out / "soak.png")
    print({name: value for name, value in found.items() if name not in ("memory_mb", "attempts")})
    enough = found["kills"] >= options.kills
    return 0 if all(found["equal"].values()) and found["memory_growth"] < 0.02 and enough else 1


if __name__ == "__main__":
    sys.exit(main())
