"""Writes docs/architecture.md from the code: the floors, the modules' class tree, and the path of one PPO iteration.

    python docs/architecture.py

tests/test_architecture.py fails where the page is not what this writes.
"""

from __future__ import annotations

import ast
import inspect
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlhf_lightning"
PAGE = ROOT / "docs" / "architecture.md"

FLOW = """
    people -> preferences/ -> data/ --+--> modules/sft -----------------------> policy
                                      |                                            |
                                      +--> modules/reward_model -> reward model    |
                                      |                                 |          v
                                      +--> prompts -> rollout/ -> rewards/ -> modules/ppo -> evaluation/ -> report
                                      |                  ^     (algorithms/: KL, GAE; ops/: losses)
                                      |                  +------- the updated policy
                                      |
                                      +--> modules/dpo, kto, orpo, simpo: no sampling, no reward model
"""


# What people come to change, and the file that has it; a test holds that the files are there.
PLACES = {
    "the KL estimators": ("algorithms/kl.py",),
    "the KL penalty, its coefficient": ("training/kl_control.py",),
    "the normalisation and penalties of scores": ("training/shaping.py",),
    "advantages and returns": ("training/credit.py",),
    "the clipped loss": ("training/objective.py",),
    "where a critic starts": ("training/critic.py",),
    "minibatches and micro-batches": ("training/minibatches.py",),
    "the learning-rate schedule": ("training/optimizer.py",),
    "how training, validation and predict sample": ("training/sampler.py",),
    "the decode loop": ("rollout/native.py",),
    "LoRA's options; its layers": ("models/building.py", "models/lora.py"),
    "what a checkpoint holds": ("modules/base.py", "modules/on_policy.py"),
    "when checkpoints are saved, and how they lie on the disk": (
        "callbacks/checkpoints.py",
        "callbacks/checkpoint_files.py",
    ),
    "where a resumed run goes on": ("callbacks/loop_position.py",),
    "what a signal does": ("callbacks/stop_signals.py",),
    "the progress line": ("callbacks/progress.py",),
    "a form of rows that data may have": ("data/forms.py",),
    "what annotators are asked next": ("preferences/assignment.py",),
    "a way to judge answers": ("preferences/tasks.py", "preferences/page/"),
    "chat templates": ("models/template.py", "data/conversations.py"),
    "`did you mean` hints": ("cli/suggestions.py",),
    "the report of evaluate and demo": ("evaluation/present.py", "evaluation/html_report.py"),
}


def places() -> list[str]:
    """`PLACES` as a table."""
    rows = ["| to change | open |", "|---|---|"]
    for what, files in PLACES.items():
        assert all((PACKAGE / file).exists() for file in files), files
        rows.append(f"| {what} | {', '.join(f'`{file}`' for file in files)} |")
    return rows


def data_files() -> list[str]:
    """The files of data/, the largest folder, with the first sentence of each."""
    rows = ["| file | what it does |", "|---|---|"]
    for path in sorted((PACKAGE / "data").glob("*.py")):
        if path.name != "__init__.py":
            first = re.split(r"(?<=\.)\s", _told(path), maxsplit=1)[0]
            rows.append(f"| `{path.name}` | {first} |")
    return rows


def _told(path: Path) -> str:
    """The first paragraph of a file's docstring, in one line."""
    told = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return " ".join(told.split("\n\n")[0].split())


