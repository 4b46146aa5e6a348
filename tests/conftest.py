"""Tiny models and tokenizers that every test may use; one thread, one seed."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings
from tiny_models import make_config, make_tokenizer
from transformers import LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerBase

settings.register_profile("any machine", deadline=None)  # a busy machine makes an example slow, not wrong
settings.load_profile("any machine")


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """Tiny tensors gain nothing from threads, and sums in one thread come out the same every time."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_rank_is_left() -> Iterator[None]:
    """Lightning leaves a fit's rank and port in the environment, where commands of later tests would take them over."""
    names = ("MASTER_ADDR", "MASTER_PORT", "WORLD_SIZE", "NODE_RANK", "LOCAL_RANK", "RANK")
    for name in names:
        os.environ.pop(name, None)
    yield
    for name in names:
        os.environ.pop(name, None)


@pytest.fixture(scope="session")
def kept_tokenizer() -> PreTrainedTokenizerBase:
    """For fixtures that live longer than a test."""
    return make_tokenizer("<pad>")


@pytest.fixture
def tiny_tokenizer() -> PreTrainedTokenizerBase:
    """Each test's own: a DataModule may set its chat template."""
    return make_tokenizer("<pad>")


@pytest.fixture
def pad_is_eos_tokenizer() -> PreTrainedTokenizerBase:
    """One of the test's own: tests add tokens to it."""
    return make_tokenizer("<eos>")


@pytest.fixture(scope="session")
def tiny_policy_dir(tmp_path_factory: pytest.TempPathFactory, kept_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "policy"
    torch.manual_seed(1)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reward_dir(tmp_path_factory: pytest.TempPathFactory, kept_tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "reward"
    torch.manual_seed(2)
    LlamaForSequenceClassification(make_config(num_labels=1)).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder
