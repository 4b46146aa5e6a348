"""The demo's corpus: a pure function of the seed, its two parts disjoint, its texts readable by the gold reward."""

from __future__ import annotations

from random import Random

import pytest

from rlhf_lightning.demo.corpus import PLANTS, TOPICS, all_questions, build_corpus, origin, sentence, write_answer
from rlhf_lightning.demo.start import EOS, PAD, save_start, train_tokenizer


def test_the_same_seed_gives_the_same_corpus_and_another_seed_another() -> None:
    assert build_corpus(3, 40, 10) == build_corpus(3, 40, 10)
    assert build_corpus(3, 40, 10).train_answers != build_corpus(4, 40, 10).train_answers


def test_no_held_out_question_is_in_training() -> None:
    corpus = build_corpus(0, 4096, 512)
    train, held_out = ({question.prompt for question in part} for part in (corpus.train, corpus.held_out))
    assert (len(train), len(held_out)) == (4096, 512)
    assert not train & held_out


def test_all_questions_are_different() -> None:
    prompts = [question.prompt for question in all_questions()]
    assert len(prompts) == len(set(prompts)) == 12 * (6 * 5 + 6 * 5 * 4) * 4


def test_every_plant_has_one_right_kind_of_advice_on_every_topic() -> None:
    for plants in PLANTS.values():
        for plant in plants:
            assert all(origin(plant) in TOPICS[topic] for topic in TOPICS)
    assert sentence("water", TOPICS["water"][origin("cactus")][0]) == "For water, one cup a month."
    kinds = [advice for kinds in TOPICS.values() for texts in kinds.values() for advice in texts]
    assert len(kinds) == len(set(kinds))


def test_gardeners_are_right_more_often_than_not() -> None:
    corpus = build_corpus(1, 2000, 1)
    right = wrong = 0
    for question, answer in zip(corpus.train, corpus.train_answers, strict=True):
        for topic in question.topics:
            for kind, texts in TOPICS[topic].items():
                given = any(sentence(topic, text) in answer for text in texts)
                right += given and kind == origin(question.plant)
                wrong += given and kind != origin(question.plant)
    assert 0.6 < right / (right + wrong) < 0.8


@pytest.mark.parametrize("text", ["For water, one cup a month.", "Zürich \U0001f335 <eos> \x00\n"])
def test_the_tokenizer_keeps_any_text(text: str) -> None:
    corpus = build_corpus(0, 200, 1)
    tokenizer = train_tokenizer(corpus.train_answers, 400)
    assert len(tokenizer) <= 400
    ids = tokenizer(text, split_special_tokens=True)["input_ids"]
    assert tokenizer.decode(ids) == text
    assert tokenizer.eos_token == EOS and tokenizer.pad_token == PAD
    assert tokenizer.eos_token_id != tokenizer.pad_token_id


def test_the_tokenizer_and_the_start_are_functions_of_their_inputs(tmp_path) -> None:
    texts = build_corpus(0, 100, 1).train_answers
    first, second = train_tokenizer(texts, 400), train_tokenizer(texts, 400)
    assert first.get_vocab() == second.get_vocab()
    count = save_start(tmp_path / "a", first, hidden=16, layers=1, seed=5)
    assert save_start(tmp_path / "b", second, hidden=16, layers=1, seed=5) == count
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("a", "b")]
    assert weights[0] == weights[1]


def test_answers_depend_on_the_generator_alone() -> None:
    question = all_questions()[0]
    assert write_answer(question, Random(1)) == write_answer(question, Random(1))
