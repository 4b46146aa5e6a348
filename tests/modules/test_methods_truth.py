"""The methods without a critic against their papers: the first gradient in float64, and a problem solved exactly."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from bandit import BETA, Bandit, BanditReward, repeated_prompt, save_small_policy
from making import merged
from methods import COARSE, METHODS, method
from ppo_harness import LastTokenReward, TokenReward, fit, make_module
from tiny_models import make_config
from torch import Tensor
from transformers import LlamaForCausalLM

LONGEST = 6  # max_new_tokens


@pytest.fixture(scope="module")
def other_reference(tmp_path_factory, kept_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(5)
    LlamaForCausalLM(make_config()).save_pretrained(folder)
    kept_tokenizer.save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- the papers' losses, a response at a time


@dataclass
class Response:
    """A response under the policy that is trained (with gradient), and under the reference; float64, nats a token."""

    log_probs: Tensor
    reference: Tensor
    score: float

    @property
    def ratio(self) -> Tensor:
        """To the policy that sampled, which is the same one: 1, with the gradient of the log-probs."""
        return torch.exp(self.log_probs - self.log_probs.detach())

    @property
    def kl(self) -> Tensor:
        return (self.log_probs - self.reference).detach()


Groups = list[list[Response]]


def mean(values: list) -> Tensor:
    return sum(values) / len(values)


def relative(group: list[Response]) -> list[float]:
    average = sum(r.score for r in group) / len(group)
    return [r.score - average for r in group]


def standardised(group: list[Response]) -> list[float]:
    centred = relative(group)
    deviation = (sum(c * c for c in centred) / (len(group) - 1)) ** 0.5
    return [c / deviation if deviation > 0 else 0.0 for c in centred]


def k3(r: Response) -> Tensor:
    return torch.exp(r.reference - r.log_probs) - (r.reference - r.log_probs) - 1


def grpo(groups: Groups) -> Tensor:
    """Shao et al. 2024, equations 3 and 4, with their beta of 0.04."""
    return -mean(
        [mean([(a * r.ratio - 0.04 * k3(r)).mean() for a, r in zip(standardised(g), g, strict=True)]) for g in groups]
    )


def dr_grpo(groups: Groups) -> Tensor:
    """Liu et al. 2025, section 3: neither the deviation nor the response's length divides, and there is no KL term."""
    return -mean([mean([(a * r.ratio).sum() / LONGEST for a, r in zip(relative(g), g, strict=True)]) for g in groups])


def dapo(groups: Groups) -> Tensor:
    """Yu et al. 2025, equation 8, over the tokens of the first two groups that do not all score the same."""
    kept = [g for g in groups if len({r.score for r in g}) > 1]
    assert 2 < len(kept) < len(groups)
    terms = [a * r.ratio for g in kept[:2] for a, r in zip(standardised(g), g, strict=True)]
    return -torch.cat(terms).mean()


def rloo(groups: Groups) -> Tensor:
    """Ahmadian et al. 2024: each response's reward, less its KL, against the mean of the others'."""
    terms = []
    for g in groups:
        rewards = [r.score - 0.3 * float(r.kl.sum()) for r in g]
        for i, r in enumerate(g):
            others = [reward for j, reward in enumerate(rewards) if j != i]
            terms.append((rewards[i] - sum(others) / len(others)) * r.log_probs.sum())
    return -mean(terms) / LONGEST


def reinforce(groups: Groups, gamma: float = 0.9, baseline: bool = False) -> Tensor:
    """Hu 2025: token-level KL in the reward, discounted return-to-go, whitened over all tokens of the batch."""
    returns, ratios = [], []
    for g in groups:
        for score, r in zip(relative(g) if baseline else [r.score for r in g], g, strict=True):
            rewards = [-0.3 * float(k) for k in r.kl]
            rewards[-1] += score
            steps = range(len(rewards))
            returns += [sum(gamma ** (k - t) * rewards[k] for k in steps if k >= t) for t in steps]
            ratios.append(r.ratio)
    advantages = torch.tensor(returns, dtype=torch.float64)
    advantages = (advantages - advantages.mean()) / advantages.std(correction=0)
    return -(advantages * torch.cat(ratios)).mean()


def reinforce_baseline(groups: Groups) -> Tensor:
    return reinforce(groups, gamma=1.0, baseline=True)


def rejection_sampling(groups: Groups) -> Tensor:
    """Dong et al. 2023: SFT on the two best of each four."""
    best = [r for g in groups for r in sorted(g, key=lambda r: -r.score)[:2]]
    return -torch.cat([r.log_probs for r in best]).mean()


def online_dpo(groups: Groups, loss: str = "sigmoid", label_smoothing: float = 0.0) -> Tensor:
    """Guo et al. 2024: DPO (Rafailov et al. 2023, equation 7) on the best and the worst; Mitchell 2023 with smoothing,
    Azar et al. 2023, equation 17, over means or sums of tokens, Zhao et al. 2023."""
    losses, beta = [], 0.3
    for g in groups:
        best, worst = max(g, key=lambda r: r.score), min(g, key=lambda r: r.score)
        if best.score > worst.score:
            ratios = [r.log_probs - r.reference for r in (best, worst)]
            up, down = (r.mean() if loss == "ipo" else r.sum() for r in ratios)
            h = up - down
            right, wrong = -torch.log(torch.sigmoid(beta * h)), -torch.log(torch.sigmoid(-beta * h))
            losses.append(
                {
                    "sigmoid": (1 - label_smoothing) * right + label_smoothing * wrong,
                    "ipo": (h - 1 / (2 * beta)) ** 2,
                    "ipo_sum": (h - 1 / (2 * beta)) ** 2,
                    "hinge": torch.clamp(1 - beta * h, min=0),
                }[loss]
            )
    return mean(losses)


