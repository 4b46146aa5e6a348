"""Lines that a fit prints before its first step (models, data, one example as the loss sees it) and after its last."""

from __future__ import annotations

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from rlhf_lightning.callbacks.checkpoints import RunCheckpoint
from rlhf_lightning.cli.runs import Run
from rlhf_lightning.data.ids import readable
from rlhf_lightning.modules.base import RLHFModule
from rlhf_lightning.modules.reward_model import RewardModelModule
from rlhf_lightning.modules.sft import SFTModule
from rlhf_lightning.ops import extension
from rlhf_lightning.rewards.model import ModelReward
from rlhf_lightning.text import notice, printable, say

_BEGINNING, _END, _RESPONSE_SHOWN = 120, 160, 160  # characters of the prompt, then of the response


class Preflight(Callback):
    """Prints a few lines once everything is loaded, so that users see a wrong file or template before the training.

    Args:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._trained = False

    def on_fit_start(self, trainer: Trainer, pl_module: RLHFModule) -> None:  # type: ignore[override]
        """Prints the lines, on the first process."""
        if trainer.is_global_zero:
            for name, text in report(trainer, pl_module, self.folder):
                say(notice(name, text))

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Remembers that there was something to train."""
        self._trained = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Tells the user if a resumed run had nothing left to train, so that its model is unchanged."""
        if not self._trained and trainer.is_global_zero:
            line = f"{self.folder}: nothing was left to train after step {trainer.global_step:,}; to go on, raise "
            limits = "trainer.max_epochs or trainer.max_steps"
            say(notice("run", line + (limits if pl_module.automatic_optimization else "model.iterations")))


class MeasuredRows(Callback):
    """Prints which rows ``validate`` and ``test`` measure on."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Prints the line. Lightning has set up the data by now."""
        if trainer.is_global_zero:
            say(notice("data", trainer.datamodule.summary().removeprefix("data: ")))  # type: ignore[attr-defined]


