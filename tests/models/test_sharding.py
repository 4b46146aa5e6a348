"""Two processes over gloo on the CPU: sharded models compute what unsharded ones do, in float64."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from architectures import build
from processes import fork_server
from tiny_models import make_config, make_tokenizer
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaForSequenceClassification

from rlhf_lightning.models.export import export_policy, export_scalar
from rlhf_lightning.models.layers import checkpoint_activations, decoder_layers
from rlhf_lightning.models.loading import load_scalar_model
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.scalar import ScalarModel
from rlhf_lightning.models.sharding import full_state_dict, gathered, shard, unsharded

TOKENS = torch.randint(3, 40, (4, 8), generator=torch.Generator().manual_seed(7))
LENGTHS, PROMPTS = torch.tensor([8, 6, 5, 3]), torch.tensor([3, 2, 4, 3])


def make_policy(name: str = "llama", critic: object = None, ids: list[int] | None = None) -> Policy:
    return Policy(build(name), critic, ids=ids)


def make_scalar() -> ScalarModel:
    torch.manual_seed(4)
    return ScalarModel(LlamaForSequenceClassification(make_config(num_labels=1)).double())


def total(module: nn.Module, rows: slice) -> Tensor:
    """A scalar of everything that the module puts out for some rows."""
    tokens, lengths, prompts = TOKENS[rows], LENGTHS[rows], PROMPTS[rows]
    if isinstance(module, ScalarModel):
        return module(tokens, lengths).square().sum()
    scores = module(tokens, lengths, prompts, temperature=0.8)
    values = 0.0 if scores.values is None else scores.values.square().sum()
    return scores.log_probs.sum() + 0.1 * scores.entropy.sum() + values


def compare_training(rank: int, module: nn.Module, oracle: nn.Module) -> None:
    """Each process has half of the rows; FSDP2 averages the gradients."""
    mesh = init_device_mesh("cpu", (2,))
    shard(module, mesh)
    assert all(isinstance(p, DTensor) for p in module.parameters())
    for _ in range(2):  # the second time the root has been gathered, used and freed once
        module.zero_grad()
        oracle.zero_grad()
        mine = total(module, slice(2 * rank, 2 * rank + 2))
        torch.testing.assert_close(mine, total(oracle, slice(2 * rank, 2 * rank + 2)))
        mine.backward()
        (total(oracle, slice(0, 4)) / 2).backward()
        for (name, ours), theirs in zip(module.named_parameters(), oracle.parameters(), strict=True):
            assert (ours.grad is None) == (theirs.grad is None), name
            if theirs.grad is not None:
                torch.testing.assert_close(
                    ours.grad.full_tensor(), theirs.grad, msg=lambda m, name=name: f"{name}: {m}"
                )


def train_policies(rank: int, folder: Path) -> None:
    for name, critic in (
        ("llama", None),
        ("llama", "head"),
        ("llama-tied", "head"),
        ("gemma2", None),
        ("cohere", None),
    ):
        compare_training(rank, make_policy(name, critic), make_policy(name, critic))
    holed = [i for i in range(40) if i not in (2, 10)]  # ids without a token, none of them in TOKENS
    compare_training(rank, make_policy("llama-tied", None, holed), make_policy("llama-tied", None, holed))
    checkpointed = make_policy("llama", "head").train()
    checkpoint_activations(checkpointed.model)
    compare_training(rank, checkpointed, make_policy("llama", "head"))


def train_scalar(rank: int, folder: Path) -> None:
    compare_training(rank, make_scalar(), make_scalar())


def decode_and_save(rank: int, folder: Path) -> None:
    mesh = init_device_mesh("cpu", (2,))
    oracle = make_policy("llama-tied", "head").eval()
    policy = shard(make_policy("llama-tied", "head"), mesh).eval()
    positions = torch.arange(8).expand(4, 8)
    with torch.no_grad():
        expected = oracle.decode(TOKENS, positions, DynamicCache(), LENGTHS - 1)
        torch.testing.assert_close(policy.decode(TOKENS, positions, DynamicCache(), LENGTHS - 1), expected)
        with unsharded(policy):
            assert not any(isinstance(p, DTensor) for p in policy.parameters())
            # Processes may take different numbers of steps: nothing is communicated in here.
            for _ in range(1 + rank):
                logits = policy.decode(TOKENS, positions, DynamicCache(), LENGTHS - 1)
                torch.testing.assert_close(logits, expected)
                assert not any(isinstance(p, DTensor) for p in policy.parameters())
        assert all(isinstance(p, DTensor) for p in policy.parameters())
        for name, tensor in gathered(policy):
            assert torch.equal(tensor, oracle.get_parameter(name)), name
        policy(TOKENS, LENGTHS, PROMPTS)  # leaves the root gathered
        state = full_state_dict(policy)
    if rank == 0:
        assert state.keys() == oracle.state_dict().keys()
        for name, tensor in oracle.state_dict().items():
            assert torch.equal(state[name], tensor), name
    else:
        assert state == {}
    compare_after_rollout(rank, policy, oracle)
    export_policy(policy, make_tokenizer("<pad>"), folder / "policy")
    stock = AutoModelForCausalLM.from_pretrained(folder / "policy", dtype=torch.float64)
    torch.testing.assert_close(stock(TOKENS).logits, oracle.model(TOKENS).logits)


def compare_after_rollout(rank: int, policy: Policy, oracle: Policy) -> None:
    """A step after a rollout sees the new weights, in training and in the next rollout."""
    for module in (policy, oracle):
        rows = slice(2 * rank, 2 * rank + 2) if module is policy else slice(0, 4)
        optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
        (total(module, rows) / (1 if module is policy else 2)).backward()
        optimizer.step()
    with torch.no_grad(), unsharded(policy):
        torch.testing.assert_close(total(policy, slice(0, 4)), total(oracle, slice(0, 4)))


def save_scalar(rank: int, folder: Path) -> None:
    scalar = shard(make_scalar(), init_device_mesh("cpu", (2,)))
    scalar.set_normalisation(0.5, 2.0)
    export_scalar(scalar, make_tokenizer("<eos>"), folder / "reward")
    again = ScalarModel(load_scalar_model(folder / "reward", fresh_head=False, dtype=torch.float64))
    with torch.no_grad():
        torch.testing.assert_close(again(TOKENS, LENGTHS), scalar(TOKENS, LENGTHS))


def run(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    store = torch.distributed.FileStore(str(folder / "store"), 2)
    torch.distributed.init_process_group("gloo", store=store, rank=rank, world_size=2)
    try:
        for work in (train_policies, train_scalar, decode_and_save, save_scalar):
            work(rank, folder)
    finally:
        torch.distributed.destroy_process_group()


def test_two_processes(tmp_path: Path) -> None:
    # One pair of processes for all: starting them takes longer than the work. A failure's traceback names its function.
    fork_server()
    mp.start_processes(run, args=(tmp_path,), nprocs=2, start_method="forkserver")


def test_unsharded_modules_pass_through() -> None:
    policy = make_policy("llama", "head")
    with unsharded(policy):
        assert not isinstance(policy, FSDPModule)
    state = full_state_dict(policy)
    assert state.keys() == policy.state_dict().keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in policy.state_dict().items())


@pytest.mark.parametrize(("name", "expected"), [("llama", "layers"), ("gpt2", "h"), ("gemma3", "layers")])
def test_decoder_layers_are_found(name: str, expected: str) -> None:
    found, layers = decoder_layers(build(name).base_model)
    assert found == expected and len(layers) == 3
