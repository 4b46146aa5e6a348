"""The demo's stages before the comparison: the data, the training runs, and the annotation.

The training runs use the public command line, ``python -m rlhf_lightning fit --config demo/ppo.yaml ...``, and each
prints its command.
"""

from __future__ import annotations

import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rlhf_lightning.cli import training
from rlhf_lightning.data.batching import prompt_batches
from rlhf_lightning.data.records import load_records
from rlhf_lightning.demo.corpus import Question, build_corpus
from rlhf_lightning.demo.gold import gold_reward
from rlhf_lightning.demo.methods import METHODS
from rlhf_lightning.demo.start import save_start, train_tokenizer
from rlhf_lightning.models.loading import eos_ids, load_causal_lm, load_tokenizer, token_ids
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.preferences.annotator import SimulatedAnnotator
from rlhf_lightning.preferences.candidates import Ranking, annotate, sample_candidates, write_rankings, write_rows

MAX_NEW_TOKENS = 64  # the default of every module; the longest demonstration has 52
TEMPERATURE = 1.0  # the default of every module
VOCABULARY = 768

ANNOTATOR_LAPSE = 0.05  # share of random rankings


@dataclass(frozen=True)
class Size:
    """The sizes of data and model. The sizes of the training runs are in configs/demo/."""

    train: int  # questions with a demonstration
    held_out: int  # questions that everything is measured on
    ranked: int  # training questions whose candidates are ranked
    candidates: int  # answers to each ranked question
    annotator_temperature: float  # the difference in gold reward that the annotator notices with log-odds of 1
    options: dict[str, tuple[str, ...]]  # stage -> options that change its config
    hidden: int = 128  # width of the model
    layers: int = 2
    configs: dict[str, str] = field(default_factory=dict)  # stage -> its config, if not demo/<stage>.yaml


# For the same training, two answers to many questions teach a reward model more than three answers to fewer.
FULL = Size(
    train=6144,
    held_out=512,
    ranked=6144,
    candidates=2,
    annotator_temperature=0.75,
    options={},
)
QUICK = Size(
    train=2048,
    held_out=192,
    ranked=1536,
    candidates=2,
    annotator_temperature=0.75,
    options={
        "sft": ("--trainer.max_steps", "220", "--data.batch_size", "12"),
        "dpo": ("--trainer.max_steps", "24"),
        "ppo": ("--model.iterations", "14", "--data.batch_size", "48"),
        "grpo": ("--model.iterations", "15", "--data.batch_size", "16"),
        "rloo": ("--model.iterations", "15", "--data.batch_size", "16"),
        "reinforce": ("--model.iterations", "15", "--data.batch_size", "64"),
        "online_dpo": ("--model.iterations", "15", "--data.batch_size", "32"),
        "rejection_sampling": ("--model.iterations", "15", "--data.batch_size", "16"),
    },
)
# Shows what goes wrong if a reward model learned from few noisy labels and nothing keeps PPO from exploiting it.
HACKING = replace(
    QUICK,
    ranked=256,
    candidates=3,
    annotator_temperature=1.25,
    options={"sft": QUICK.options["sft"]},
    configs={stage: f"demo/hacking/{stage}.yaml" for stage in ("reward_model", "ppo")},
)


@dataclass(frozen=True)
class Folder:
    """The paths of the demo's files."""

    root: Path

    @property
    def start(self) -> Path:
        """The untrained model."""
        return self.root / "start"

    def data(self, name: str) -> Path:
        """A data file."""
        return self.root / "data" / f"{name}.jsonl"

    def model(self, stage: str) -> Path:
        """The model that a stage exports."""
        return self.root / stage / "model"


