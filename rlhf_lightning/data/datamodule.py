"""The DataModule of every stage: the training module names the view that it wants, and this serves it in batches.

It needs a Trainer. ``batching`` has functions for evaluation and for scripts without one.
"""

from __future__ import annotations

import json
import warnings
from collections import Counter
from dataclasses import replace
from datetime import date as Date
from typing import Any, cast

from jsonargparse.typing import NonNegativeInt, PositiveInt, restricted_number_type
from lightning.pytorch import LightningDataModule
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from rlhf_lightning.batches import View
from rlhf_lightning.data.advice import for_training, repeating
from rlhf_lightning.data.choices import Kind, check_fit
from rlhf_lightning.data.collate import encoding
from rlhf_lightning.data.columns import Columns
from rlhf_lightning.data.hints import COLUMNS
from rlhf_lightning.data.ids import SpecialTokens
from rlhf_lightning.data.loader import Loader
from rlhf_lightning.data.mixing import asked_again, check_weights, file_weights
from rlhf_lightning.data.records import Records, load_records
from rlhf_lightning.data.resuming import check_resumed
from rlhf_lightning.data.split import split_by_prompt
from rlhf_lightning.data.summary import counts_text, told
from rlhf_lightning.data.tokenization import Encoder, Example, LongPrompts, LongResponses, TrainOn
from rlhf_lightning.errors import InputError, check_choice
from rlhf_lightning.models.loading import load_tokenizer
from rlhf_lightning.models.template import ChatTemplate, checked_date

_COMPARED = 2000  # most sequences whose ids are compared with the ids of their text as a whole

Fraction = restricted_number_type("Fraction", float, [(">=", 0), ("<", 1)], docstring="A number in [0, 1).")


