"""Writes samples of a policy: tables for TensorBoard, and all samples to ``samples.jsonl``."""

from __future__ import annotations

import sys
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor

from rlhf_lightning.batches import DemonstrationBatch, PreferenceBatch, PromptBatch, Rollout, length_mask
from rlhf_lightning.callbacks.loop_position import steps_logged
from rlhf_lightning.callbacks.run_files import append_line, logged_step, rewind_lines, run_folder
from rlhf_lightning.callbacks.sinks import Sink
from rlhf_lightning.errors import TrainingDiverged
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.text import printable, say

# Characters that could be markup in HTML or Markdown, as entities. One pass replaces all, so none is escaped twice.
_ENTITIES = {ord(character): f"&#{ord(character)};" for character in "&<>\\`*_{}[]()#+-!|~"}


class SampleTable(Callback):
    """Writes prompts, responses and scores, and histograms of the scores and lengths.

    Modules that sample in training (PPO) pass on their rollouts, and the first rows are written every so many batches.
    Other modules with a policy answer the first held-out prompts after each validation.

    Args:
        rows: number of samples in a table.
        every_n_batches: batches from one written rollout to the next.
    """

    def __init__(self, rows: PositiveInt = 4, every_n_batches: PositiveInt = 10) -> None:
        self.rows = rows
        self.every_n_batches = every_n_batches
        self._held_out: PromptBatch | None = None
        self._drawn: tuple[Rollout, dict[str, Tensor]] | None = None  # the first rollout of a validation
        self._file, self._events = Sink("samples.jsonl"), Sink("TensorBoard's samples")
        self._answers = Sink("the table of samples")

    def on_validation_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Begins a validation, which writes one table, of its first batch, at its end."""
        self._drawn = None

    def setup(self, trainer: Trainer, pl_module: RLHFModule, stage: str) -> None:  # type: ignore[override]
        """Finds the run's folder here, since all processes must take part."""
        self.path = run_folder(trainer) / "samples.jsonl"

    def on_train_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """After a resume, removes samples later than the checkpoint, since they will be written again."""
        if trainer.ckpt_path is not None and trainer.is_global_zero:
            rewind_lines(self.path, steps_logged(trainer))

    def on_samples(self, trainer: Trainer, module: RLHFModule, rollout: Rollout, scores: dict[str, Tensor]) -> None:
        """Called by modules with a rollout and its scores, ``[B]`` by name."""
        if trainer.sanity_checking or not trainer.is_global_zero:
            return
        if trainer.training and trainer.fit_loop.epoch_loop.total_batch_idx % self.every_n_batches == 0:
            self.write(trainer, rollout, scores, "train")
        elif not trainer.training and self._drawn is None:
            self._drawn = rollout, scores

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: RLHFModule, outputs: Any, batch: Any, batch_idx: int, *args: Any
    ) -> None:
        """Stores the first prompts of a validation."""
        if batch_idx == 0 and hasattr(pl_module, "generate") and pl_module.automatic_optimization:
            self._held_out = prompts_of(batch, self.rows, pl_module.tokenizer)

    def on_validation_end(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Answers the stored prompts. Every process takes part, since the weights may be sharded."""
        prompts, self._held_out = self._held_out, None
        if self._drawn is not None:
            self.write(trainer, *self._drawn, "val")
            self._drawn = None
        if prompts is not None and not trainer.sanity_checking:
            rollout, diverged = None, None
            with self._answers:
                try:
                    answer: Any = pl_module.generate
                    rollout = answer(prompts, iteration=logged_step(trainer))
                except TrainingDiverged as error:  # the weights are lost, so this error must not be swallowed
                    diverged = error
            if diverged is not None:
                raise diverged
            if rollout is not None and trainer.is_global_zero:
                self.write(trainer, rollout, {}, "val")

    def write(self, trainer: Trainer, rollout: Rollout, scores: dict[str, Tensor], stage: str) -> None:
        """Writes one line for each sample, and one table. Writes nothing in a ``fast_dev_run``."""
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
                        # TensorBoard raises an error for empty histograms, and for numbers that are not finite.
                        if len(finite := values[values.isfinite()]):
                            logger.experiment.add_histogram(f"samples/{stage}_{name}", finite, step)

    def teardown(self, trainer: Trainer, pl_module: RLHFModule, stage: str) -> None:  # type: ignore[override]
        """Prints what could not be written."""
        for sink in (self._answers, self._file, self._events):
            if (text := sink.summary()) is not None:
                say(text, sys.stderr)


def prompts_of(batch: Any, rows: int, tokenizer: Any) -> PromptBatch | None:
    """The first prompts of a held-out batch, as a batch of prompts to answer; None for batches of other kinds."""
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
    """The rows as a Markdown table. Texts are shown as they are, and no part of them acts as markup."""
    lines = ["| " + " | ".join(rows[0]) + " |", "|" + " --- |" * len(rows[0])]
    lines += ["| " + " | ".join(escaped(str(value)) for value in row.values()) + " |" for row in rows]
    return "\n".join(lines)


def escaped(text: str) -> str:
    """Model text made safe for a Markdown table: without control characters, HTML or markup."""
    return printable(text).translate(_ENTITIES).replace("\n", "<br>")
