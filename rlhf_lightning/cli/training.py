"""fit, validate, test and predict: LightningCLI with this library's modules, callbacks, loggers and run folders."""

from __future__ import annotations

import importlib
import inspect
import logging
import typing
import warnings
from argparse import ArgumentError
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace, set_parsing_settings
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from transformers.utils.logging import disable_progress_bar

from rlhf_lightning import modules, rewards
from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.callbacks.export import ModelExport
from rlhf_lightning.callbacks.metrics import JsonlLogger
from rlhf_lightning.callbacks.progress import RunProgress
from rlhf_lightning.callbacks.samples import SampleTable
from rlhf_lightning.callbacks.sinks import SinkGuard
from rlhf_lightning.cli.claims import claimed, cleared_up, first_process
from rlhf_lightning.cli.configs import resolve_configs, shipped_configs
from rlhf_lightning.cli.foreign import check_loggers, of_callback
from rlhf_lightning.cli.notices import Preflight, farewell, notice
from rlhf_lightning.cli.parse_errors import explain
from rlhf_lightning.cli.predictions import PredictionWriter, inputs_of
from rlhf_lightning.cli.runs import Run, Wanted, choose
from rlhf_lightning.cli.stages import check_inputs, newer_models, what_to_try
from rlhf_lightning.data.datamodule import PreferenceDataModule
from rlhf_lightning.errors import InputError
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.outputs import check_output
from rlhf_lightning.text import say

_SUBCOMMANDS = ("fit", "validate", "test", "predict")
_TRAINER_DEFAULTS = {
    "max_epochs": 1,
    "log_every_n_steps": 1,
    "use_distributed_sampler": False,  # our batch sampler already deals the rows out to the processes
    "enable_model_summary": False,  # Preflight says it in one line
}


def main(arguments: Sequence[str]) -> int:
    """Run ``fit``, ``validate``, ``test`` or ``predict`` (the first argument); 0 when it is done."""
    set_parsing_settings(config_read_mode_fsspec_enabled=False)  # a config is code: never one from the network
    resolved, paths = resolve_configs(arguments)
    _quiet()
    try:
        TrainingCLI(resolved, paths)
    except MisconfigurationException as error:
        raise InputError(str(error)) from error
    except Exception as error:
        if (said := of_callback(error)) is not None:
            raise said from error
        raise
    return 0