def report(trainer: Trainer, module: RLHFModule, folder: Path) -> Iterable[tuple[str, str]]:
    """The lines before the first step, as pairs of heading and text."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    tokenizer = module.tokenizer
    batches = len(data.train_dataloader())
    samples = not module.automatic_optimization
    size = f"{batches:,} {'iterations' if samples else 'batches'} of {data.batch_size}{' prompts' * samples}"
    stepwise = (trainer.max_epochs or -1) < 1  # only max_steps ends the run
    repeated = "" if samples and trainer.max_epochs == 1 else f"{trainer.max_epochs} x "
    amount = f"{trainer.max_steps:,} steps, an epoch is {size}" if stepwise else f"{repeated}{size}"
    if trainer.max_steps > 0 and not stepwise:
        whole = ", to the end of an iteration" if samples else ""
        amount += f", at most {trainer.max_steps:,} optimizer steps{whole}"
    yield "run", f"{folder}: {type(module).__name__}, {amount}"
    yield "model", f"{module.model_folder}: {_sizes(module)}"
    yield (
        "tokenizer",
        f"{len(tokenizer):,} tokens, eos {tokenizer.eos_token!r} ({tokenizer.eos_token_id}), pad "
        f"{tokenizer.pad_token!r} ({tokenizer.pad_token_id}), {_template(data)}",
    )
    yield "data", data.summary().removeprefix("data: ")
    example = data.train[0]
    prompt = _both_ends(printable(readable(tokenizer, example.prompt.tolist())))
    if not example.responses:
        yield "example", f"{prompt!r} | (the policy answers)"
    sides = ("chosen", "rejected") if len(example.responses) == 2 else ("example",)
    masks = example.masks or (None,) * len(example.responses)
    for side, response, mask in zip(sides, example.responses, masks, strict=False):
        text = printable(readable(tokenizer, response.tolist()))
        count = len(response) if mask is None else f"{int(mask.sum())} of {len(response)}"
        shown = text if len(text) <= _RESPONSE_SHOWN else text[:_RESPONSE_SHOWN] + "..."
        yield side, f"{prompt!r} | {shown!r} ({count} tokens right of the bar carry the loss)"
    yield "hardware", f"{_hardware(trainer)}; operators: {_operators(trainer)}"
    saver = next((one for one in trainer.checkpoint_callbacks if isinstance(one, RunCheckpoint)), None)
    if saver is not None:
        often = f"every {saver.every_n_batches:,} {'iterations' if samples else 'batches'}"
        yield "saves", f"a checkpoint {often} (--checkpoint.every_n_batches), at a stop and at the end"


def _both_ends(prompt: str) -> str:
    """The beginning and end of a long prompt: chats begin with system message and tools, and end in the question."""
    whole = len(prompt) <= _BEGINNING + _END
    return prompt if whole else f"{prompt[:_BEGINNING]} ... {prompt[-_END:]}"


def _template(data: Any) -> str:
    """How many rows go through the chat template, so that users notice plain rows that were meant to be chats."""
    if data.template is None:
        return "no chat template"
    chats = sum(data.chat or not isinstance(example.record.prompt, str) for example in data.train)
    if chats == len(data.train):
        return "a chat template"
    rows = "no row goes" if not chats else f"{chats:,} of {len(data.train):,} rows go"
    return f"a chat template that {rows} through: plain rows do with data.chat true"


def _sizes(module: RLHFModule) -> str:
    """The number of parameters of every model, and how many of them are trained."""
    trained, total = _count(p for p in module.parameters() if p.requires_grad), _count(module.parameters())
    rest = f", {_millions(total - trained)} beside them frozen" if trained < total else ""
    sizes = [f"{_millions(trained)} parameters trained{rest}"]
    actors = getattr(module, "actors", None)
    for name, holder in (("reference", actors or module), ("reward", module)):
        frozen = getattr(holder, name, None)
        if isinstance(frozen, nn.Module) and (count := _count(frozen.parameters())):
            sizes.append(f"{name} {_millions(count)} frozen")
    return ", ".join(sizes)


def _count(parameters: Iterable[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def _millions(count: int) -> str:
    return f"{count / 1e6:,.1f} M" if count >= 1e5 else f"{count:,}"


def _hardware(trainer: Trainer) -> str:
    device = trainer.strategy.root_device.type
    processes = "1 process"
    if trainer.world_size > 1:
        processes = f"{trainer.world_size} processes ({type(trainer.strategy).__name__})"
    return f"{processes} on {device}, precision {trainer.precision}"


def _operators(trainer: Trainer) -> str:
    device = trainer.strategy.root_device.type
    paths = {name: devices.get(device) for name, devices in extension.status()["operators"].items()}
    plain = [name for name, path in paths.items() if path is None or path["path"] != "native"]
    if not plain:
        return "native"
    return ("plain PyTorch" if len(plain) == len(paths) else f"native but for {', '.join(plain)}") + " (see `info`)"


def farewell(run: Run, module: RLHFModule) -> str:
    """The lines after a fit: where its files are, and the command that may come next."""
    model = run.folder / "model"
    kind = "AutoModelForSequenceClassification" if isinstance(module, RewardModelModule) else "AutoModelForCausalLM"
    lines = {
        **({"run": run.note} if run.note and not run.goes_on else {}),
        "model": f"{model} (for {kind}.from_pretrained)",
        "curves": shlex.join(["tensorboard", "--logdir", str(run.folder.parent)]),
        "next": shlex.join(["python", "-m", "rlhf_lightning", *_next(module, str(model))]),
    }
    return "\n".join(notice(name, text) for name, text in lines.items())


def _next(module: RLHFModule, model: str) -> list[str]:
    """The next command as words. The user replaces the words in capitals."""
    if isinstance(module, SFTModule):
        return ["fit", "--config", "reward_model.yaml", "--model.model", model, "--data.path", "PAIRS"]
    if isinstance(module, RewardModelModule):
        policy = ["--model.model", module.model_folder, "--model.reward.path", model]
        return ["fit", "--config", "ppo.yaml", *policy, "--data.path", "PROMPTS"]
    reward = getattr(module, "reward", None)
    scored = ["--reward", reward.path] if isinstance(reward, ModelReward) else []
    return ["evaluate", "--policies", module.model_folder, model, "--prompts", "PROMPTS", *scored]
