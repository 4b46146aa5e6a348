"""fit, validate, test and predict: LightningCLI with this library's modules, callbacks, loggers and run folders."""

from __future__ import annotations

import logging
import shlex
import sys
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import Namespace, set_parsing_settings
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from transformers.utils.logging import disable_progress_bar

from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.event_log import EventLogger
from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.model_export import ModelExport
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.callbacks.sinks import SinkGuard
from rlhf_lightning.cli import foreign
from rlhf_lightning.cli.arguments import ordered, repeats, split
from rlhf_lightning.cli.claims import claimed, cleared_up, first_process
from rlhf_lightning.cli.classes import (
    CLASSES,
    SHORT_NAMES,
    built_of_plain_numbers,
    class_path,
    imported,
    keys_of,
    resolved,
)
from rlhf_lightning.cli.config_layers import Layers, lay
from rlhf_lightning.cli.configs import no_module, resolve_configs
from rlhf_lightning.cli.notices import MeasuredRows, Preflight, farewell
from rlhf_lightning.cli.nulls import refused_values
from rlhf_lightning.cli.parse_errors import explain, refusal
from rlhf_lightning.cli.predictions import PredictionWriter, inputs_of
from rlhf_lightning.cli.runs import Run, Wanted, choose, free
from rlhf_lightning.cli.seeds import follow_seed_everything
from rlhf_lightning.cli.stage_inputs import check_inputs, newer_models, what_to_try
from rlhf_lightning.cli.trainer_options import fit_trainer
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.distributed import ending_together, leave_group
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.outputs import check_output
from rlhf_lightning.text import PACKAGE, notice, plain_warnings, say

_TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,  # our batches are split over the processes already
    "enable_model_summary": False,  # Preflight has one line for it
}


def main(arguments: Sequence[str]) -> int:
    """Runs ``fit``, ``validate``, ``test`` or ``predict`` (the first argument). Returns 0 when it is done."""
    set_parsing_settings(config_read_mode_fsspec_enabled=False)  # configs are like code: none from the network
    resolved, paths = resolve_configs(arguments)
    _quiet()
    try:
        TrainingCLI(resolved, paths)
    except Exception as error:
        if (said := foreign.explained(error)) is not None:
            raise said from error
        raise
    leave_group()
    return 0