ORACLES: dict[str, Callable[..., Tensor]] = {
    "grpo": grpo,
    "dr_grpo": dr_grpo,
    "dapo": dapo,
    "rloo": rloo,
    "reinforce": reinforce,
    "reinforce_baseline": reinforce_baseline,
    "rejection_sampling": rejection_sampling,
    "online_dpo": online_dpo,
}


def log_probs(model: LlamaForCausalLM, tokens: Tensor, start: int) -> Tensor:
    table = model(tokens[None]).logits[0].log_softmax(-1)
    return table[start - 1 : -1].gather(1, tokens[start:, None])[:, 0]


# What the method itself leaves out: the module's options, and the oracle's.
OTHERWISE: list[tuple[str, dict, dict]] = [
    *[("online_dpo", {"loss_type": kind}, {"loss": kind}) for kind in ("ipo", "ipo_sum", "hinge")],
    ("online_dpo", {"label_smoothing": 0.3}, {"label_smoothing": 0.3}),
    (
        "rejection_sampling",
        {"sampling": {"temperature": 0.7}},
        {},
    ),  # what was sampled at any temperature is learnt at 1
]


FIRST_STEP = {
    "sampling": {"max_new_tokens": LONGEST},
    "update": {"max_grad_norm": None},
    "optimizer": {"learning_rate": 1e-12},
}


@pytest.mark.parametrize(("name", "more", "known"), [*[(name, {}, {}) for name in METHODS], *OTHERWISE])
def test_the_first_gradient_is_the_papers(tiny_policy_dir, other_reference, name, more, known):
    cls, options = method(name)
    reward = LastTokenReward() if name in COARSE else TokenReward()
    module = make_module(
        tiny_policy_dir,
        reward,
        cls,
        reference=str(other_reference),
        **merged(FIRST_STEP, options, more),
    )
    fit(module)
    rollout, model = module.rollouts[0], LlamaForCausalLM.from_pretrained(tiny_policy_dir, dtype=torch.float64)
    model.get_input_embeddings().padding_idx = None  # the pad token is a token like others where it is sampled
    reference = LlamaForCausalLM.from_pretrained(other_reference, dtype=torch.float64)
    responses = []
    for row, score in enumerate(reward(rollout).tolist()):
        tokens, start = rollout.tokens[row, : rollout.lengths[row]], int(rollout.prompt_lengths[row])
        with torch.no_grad():
            expected = log_probs(reference, tokens, start)
        responses.append(Response(log_probs(model, tokens, start), expected, score))
    size = module.group_size
    ORACLES[name]([responses[i : i + size] for i in range(0, len(responses), size)], **known).backward()
    ours = torch.cat([p.grad.flatten() for p in module.policy.model.parameters()]).double()
    theirs = torch.cat([p.grad.flatten() for p in model.parameters()])
    assert theirs.norm() > 1e-2
    assert (ours - theirs).norm() < 1e-4 * theirs.norm()


# ---------------------------------------------------------------- a problem solved exactly


ON_THE_BANDIT = {
    "sampling": {"max_new_tokens": 2},
    "update": {"micro_batch_tokens": 10_000},
    "optimizer": {"learning_rate": 3e-3, "schedule": "linear"},
}


def trained_on_the_bandit(folder: Path, name: str, iterations: int, **options):
    save_small_policy(folder, seed=0)
    bandit, (cls, _) = Bandit.make(), method(name)
    start = bandit.log_probs(LlamaForCausalLM.from_pretrained(folder))
    module = make_module(
        folder,
        BanditReward(bandit),
        cls,
        iterations=iterations,
        **merged(ON_THE_BANDIT, options),
    )
    rows = 64 // module.group_size
    fit(module, [repeated_prompt(rows, i) for i in range(iterations)])
    return bandit, start, module


# The mean reward less beta times KL is all that these ask for, so their optimum is reference * exp(reward / beta) / Z.
SOLVED = {
    "dr_grpo": {
        "group_size": 8,
        "scale_by_std": False,
        "kl": {"coef": BETA, "loss_coef": 0.0},
        "update": {"minibatches": 2},
    },
    "rloo": {"group_size": 4, "kl": {"coef": BETA}, "update": {"minibatches": 2}},
    "reinforce": {"kl": {"coef": BETA}, "update": {"minibatches": 2}},
}


@pytest.mark.parametrize("name", SOLVED)
def test_the_optimum_of_a_known_problem_is_found(tmp_path, name):
    bandit, reference, module = trained_on_the_bandit(tmp_path, name, iterations=80, **SOLVED[name])
    optimum = BETA * torch.logsumexp(reference + bandit.rewards / BETA, 0).item()
    start = (reference.exp() * bandit.rewards).sum().item()
    assert optimum - start > 0.4  # there is something to learn
    assert optimum - bandit.objective(module.policy.model, reference) < 0.1 * (optimum - start)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("grpo", {"group_size": 8}),
        ("rejection_sampling", {"group_size": 8, "keep": 1}),
        ("online_dpo", {"group_size": 4, "beta": 0.1}),
    ],
)
def test_the_best_response_of_a_known_problem_is_found(tmp_path, name, options):
    """Little holds these near the reference: the share of the one best response of 57 grows to most of all."""
    bandit, start, module = trained_on_the_bandit(tmp_path, name, iterations=60, **options)
    best = int(bandit.rewards.argmax())
    assert start[best].exp() < 0.05
    assert bandit.log_probs(module.policy.model)[best].exp() > 0.8
