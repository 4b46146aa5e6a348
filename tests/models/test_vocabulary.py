"""Rows of the head without a token: no share in any log-prob, no gradient; the oracle is the stock model's cut."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from architectures import build
from ppo_harness import fit, make_module
from rollouts import sample, small_prompts
from tiny_models import make_config, make_tokenizer
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from rlhf_lightning.errors import InputError
from rlhf_lightning.models.export import export_policy
from rlhf_lightning.models.loading import load_tokenizer, token_ids
from rlhf_lightning.models.lora import add_adapter
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.models.vocabulary import Vocabulary
from rlhf_lightning.rollout import NativeEngine, Responses, RolloutEngine, TransformersEngine

ROWS = 40  # of the models of `architectures`
PADDED = list(range(33))
HOLED = [i for i in range(33) if i not in (7, 8, 30)]
LENGTHS, PROMPTS = torch.tensor([9, 5, 6, 4]), torch.tensor([4, 2, 1, 4])
HEADS = ["llama", "llama-tied", "gpt2", "gemma2", "granite"]  # plain, tied, capped, scaled


def policy_of(name: str, ids: list[int], adapted: bool = False) -> Policy:
    model = build(name)
    with torch.no_grad():  # ids without a token would be the likeliest of all
        absent = [i for i in range(ROWS) if i not in ids]
        model.get_output_embeddings().weight[absent] *= 4.0
    if adapted:
        add_adapter(model, 2, 4.0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Gemma 2's capped logits
        return Policy(model, ids=ids).eval()


def tokens_of(ids: list[int]) -> Tensor:
    return torch.tensor(ids)[torch.randint(len(ids), (4, 9), generator=torch.Generator().manual_seed(5))]


def by_hand(policy: Policy, tokens: Tensor, ids: list[int], temperature: float = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probs and entropies, row by row, among the logits of ``ids`` alone."""
    log_probs, entropy = (torch.zeros(4, 5, dtype=torch.float64) for _ in range(2))
    for row, (start, end) in enumerate(zip(PROMPTS.tolist(), LENGTHS.tolist(), strict=True)):
        logits = policy.model(input_ids=tokens[row : row + 1, :end]).logits[0, start - 1 : end - 1, ids] / temperature
        table = logits.log_softmax(-1)
        places = torch.tensor([ids.index(token) for token in tokens[row, start:end].tolist()], dtype=torch.int64)
        log_probs[row, : end - start] = table[torch.arange(end - start), places]
        entropy[row, : end - start] = -(table.exp() * table).sum(-1)
    return log_probs, entropy


@pytest.mark.parametrize("ids", [PADDED, HOLED], ids=["padded", "holed"])
@pytest.mark.parametrize("name", HEADS)
def test_log_probs_are_among_the_ids_that_have_a_token(name: str, ids: list[int]) -> None:
    policy, tokens = policy_of(name, ids), tokens_of(ids)
    log_probs, entropy = by_hand(policy, tokens, ids, 0.7)
    scores = policy(tokens, LENGTHS, PROMPTS, temperature=0.7)
    torch.testing.assert_close(scores.log_probs, log_probs, rtol=1e-5, atol=1e-5)  # most norms compute in float32
    torch.testing.assert_close(scores.entropy, entropy, rtol=1e-5, atol=1e-5)
    whole = Policy(policy.model)(tokens, LENGTHS, PROMPTS, temperature=0.7) if name != "gemma2" else None
    assert whole is None or (whole.log_probs - log_probs).abs().max() > 0.1  # there is something to see


@pytest.mark.parametrize("ids", [PADDED, HOLED], ids=["padded", "holed"])
@pytest.mark.parametrize("name", HEADS)
@pytest.mark.parametrize("way", ["forward", "cross_entropy"])
def test_rows_without_a_token_get_no_gradient_from_the_head(name: str, ids: list[int], way: str) -> None:
    policy, tokens = policy_of(name, ids), tokens_of(ids)
    weights = torch.where(by_hand(policy, tokens, ids)[0] < 0, 1.0, 0.0).detach()
    (-by_hand(policy, tokens, ids)[0].sum()).backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters()}
    policy.zero_grad()
    if way == "forward":
        (-policy(tokens, LENGTHS, PROMPTS).log_probs.sum()).backward()
    else:
        policy.cross_entropy(tokens, LENGTHS, PROMPTS, weights)[0].backward()
    got = {n: p.grad for n, p in policy.named_parameters()}
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # most models' norms compute in float32
    absent = [i for i in range(ROWS) if i not in ids]
    assert torch.equal(policy.model.get_output_embeddings().weight.grad[absent], torch.zeros(len(absent), 16).double())


