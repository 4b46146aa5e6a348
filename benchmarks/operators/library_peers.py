"""What other libraries ship. Each is imported from its own folder, by the one process that calls it."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import torch

from operators.inputs import GAMMA, LAM, Inputs
from operators.torch_peers import Forward


def trl_selective(inputs: Inputs) -> Forward:
    from trl.trainer.utils import selective_log_softmax

    # TRL's batches are [B, T, V], and on the CPU it loops over B.
    count, vocabulary = inputs["logits"].shape
    rows = 8 if count % 8 == 0 else 1
    logits = inputs["logits"].view(rows, count // rows, vocabulary)
    tokens = inputs["tokens"].view(rows, count // rows)
    return lambda: {"log_probs": selective_log_softmax(logits, tokens).view(-1)}


def trl_chunked(inputs: Inputs) -> Forward:
    from trl.kernels import ChunkedLogProbFunction
    from trl.trainer.utils import _CHUNKED_LOGPROB_CHUNK_SIZE as COLUMNS

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {
        "log_probs": ChunkedLogProbFunction.apply(hidden, weight, None, tokens, 1.0, COLUMNS, None, 1.0, ())[0]
    }


def verl_loop(inputs: Inputs) -> Forward:
    from verl.trainer.ppo.core_algos import compute_gae_advantage_return

    rewards, values = inputs["rewards"], inputs["values"]

    def forward() -> dict[str, torch.Tensor]:
        mask = inputs["mask"].float()  # it subtracts the mask from 1
        whitened, returns = compute_gae_advantage_return(rewards, values, mask, GAMMA, LAM)
        return {"whitened": whitened, "returns": returns}

    return forward


def liger(inputs: Inputs) -> Forward:
    from liger_kernel.transformers.functional import liger_cross_entropy

    return lambda: {"loss": liger_cross_entropy(inputs["logits"], inputs["tokens"])}


def liger_linear(inputs: Inputs) -> Forward:
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {"loss": liger_fused_linear_cross_entropy(hidden, weight, tokens)}


def apple_cce(inputs: Inputs) -> Forward:
    from cut_cross_entropy import linear_cross_entropy

    hidden, weight, tokens = inputs["hidden"], inputs["weight"], inputs["tokens"]
    return lambda: {"loss": linear_cross_entropy(hidden, weight, tokens, filter_eps=None)}


def flash(inputs: Inputs) -> Forward:
    module = _file_of("flash_attn", "ops/triton/cross_entropy.py")
    return lambda: {"loss": module.cross_entropy_loss(inputs["logits"], inputs["tokens"])[0].mean()}


def _file_of(package: str, path: str) -> ModuleType:
    """One file of a package, whose __init__ would want kernels that were not built."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No module named '{package}'")
    file = importlib.util.spec_from_file_location("one_file", Path(spec.submodule_search_locations[0]) / path)
    module = importlib.util.module_from_spec(file)
    file.loader.exec_module(module)
    return module