class PreferenceDataModule(LightningDataModule):
    """Demonstrations, preference pairs, labelled responses or prompts from files, as token batches.

    ``setup`` reads, checks and tokenises everything. Batches are only padded after that, so there are no loader
    workers. A global batch is formed first, and rank r of W takes its rows ``r::W``; a rank left without rows gets a
    filler of weight 0. So a configuration gives the same batches on any number of processes. The order is a function
    of (seed, epoch), and a resumed run goes on with the batch after the checkpoint's.

    Args:
        path: the data: .jsonl, .json (each also with .gz), .csv or .parquet files, or a hub data set's name. As
            {FILE: WEIGHT}, each row of a file comes WEIGHT times in an epoch; 0.5 takes half of its rows.
        val_path: held-out data; if not given, ``validation_fraction`` of the prompts in ``path`` is held out.
        tokenizer: folder with the tokenizer; the module's model folder if not given.
        batch_size: rows in a global batch, over all processes together.
        val_batch_size: the same for validation, test and prediction; ``batch_size`` if not given.
        batch_tokens: most tokens in a global batch, padding included; long rows make smaller batches. Not for PPO.
        max_prompt_tokens: longest prompt, chat template included; null for no limit.
        max_response_tokens: longest response in the data, EOS included; null for no limit.
        long_prompts: what to do with longer prompts: refuse them, drop and count them, or cut them on the left.
        long_responses: what to do with longer responses: refuse them, or drop and count them; they are never cut.
        validation_fraction: share of the distinct prompts that is held out when there is no ``val_path``.
        chat: put plain prompts through the chat template as a user message, and transcripts as their turns.
        chat_template: file with a Jinja chat template to use in place of the tokenizer's.
        columns: the names that the rows have for our keys, as {prompt: question, completion: answer}.
        chat_template_name: which of the tokenizer's named chat templates to use; the one named default if not given.
        chat_template_kwargs: variables of the chat template, as ``{enable_thinking: false}``.
        date: today's date for chat templates that show one, as 2026-01-31; if not given, the day on which the run
            started, also when it is resumed or its checkpoint is measured.
        special_tokens: whether special tokens that texts spell stay letters (``text``) or become ``tokens``. Choose
            ``tokens`` for texts that a chat template was applied to already.
        train_on: whether every assistant turn of a conversation (``messages``) carries loss, or only the last one.
        seed: seed of the order and of the split.
    """

    def __init__(
        self,
        path: dict[str, float] | list[str] | str,
        val_path: str | list[str] | None = None,
        tokenizer: str | None = None,
        batch_size: PositiveInt = 32,
        val_batch_size: PositiveInt | None = None,
        batch_tokens: PositiveInt | None = None,
        max_prompt_tokens: PositiveInt | None = 1024,
        max_response_tokens: PositiveInt | None = 1024,
        long_prompts: LongPrompts = "error",
        long_responses: LongResponses = "error",
        validation_fraction: Fraction = 0.05,  # type: ignore[valid-type]
        chat: bool = False,
        chat_template: str | None = None,
        columns: dict[str, str] | None = None,
        chat_template_name: str | None = None,
        chat_template_kwargs: dict[str, Any] | None = None,
        date: str | None = None,
        special_tokens: SpecialTokens = "text",
        train_on: TrainOn = "all_assistant",
        seed: NonNegativeInt = 0,
    ) -> None:
        super().__init__()
        check_choice("data.long_prompts", long_prompts, LongPrompts)
        check_choice("data.long_responses", long_responses, LongResponses)
        check_choice("data.special_tokens", special_tokens, SpecialTokens)
        check_choice("data.train_on", train_on, TrainOn)
        self.weights = file_weights(path)  # by file; empty if none are given
        self.path = path if isinstance(path, str) else list(path)
        self.columns = columns
        self.val_path = val_path
        self.tokenizer_path = tokenizer
        self.batch_size = int(batch_size)
        self.val_batch_size = int(val_batch_size or batch_size)
        self.batch_tokens = batch_tokens
        self.max_prompt_tokens = max_prompt_tokens
        self.max_response_tokens = max_response_tokens
        self.long_prompts = long_prompts
        self.long_responses = long_responses
        self.validation_fraction = float(validation_fraction)
        self.chat = chat
        self.chat_template = chat_template
        self.chat_template_name = chat_template_name
        self.chat_template_kwargs = chat_template_kwargs
        self.date = checked_date(date) if date is not None else Date.today().isoformat()
        self._date_given = date is not None
        self.special_tokens = special_tokens
        self.train_on = train_on
        self.seed = int(seed)
        self.tokenizer: Any = None
        self.view: View | None = None
        # What the batches hold: the view's kind; labels if the view takes them in place of pairs; prompts to `predict`.
        self.kind: Kind = "prompts"
        self.answering = False  # for `predict`: `held_out` has every row of ``path``, with its number in the files
        self.pad_id = 0
        self.train: list[Example] = []
        self.held_out: list[Example] = []
        self.dropped: Counter[str] = Counter()  # rows or pairs left out, by reason
        self.noted: Counter[str] = Counter()  # used rows with something that users may not expect, by what it is
        self.template: ChatTemplate | None = None  # the template that renders chats
        self._read_noted: Counter[str] = Counter()  # the part of `noted` that comes from reading
        self._fingerprint = self._encoding = self._stage = ""
        self._resumed: dict[str, Any] | None = None

    # -- called by Lightning -------------------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Prepares the view that the module wants, with its tokenizer; Lightning calls it on every process.

        Raises:
            InputError: something is wrong with the data or the options.
        """
        if self.trainer is None:
            raise InputError("PreferenceDataModule.setup: needs the Trainer of a module; without one, call prepare")
        module = self.trainer.lightning_module
        if self.tokenizer is None:
            folder = self.tokenizer_path or getattr(module, "model_folder", None)
            if not isinstance(folder, str):
                raise InputError("data.tokenizer: is not set, and the module names no model folder; set it")
            self.tokenizer = load_tokenizer(
                folder, getattr(getattr(module, "network_options", None), "trust_remote_code", False)
            )
        self.date = self.trainer.strategy.broadcast(self.date)  # the same on all processes, even at midnight
        self.prepare(cast(View, module.data_view), stage=stage)

    def prepare(self, view: View, tokenizer: Any = None, stage: str = "fit") -> PreferenceDataModule:
        """Reads, checks, splits and encodes the data, as ``setup`` does, but without a Trainer.

        Args:
            view: what to serve.
            tokenizer: a Hugging Face tokenizer; needed if none was set before.
            stage: ``predict`` answers every row of ``path``; the other stages hold rows out.

        Returns: itself.
        """
        self.view, self._stage = view, stage
        self.answering = stage == "predict"
        self.kind = "prompts" if stage == "predict" else view.kind
        if tokenizer is not None:
            self.tokenizer = tokenizer
        if view.steps is not None and self.batch_tokens is not None:
            raise InputError("data.batch_tokens: has no effect on prompts to sample from; leave it out, set batch_size")
        encoder = self._encoder()
        self.pad_id, self.template, self.noted = encoder.pad_id, encoder.template, Counter()
        if self.template is not None and (self.chat_template or self.chat_template_name):
            self.tokenizer.chat_template = self.template.text  # for sampling, and for exported models
        names = Columns(self.columns)
        records = load_records(self.path, prompts=self.answering, columns=names)
        if self.kind == "prompts":
            records.check_prompts()
        self.dropped, self._read_noted = Counter(records.dropped), records.noted
        if self.kind == "pairs" and view.labels and any(row.form.labelled for row in records.rows):
            self.kind = "labels"
        if stage == "predict":
            self.train, self.held_out = [], self._encode(encoder, records, "answer", every_row=True)
            return self
        if stage == "fit" or self.val_path is None:  # before the split: the error counts all rows at fault
            check_fit(records.rows, self.kind, COLUMNS, records.read, view.soft)
        if self.val_path is not None:
            held_out = load_records(self.val_path, columns=names)
            check_fit(held_out.rows, self.kind, COLUMNS, held_out.read, view.soft)
            if stage != "fit":
                self.dropped, self._read_noted = Counter(), Counter()  # training rows are not used here
            self.dropped.update(held_out.dropped)
            self._read_noted = self._read_noted + held_out.noted
            leaks = {row.key for row in records.rows} & {row.key for row in held_out.rows}
            if leaks:
                rank_zero_warn(f"data.val_path: {len(leaks)} of its prompts are in data.path too, and so not held out")
        elif not records.rows:
            raise self._nothing_left(records, "train on")
        else:
            train, rest = split_by_prompt(records.rows, self.validation_fraction, self.seed)
            records, held_out = replace(records, rows=train), replace(records, rows=rest)
        learnt, watched = view.demonstrations == "all", view.demonstrations != "none"
        self.train = self._encode(encoder, records, "train on", learnt) if stage == "fit" else []
        for path in check_weights(self.train, self.weights) if stage == "fit" else ():
            rank_zero_warn(f"data.path: no row of {path} is left to train on, its weight has no effect")
        wanted = self.val_path is not None or self.validation_fraction > 0
        self.held_out = self._encode(encoder, held_out, "validate on", watched) if wanted else []
        if learnt and stage == "fit" and not any(example.responses for example in self.train):
            raise InputError(
                f"{', '.join(records.paths)}: no row to train on has a response, and the module learns from "
                "demonstrations beside its prompts; give rows with 'chosen' or 'completion', or set model.ptx_coef to 0"
            )
        if stage == "fit":
            self._fingerprint = records.fingerprint()
            self._encoding = encoding(self.train, self.kind)
            self._check_resumed()
        self._tell_spelled(encoder)
        losses = encoder.conversations.losses if encoder.conversations is not None else []
        looks = for_training(records.rows, self.kind == "labels") if stage == "fit" else repeating(held_out.rows)
        if stage == "fit" and view.steps is not None:
            looks += asked_again(self.train, self.weights, self.batch_size)
        for line in [*losses, *looks]:
            rank_zero_warn(f"data: {line}")
        rank_zero_info(self.summary(), extra={"in_preflight": True})
        return self

    def train_dataloader(self) -> Loader:
        """Training batches of this process. The Trainer's progress gives the epoch and the first batch."""
        return Loader(self, training=True)

    def val_dataloader(self) -> Loader | list[Any]:
        """Every held-out row once, split over the processes; an empty list if nothing is held out."""
        if self.held_out:
            return Loader(self, training=False)
        warnings.filterwarnings("ignore", "Total length of `list` across ranks is zero")  # the user asked for none
        return []

    def test_dataloader(self) -> Loader:
        """The held-out rows, as for validation."""
        return self._held_out_or_error("test on")

    def predict_dataloader(self) -> Loader:
        """Every row of ``path`` once, even if several rows have the same prompt."""
        return self._held_out_or_error("answer")

    def state_dict(self) -> dict[str, Any]:
        """Identifies the data for a checkpoint. The position in the data is not in it; the Trainer counts that."""
        return {
            "fingerprint": self._fingerprint,
            "encoding": self._encoding,
            "rows": len(self.train),
            "options": self._options(),
            "date": self.date,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Checks that the data and the batch options are still those of the checkpoint.

        Chats are then rendered with the checkpoint's date, unless another was given, in every stage.

        Raises:
            InputError: data or options changed, so the checkpoint's batch numbers would mean other rows.
        """
        self._resumed = state_dict
        then = state_dict.get("date")
        if then is None or then == self.date:
            pass
        elif not self._date_given:
            self.date = then  # a reward model's chat template may show it, too
            if self.template is not None and self.template.dated and self.view is not None:
                self.prepare(self.view, stage=self._stage)
                return
        elif self._fingerprint and self.template is not None and self.template.dated:
            raise InputError(
                f"data.date: the checkpoint was made with {then}, now it is {self.date}; set it back to resume, or "
                "start a new run from the exported model"
            )
        if self._fingerprint:
            self._check_resumed()

    # -- internals -----------------------------------------------------------------------------------------------------

    def _encoder(self) -> Encoder:
        return Encoder(
            self.tokenizer,
            chat=self.chat,
            chat_template=self.chat_template,
            chat_template_name=self.chat_template_name,
            chat_template_kwargs=self.chat_template_kwargs,
            date=self.date,
            special_tokens=self.special_tokens,
            train_on=self.train_on,
            compared=_COMPARED,
            max_prompt_tokens=self.max_prompt_tokens,
            max_response_tokens=self.max_response_tokens,
            long_prompts=self.long_prompts,
            long_responses=self.long_responses,
        )

    def _encode(
        self,
        encoder: Encoder,
        records: Records,
        purpose: str,
        demonstrations: bool = False,
        every_row: bool = False,
    ) -> list[Example]:
        examples, dropped = encoder.encode(records.rows, self.kind, demonstrations, every_row)
        self.dropped.update(dropped)
        self.noted = self._read_noted + encoder.noted
        if encoder.borders["merged"]:
            self.noted["responses whose first letters would merge with their prompts' last, kept apart"] = (
                encoder.borders["merged"]
            )
        if encoder.borders["compared"] < encoder.borders["sequences"]:
            self.noted["sequences in the sample whose tokens were checked"] = encoder.borders["compared"]
        if not examples:
            raise self._nothing_left(records, purpose)
        return examples

    def _nothing_left(self, records: Records, purpose: str) -> InputError:
        return InputError(
            f"{', '.join(records.paths)}: no {self.kind} left to {purpose} of {records.read} rows read "
            f"({counts_text(self.dropped, self.noted)}); give more rows"
        )

    def _held_out_or_error(self, purpose: str) -> Loader:
        if not self.held_out:
            raise InputError(f"no rows to {purpose}: set data.val_path, or data.validation_fraction above 0")
        return Loader(self, training=False)

    def _options(self) -> dict[str, Any]:
        names = (
            "batch_size",
            "batch_tokens",
            "max_prompt_tokens",
            "max_response_tokens",
            "long_prompts",
            "long_responses",
            "validation_fraction",
            "chat",
            "chat_template_name",
            "chat_template_kwargs",
            "special_tokens",
            "train_on",
            "seed",
        )
        weights = list(self.weights.values()) or None  # None, as in checkpoints from before weights
        return {**{name: getattr(self, name) for name in names}, "view": self.kind, "path": weights}

    def _check_resumed(self) -> None:
        if self._resumed is not None:
            check_resumed(self._resumed, self._options(), self._fingerprint, self._encoding, len(self.train))

    @property
    def longest_prompt(self) -> int:
        """Tokens of the longest prompt."""
        return max((len(example.prompt) for example in self.train + self.held_out), default=0)

    @property
    def longest_response(self) -> int:
        """Tokens of the longest response, EOS included; 0 where there is none."""
        examples = self.train + self.held_out
        return max((len(response) for example in examples for response in example.responses), default=0)

    @property
    def longest_sequence(self) -> int:
        """Tokens of the longest sequence: prompt and response, or the prompt alone where there is no response."""
        return max((width for example in self.train + self.held_out for width in example.widths), default=0)

    def summary(self) -> str:
        """One line: how much there is, and what was dropped."""
        left_out = counts_text(self.dropped, self.noted)
        return told(self.kind, len(self.train), len(self.held_out), left_out, self.answering)

    def _tell_spelled(self, encoder: Encoder) -> None:
        if not encoder.spelled:
            return
        tokens = ", ".join(json.dumps(token, ensure_ascii=False) for token, _ in encoder.spelled.most_common(3))
        count = f"data: the texts of {encoder.spelling_rows:,} rows spell special tokens ({tokens})"
        if self.special_tokens == "tokens":
            rank_zero_info(f"{count}, and are encoded as these tokens")
        else:
            rank_zero_warn(
                f"{count}, which stay text, letter by letter; if a chat template was applied to them already, set "
                "data.special_tokens to tokens, or give rows of messages"
            )
