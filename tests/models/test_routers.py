"""The load-balancing loss of a pass: against one written out by hand, however the rows are put to the trunk."""

from __future__ import annotations

import pytest
import torch
from architectures import build
from torch import Tensor
from transformers import PreTrainedModel

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.routers import find_routers

# Rows 0 and 1 begin alike; what is past a row's length is padding.
TOKENS = torch.tensor([[5, 6, 7, 8, 9, 10], [5, 6, 7, 11, 0, 0], [12, 13, 0, 0, 0, 0]])
LENGTHS, PROMPTS = torch.tensor([6, 4, 2]), torch.tensor([2, 2, 1])


def asking() -> PreTrainedModel:
    model = build("mixtral")
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.1
    return model


def by_hand(model: PreTrainedModel, rows: list[int]) -> Tensor:
    """Tokens one by one: E times the sum over experts of the share of tokens and the mean probability."""
    chosen, probabilities = torch.zeros(4, dtype=torch.float64), torch.zeros(4, dtype=torch.float64)
    tokens = 0
    for row in rows:
        for layer in model.base_model(TOKENS[row : row + 1, : LENGTHS[row]], output_router_logits=True).router_logits:
            for logits in layer:
                probabilities = probabilities + logits.softmax(0)
                chosen[logits.topk(2).indices] += 1
                tokens += 1
    return 4 * (chosen / tokens * probabilities / tokens).sum()


@pytest.mark.parametrize("packs", [True, False])
@pytest.mark.parametrize("rows", [[0, 1, 2], [0, 2], [1]])
def test_loss_is_of_the_real_tokens_of_rows_that_count(packs: bool, rows: list[int]) -> None:
    model = asking()
    policy = Policy(model)
    assert policy.packs
    policy.packs = packs
    policy.routers = find_routers(model)
    policy(TOKENS, LENGTHS, PROMPTS)
    counted = torch.zeros(3, dtype=torch.bool)
    counted[rows] = True
    torch.testing.assert_close(policy.routers.loss(counted).double(), by_hand(model, rows), rtol=1e-5, atol=0)
    assert not policy.routers.untaken


def test_only_passes_with_a_gradient_are_remembered() -> None:
    policy = Policy(asking())
    policy.routers = find_routers(policy.model)
    policy(TOKENS, LENGTHS, PROMPTS, trained=False)
    with torch.no_grad():
        policy(TOKENS, LENGTHS, PROMPTS)
        policy.cross_entropy(TOKENS, LENGTHS, PROMPTS, torch.ones(3, 4))
    assert not policy.routers.untaken


def test_a_pass_without_rows_that_count_is_finite() -> None:
    policy = Policy(asking())
    policy.routers = find_routers(policy.model)
    policy(TOKENS, LENGTHS, PROMPTS)
    assert torch.isfinite(policy.routers.loss(torch.zeros(3, dtype=torch.bool)))


@pytest.mark.parametrize(("name", "value"), [("output_router_logits", False), ("router_aux_loss_coef", 0.0)])
def test_configs_that_do_not_ask_have_none(name: str, value: float) -> None:
    model = asking()
    setattr(model.config, name, value)
    assert find_routers(model) is None


def test_another_loss_than_the_familys_is_refused() -> None:
    model = asking()
    model.config.num_experts_per_tok = 1  # the model itself still counts two
    with pytest.raises(InputError, match="output_router_logits"):
        find_routers(model)
    llama = build("llama")
    llama.config.output_router_logits, llama.config.router_aux_loss_coef = True, 0.1
    with pytest.raises(InputError, match="no load-balancing loss"):
        find_routers(llama)
