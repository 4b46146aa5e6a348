"""A reward model reads conversations by its own chat template: its scores are stock transformers' of the whole."""

from __future__ import annotations

import json

import pytest
import torch
from chat_tokenizer import make_tokenizer as make_bytes
from templates import BRACKETS, CHATML, DATED, NO_END, TOOLS
from tiny_models import CHAT_TEMPLATE, make_config, make_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaForSequenceClassification

from rlhf_lightning.batches import Rollout
from rlhf_lightning.data.collate import collate
from rlhf_lightning.data.records import load_records
from rlhf_lightning.data.tokenization import Encoder
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards import ModelReward, Reward, WeightedSum
from rlhf_lightning.training.scoring import checked_scores

USER = {"role": "user", "content": "the cat"}
CHAT = [
    {"role": "system", "content": "be good"},
    USER,
    {"role": "assistant", "content": "likes fish"},
    {"role": "user", "content": "who is he"},
]
TOOL = {"type": "function", "function": {"name": "find", "parameters": {}}}


def make_policy(template: str = CHAT_TEMPLATE):
    tokenizer = make_tokenizer("<pad>")
    tokenizer.chat_template = template
    return tokenizer


@pytest.fixture
def reward_dir(tmp_path):
    """Saves a reward model of a byte-level vocabulary, as transformers does or as we do."""

    def save(template: str | None, tokenizer=None, **config):
        tokenizer = make_bytes() if tokenizer is None else tokenizer
        tokenizer.chat_template = template
        torch.manual_seed(3)
        config = make_config(num_labels=1, vocab_size=330, eos_token_id=2, max_position_embeddings=400, **config)
        LlamaForSequenceClassification(config).save_pretrained(tmp_path / "reward")
        tokenizer.save_pretrained(tmp_path / "reward")
        return str(tmp_path / "reward")

    return save


def answered(policy, rows, responses, tmp_path, cut=False, **options) -> Rollout:
    """The rows' prompts as the data side makes them, with these responses."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    encoder = Encoder(policy, **options)
    prompts = collate(encoder.encode(load_records(str(path)).rows, "prompts")[0], "prompts", 0)
    end = [] if cut else [policy.eos_token_id]
    said = [policy(response, add_special_tokens=False).input_ids + end for response in responses]
    ids = [
        torch.tensor(prompts.tokens[i, : prompts.lengths[i]].tolist() + words, dtype=torch.int64)
        for i, words in enumerate(said)
    ]
    return Rollout(
        prompts,
        torch.nn.utils.rnn.pad_sequence(ids, batch_first=True),
        torch.tensor([len(row) for row in ids]),
        prompts.lengths,
        torch.zeros(len(ids), max(map(len, said))),
        torch.full((len(ids),), cut),
        list(responses),
    )


def scored(path, policy, rollout) -> torch.Tensor:
    reward = ModelReward(path)
    reward.prepare(policy, torch.device("cpu"))
    return reward(rollout)


def read(path, policy, rollout) -> list[str]:
    """What the reward model reads, as text."""
    reward = ModelReward(path)
    reward.prepare(policy, torch.device("cpu"))
    tokens, lengths = reward._reader.encoded(rollout)
    own = AutoTokenizer.from_pretrained(path)
    return [own.decode(row[:length]) for row, length in zip(tokens, lengths, strict=True)]


def stock(path, texts: list[str]) -> torch.Tensor:
    """Of rendered texts, one unpadded row at a time, by transformers' own head."""
    model = AutoModelForSequenceClassification.from_pretrained(path, dtype=torch.float64)
    own = AutoTokenizer.from_pretrained(path)
    rows = [torch.tensor([own(text, add_special_tokens=False).input_ids]) for text in texts]
    with torch.no_grad():
        return torch.cat([model(row).logits[:, 0] for row in rows]).float()


def rendered(path, chats: list[list[dict]], **options) -> list[str]:
    own = AutoTokenizer.from_pretrained(path)
    return [own.apply_chat_template(chat, tokenize=False, **options) for chat in chats]


def said(text: str) -> dict:
    return {"role": "assistant", "content": text}


def close(found, wanted):
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-5)


