"""A second tiny policy."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def other_policy_dir(tiny_policy_dir: Path, kept_tokenizer: PreTrainedTokenizerBase, tmp_path_factory) -> Path:
    """Another policy of the same vocabulary, so that log-ratios are not 0."""
    folder = tmp_path_factory.mktemp("other") / "policy"
    model = AutoModelForCausalLM.from_pretrained(tiny_policy_dir)
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    model.save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder
