"""Does it pay to label the most uncertain pairs first? A measurement in the demo's world, whose true quality is known.

Two arms get the same number of labels from the demo's simulated annotator. One takes pairs in random order. The other
begins with the same random pairs, then takes the pairs about which the reward models of the labels so far disagree
most. Both train their reward models anew at each number of labels. The accuracy is the share of held-out pairs whose
better answer, by true quality, scores higher.

    python -m rlhf_lightning demo --quick --out runs/demo
    python examples/active_labels.py --demo runs/demo --out runs/active_labels
"""

from __future__ import annotations

import argparse
import json
import logging
import random
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import Trainer

from rlhf_lightning.callbacks.model_export import ModelExport
from rlhf_lightning.data.batching import prompt_batches
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.data.records import load_records
from rlhf_lightning.demo.gold import gold_reward
from rlhf_lightning.demo.stages import MAX_NEW_TOKENS, QUICK, TEMPERATURE, Folder, annotator
from rlhf_lightning.evaluation.charts import Series, line_chart
from rlhf_lightning.evaluation.stand_alone import stand_alone
from rlhf_lightning.models.loading import eos_ids, load_causal_lm, load_tokenizer, token_ids
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules import RewardModelModule
from rlhf_lightning.preferences.candidates import Candidates, Ranking, annotate, sample_candidates, write_rankings
from rlhf_lightning.preferences.uncertainty import reward_scores, uncertain_order
from rlhf_lightning.training.optimizer import AdamWOptions

MEMBERS = 3  # reward models of an arm, which differ in their head and in the order of their data
EPOCHS = 3


def candidates(folder: Folder, source: str, prompts: int, count: int, seed: int) -> list[Candidates]:
    """Answers of the demo's SFT model to its first questions."""
    model = load_causal_lm(folder.model("sft"))
    tokenizer = load_tokenizer(folder.model("sft"))
    records = load_records(str(folder.data(source)))
    records.rows = records.rows[:prompts]
    return sample_candidates(
        Policy(model, ids=token_ids(tokenizer)).eval(),
        prompt_batches(records, tokenizer, batch_size=1024),
        tokenizer,
        count=count,
        max_new_tokens=MAX_NEW_TOKENS,
        temperature=TEMPERATURE,
        eos_ids=eos_ids(model, tokenizer),
        seed=seed,
    )


def train(folder: Folder, rankings: Sequence[Ranking], out: Path, seed: int) -> list[Path]:
    """Reward models of these labels. Returns their folders."""
    write_rankings(rankings, out / "labels.jsonl")
    folders = []
    for member in range(MEMBERS):
        optimizer = AdamWOptions(learning_rate=1e-3, warmup_steps=5, schedule="cosine")
        module = RewardModelModule(str(folder.model("sft")), optimizer=optimizer, seed=MEMBERS * seed + member)
        data = PreferenceDataModule(
            str(out / "labels.jsonl"), batch_size=16, validation_fraction=0.0, seed=MEMBERS * seed + member
        )
        trainer = Trainer(
            accelerator="cpu",
            max_epochs=EPOCHS,
            default_root_dir=out / str(member),
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            gradient_clip_val=1.0,
            callbacks=[ModelExport()],
        )
        trainer.fit(module, datamodule=data)
        folders.append(out / str(member) / "model")
    return folders


def accuracy(items: Sequence[Candidates], folders: Sequence[Path]) -> float:
    """The share of pairs whose better answer scores higher, the mean over the models. Equal pairs are left out."""
    count = len(items[0].completions)
    prompts = [item.prompt for item in items for _ in range(count)]
    texts = [text for item in items for text in item.completions]
    quality = torch.tensor(gold_reward(prompts, texts), dtype=torch.float64).reshape(len(items), count)
    first, second = torch.triu_indices(count, count, offset=1)
    truth = quality[:, first] - quality[:, second]
    shares = []
    for folder in folders:
        scores = reward_scores(items, folder)
        guess = scores[:, first] - scores[:, second]
        known = (truth != 0) & ~guess.isnan()
        shares.append(float(((guess[known] > 0) == (truth[known] > 0)).double().mean()))
    return sum(shares) / len(shares)


