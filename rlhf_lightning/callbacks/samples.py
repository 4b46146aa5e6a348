"""What the policy says: a table of samples in TensorBoard, and all of them in ``samples.jsonl``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch, Rollout, length_mask
from rlhf_lightning.callbacks.run_files import append_line, logged_step, rewind_lines, run_folder
from rlhf_lightning.callbacks.sinks import Sink
from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.text import printable, say

# Everything that HTML or Markdown could take for markup, as entities; one pass, so that no entity is escaped again.
_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "&<>\\`*_{}[]()#+-!|~"}


class SampleTable(Callback):
    """Writes prompts, responses and scores, and histograms of the scores and lengths.

    A module that samples in training (PPO) hands over its rollouts; every so many batches the first rows are written.
    Other modules with a policy answer the first held-out prompts after each validation.

    Args:
        rows: how many samples a table has.
        every_n_batches: how often a rollout is written.
    """

    def __init__(self, rows: PositiveInt = 4, every_n_batches: PositiveInt = 10) -> None:
        self.rows = rows
        self.every_n_batches = every_n_batches
        self._held_out: PromptBatch | None = None
        self._validated = False  # whether this validation's table is written
        self._file, self._events = Sink("samples.jsonl"), Sink("TensorBoard's samples")
        self._answers = Sink("the table of samples")

    def on_validation_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """A validation has one table, of its first batch."""
        self._validated = False

    def setup(self, trainer: Trainer, pl_module: RLHFModule, stage: str) -> None:  # type: ignore[override]
        """Find the run's folder, while all processes are here."""
        self.path = run_folder(trainer) / "samples.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """After a resume the samples logged later than the checkpoint are written again."""
        if trainer.ckpt_path is not None and trainer.is_global_zero:
            rewind_lines(self.path, logged_step(trainer))

    def on_samples(self, trainer: Trainer, module: RLHFModule, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """A module hands over a rollout, with scores ``[B]`` by name."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.training and trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_batches == 0:
            self.write(trainer, rollout, scores, "train")
        elif not trainer.training and not self._validated:
            self._validated = True
            self.write(trainer, rollout, scores, "val")

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: RLHFModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Keep the first prompts."""
        if batch_idx == 0 and hasattr(pl_module, "generate") and pl_module.automatic_optimization:
            self._held_out = prompts_of(batch, self.rows, pl_module.tokenizer)

    def on_validation_end(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Answer them; every process takes part, as sharded weights ask for."""
        prompts, self._held_out = self._held_out, None
        if prompts is not None and not trainer.sanity_checking:
            rollout, diverged = None, None
            with self._answers:
                try:
                    answer: Any = pl_module.generate
                    rollout = answer(prompts, iteration=logged_step(trainer))
                except TrainingDiverged as error:  # no fault of the table's: the weights are lost
                    diverged = error
            if diverged is not None:
                raise diverged
            if rollout is not None and trainer.is_global_zero:
                self.write(trainer, rollout, {}, "val")

    def write(self, trainer: Trainer, rollout: Rollout, scores: dict[str, Tensor], stage: str) -> None:
        """One line a sample, and one table; nothing in a ``fast_dev_run``, which is to leave nothing."""
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        step = logged_step(trainer)
        samples = []
        for index in (rollout.prompts.weights > 0).nonzero()[: self.rows, 0].tolist():
            sample = {
                "prompt": rollout.prompts.prompts[index],
                "response": rollout.responses[index],
                "tokens": int(rollout.response_lengths[index]),
                "truncated": bool(rollout.truncated[index]),
                **{name: round(float(values[index]), 4) for name, values in scores.items()},
            }
            row = {"step": step, "stage": stage, "row": int(rollout.prompts.rows[index]), **sample}
            with self._file:
                append_line(self.path, row)
            samples.append(sample)
        present = rollout.prompts.weights > 0
        distributions = {"length": rollout.response_lengths[present].float()}
        distributions |= {name: values[present] for name, values in scores.items()}
        for logger in trainer.loggers:
            if samples and isinstance(logger, TensorBoardLogger) and not self._events.given_up:
                with self._events:
                    logger.experiment.add_text(f"samples/{stage}", markdown_table(samples), step)
                    for name, values in distributions.items():
                        # A histogram of no number, or with one that is not finite, is an error to TensorBoard.
                        if len(finite := values[values.isfinite()]):
                            logger.experiment.add_histogram(f"samples/{stage}_{name}", finite, step)

    def teardown(self, trainer: Trainer, pl_module: RLHFModule, stage: str) -> None:  # type: ignore[override]
        """Say what could not be written."""
        for sink in (self._answers, self._file, self._events):
            if (text := sink.summary()) is not None:
                say(text, sys.stderr)


def prompts_of(batch: Any, rows: int, tokenizer: Any) -> PromptBatch | None:
    """The first prompts of a held-out batch, as a batch to be answered."""
    side = batch.chosen if isinstance(batch, PreferenceBatch) else batch
    if not isinstance(side, DemonstrationBatch):
        return None
    lengths = side.prompt_lengths[:rows]
    width = int(lengths.max())
    tokens = side.tokens[:rows, :width] * length_mask(lengths, width)
    return PromptBatch(
        tokens=tokens,
        lengths=lengths,
        rows=torch.arange(len(lengths), device=lengths.device),
        weights=batch.weights[:rows],
        prompts=[
            tokenizer.decode(row[:length].tolist(), skip_special_tokens=True)
            for row, length in zip(tokens, lengths.tolist(), strict=True)
        ],
        columns={},
    )


def markdown_table(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table in which every text shows as it is and can do nothing."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(escaped(str(value)) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Model text for a Markdown table: no control characters, no HTML, no markup."""
    return printable(text).translate(_ENTITIES).replace("\n", "<br>")
