"""Writes the README.md of an exported model, for people and for the hub: how it was made, and with what result.

Everything but the last metrics is gathered before the first step, since files may change later. The front matter holds
the stages as data, so that the card of a later stage (DPO after SFT) names the earlier ones.
"""

from __future__ import annotations

import hashlib
import math
import os
import platform
import re
import warnings
from importlib import metadata
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData, try_to_load_from_cache
from lightning.pytorch import Trainer

from rlhf_lightning import __version__
from rlhf_lightning.callbacks.samples import escaped
from rlhf_lightning.models.loading import eos_ids
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.modules.base import RLHFModule

_STAGES = "rlhf_lightning"  # the front matter's key
_LICENCE = ("license", "license_name", "license_link")
_CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+$")


class Card:
    """Gathers the facts before the first step. Every file of the data is read once for its hash.

    Args:
        trainer: a Trainer whose module and data are set up.
        module: the module that is trained.
    """

    def __init__(self, trainer: Trainer, module: RLHFModule) -> None:
        base = _front_matter(module.model_folder)
        known = base.get("base_model")
        self.base = known[0] if isinstance(known, list) and known else known or name_of(module.model_folder)
        self.licence = {key: base[key] for key in _LICENCE if isinstance(base.get(key), str)}
        stages = base.get(_STAGES)
        self.earlier = [stage for stage in stages if isinstance(stage, dict)] if isinstance(stages, list) else []
        self.classifies = isinstance(module.model, ScalarModel)
        self.template, self.ends = _text(module)
        self.stage = _stage(trainer, module)

    def text(self, name: str, trainer: Trainer) -> str:
        """The card of the model as it is now.

        Args:
            name: the card's title.
            trainer: the Trainer with the number of steps and the metrics.
        """
        metrics = {key: float(value) for key, value in sorted(trainer.callback_metrics.items())}
        stages = [*self.earlier, {**self.stage, "steps": trainer.global_step, "metrics": metrics}]
        facts: dict[str, Any] = {
            "base_model": str(self.base),
            "library_name": "transformers",
            "pipeline_tag": "text-classification" if self.classifies else "text-generation",
            "tags": ["rlhf-lightning", str(self.stage["method"]).removesuffix("Module").lower()],
            **self.licence,
            _STAGES: stages,
        }
        data = ModelCardData(**facts)
        auto = "AutoModelForSequenceClassification" if self.classifies else "AutoModelForCausalLM"
        lines = [
            f"# {_code(name)}",
            f"For `{auto}.from_pretrained`, made by rlhf-lightning from {_code(str(self.base))}.",
            f"Chat template: {self.template}. A response ends with {self.ends}.",
        ]
        for number, stage in enumerate(stages, 1):
            lines += [f"## {number}. {_code(str(stage.get('method')))}", *_section(stage)]
        return f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(lines) + "\n"


def name_of(model: str) -> str:
    """The name of a model in cards: its hub name, or the name of its run or folder. No path, which others lack."""
    if not Path(model).expanduser().exists():
        return model
    path = Path(model).expanduser().resolve()
    if cached := _CACHED.search(path.as_posix()):
        return "/".join(cached.groups())
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def _stage(trainer: Trainer, module: RLHFModule) -> dict[str, Any]:
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    seeds = {"seed_everything": os.environ.get("PL_GLOBAL_SEED"), "data": getattr(data, "seed", None)}
    reward: Any = getattr(module, "reward", None)
    facts = {
        "method": type(module).__name__,
        "from": name_of(module.model_folder),
        "reward": None if reward is None else _reward_name(reward),
        "data": _files(data),
        "rows": _rows(data),
        "seeds": {
            name: int(str(seed)) for name, seed in {**seeds, "model": module.seed}.items() if str(seed).isdigit()
        },
        "learning_rate": float(module.optimizer_options.learning_rate),
        "precision": str(trainer.precision),
        "lora_rank": module.lora_options.rank,
        "versions": _versions(),
    }
    return {name: fact for name, fact in facts.items() if fact is not None}


