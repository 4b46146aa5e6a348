"""The length of a response as a reward, to be subtracted from another reward: see length_penalty.yaml."""

from __future__ import annotations


def words(prompts: list[str], responses: list[str]) -> list[float]:
    """Words in each response."""
    return [float(len(response.split())) for response in responses]
