"""Candidates from a policy, and their rankings as rows that the data side reads back as the same pairs."""

from __future__ import annotations

from pathlib import Path

import torch

from rlhf_lightning.data.batching import prompt_batches
from rlhf_lightning.data.records import load_records
from rlhf_lightning.models.loading import load_causal_lm
from rlhf_lightning.models.policy import Policy
from rlhf_lightning.preferences.annotator import SimulatedAnnotator
from rlhf_lightning.preferences.candidates import (
    Candidates,
    Ranking,
    annotate,
    sample_candidates,
    write_rankings,
    write_rows,
)

SHARP = SimulatedAnnotator(temperature=1e-3, lapse=0.0, seed=0)


def length(prompts: list[str], responses: list[str]) -> list[float]:
    return [float(len(response)) for response in responses]


def test_rankings_become_the_pairs_that_the_annotator_meant(tmp_path: Path) -> None:
    candidates = [Candidates(0, "first\n", ("bb", "a", "cccc")), Candidates(1, "second\n", ("long", "longer", "l"))]
    rankings = annotate(candidates, SHARP, length)
    assert [ranking.ranks for ranking in rankings] == [(2, 3, 1), (2, 1, 3)]
    write_rankings(rankings, tmp_path / "rankings.jsonl")
    records = load_records(str(tmp_path / "rankings.jsonl"))
    found = {(r.prompt, r.responses[better], r.responses[worse]) for r in records.rows for better, worse in r.pairs}
    assert found == {
        ("first\n", "cccc", "bb"),
        ("first\n", "cccc", "a"),
        ("first\n", "bb", "a"),
        ("second\n", "longer", "long"),
        ("second\n", "longer", "l"),
        ("second\n", "long", "l"),
    }


def test_pairs_of_the_ceiling_are_those_that_the_data_side_keeps(tmp_path: Path) -> None:
    ranking = Ranking(Candidates(0, "p", ("same", "same ", "", "other")), (1, 2, 3, 4), (4.0, 4.0, 0.0, 1.0))
    assert ranking.pairs() == [(4.0, 1.0), (4.0, 1.0)]
    write_rankings([ranking], tmp_path / "rankings.jsonl")
    (record,) = load_records(str(tmp_path / "rankings.jsonl")).rows
    assert len(record.pairs) == len(ranking.pairs())


def test_candidates_differ_and_are_repeatable_in_any_batching(tmp_path: Path, tiny_policy_dir, tiny_tokenizer) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"prompt": text} for text in ("the cat", "a dog", "the old dog")])
    records = load_records(str(tmp_path / "prompts.jsonl"))
    policy = Policy(load_causal_lm(tiny_policy_dir).double()).eval()

    def ask(batch_size: int, seed: int) -> list[Candidates]:
        return sample_candidates(
            policy,
            prompt_batches(records, tiny_tokenizer, batch_size),
            tiny_tokenizer,
            count=3,
            max_new_tokens=8,
            temperature=1.0,
            eos_ids=[tiny_tokenizer.eos_token_id],
            seed=seed,
        )

    with torch.no_grad():
        first = ask(3, seed=0)
    assert [item.row for item in first] == [0, 1, 2]
    assert [item.prompt for item in first] == ["the cat", "a dog", "the old dog"]
    assert all(len(set(item.completions)) == 3 for item in first)
    assert ask(1, seed=0) == first
    assert ask(3, seed=1) != first