def _quiet() -> None:
    """Leave the terminal to what concerns the user: Preflight says the rest of what these would."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.WARNING)
    disable_progress_bar()
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*in eval mode.*", ".*instantiate_classes.*"):
        warnings.filterwarnings("ignore", message=message)


class TrainingCLI(LightningCLI):
    """Parses, builds and runs. The config decides everything; a checkpoint's hyperparameters are never read.

    Args:
        arguments: the subcommand and its options, with config files resolved.
        paths: the config files among them, for messages.
    """

    def __init__(self, arguments: Sequence[str], paths: Sequence[Path]) -> None:
        self.arguments = list(arguments)
        self.paths = list(paths)
        raise_errors = {"exit_on_error": False, "allow_abbrev": False}
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
                parser_kwargs={**raise_errors, **{name: dict(raise_errors) for name in _SUBCOMMANDS}},
                args=self.arguments,
                load_from_checkpoint_support=False,  # it would put class paths into checkpoints
            )

    # Parsing

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Our options beside LightningCLI's: the run's name, and the callbacks that can be configured."""
        parser.set_defaults({"data": {"class_path": _class_path(PreferenceDataModule)}})
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
        """Parse; whatever is wrong comes back as an InputError of one line."""
        try:
            self.config = parser.parse_args(args)
        except ArgumentError as error:
            said = explain(str(error.message), self.arguments, self.paths, self._accepted)
            way = what_to_try(self.paths) if ": required" in said else ""
            raise InputError(f"{said}; {way}" if way else said) from None
        for section in ("model", "data"):
            chosen = self.options[section]
            if chosen is not None:
                for key in _nulls_refused(_imported(chosen.class_path), dict(chosen.get("init_args", {}))):
                    raise InputError(f"{section}.{key}: null is no value for it; leave the key out to get the default")

    def _accepted(self, class_path: str | None) -> list[str]:
        """The valid keys of a class, or of the whole command where it is None; ``"classes"``: the known class names."""
        if class_path == "classes":
            return [cls.__name__ for cls in _CLASSES]
        if class_path is not None:
            return _keys_of(class_path)
        keys = list(self._subcommand_parsers[self.arguments[0]].get_defaults().keys())
        for prefix, base in (("model", RLHFModule), ("data", PreferenceDataModule)):
            for cls in (base, *(cls for cls in _CLASSES if issubclass(cls, base))):
                keys += [f"{prefix}.{key}" for key in _keys_of(_class_path(cls))]
        return list(dict.fromkeys(keys))

    def _parse_ckpt_path(self) -> None:
        """Nothing: LightningCLI lets the checkpoint's hyperparameters win over the config, and imports its class."""

    # The run's folder, loggers and callbacks

    @property
    def options(self) -> Namespace:
        """The parsed options of the subcommand."""
        return self.config[self.config.subcommand]

    def before_instantiate_classes(self) -> None:
        """Fix the run's folder and the checkpoint to start from, before anything is built."""
        self.parser.add_instantiator(_built_of_plain_numbers, object, subclasses=True)
        subcommand = self.config.subcommand
        if self.options.model is None or _imported(self.options.model.class_path) is RLHFModule:
            stages = ", ".join(name for name in shipped_configs() if "/" not in name)
            raise InputError(f"no module is chosen; add --config NAME (shipped: {stages}) or --model PPOModule")
        _check_trainer(self.options.trainer, subcommand)
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
            read = inputs_of(self.options.data.init_args, self.options.model.init_args.get("model"))
            check_output(self._predictions, "--output", [*read, *self.paths])
        self.save_config_kwargs = {"overwrite": True}

    def instantiate_classes(self) -> None:
        """Build data, model and trainer; an InputError of a constructor comes through as it is.

        The parser takes it for one of its own complaints (it is a ValueError) and wraps it in a report of many lines.
        """
        try:
            super().instantiate_classes()
        except Exception as error:
            link: BaseException | None = error
            while link is not None and not isinstance(link, InputError):
                link = link.__cause__ or link.__context__
            if link is None:
                raise
            raise link from None

    def _run_to_write(self) -> Run:
        options = self.options
        wanted = Wanted(
            root=options.runs or Path(options.trainer.default_root_dir or ".") / "runs",
            name=options.run,
            typed=any(argument.partition("=")[0] == "--run" for argument in self.arguments),
            module=options.model.class_path.rsplit(".", 1)[-1],
            checkpoint=options.ckpt_path,
            configs=self.paths,
            fresh=self.config.subcommand == "fit",
        )
        if not first_process():
            return choose(wanted, first=False)
        if wanted.fresh:
            return self.until_the_end.enter_context(claimed(wanted))
        run = choose(wanted)
        self.until_the_end.enter_context(cleared_up(run.folder))
        return run

    @property
    def folder(self) -> Path:
        """The run's folder."""
        return self.run.folder

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """The Trainer with the run's loggers before the user's own, and the callbacks that every run has."""
        given = self._get(self.config_init, "trainer").get("logger")
        own = [] if isinstance(given, bool) or given is None else given
        own = list(own) if isinstance(own, Iterable) else [own]
        loggers: list[Logger] = own
        if given is not False and self.subcommand != "predict":
            loggers = [
                EventLogger(save_dir=str(self.folder.parent), name=self.run.name, version=""),
                JsonlLogger(self.folder),
                *loggers,
            ]
        if not self.options.trainer.fast_dev_run:  # which logs nothing
            check_loggers(own)
        self.trainer_defaults["callbacks"] = self._run_callbacks()
        try:
            # Callbacks write to the first logger's folder, and without loggers to this root.
            options = {"logger": loggers or False, "default_root_dir": str(self.folder), **kwargs}
            return super().instantiate_trainer(**options)
        except (ValueError, TypeError) as error:  # how Trainer refuses an option's value
            raise InputError(f"trainer: {error}") from error

    def _run_callbacks(self) -> list[Any]:
        callbacks: list[Any] = [SinkGuard(), RunProgress()]
        if self.subcommand == "fit":
            callbacks += [Preflight(self.folder), ModelExport()]
        if self.subcommand == "predict":
            callbacks.append(PredictionWriter(self._predictions))
        return callbacks

    @property
    def _predictions(self) -> Path:
        return self.options.output or self.folder / "predictions.jsonl"

    def after_fit(self) -> None:
        """Say where everything is and what the next command may be."""
        if first_process() and not self.options.trainer.fast_dev_run:
            say(farewell(self.run, self.model))