def test_a_score_is_stock_transformers_of_the_whole_conversation(reward_dir, tmp_path):
    path, policy = reward_dir(CHATML), make_policy()
    rollout = answered(policy, [{"prompt": CHAT}, {"prompt": [USER]}], ["no thanks", "yes"], tmp_path)
    texts = rendered(path, [[*CHAT, said("no thanks")], [USER, said("yes")]])
    assert read(path, policy, rollout) == texts
    close(scored(path, policy, rollout), stock(path, texts))
    # Copies and parts of a batch keep their conversations.
    twice = rollout.prompts.take(torch.tensor([1, 0])).repeat(2).conversations
    assert [chat["messages"] for chat in twice] == [[USER], [USER], CHAT, CHAT]


def test_ours_ends_at_the_token_that_ends_the_turn(reward_dir, tmp_path):
    path, policy = reward_dir(CHATML, reward_mean=0.0, reward_std=1.0), make_policy()
    rollout = answered(policy, [{"prompt": [USER]}], ["yes"], tmp_path)
    texts = [text.removesuffix("\n") for text in rendered(path, [[USER, said("yes")]])]
    assert read(path, policy, rollout) == texts
    close(scored(path, policy, rollout), stock(path, texts))


@pytest.mark.parametrize("template", [CHATML, NO_END, BRACKETS])
@pytest.mark.parametrize("ours", [{}, {"reward_mean": 0.0, "reward_std": 1.0}])
def test_a_response_that_was_cut_has_no_end(template, ours, reward_dir, tmp_path):
    path, policy = reward_dir(template, **ours), make_policy()
    rollout = answered(policy, [{"prompt": CHAT[1:]}], ["the big"], tmp_path, cut=True)
    text = rendered(path, [[*CHAT[1:], said("the big")]])[0]
    texts = [text[: text.rindex("the big") + len("the big")]]
    assert read(path, policy, rollout) == texts
    close(scored(path, policy, rollout), stock(path, texts))


def test_without_a_token_that_ends_turns_ours_ends_in_eos(reward_dir, tmp_path):
    policy = make_policy()
    rollout = answered(policy, [{"prompt": [USER]}, {"prompt": CHAT}], ["yes", ""], tmp_path)
    path = reward_dir(NO_END, reward_mean=0.0, reward_std=1.0)
    wanted = [text.rstrip() for text in rendered(path, [[USER, said("yes")]])]
    first, empty = read(path, policy, rollout)
    assert first == f"{wanted[0]}<|im_end|>"
    assert empty.endswith("assistant: <|im_end|>")


def test_a_system_message_that_the_template_refuses_is_folded(reward_dir, tmp_path, monkeypatch):
    told: list[str] = []
    monkeypatch.setattr("rlhf_lightning.rewards.model.rank_zero_info", told.append)
    path, policy = reward_dir(BRACKETS), make_policy()
    rollout = answered(policy, [{"prompt": CHAT}], ["yes"], tmp_path)
    folded = [{"role": "user", "content": "be good\n\nthe cat"}, *CHAT[2:], said("yes")]
    assert read(path, policy, rollout) == rendered(path, [folded])
    assert "own tokenizer and chat template" in told[0]
    assert "system message put into the user's" in told[1]


def test_tools_a_begun_answer_and_transcripts(reward_dir, tmp_path):
    path, policy = reward_dir(TOOLS), make_policy(TOOLS.replace("<|im_end|>", "<eos>"))
    transcript = "\n\nHuman: the cat\n\nAssistant: likes fish\n\nHuman: who is he\n\nAssistant:"
    rows = [
        {"prompt": [USER], "tools": [TOOL]},
        {"prompt": [USER, said("the big ")]},
        {"chosen": f"{transcript} no", "rejected": f"{transcript} yes"},
    ]
    rollout = answered(policy, rows, ["yes", "dog", "bye"], tmp_path, chat=True)
    assert read(path, policy, rollout) == [
        *rendered(path, [[USER, said("yes")]], tools=[TOOL]),
        *rendered(path, [[USER, said("the big dog")], [*CHAT[1:], said("bye")]]),
    ]


def test_tools_that_the_reward_model_has_no_place_for_are_refused(reward_dir, tmp_path):
    path, policy = reward_dir(CHATML), make_policy(TOOLS.replace("<|im_end|>", "<eos>"))
    rollout = answered(policy, [{"prompt": [USER], "tools": [TOOL]}], ["yes"], tmp_path)
    with pytest.raises(InputError, match=r"reward .*: row 0: key 'tools': the chat template has no place.*the reward"):
        scored(path, policy, rollout)


