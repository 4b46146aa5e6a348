"""Run by test_export.py: replaces a model by another one and dies, once at every step that changes the disk."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerBase

from rlhf_lightning.models import export, replacing
from rlhf_lightning.models.loading import load_causal_lm, load_tokenizer
from rlhf_lightning.models.policy import Policy


def die_at(point: int) -> None:
    """Count the steps that change something on the disk; die right before number ``point``."""
    passed = [0]

    def counted(module: Any, name: str) -> None:
        original = getattr(module, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if passed[0] == point:
                os._exit(77)
            passed[0] += 1
            return original(*args, **kwargs)

        setattr(module, name, wrapped)

    counted(export, "_write")
    counted(PreTrainedTokenizerBase, "save_pretrained")
    for name in ("mkdir", "rename", "write_text"):
        counted(Path, name)
    counted(shutil, "rmtree")
    counted(os, "link")
    counted(replacing, "flush")


def write(policy: Policy, tokenizer: Any, value: float, folder: Path) -> None:
    with torch.no_grad():
        policy.model.lm_head.weight.fill_(value)
    export.export_policy(policy, tokenizer, folder, card=f"version {value:g}")


def main() -> None:
    """Every point in a child of its own. Then the model is the old or the new one, and the next export clears up."""
    base, out = Path(sys.argv[1]), Path(sys.argv[2])
    torch.set_num_threads(1)
    policy, tokenizer = Policy(load_causal_lm(base)), load_tokenizer(base)
    found = []
    for point in range(60):
        folder = out / f"{point:02d}" / "model"
        write(policy, tokenizer, 1.0, folder)
        (folder / "notes.txt").write_text("mine")
        child = os.fork()
        if child == 0:
            die_at(point)
            write(policy, tokenizer, 2.0, folder)
            os._exit(0)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        aside = [path for path in folder.parent.glob(".model.export.old-*") if not folder.exists()]
        standing = aside[0] if aside else folder  # between two renames the old one stands beside its place
        versions = load_file(standing / "model.safetensors")["lm_head.weight"].unique().tolist()
        assert (standing / "README.md").read_text() == f"version {versions[0]:g}"
        assert len(versions) == 1 and (standing / "tokenizer.json").exists()
        found.append(versions[0])
        replacing.clear_beside(folder)
        assert [path.name for path in folder.parent.iterdir()] == ["model"], point
        assert (folder / "notes.txt").read_text() == "mine"
        if code == 0:
            assert set(found) == {1.0, 2.0} and found == sorted(found) and len(found) > 20
            return
        assert code == 77, code
    raise AssertionError("the export has more than 60 steps")


if __name__ == "__main__":
    main()
