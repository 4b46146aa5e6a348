"""A small part of campaign.py: the server is killed ten times, and serves fifty annotators at once."""

from pathlib import Path

from campaign import kills, load


def test_no_acknowledged_judgement_is_lost_or_counts_twice_when_the_server_is_killed(tmp_path: Path) -> None:
    assert kills(tmp_path, 10) == []


def test_fifty_annotators_at_once_are_served_and_no_item_is_over_its_overlap(tmp_path: Path) -> None:
    faults, times = load(tmp_path, annotators=50, seconds=3.0)
    assert faults == []
    assert len(times) >= 200  # two requests a judgement