def measure(
    folder: Folder, counts: Sequence[int], pool: int, held_out: int, seed: int, out: Path
) -> dict[str, list[float]]:
    """The accuracy of both arms at each number of labels, for one seed of answers, annotator and reward models."""
    items = candidates(folder, "demonstrations", pool, 2, 2 * seed)
    asked = candidates(folder, "demonstrations_held_out", held_out, 4, 2 * seed + 1)
    rankings = annotate(items, annotator(QUICK, seed), gold_reward)
    shuffled = random.Random(seed).sample(range(len(items)), len(items))
    chosen = list(shuffled[: counts[0]])
    own: list[Path] = []  # the models of the uncertain arm's labels so far
    found: dict[str, list[float]] = {"random": [], "uncertain": []}
    for count in counts:
        models = train(folder, [rankings[i] for i in shuffled[:count]], out / f"random-{seed}-{count}", seed)
        found["random"].append(accuracy(asked, models))
        if count > counts[0]:
            left = sorted(set(range(len(items))) - set(chosen))
            order = uncertain_order([items[i] for i in left], own)
            chosen += [left[place] for place in order[: count - len(chosen)]]
            models = train(folder, [rankings[i] for i in chosen], out / f"uncertain-{seed}-{count}", seed)
        own = models
        found["uncertain"].append(accuracy(asked, models))
        print(
            f"seed {seed}, {count} labels: " + ", ".join(f"{arm} {v[-1]:.3f}" for arm, v in found.items()), flush=True
        )
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures all seeds; prints the table, writes the numbers and the plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--demo", default="runs/demo", help="the folder of a demo that has run")
    parser.add_argument("--out", default="runs/active_labels", help="folder of the results")
    parser.add_argument("--quick", action="store_true", help="one seed and few labels, to see that it runs")
    options = parser.parse_args(arguments)
    seeds, counts, pool, held_out = range(5), (64, 128, 256), 1536, 192
    if options.quick:
        seeds, counts, pool, held_out = range(1), (8, 16), 32, 8
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    began, out = time.perf_counter(), Path(options.out)
    runs = [measure(Folder(Path(options.demo)), counts, pool, held_out, seed, out) for seed in seeds]
    values = {arm: torch.tensor([run[arm] for run in runs], dtype=torch.float64) for arm in runs[0]}
    difference = values["uncertain"] - values["random"]
    print("| labels | random order | uncertain order | difference |\n|---|---|---|---|")
    for place, count in enumerate(counts):
        cells = [_spread(column[:, place]) for column in (*values.values(), difference)]
        print(f"| {count} | {' | '.join(cells)} |")
    (out / "numbers.json").write_text(json.dumps({"labels": counts, "runs": runs}, indent=1) + "\n")
    series = []
    for place, (arm, column) in enumerate(values.items()):
        mean, error = column.mean(dim=0), column.std(dim=0) / len(column) ** 0.5
        low, high = (mean - error).tolist(), (mean + error).tolist()
        series.append(Series(arm, counts, mean.tolist(), low, high, color=place))
    figure = line_chart("Reward accuracy by number of labels", series, "labels", "accuracy")
    (out / "accuracy.svg").write_text(stand_alone(figure), encoding="utf-8")
    print(f"{time.perf_counter() - began:.0f} s")


def _spread(column: torch.Tensor) -> str:
    """The mean over the seeds, and its standard error."""
    error = f" ± {float(column.std()) / len(column) ** 0.5:.3f}" if len(column) > 1 else ""
    return f"{float(column.mean()):.3f}{error}"


if __name__ == "__main__":
    main()