@pytest.mark.parametrize("ids", [PADDED, HOLED], ids=["padded", "holed"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2"])
def test_both_engines_sample_tokens_alone_with_the_log_probs_of_training(name: str, ids: list[int]) -> None:
    policy, batch = policy_of(name, ids), small_prompts(8)
    batch.tokens = torch.tensor(ids)[batch.tokens % len(ids)]
    native, stock = (sample(policy, batch, engine, eos_ids=[]) for engine in (NativeEngine(), TransformersEngine()))
    assert torch.equal(native.tokens, stock.tokens)
    sampled = torch.cat([row[start:] for row, start in zip(native.tokens, native.prompt_lengths, strict=True)])
    assert set(sampled.tolist()) <= set(ids)
    trained = policy(native.tokens, native.lengths, native.prompt_lengths)
    torch.testing.assert_close(native.log_probs, trained.log_probs, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(native.entropy, trained.entropy, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(stock.log_probs.double(), trained.log_probs, rtol=1e-5, atol=1e-5)
    whole = sample(Policy(policy.model).eval(), batch, eos_ids=[]) if name != "gemma2" else None
    assert whole is None or not set(whole.tokens.flatten().tolist()) <= set(ids)  # there is something to leave out


@pytest.mark.parametrize("adapted", [True, False])
def test_an_adapted_policy_is_cut_with_its_adapter_and_without(adapted: bool) -> None:
    policy, plain, tokens = policy_of("llama", PADDED, adapted=True), policy_of("llama", PADDED), tokens_of(PADDED)
    got = policy(tokens, LENGTHS, PROMPTS, adapted=adapted)  # a fresh adapter changes nothing
    torch.testing.assert_close(got.log_probs, by_hand(plain, tokens, PADDED)[0])


class Padding(RolloutEngine):
    """Samples the id that it is told to."""

    def __init__(self, token: int) -> None:
        self.token = token

    def generate(self, policy, prompts, sampling, progress=None):
        count = len(prompts)
        ones, zeros = torch.ones(count, dtype=torch.int64), torch.zeros(count, 1)
        return Responses(torch.full((count, 1), self.token), zeros, ones, ones > 1)


@pytest.mark.parametrize("token", [-1, 8, 33, 39, 40])
def test_a_foreign_engine_that_samples_an_id_without_a_token_is_told(token: int) -> None:
    policy = policy_of("llama", HOLED)
    sample(policy, small_prompts(2), Padding(9))  # is one
    with pytest.raises(InputError, match=rf"Padding.generate: id {token} was sampled for prompt row 0, .*no token"):
        sample(policy, small_prompts(2), Padding(token))


def test_a_whole_vocabulary_copies_nothing() -> None:
    whole, padded = Vocabulary(5), Vocabulary(5, [0, 1, 2])
    weight = torch.zeros(5, 2)
    assert whole.whole and not padded.whole
    assert whole.weight(weight).data_ptr() == padded.weight(weight).data_ptr() == weight.data_ptr()
    assert not Vocabulary(5, [0, 2, 4]).state_dict()  # no checkpoint knows of it


@pytest.fixture
def padded_dir(tmp_path: Path) -> Path:
    """A policy of 96 rows for 64 tokens, of which the others would be the likeliest."""
    torch.manual_seed(1)
    model = LlamaForCausalLM(make_config(vocab_size=96))
    with torch.no_grad():
        model.lm_head.weight[64:] *= 4.0
    model.save_pretrained(tmp_path / "padded")
    make_tokenizer("<pad>").save_pretrained(tmp_path / "padded")
    return tmp_path / "padded"


def test_ppo_of_a_padded_policy_samples_and_learns_tokens_alone(padded_dir: Path) -> None:
    module = make_module(padded_dir, iterations=2, critic={"kind": "head"})
    fit(module)
    for rollout, logged in zip(module.rollouts, module.logged, strict=True):
        assert int(rollout.tokens.max()) < 64
        assert logged["rollout/logprob_gap"] < 1e-5
    start = LlamaForCausalLM.from_pretrained(padded_dir).lm_head.weight
    head = module.policy.model.lm_head.weight
    assert torch.equal(head[64:], start[64:]) and not torch.equal(head[:64], start[:64])


def test_the_exported_model_keeps_its_rows(padded_dir: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(padded_dir)
    policy = Policy(LlamaForCausalLM.from_pretrained(padded_dir), ids=token_ids(tokenizer))
    export_policy(policy, tokenizer, tmp_path / "out")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.vocab_size == 96 and torch.equal(stock.lm_head.weight, policy.model.lm_head.weight)
