import warnings

import pytest
import torch
from architectures import NAMES, build
from torch import Tensor
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, Llama4ForCausalLM, Llama4TextConfig

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.layers import checkpoint_activations
from rlhf_lightning.models.loading import draw_head
from rlhf_lightning.models.policy import Policy, TokenScores

LENGTHS = torch.tensor([9, 5, 6, 4])
PROMPTS = torch.tensor([4, 2, 1, 4])  # the last response is empty


def some_tokens(width: int = 9) -> Tensor:
    return torch.randint(3, 40, (4, width), generator=torch.Generator().manual_seed(5))


def quiet_policy(name: str, critic: object = None, **options: int) -> Policy:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return Policy(build(name, **options), critic)


def one_row_at_a_time(policy: Policy, tokens: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The oracle: unpadded rows through the stock model, log-softmax of its logits."""
    log_probs, entropy = (torch.zeros(4, 5, dtype=torch.float64) for _ in range(2))
    for row in range(4):
        start, end = int(PROMPTS[row]), int(LENGTHS[row])
        logits = policy.model(input_ids=tokens[row : row + 1, :end]).logits[0, start - 1 : end - 1] / temperature
        table = logits.log_softmax(-1)
        log_probs[row, : end - start] = table[torch.arange(end - start), tokens[row, start:end]]
        entropy[row, : end - start] = -(table.exp() * table).sum(-1)
    return log_probs, entropy


@pytest.mark.parametrize("name", NAMES)
def test_scores_equal_the_stock_model_on_unpadded_rows(name: str) -> None:
    policy, tokens = quiet_policy(name), some_tokens()
    log_probs, entropy = one_row_at_a_time(policy, tokens, 0.7)
    scores = policy(tokens, LENGTHS, PROMPTS, temperature=0.7)
    torch.testing.assert_close(scores.log_probs, log_probs)
    torch.testing.assert_close(scores.entropy, entropy)
    assert scores.values is None


def test_a_model_that_is_its_own_base_runs_by_its_own_forward() -> None:
    torch.manual_seed(3)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "intermediate_size_mlp": 24, "head_dim": 4, "vocab_size": 40}
    layers = {"num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 1}
    model = Llama4ForCausalLM(Llama4TextConfig(**sizes, **layers, **ids, initializer_range=0.3))
    with pytest.warns(UserWarning, match="Llama4ForCausalLM: its head cannot be run apart from its trunk"):
        policy = Policy(model)
    tokens = some_tokens()
    log_probs, entropy = one_row_at_a_time(policy, tokens, 0.7)
    scores = policy(tokens, LENGTHS, PROMPTS, temperature=0.7)
    torch.testing.assert_close(scores.log_probs, log_probs.float(), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scores.entropy, entropy.float(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_cross_entropy_and_its_gradients_are_those_of_the_stock_model(name: str) -> None:
    policy, tokens = quiet_policy(name), some_tokens()
    known = one_row_at_a_time(policy, tokens, 1.0)[0]
    weights = torch.where(known < 0, torch.linspace(0.5, 2.0, 20, dtype=torch.float64).view(4, 5), 0.0)
    weights[1] = 0.0  # a filler row
    weights[0, 2] = 0.0
    expected = -(weights * known).sum()
    expected.backward()
    grads = {name: p.grad.clone() for name, p in policy.named_parameters()}
    policy.zero_grad()
    loss, log_probs = policy.cross_entropy(tokens, LENGTHS, PROMPTS, weights)
    (3.0 * loss).backward()  # as a strategy that scales the loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(log_probs, known.masked_fill(weights == 0, 0.0))
    assert not log_probs.requires_grad
    got = {name: p.grad / 3.0 for name, p in policy.named_parameters()}
    torch.testing.assert_close(got, grads, rtol=1e-5, atol=1e-5)  # most models' norms compute in float32


@pytest.mark.parametrize("name", ["llama-tied", "gemma2"])
def test_cross_entropy_of_nothing_is_0_with_gradients_of_0(name: str) -> None:
    """A process whose rows are all fillers takes part in the exchange of gradients."""
    policy = quiet_policy(name)
    loss, log_probs = policy.cross_entropy(some_tokens(), LENGTHS, PROMPTS, torch.zeros(4, 5))
    loss.backward()
    assert loss.item() == 0.0 and log_probs.tolist() == [[0.0] * 5] * 4
    assert all(p.grad.abs().max() == 0.0 for p in policy.parameters())


def test_which_heads_are_fused() -> None:
    scales = {name: quiet_policy(name).logit_scale for name in NAMES}
    expected = dict.fromkeys(NAMES, 1.0) | {"cohere": 0.0625, "granite": pytest.approx(1 / 3, rel=1e-15)}
    assert scales == expected | {"gemma2": None}  # Gemma 2 caps its logits
    with pytest.warns(UserWarning, match="capped"):
        Policy(build("gemma2"))


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-7), (torch.bfloat16, 1e-3)])
def test_the_logit_scale_is_found_in_any_precision(dtype: torch.dtype, rounding: float) -> None:
    assert Policy(build("cohere").to(dtype)).logit_scale == 0.0625  # a power of two: nothing is rounded
    assert Policy(build("granite").to(dtype)).logit_scale == pytest.approx(1 / 3, rel=rounding)


@pytest.mark.parametrize("scale", [-0.5, 0.0])
def test_a_logit_scale_that_is_no_temperature_is_not_folded(scale: float) -> None:
    model = build("cohere")
    model.logit_scale = scale
    with pytest.warns(UserWarning, match="multiple"):
        policy = Policy(model)
    tokens = some_tokens()
    assert policy.logit_scale is None
    torch.testing.assert_close(policy(tokens, LENGTHS, PROMPTS).log_probs, one_row_at_a_time(policy, tokens, 1.0)[0])


def test_a_cap_is_seen_where_the_scale_hides_it() -> None:
    model = build("cohere")
    model.logit_scale = 1e-3
    stock = model.forward

    def capped(**inputs: Tensor) -> object:
        output = stock(**inputs)
        output.logits = 30.0 * (output.logits / 30.0).tanh()
        return output

    model.forward = capped
    with pytest.warns(UserWarning, match="capped"):
        assert Policy(model).logit_scale is None


def test_a_head_with_bias_is_not_fused_and_right() -> None:
    model = build("llama")
    model.lm_head = torch.nn.Linear(16, 40, dtype=torch.float64)  # its bias is not 0
    with pytest.warns(UserWarning, match="plain linear"):
        policy = Policy(model)
    tokens = some_tokens()
    torch.testing.assert_close(policy(tokens, LENGTHS, PROMPTS).log_probs, one_row_at_a_time(policy, tokens, 1.0)[0])


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_values_are_the_head_on_the_state_before_each_token(name: str) -> None:
    policy, tokens = quiet_policy(name, "head"), some_tokens()
    states = policy.model.base_model(input_ids=tokens).last_hidden_state
    values = policy(tokens, LENGTHS, PROMPTS).values
    expected = states @ policy.critic_head.weight[0] + policy.critic_head.bias
    torch.testing.assert_close(values[0], expected[0, 3:9])  # 5 tokens: the states before each, and after the last
    torch.testing.assert_close(values[1, :4], expected[1, 1:5])
    assert values[1, 4:].tolist() == [0.0, 0.0]
    torch.testing.assert_close(values[3, 0], expected[3, 3])  # an empty response has the state after its prompt


def test_a_model_in_training_mode_is_tried_without_its_dropout() -> None:
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 2, "n_head": 2, "vocab_size": 40, "bos_token_id": 0, "eos_token_id": 1}
    model = GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.5)).train()
    model.transformer.h[0].eval()
    policy = Policy(model)
    assert policy.logit_scale == 1.0
    assert model.training and model.transformer.h[1].mlp.dropout.training
    assert not model.transformer.h[0].mlp.dropout.training  # left as it was


def test_critics_that_cannot_be() -> None:
    for critic in (0, 4, True, "tail"):
        with pytest.raises(InputError, match="critic: "):
            quiet_policy("llama", critic)


def test_critic_head_starts_small_or_from_a_reward_model() -> None:
    wide = torch.nn.Linear(4000, 1)
    draw_head(wide, seed=1)
    assert wide.weight.std().item() == pytest.approx(4001**-0.5, rel=0.05)
    policy = quiet_policy("llama", "head")
    policy.load_critic_head(torch.full((1, 16), 0.5), bias=-2.0)
    assert policy.critic_head.weight.tolist() == [[0.5] * 16] and policy.critic_head.bias.item() == -2.0
    with pytest.raises(InputError, match=r"\[1, 8\]"):
        policy.load_critic_head(torch.zeros(1, 8))
    with pytest.raises(InputError, match="no critic head"):
        quiet_policy("llama").load_critic_head(torch.zeros(1, 16))


@pytest.mark.parametrize("critic", [None, "head"])
def test_padding_and_row_order_change_nothing(critic: object) -> None:
    policy, tokens = quiet_policy("llama", critic), some_tokens()
    scores = policy(tokens, LENGTHS, PROMPTS)
    padded = torch.cat([tokens, torch.full((4, 6), 1)], dim=1)  # padded with EOS
    same(policy(padded, LENGTHS, PROMPTS), scores)
    order = torch.tensor([2, 0, 3, 1])
    shuffled = policy(tokens[order], LENGTHS[order], PROMPTS[order])
    same(shuffled, TokenScores(*(None if x is None else x[order] for x in scores)))


def same(first: TokenScores, second: TokenScores) -> None:
    for ours, theirs in zip(first, second, strict=True):
        assert (ours is None) == (theirs is None)
        if ours is not None:
            torch.testing.assert_close(ours, theirs)


def test_batches_without_response_tokens() -> None:
    policy, tokens = quiet_policy("llama", "head"), some_tokens()
    empty = policy(tokens, PROMPTS, PROMPTS)
    assert [x.shape for x in empty] == [(4, 0), (4, 0), (4, 1)]
    (empty.log_probs.sum() + empty.values.sum()).backward()
    assert all(p.grad is None or p.grad.abs().max() == 0 for p in policy.model.lm_head.parameters())


def test_gradients_reach_the_tied_weight_from_both_ends() -> None:
    policy, tokens = quiet_policy("llama-tied"), some_tokens()
    policy(tokens, LENGTHS, PROMPTS).log_probs.sum().backward()
    ours = policy.model.lm_head.weight.grad.clone()
    policy.zero_grad()
    one_row_at_a_time(policy, tokens, 1.0)[0].sum().backward()
    torch.testing.assert_close(ours, policy.model.lm_head.weight.grad)


def test_gradient_checkpointing_changes_nothing() -> None:
    policy, tokens = quiet_policy("llama", "head").train(), some_tokens()
    grads = []
    for checkpointed in (False, True):
        if checkpointed:
            checkpoint_activations(policy.model)
        policy.zero_grad()
        scores = policy(tokens, LENGTHS, PROMPTS)
        (scores.log_probs.sum() + scores.values.sum()).backward()
        grads.append({name: p.grad.clone() for name, p in policy.named_parameters() if p.grad is not None})
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_autocast_gives_float32_near_the_exact_scores(name: str) -> None:
    policy, tokens = quiet_policy(name, "head"), some_tokens()
    exact = policy(tokens, LENGTHS, PROMPTS)
    policy.float()
    with torch.autocast("cpu", torch.bfloat16):
        scores = policy(tokens, LENGTHS, PROMPTS)
        logits = policy.eval().decode(tokens, torch.arange(9).expand(4, 9), DynamicCache(), torch.full((4,), 8))
    assert logits.dtype == torch.float32
    for ours, theirs in zip(scores, exact, strict=True):
        assert ours.dtype == torch.float32
        assert (ours - theirs).abs().max() < 0.3  # bf16 through three layers; log-probs are around -4


def test_bfloat16_weights_give_float32_scores() -> None:
    policy = quiet_policy("llama", "head").bfloat16()
    assert all(x.dtype == torch.float32 for x in policy(some_tokens(), LENGTHS, PROMPTS))