def test_plain_prompts_stay_plain_beside_chats_and_chat_makes_them_chats(reward_dir, tmp_path):
    path, policy = reward_dir(CHATML), make_policy()
    rows, responses = [{"prompt": "the cat"}, {"prompt": [USER]}], ["yes", "no"]
    chats = rendered(path, [[USER, said("yes")], [USER, said("no")]])
    assert read(path, policy, answered(policy, rows, responses, tmp_path)) == ["the catyes<|im_end|>", chats[1]]
    assert read(path, policy, answered(policy, rows[:1], responses[:1], tmp_path, chat=True)) == chats[:1]


def test_without_a_template_of_its_own_a_conversation_is_plain_text(reward_dir, tmp_path):
    path, policy = reward_dir(None), make_policy()
    rollout = answered(policy, [{"prompt": [USER]}], ["yes"], tmp_path)
    assert read(path, policy, rollout) == ["user : the cat assistant :yes<|im_end|>"]


def test_ids_are_handed_over_only_where_the_template_is_the_policy_s(reward_dir, tmp_path):
    policy = make_policy()
    rollout = answered(policy, [{"prompt": [USER]}], ["yes"], tmp_path)
    for template in (None, CHAT_TEMPLATE):
        reward = ModelReward(reward_dir(template, make_policy()))
        reward.prepare(policy, torch.device("cpu"))
        assert reward._reader.encoded(rollout)[0] is rollout.tokens
    other = CHAT_TEMPLATE.replace(" : ", " . ")
    path = reward_dir(other, make_policy())
    close(scored(path, policy, rollout), stock(path, rendered(path, [[USER, said("yes")]])))
    assert not torch.equal(scored(path, policy, rollout), stock(path, ["user : the cat assistant : yes <eos>"]))


def test_a_token_that_the_policy_has_and_the_reward_model_does_not_is_not_handed_over(reward_dir, tmp_path):
    policy = make_policy()
    policy.add_special_tokens({"additional_special_tokens": ["<new>"]})
    rollout = answered(policy, [{"prompt": "the cat"}], ["yes"], tmp_path)
    rollout.tokens[0, -2] = policy.convert_tokens_to_ids("<new>")
    path = reward_dir(None, make_policy())
    assert read(path, policy, rollout) == ["the cat yes <eos>"]


def test_special_tokens_that_a_response_spells_stay_text(reward_dir, tmp_path):
    path, policy = reward_dir(CHATML), make_policy()
    rollout = answered(policy, [{"prompt": [USER]}], ["<|im_end|> yes"], tmp_path)
    reward = ModelReward(path)
    reward.prepare(policy, torch.device("cpu"))
    tokens, lengths = reward._reader.encoded(rollout)
    own = AutoTokenizer.from_pretrained(path)
    end = own.convert_tokens_to_ids("<|im_end|>")
    assert int((tokens[0, : lengths[0]] == end).sum()) == 2  # the user's turn's, and the response's
    assert own.decode(tokens[0, : lengths[0]]) == rendered(path, [[USER, said("<|im_end|> yes")]])[0]


def test_a_clock_in_its_template_says_the_runs_day_also_where_that_is_told_late(reward_dir, tmp_path):
    path, policy = reward_dir(DATED), make_policy()
    rollout = answered(policy, [{"prompt": [USER]}], ["yes"], tmp_path)
    reward = ModelReward(path)
    reward.prepare(policy, torch.device("cpu"))
    for date, said_day in (("2001-02-03", "03 February 2001"), ("2002-03-04", "04 March 2002")):
        reward.date = date
        reward(rollout)
        tokens, lengths = reward._reader.encoded(rollout)
        assert f"Today is {said_day}." in AutoTokenizer.from_pretrained(path).decode(tokens[0, : lengths[0]])


def test_a_module_tells_every_part_of_its_reward_the_runs_day():
    told = []

    class Told(Reward):
        def forward(self, rollout):
            told.append(self.date)
            return torch.zeros(1)

    class Prompts:
        def __len__(self):
            return 1

        tokens = torch.zeros(1, 1)

    reward = WeightedSum([Told(), Told()], [1.0, 1.0])
    checked_scores(reward, Prompts(), reward, "score", date="2001-02-03")
    assert told == ["2001-02-03"] * 2
