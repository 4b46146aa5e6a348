import pytest
import torch
from architectures import build
from rollouts import sample, small_prompts
from transformers import LlamaConfig

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.loading import check_length
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.positions import at_last_token, response_mask, response_states, rope_limit
from rlhf_lightning.rollout import NativeEngine, TransformersEngine

TOKENS = torch.tensor([[11, 12, 13, 14, 15], [21, 22, 23, 99, 99], [31, 32, 99, 99, 99]])
PROMPTS = torch.tensor([2, 1, 2])
LENGTHS = torch.tensor([5, 3, 2])


def test_response_mask_by_hand() -> None:
    expected = torch.tensor([[True, True, True], [True, True, False], [False, False, False]])
    assert torch.equal(response_mask(PROMPTS, LENGTHS), expected)


def test_response_states_stand_one_before_the_tokens() -> None:
    expected = torch.tensor([[12, 13, 14], [21, 22, 0], [0, 0, 0]])
    assert torch.equal(response_states(TOKENS, PROMPTS, LENGTHS), expected)
    wide = torch.stack([TOKENS, -TOKENS], dim=-1)
    assert torch.equal(response_states(wide, PROMPTS, LENGTHS), torch.stack([expected, -expected], dim=-1))


def test_nan_past_the_end_stays_out() -> None:
    x = torch.ones(1, 4)
    x[0, 2:] = torch.nan
    assert torch.equal(response_states(x, torch.tensor([1]), torch.tensor([3])), torch.ones(1, 2))
    short = response_states(x.expand(2, 4), torch.tensor([1, 1]), torch.tensor([2, 3]))
    assert torch.equal(short, torch.tensor([[1.0, 0.0], [1.0, 1.0]]))


def test_at_last_token() -> None:
    assert at_last_token(TOKENS, LENGTHS).tolist() == [15, 23, 32]
    assert at_last_token(torch.stack([TOKENS, -TOKENS], -1), LENGTHS).tolist() == [[15, -15], [23, -23], [32, -32]]


def test_no_rows_and_empty_responses() -> None:
    none = torch.zeros(0, dtype=torch.int64)
    assert response_states(TOKENS[:0], none, none).shape == (0, 0)
    assert response_states(TOKENS, PROMPTS, PROMPTS).shape == (3, 0)


def test_an_empty_prompt_is_refused() -> None:
    with pytest.raises(InputError, match="0 tokens"):
        response_mask(torch.tensor([2, 0]), torch.tensor([3, 3]))


def test_positions_that_follow_the_longest_row_are_refused_where_they_would() -> None:
    """Up to the original length a row's log-probs are the stock model's alone, whatever stands beside or after it."""
    policy = Policy(build("phi3")).eval()
    tokens = torch.randint(3, 40, (2, 20), generator=torch.Generator().manual_seed(5))
    lengths, prompts = torch.tensor([9, 12]), torch.tensor([4, 4])
    with torch.no_grad():
        alone = policy.model(input_ids=tokens[:1, :9]).logits[0, 3:8].log_softmax(-1)
        got = policy(tokens, lengths, prompts).log_probs[0, :5]
    torch.testing.assert_close(got, alone[torch.arange(5), tokens[0, 4:9]], rtol=1e-6, atol=1e-6)
    for refused in (lambda: policy(tokens, torch.tensor([9, 13]), prompts), lambda: check_length(policy.model, 13)):
        with pytest.raises(InputError, match="may take 13 tokens, and past 12 the angles"):
            refused()
    batch = small_prompts(2)
    for engine in (NativeEngine(), TransformersEngine()):
        assert sample(policy, batch, engine, max_new_tokens=9).tokens.shape[0] == 2
        with pytest.raises(InputError, match="may take 13 tokens, and past 12 the angles"):
            sample(policy, batch, engine, max_new_tokens=10)
    dynamic = LlamaConfig(max_position_embeddings=64, rope_parameters={"rope_type": "dynamic", "factor": 2.0})
    assert rope_limit(dynamic) == 64 and rope_limit(LlamaConfig()) is None
