"""A reward model as a reward: its normalised score at the last token, also through another vocabulary."""

from __future__ import annotations

import pytest
import torch
from test_rewards import make_rollout
from tiny_models import WORDS, make_config
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoModelForSequenceClassification, LlamaForSequenceClassification, PreTrainedTokenizerFast

from rlhf_lightning.batches import PromptBatch, Rollout
from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards import ModelReward


def rollout_of(tokenizer, prompts: list[str], responses: list[str], truncated: list[bool]) -> Rollout:
    ids = [tokenizer(text)["input_ids"] for text in prompts]
    full = [
        p + tokenizer(r)["input_ids"] + ([] if cut else [tokenizer.eos_token_id])
        for p, r, cut in zip(ids, responses, truncated, strict=True)
    ]
    plain = make_rollout(responses)
    lengths = torch.tensor([len(row) for row in full])
    tokens = torch.zeros(len(full), int(lengths.max()) + 2, dtype=torch.int64)
    for row, values in enumerate(full):
        tokens[row, : len(values)] = torch.tensor(values)
    batch = plain.prompts
    batch = PromptBatch(batch.tokens, torch.tensor([len(p) for p in ids]), batch.rows, batch.weights, prompts, {})
    return Rollout(batch, tokens, lengths, batch.lengths, plain.log_probs, torch.tensor(truncated), responses)


PROMPTS = ["the cat", "a dog sees", "who is he"]
RESPONSES = ["likes fish", "the big red bird", "no"]
CUT = [False, True, False]


@pytest.fixture
def reversed_vocabulary_dir(tmp_path):
    """A reward model whose tokenizer numbers the same words the other way round."""
    tokens = ["<pad>", "<unk>", "<eos>", *reversed(WORDS)]
    inner = Tokenizer(models.WordLevel({token: i for i, token in enumerate(tokens)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")
    torch.manual_seed(3)
    LlamaForSequenceClassification(make_config(num_labels=1, eos_token_id=2)).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    return tmp_path


def stock_scores(folder, tokenizer, rows: list[str]) -> torch.Tensor:
    """One unpadded row at a time, by transformers' own head."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64)
    with torch.no_grad():
        return torch.cat([model(torch.tensor([tokenizer(row)["input_ids"]])).logits[:, 0] for row in rows]).float()


def test_the_score_is_the_stock_head_s_at_the_last_token(tiny_reward_dir, tiny_tokenizer):
    reward = ModelReward(str(tiny_reward_dir), micro_batch_tokens=8)
    reward.prepare(tiny_tokenizer, torch.device("cpu"))
    rollout = rollout_of(tiny_tokenizer, PROMPTS, RESPONSES, CUT)
    texts = [f"{p} {r}{'' if cut else ' <eos>'}" for p, r, cut in zip(PROMPTS, RESPONSES, CUT, strict=True)]
    torch.testing.assert_close(
        reward(rollout), stock_scores(tiny_reward_dir, tiny_tokenizer, texts), atol=1e-5, rtol=1e-5
    )


def test_another_vocabulary_is_decoded_and_encoded_again(reversed_vocabulary_dir, tiny_tokenizer):
    reward = ModelReward(str(reversed_vocabulary_dir))
    reward.prepare(tiny_tokenizer, torch.device("cpu"))
    rollout = rollout_of(tiny_tokenizer, PROMPTS, RESPONSES, CUT)
    own = PreTrainedTokenizerFast.from_pretrained(reversed_vocabulary_dir)
    texts = [f"{p} {r}{'' if cut else ' <eos>'}" for p, r, cut in zip(PROMPTS, RESPONSES, CUT, strict=True)]
    torch.testing.assert_close(reward(rollout), stock_scores(reversed_vocabulary_dir, own, texts), atol=1e-5, rtol=1e-5)


def test_encoding_again_is_what_training_does(tiny_reward_dir, tiny_tokenizer, tmp_path):
    # The reward model's tokenizer adds BOS, and has a special token that the policy's text may spell.
    words = {"<eos>": 0, "<bos>": 1, "?": 2, "<": 3, "eos": 4, ">": 5, "the": 6, "cat": 7}
    inner = Tokenizer(models.WordLevel(words, unk_token="?"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    inner.post_processor = processors.TemplateProcessing("<bos> $A", special_tokens=[("<bos>", 1)])
    own = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", bos_token="<bos>", unk_token="?")
    torch.manual_seed(3)
    LlamaForSequenceClassification(make_config(num_labels=1, eos_token_id=0)).save_pretrained(tmp_path)
    own.save_pretrained(tmp_path)
    reward = ModelReward(str(tmp_path))
    reward.prepare(tiny_tokenizer, torch.device("cpu"))
    tokens, lengths = reward._reader.encoded(
        rollout_of(tiny_tokenizer, ["the cat", "the"], ["the <eos> cat", "cat"], [False, True])
    )
    assert tokens[0].tolist() == [1, 6, 7, 6, 3, 4, 5, 7, 0]
    assert tokens[1, : lengths[1]].tolist() == [1, 6, 7]


@pytest.mark.parametrize("folder", ["tiny_reward_dir", "reversed_vocabulary_dir"])
def test_a_sequence_over_the_model_s_positions_is_refused(folder, tiny_tokenizer, request):
    path = request.getfixturevalue(folder)
    reward = ModelReward(str(path))
    reward.prepare(tiny_tokenizer, torch.device("cpu"))
    rollout = rollout_of(tiny_tokenizer, ["the cat"], ["fish " * 130], [False])
    with pytest.raises(InputError, match=r"133 tokens and the model has positions for 128"):
        reward(rollout)


def test_a_policy_folder_is_no_reward_model(tiny_policy_dir, tiny_tokenizer):
    with pytest.raises(InputError, match=r"score\.weight is missing"):
        ModelReward(str(tiny_policy_dir)).prepare(tiny_tokenizer, torch.device("cpu"))