def prepare(folder: Folder, size: Size, seed: int) -> None:
    """Writes the demonstrations, the tokenizer and the untrained model, and prints a line about each."""
    corpus = build_corpus(seed, size.train, size.held_out)
    _write_demonstrations(folder.data("demonstrations"), corpus.train, corpus.train_answers)
    _write_demonstrations(folder.data("demonstrations_held_out"), corpus.held_out, corpus.held_out_answers)
    texts = [question.prompt + answer for question, answer in zip(corpus.train, corpus.train_answers, strict=True)]
    tokenizer = train_tokenizer(texts, VOCABULARY)
    parameters = save_start(folder.start, tokenizer, size.hidden, size.layers, seed)
    print(f"questions  {size.train:,} with a demonstration, {size.held_out:,} held out")
    print(f"example    {corpus.train[0].prompt!r} {corpus.train_answers[0]!r}")
    print(f"tokenizer  BPE of {len(tokenizer)} tokens, trained on them")
    print(f"model      Llama with {parameters:,} random weights")


def _write_demonstrations(path: Path, questions: Sequence[Question], answers: Sequence[str]) -> None:
    rows = zip(questions, answers, strict=True)
    write_rows(path, ({"prompt": question.prompt, "completion": answer} for question, answer in rows))


def train(stage: str, folder: Folder, size: Size, seed: int) -> None:
    """Runs a stage's training, as its printed command would."""
    kind = METHODS[stage].kind if stage in METHODS else "pairs" if stage == "reward_model" else "demonstrations"
    data = "rankings" if kind == "pairs" else "demonstrations"
    start = folder.start if stage == "sft" else folder.model("sft")
    options = [
        *(
            "--config",
            size.configs.get(stage, f"demo/{stage}.yaml"),
            "--runs",
            str(folder.root),
            "--seed_everything",
            str(seed),
        ),
        *("--model.model", str(start), "--model.seed", str(seed), "--data.seed", str(seed)),
        *("--data.path", str(folder.data(data)), "--data.val_path", str(folder.data(f"{data}_held_out"))),
        *(("--model.reward.path", str(folder.model("reward_model"))) if kind == "samples" else ()),
        *size.options.get(stage, ()),
    ]
    print(f"$ python -m rlhf_lightning fit {shlex.join(options)}", flush=True)
    training.main(["fit", *options])


def rank(folder: Folder, size: Size, seed: int) -> list[Ranking]:
    """Samples candidates from the SFT model, lets the annotator rank them, and writes both files.

    Returns the held-out rankings.
    """
    tokenizer = load_tokenizer(folder.model("sft"))
    policy = Policy(load_causal_lm(folder.model("sft")), ids=token_ids(tokenizer)).eval()
    rankings: list[Ranking] = []
    for name, source, count, file_seed in (
        ("rankings", "demonstrations", size.ranked, 2 * seed),
        ("rankings_held_out", "demonstrations_held_out", size.held_out, 2 * seed + 1),
    ):
        # Draws depend on row numbers, and both files count from 0, so each file needs its own seed.
        records = load_records(str(folder.data(source)))
        records.rows = records.rows[:count]
        candidates = sample_candidates(
            policy,
            prompt_batches(records, tokenizer, batch_size=1024),
            tokenizer,
            count=size.candidates,
            max_new_tokens=MAX_NEW_TOKENS,
            temperature=TEMPERATURE,
            eos_ids=eos_ids(policy.model, tokenizer),
            seed=file_seed,
            progress=_say,
        )
        rankings = annotate(candidates, annotator(size, file_seed), gold_reward)
        write_rankings(rankings, folder.data(name))
        best = rankings[0].candidates.completions[rankings[0].ranks.index(1)]
        worst = rankings[0].candidates.completions[rankings[0].ranks.index(size.candidates)]
        print(f"{name}: {len(rankings):,} questions, {size.candidates} answers each", flush=True)
        print(f"  {rankings[0].candidates.prompt.strip()}\n  best   {best!r}\n  worst  {worst!r}", flush=True)
    return rankings


def annotator(size: Size, seed: int) -> SimulatedAnnotator:
    """The demo's annotator."""
    return SimulatedAnnotator(size.annotator_temperature, ANNOTATOR_LAPSE, seed)


def _say(done: int, total: int) -> None:
    if sys.stdout.isatty():
        print(f"\rcandidates: batch {done}/{total}", end="\n" if done == total else "", flush=True)