def _rows(data: Any) -> dict[str, int] | None:
    """The numbers of rows; None if a user's own DataModule keeps its rows elsewhere."""
    parts = {"trained on": getattr(data, "train", None), "held out": getattr(data, "held_out", None)}
    counts = {use: len(rows) for use, rows in parts.items() if isinstance(rows, list)}
    return counts or None


def _reward_name(reward: Any) -> str:
    path, source = getattr(reward, "path", None), getattr(reward, "source", None)
    if path is not None:
        return name_of(str(path))
    return type(reward).__name__ if source is None else str(source).rpartition("/")[2]


def _files(data: Any) -> list[dict[str, Any]]:
    """Each file with name, use and hash; a hub data set with its name and use."""
    found = []
    for use, key in (("train", "path"), ("held out", "val_path")):
        given = getattr(data, key, None)
        several = given if isinstance(given, list | tuple | dict) else []
        for path in [given] if isinstance(given, str) else several:
            if Path(path).is_file():
                with Path(path).open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256").hexdigest()
                found.append({"file": Path(path).name, "use": use, "sha256": digest})
            else:
                found.append({"file": str(path), "use": use})
    return found


def _versions() -> dict[str, str]:
    packages = ("torch", "lightning", "transformers")
    versions = {"rlhf_lightning": __version__, "python": platform.python_version()}
    return versions | {name: metadata.version(name) for name in packages}


def _text(module: RLHFModule) -> tuple[str, str]:
    """Two phrases: whether there is a chat template, and which tokens end a response."""
    tokenizer: Any = module.tokenizer
    model = module.model.model if isinstance(module.model, Policy) else None
    ends = ", ".join(f"{_code(str(tokenizer.convert_ids_to_tokens(id)))} ({id})" for id in eos_ids(model, tokenizer))
    template = tokenizer.chat_template
    named = f"{len(template)} by name" if isinstance(template, dict) else "the one that training used"
    return (f"{named}, saved with the tokenizer" if template else "none"), ends


def _front_matter(model: str) -> dict[str, Any]:
    """The front matter of the card in a folder, or of a hub model's card in the cache; empty if there is none."""
    folder = Path(model).expanduser()
    path: Any = folder / "README.md"
    if not folder.exists():
        path = try_to_load_from_cache(model, "README.md") if re.fullmatch(r"[\w.-]+/[\w.-]+", model) else None
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    try:
        return ModelCard(Path(path).read_text(encoding="utf-8"), ignore_metadata_errors=True).data.to_dict()
    except Exception as error:  # anybody may have written the text
        reason = " ".join(str(error).split())[:200]
        warnings.warn(f"{path}: its front matter cannot be read, so the new card leaves it out: {reason}", stacklevel=2)
        return {}


def _section(stage: dict[str, Any]) -> list[str]:
    """A stage's facts as tables. Values that another program wrote into a card are shown as text."""
    facts = {name: fact for name, fact in stage.items() if name not in ("data", "metrics")}
    parts = [_table(("", ""), [(name, _shown(fact)) for name, fact in facts.items()])]
    if files := [file for file in _listed(stage.get("data")) if isinstance(file, dict)]:
        keys = ("file", "use", "sha256")
        parts.append(
            _table(("data", "use", "sha256"), [tuple(_shown(file.get(key, "")) for key in keys) for file in files])
        )
    if isinstance(metrics := stage.get("metrics"), dict) and metrics:
        parts.append(
            _table(("last metrics", ""), [(_code(str(name)), _shown(value)) for name, value in metrics.items()])
        )
    return parts


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in lines)


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{escaped(str(name))} {_shown(item)}" for name, item in value.items())
    if isinstance(value, float):
        return f"{value:.6g}" if math.isfinite(value) else str(value)
    return _code(str(value)) if isinstance(value, str) else escaped(str(value))


def _code(text: str) -> str:
    """Text as Markdown code if that is safe, else as text in which everything that could be markup is escaped."""
    return f"`{text}`" if re.fullmatch(r"[\w./:@+ -]+", text) else escaped(text)