def _quiet() -> None:
    """Silences lines that do not concern the user. Preflight prints the important part of them."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        for handler in logging.getLogger(name).handlers:
            handler.addFilter(_concerns_the_user)
    plain_warnings()
    disable_progress_bar()
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*in eval mode.*", ".*instantiate_classes.*"):
        warnings.filterwarnings("ignore", message=message)


def _concerns_the_user(record: logging.LogRecord) -> bool:
    """Whether a line is a warning, or a line of this library that Preflight does not print."""
    ours = Path(record.pathname).is_relative_to(PACKAGE) and not getattr(record, "in_preflight", False)
    return ours or record.levelno >= logging.WARNING


class TrainingCLI(LightningCLI):
    """Parses the options, builds the objects and runs. A checkpoint's hyperparameters are never read, only the config.

    Args:
        arguments: the subcommand and its options, with config files resolved.
        paths: the config files among them, for messages.
    """

    def __init__(self, arguments: Sequence[str], paths: Sequence[Path]) -> None:
        self.arguments = list(arguments)
        self.paths = list(paths)
        self.layers = self._arranged()
        settings = {"exit_on_error": False, "allow_abbrev": False}
        with ExitStack() as self.until_the_end:
            super().__init__(
                RLHFModule,
                PreferenceDataModule,
                subclass_mode_model=True,
                subclass_mode_data=True,
                auto_configure_optimizers=False,  # modules create their optimizers after the weights exist
                save_config_callback=SaveRunConfig,
                seed_everything_default=0,
                trainer_defaults=dict(_TRAINER_DEFAULTS),
                parser_kwargs={"prog": "python -m rlhf_lightning", **settings, self.arguments[0]: dict(settings)},
                args=[self.arguments[0], *self.layers.arguments],
                load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            )

    # Parsing

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]  # a static method in LightningCLI
        """Only the subcommand that was asked for, since each parser takes a tenth of a second to build."""
        return {self.arguments[0]: LightningCLI.subcommands()[self.arguments[0]]}

    def _arranged(self) -> Layers:
        """The command line for the parser: sorted, with the seeds that follow from ``seed_everything``."""
        given = split(self.arguments[1:])
        options = [option for option in given if option.key != "config"]
        layers = lay(self.paths, ordered(options), resolved, keys_of)
        layers.notes += [
            f"--{option.key} is given again later, so {option.value} is not used" for option in repeats(options)
        ]

        def has_seed(section: str) -> bool:
            cls = resolved(layers.classes.get((section,), PreferenceDataModule.__name__ if section == "data" else ""))
            return cls is not None and "seed" in keys_of(cls)

        follow_seed_everything(layers, has_seed)
        asked = {option.key.rsplit(".", 1)[-1] for option in given} & {"h", "help", "print_config"}
        if ("model",) not in layers.classes and not asked and not layers.given(("model",)):
            raise no_module(self.arguments)
        return layers

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Adds our options to LightningCLI's: the run's name, and two callbacks that can be configured."""
        parser.set_defaults({"data": {"class_path": class_path(PreferenceDataModule)}})
        parser.add_argument(
            "--run",
            type=str | None,
            default=None,
            help="Name of the run folder, runs/NAME. Default: module and time.",
        )
        parser.add_argument(
            "--runs",
            type=Path | None,
            default=None,
            help="Folder of the run folders. Default: runs in default_root_dir.",
        )
        parser.add_lightning_class_args(RunCheckpoint, "checkpoint")
        parser.add_lightning_class_args(SampleTable, "samples")

    def _prepare_subcommand_parser(self, klass: type, subcommand: str, **kwargs: Any) -> LightningArgumentParser:
        parser = super()._prepare_subcommand_parser(klass, subcommand, **kwargs)
        if subcommand == "predict":
            parser.set_defaults({"return_predictions": False})
            help = "Where the responses go. Default: runs/<run>/predictions.jsonl."
            parser.add_argument("--output", type=Path | None, default=None, help=help)
        return parser

    def parse_arguments(self, parser: LightningArgumentParser, args: Any) -> None:
        """Parses the arguments. Any error becomes an InputError of one line."""
        for name, subparser in self._subcommand_parsers.items():
            subparser.prog = f"python -m rlhf_lightning {name}"
        if any(".help" in argument for argument in self.arguments):  # a class's help takes the program's name from here
            sys.argv[0] = f"python -m rlhf_lightning {self.arguments[0]}"
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            said = explain(str(error.message), self.arguments, self.paths, self._accepted)
            way = what_to_try(self.paths) if ": required" in said and said.startswith(("model", "data")) else ""
            raise InputError(f"{said}; {way}" if way else said) from None
        sections: dict[str, tuple[type | None, Any]] = {
            "trainer": (Trainer, self.options.trainer),
            "checkpoint": (RunCheckpoint, self.options.checkpoint),
            "samples": (SampleTable, self.options.samples),
        }
        for name in ("model", "data"):
            if (chosen := self.options[name]) is not None:
                sections[name] = (resolved(chosen.class_path), chosen.get("init_args", Namespace()))
        for name, (cls, values) in sections.items():
            if not isinstance(values, Namespace):
                raise InputError(f"{name}: expected its options as `key: value` lines, got {values}")
            for said in refused_values(cls, values, name, resolved) if cls is not None else ():
                raise InputError(said)
        if self.options.seed_everything is None:
            raise InputError("seed_everything: null is no value for it; give a number, true or false")

    def _accepted(self, cls: str | None) -> list[str]:
        """The valid keys of a class, or of the whole command for None. For ``"classes"``: the known class names."""
        if cls == "classes":
            return SHORT_NAMES
        if cls is not None:
            return keys_of(imported(cls))
        keys = list(self._subcommand_parsers[self.arguments[0]].get_defaults().keys())
        for prefix, base in (("model", RLHFModule), ("data", PreferenceDataModule)):
            for known in (base, *(known for known in CLASSES if issubclass(known, base))):
                keys += [f"{prefix}.{key}" for key in keys_of(known)]
        return list(dict.fromkeys(keys))

    def _parse_ckpt_path(self) -> None:
        """Does nothing. LightningCLI would import the checkpoint's class and prefer its options to the config's."""

    def _set_seed(self) -> None:
        """Sets the seed. For ``true``, LightningCLI draws it here; data and module then get it like a given number."""
        drawn = self.options.seed_everything is True
        super()._set_seed()
        for section in ("data", "model") if drawn and self.options.model is not None else ():
            init_args = self.options[section].get("init_args", Namespace())
            if "seed" in init_args and not self.layers.given((section, "seed")):
                init_args.seed = self.options.seed_everything

    # The run's folder, loggers and callbacks

    @property
    def options(self) -> Namespace:
        """The parsed options of the subcommand."""
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Chooses the run's folder and the checkpoint to start from, before anything is built."""
        self.parser.add_instantiator(built_of_plain_numbers, object, subclasses=True)
        subcommand = self.config.subcommand
        if self.options.model is None or imported(self.options.model.class_path) is RLHFModule:
            raise no_module(self.arguments)
        module = imported(self.options.model.class_path)
        epochs_given = bool(self.layers.given(("trainer", "max_epochs")))
        self.layers.notes += fit_trainer(self.options.trainer, module, subcommand, epochs_given)
        if first_process():
            for note in self.layers.notes:
                say(notice("note", note))
        self._check_that_it_can_be_written()
        if self.options.get("weights_only") is False:
            raise InputError(
                "--weights_only false: a checkpoint read so can run any code, and none of this library's needs it; "
                "leave the option out"
            )
        read_from = self.options.clone().as_dict()
        check_inputs(read_from)
        self.run = self._run_to_write()
        if self.run.checkpoint is not None:
            self.options.ckpt_path = str(self.run.checkpoint)
        if first_process():
            notes = [("run", self.run.note)] if self.run.note else []
            for heading, text in [*notes, *(("note", line) for line in newer_models(read_from))]:
                say(notice(heading, text))
        if subcommand == "predict":
            if not hasattr(module, "generate"):
                raise InputError(f"{module.__name__} has no policy to answer prompts with; use a policy's module")
            if self._predictions.suffix.lower() not in (".jsonl", ".json", ".ndjson", ""):
                raise InputError(f"--output {self._predictions}: JSON lines are written, one a row; name a .jsonl file")
            read = inputs_of(self.options.data.init_args, self.options.model.init_args.get("model"))
            check_output(self._predictions, "--output", [*read, *self.paths])
        self.save_config_kwargs = {"overwrite": True}

    def _check_that_it_can_be_written(self) -> None:
        """Raises an InputError if the run's config cannot be written: YAML cannot hold some of Lightning's defaults."""
        try:
            self._parser(self.config.subcommand).dump(self.options, skip_none=False)
        except ValueError as error:
            value = str(error).rpartition("Given value: ")[2].strip()
            raise InputError(
                f"config.yaml cannot hold {value}; give the value in angle brackets as plain text, or leave it out"
            ) from error

    def instantiate_classes(self) -> None:
        """Builds data, model and trainer. Of an InputError of a constructor only the class's name is changed.

        The parser takes it for an error of its own, since it is a ValueError, and wraps it in a report of many lines.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            if (refused := refusal(error, imported(self.options.model.class_path))) is None:
                raise
            raise refused from None
        if self.subcommand == "fit":
            foreign.check_monitors(self.trainer.callbacks, self.model)  # type: ignore[attr-defined]

    def _run_to_write(self) -> Run:
        options = self.options
        wanted = Wanted(
            root=options.runs or Path(options.trainer.default_root_dir or ".") / "runs",
            name=options.run,
            typed=any(argument.partition("=")[0] == "--run" for argument in self.arguments),
            module=options.model.class_path.rsplit(".", 1)[-1],
            checkpoint=options.ckpt_path,
            configs=self.paths,
            fresh=self.config.subcommand == "fit" and not options.trainer.fast_dev_run,  # it leaves no files
            model=options.model.init_args.get("model"),
            command=shlex.join(self.arguments),
        )
        if wanted.fresh and first_process():
            return self.until_the_end.enter_context(claimed(wanted))
        run = choose(wanted, first=first_process())
        if self.config.subcommand in ("validate", "test"):
            run = run.within(self.config.subcommand)
        if first_process():
            self.until_the_end.enter_context(cleared_up(run.folder))
        return run

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run's loggers, then the user's, and with the callbacks that every run has."""
        given = self._get(self.config_init, "trainer").get("logger")
        users = [] if isinstance(given, bool) or given is None else given
        users = list(users) if isinstance(users, Iterable) else [users]
        loggers: list[Logger] = users
        if given is not False and self.subcommand != "predict":
            loggers = [
                EventLogger(save_dir=str(self.folder.parent), name=self.run.name, version=""),
                JsonlLogger(self.folder),
                *loggers,
            ]
        if not self.options.trainer.fast_dev_run:  # it logs nothing
            foreign.check_loggers(users)
        self.trainer_defaults["callbacks"] = self._run_callbacks()
        try:
            # Callbacks write to the first logger's folder, or to this root if there are no loggers.
            options = {"logger": loggers or False, "default_root_dir": str(self.folder), **kwargs}
            trainer = super().instantiate_trainer(**options)
        except (ValueError, TypeError, ImportError) as error:  # how Trainer refuses an option's value
            raise InputError(f"trainer: {error}") from error
        given = not isinstance(self.options.trainer.strategy, str)
        self.until_the_end.enter_context(ending_together(trainer, own_timeout=given))
        return trainer

    def _instantiate_trainer(self, config: dict[str, Any], callbacks: list[Callback]) -> Trainer:
        left_out: tuple[type, ...] = (RunCheckpoint,) if config["enable_checkpointing"] is False else ()
        if config["fast_dev_run"]:  # it leaves no files
            left_out = (RunCheckpoint, SampleTable)
        callbacks = [callback for callback in callbacks if not isinstance(callback, left_out)]
        return super()._instantiate_trainer(config, callbacks)

    def _run_callbacks(self) -> list[Any]:
        callbacks: list[Any] = [SinkGuard()]
        given = self._get(self.config_init, "trainer").get("callbacks") or []
        bars = any(isinstance(callback, ProgressBar) for callback in (given if isinstance(given, list) else [given]))
        if self.options.trainer.enable_progress_bar is not False and not bars:
            callbacks.append(RunProgress())
        if self.subcommand == "fit":
            return [*callbacks, Preflight(self.folder), foreign.CheckMonitors(), ModelExport()]
        if self.subcommand == "predict":
            return [*callbacks, PredictionWriter(self._predictions)]
        return [*callbacks, MeasuredRows()]

    @property
    def _predictions(self) -> Path:
        return self.options.output or free(self.folder / "predictions.jsonl")

    def after_fit(self) -> None:
        """Prints where everything is, and what the next command may be."""
        if first_process() and not self.options.trainer.fast_dev_run:
            say(farewell(self.run, self.model))


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder, without the run's name and checkpoint.

    So ``fit --config runs/NAME/config.yaml`` repeats the run in a new folder. The config is written once data and
    models are loaded, so that a run with bad input leaves nothing behind.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        config.run = None
        config.runs = None
        config.ckpt_path = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Does nothing, since it is too early to write."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Writes the config, with the date that chats show, if anything is left to train. Every process takes part."""
        data = getattr(trainer, "datamodule", None)
        if isinstance(data, PreferenceDataModule) and data.template is not None and data.template.dated:
            self.config.data.init_args.date = data.date
        super().setup(trainer, pl_module, "fit")