class EventLogger(TensorBoardLogger):
    """TensorBoard's event file, and no hparams.yaml beside it: config.yaml has everything."""

    @rank_zero_only
    def save(self) -> None:
        """Write what is pending."""
        self.experiment.flush()


class SaveRunConfig(SaveConfigCallback):
    """Writes the resolved config into the run folder, without what belongs to this one run: its name, its checkpoint.

    So ``fit --config runs/NAME/config.yaml`` repeats the run in a folder of its own. It is written once data and models
    are loaded: a run that bad input stops leaves nothing behind.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, **kwargs: Any) -> None:
        config = config.clone()
        config.run = None
        config.runs = None
        config.ckpt_path = None
        super().__init__(parser, config, **kwargs)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early to write."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write; every process takes part."""
        super().setup(trainer, pl_module, "fit")


_CLASSES = (
    *(getattr(modules, name) for name in modules.__all__),
    *(getattr(rewards, name) for name in rewards.__all__),
    PreferenceDataModule,
)


def _class_path(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _imported(class_path: str) -> type:
    """The class of a path that the parser has accepted, and so imported already."""
    module, _, name = class_path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def _keys_of(class_path: str) -> list[str]:
    """The constructor's keywords, base classes included, as the parser finds them."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(_imported(class_path), "it", fail_untyped=False, instantiate=False)
    keys = parser.get_defaults().keys()  # a Namespace: iterating over it alone does not work
    return [key.removeprefix("it.") for key in keys]


def _built_of_plain_numbers(cls: type, *args: Any, **kwargs: Any) -> Any:
    """``cls(...)`` with ``PositiveFloat(0.1)`` and its like as plain numbers.

    The parser's restricted types are classes of their own. As an optimizer's option they would get into checkpoints,
    which then could not be loaded with ``weights_only=True``.
    """
    return cls(*(_plain(value) for value in args), **{name: _plain(value) for name, value in kwargs.items()})


def _plain(value: Any) -> Any:
    if isinstance(value, list):
        return [_plain(item) for item in value]
    for kind in (int, float):
        if isinstance(value, kind) and not isinstance(value, bool):
            return kind(value)
    return value


def _nulls_refused(cls: type, given: dict[str, Any]) -> list[str]:
    """Keys given as null whose type has no None: the parser lets them pass."""
    refused = []
    for init in (vars(base)["__init__"] for base in cls.__mro__ if "__init__" in vars(base)):
        for name, kind in typing.get_type_hints(init).items():
            if name in given and given[name] is None and type(None) not in typing.get_args(kind) and kind is not Any:
                refused.append(name)
        own = inspect.signature(init).parameters
        given = {name: value for name, value in given.items() if name not in own}
    return refused


def _check_trainer(options: Namespace, subcommand: str) -> None:
    """InputError for what Trainer accepts, and what would go wrong later, or wrong and unseen."""
    if options.strategy in ("fsdp", "fsdp_cpu_offload"):
        raise InputError(f"trainer.strategy: {options.strategy} is FSDP1, which cannot run PPO; use fsdp2 (fsdp.yaml)")
    if subcommand == "fit" and options.precision in ("bf16-true", "16-true"):
        raise InputError(
            f"trainer.precision: {options.precision} keeps the weights in 16 bits, where most updates round to "
            "nothing; use bf16-mixed"
        )
    if options.accumulate_grad_batches < 1:
        raise InputError(
            f"trainer.accumulate_grad_batches: expected a number from 1, got {options.accumulate_grad_batches}"
        )