def floors() -> list[str]:
    """Each unit under its floor, with the first line of its docstring; the lowest floor first."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_structure import LAYERS

    rows = ["| floor | unit | what it is |", "|---|---|---|"]
    for number, units in enumerate(LAYERS):
        for unit in units:
            path = PACKAGE / unit / "__init__.py"
            path = path if path.exists() else PACKAGE / f"{unit}.py"
            rows.append(f"| {number} | `{unit}` | {_told(path)} |")
    return rows


def class_tree() -> list[str]:
    """The modules' classes, indented below the class that they derive from."""
    from lightning.pytorch import LightningModule

    from rlhf_lightning import modules

    classes = [getattr(modules, name) for name in modules.__all__]
    everything = {base for cls in classes for base in cls.__mro__ if issubclass(base, LightningModule)}

    def below(cls: type, depth: int) -> list[str]:
        own = (
            "" if cls is LightningModule else f"  {cls.__module__.replace('.', '/').removeprefix('rlhf_lightning/')}.py"
        )
        lines = [f"    {'  ' * depth}{cls.__name__}{own}"]
        for child in sorted((c for c in everything if cls in c.__bases__), key=lambda c: c.__name__):
            lines += below(child, depth + 1)
        return lines

    return below(LightningModule, 0)


def parts() -> list[str]:
    """The parts that a PPO module holds, with the file of each."""
    from rlhf_lightning.modules import PPOModule
    from rlhf_lightning.training.actors import Actors

    module: Any = PPOModule("model")
    held = {name: type(value) for name, value in vars(module).items() if not name.startswith("_")}
    held["actors"] = Actors  # from `configure_model` on
    rows = ["| `self.` | class | file |", "|---|---|---|"]
    for name, cls in sorted(held.items()):
        if cls.__module__.startswith(("rlhf_lightning.training", "rlhf_lightning.models")):
            rows.append(f"| `{name}` | `{cls.__name__}` | `{_file(cls)}` |")
    return rows


def iteration() -> list[str]:
    """The calls of one PPO iteration in their order, with the file that each leads to."""
    from rlhf_lightning.modules import PPOModule
    from rlhf_lightning.training.actors import Actors

    module: Any = PPOModule("model")
    known = {**vars(module), "actors": Actors}
    rows = []
    for method in (PPOModule.training_step, PPOModule.loss):
        rows += ["", f"`{method.__name__}`:", ""]
        tree = ast.parse(textwrap.dedent(inspect.getsource(method)))
        calls = sorted(
            (node for node in ast.walk(tree) if isinstance(node, ast.Call)),
            key=lambda node: (node.end_lineno or 0, node.end_col_offset or 0),
        )
        for call in calls:
            words = ast.unparse(call.func).split(".")
            if words[0] == "self" and (found := _leads_to(module, known, words[1:])):
                rows.append(f"- `{'.'.join(words)}` in `{found}`")
    return rows


def _leads_to(module: Any, known: dict[str, Any], words: list[str]) -> str | None:
    held = known.get(words[0])
    cls = held if isinstance(held, type) else type(held) if held is not None else None
    if cls is not None and cls.__module__.startswith("rlhf_lightning"):
        return _file(cls)
    owner = next((base for base in type(module).__mro__ if words[0] in vars(base)), None)
    return _file(owner) if owner is not None and owner.__module__.startswith("rlhf_lightning") else None


def _file(cls: type) -> str:
    return f"{cls.__module__.removeprefix('rlhf_lightning.').replace('.', '/')}.py"


def page() -> str:
    """The whole text."""
    return "\n".join(
        [
            "# Architecture",
            "",
            "Made from the code by `python docs/architecture.py`.",
            "",
            "## How data flows",
            FLOW,
            "## Where things are changed",
            "",
            *places(),
            "",
            "## The floors",
            "",
            "An import points to a lower floor, or stays on its own. `tests/test_structure.py` holds it.",
            "",
            *floors(),
            "",
            "## The modules",
            "",
            "At most two classes of ours stand between Lightning and a method; all else is held as a part.",
            "",
            *class_tree(),
            "",
            "What a PPO module holds:",
            "",
            *parts(),
            "",
            "## One iteration of PPO",
            "",
            "`modules/ppo.py` has it on one screen. Where its calls lead:",
            *iteration(),
            "",
            "## The files of data/",
            "",
            *data_files(),
            "",
        ]
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(PAGE)
