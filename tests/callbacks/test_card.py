"""The card of an exported model: true, readable by the hub's own parser, and safe to show."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard
from tiny_models import make_tokenizer

from rlhf_lightning.callbacks.card import Card, name_of
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.modules.dpo import DPOModule
from rlhf_lightning.modules.sft import SFTModule

METRICS = {"val/loss": torch.tensor(1.25), "val/nan": torch.tensor(float("nan"))}


def trainer(data: Any, metrics: dict[str, Any] | None = None) -> Any:
    found = METRICS if metrics is None else metrics
    return SimpleNamespace(datamodule=data, precision="32-true", global_step=7, callback_metrics=found)


def module(kind: type, folder: Path) -> Any:
    made = kind(str(folder), seed=5)
    made.tokenizer = make_tokenizer("<pad>")
    made.policy = Policy(load_causal_lm(folder))
    return made


@pytest.fixture
def base(tmp_path: Path, tiny_policy_dir: Path) -> Path:
    """A folder with a card of its own."""
    folder = shutil.copytree(tiny_policy_dir, tmp_path / "runs" / "tiny" / "model")
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: mine\nbase_model: owner/root\n---\n# Hello\n")
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Any:
    (tmp_path / "pairs.jsonl").write_text("rows")
    (tmp_path / "val.jsonl").write_text("others")
    paths = [str(tmp_path / "pairs.jsonl"), "owner/hub_set"]
    return SimpleNamespace(path=paths, val_path=str(tmp_path / "val.jsonl"), seed=3, train=[1, 2], held_out=[1])


def test_a_card_says_what_a_model_is_made_of(base: Path, data: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)  # a command that ran before may have set it
    made = trainer(data)
    text = Card(made, module(SFTModule, base)).text("sft", made)
    front = yaml.safe_load(text.split("---\n")[1])
    assert front["base_model"] == "owner/root" and front["library_name"] == "transformers"
    assert (front["license"], front["license_name"]) == ("other", "mine")
    assert {"rlhf-lightning", "sft"} <= set(front["tags"]) and front["pipeline_tag"] == "text-generation"
    (stage,) = front["rlhf_lightning"]
    assert (stage["method"], stage["from"], stage["steps"], stage["seeds"]) == (
        "SFTModule",
        "tiny",
        7,
        {"data": 3, "model": 5},
    )
    assert stage["rows"] == {"trained on": 2, "held out": 1}
    assert stage["data"] == [
        {"file": "pairs.jsonl", "use": "train", "sha256": hashlib.sha256(b"rows").hexdigest()},
        {"file": "owner/hub_set", "use": "train"},
        {"file": "val.jsonl", "use": "held out", "sha256": hashlib.sha256(b"others").hexdigest()},
    ]
    assert stage["metrics"]["val/loss"] == 1.25 and {"torch", "transformers"} <= stage["versions"].keys()
    assert "| `val/loss` | 1.25 |" in text and "| `val/nan` | nan |" in text
    assert "A response ends with &#60;eos&#62; (1)" in text
    assert str(base.parent) not in text
    assert ModelCard(text).data.base_model == "owner/root"  # the hub's own parser takes it, all metadata too


def test_the_next_stage_names_the_one_before(base: Path, data: Any, tmp_path: Path) -> None:
    made = trainer(data)
    first = Card(made, module(SFTModule, base)).text("sft", made)
    sft = shutil.copytree(base, tmp_path / "runs" / "sft" / "model")
    (sft / "README.md").write_text(first)
    second = Card(made, module(DPOModule, sft)).text("dpo", made)
    front = ModelCard(second).data.to_dict()
    assert [(s["method"], s["from"]) for s in front["rlhf_lightning"]] == [("SFTModule", "tiny"), ("DPOModule", "sft")]
    assert front["base_model"] == "owner/root" and front["license"] == "other"
    assert second.index("## 1. `SFTModule`") < second.index("## 2. `DPOModule`")


def test_texts_of_others_are_shown_as_text(base: Path, tmp_path: Path) -> None:
    evil = "a|b<img src=x>\n# title`"
    stages = [{"method": evil, "data": [{"file": evil}, 3], "metrics": {evil: evil}, "x": [evil]}, "no stage"]
    (base / "README.md").write_text(f"---\nrlhf_lightning: {json.dumps(stages)}\nlicense: [odd]\n---\n")
    (tmp_path / "a|b.jsonl").write_text("")
    data = SimpleNamespace(path=str(tmp_path / "a|b.jsonl"), train=[], held_out=[])
    made = trainer(data, {evil: torch.tensor(1.0)})
    text = Card(made, module(SFTModule, base)).text(evil, made)
    body = text.split("\n---\n", 1)[1]
    assert "<img" not in body and "\n# title" not in body and "a|b" not in body
    assert "license" not in yaml.safe_load(text.split("---\n")[1])


def test_a_card_that_cannot_be_read_is_said(base: Path, data: Any) -> None:
    (base / "README.md").write_text("---\nlicense: [mit\n---\n")
    made = trainer(data)
    with pytest.warns(UserWarning, match="its front matter cannot be read"):
        card = Card(made, module(SFTModule, base))
    assert ModelCard(card.text("sft", made)).data.base_model == "tiny"


def test_models_are_named_without_paths(tmp_path: Path) -> None:
    snapshot = tmp_path / "models--owner--name" / "snapshots" / "0123abc"
    for folder in (snapshot, tmp_path / "sft-2" / "model", tmp_path / "llama"):
        folder.mkdir(parents=True)
    names = [name_of(str(p)) for p in (snapshot, tmp_path / "sft-2" / "model", tmp_path / "llama", Path("owner/far"))]
    assert names == ["owner/name", "sft-2", "llama", "owner/far"]


def test_a_folder_without_a_card_is_no_name_of_the_hub(
    tmp_path: Path, tiny_policy_dir: Path, data: Any, monkeypatch: Any
) -> None:
    shutil.copytree(tiny_policy_dir, tmp_path / "my--runs" / "start")
    monkeypatch.chdir(tmp_path)
    made = trainer(data)
    text = Card(made, module(SFTModule, Path("my--runs/start"))).text("sft", made)
    assert ModelCard(text).data.base_model == "start"
