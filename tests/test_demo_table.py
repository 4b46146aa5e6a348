"""The table of demos: what is run again, what is kept, what the page says, and that the page's table is the file's."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import demo_table  # noqa: E402


def result(rate: float, kl: float = 4.0, warnings: tuple[str, ...] = ()) -> dict[str, Any]:
    aligned = {"win_rate_vs_sft": rate, "win_rate_ci": [rate - 0.03, rate + 0.03], "kl": kl, "gold_reward": 1.5}
    return {
        "warnings": list(warnings),
        "sft": {"gold_reward": -0.5},
        "reward_model": {"accuracy": 0.7, "label_ceiling": 0.8},
        "ppo": aligned,
        "dpo": aligned,
        "cpu_seconds": 140.6,
    }


def test_what_is_there_is_not_run_again_and_another_recipe_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "table.json"
    ran: list[tuple[str, int, int]] = []

    def run(size: str, seed: int, threads: int) -> dict[str, Any]:
        ran.append((size, seed, threads))
        if seed == 3:
            raise SystemExit("ended")
        return result(0.9)

    monkeypatch.setattr(demo_table, "run", run)
    monkeypatch.setattr(sys, "argv", ["demo_table.py", "--json", str(path), "--seeds", "1", "2", "--threads", "2"])
    assert demo_table.main() == 0
    assert sorted(ran) == [("full", 1, 2), ("full", 2, 2), ("quick", 1, 2), ("quick", 2, 2)]
    assert set(json.loads(path.read_text())["runs"]) == {demo_table.name_of(*task) for task in ran}
    assert demo_table.main() == 0
    assert len(ran) == 4  # nothing is left to do
    monkeypatch.setattr(sys, "argv", [*sys.argv, "--sizes", "quick"])
    sys.argv[4:6] = ["2", "3"]
    with pytest.raises(SystemExit):
        demo_table.main()
    assert ran[4:] == [("quick", 3, 2)]
    assert len(json.loads(path.read_text())["runs"]) == 4  # a failure leaves what was there
    monkeypatch.setattr(demo_table, "recipe", lambda size: "another")
    sys.argv[4:6] = ["1", "2"]
    assert demo_table.main() == 0
    assert sorted(ran[5:]) == [("quick", 1, 2), ("quick", 2, 2)]


def test_the_page_has_the_numbers_and_says_how_many_runs_there_are(tmp_path: Path) -> None:
    facts = {"recipe": "now", "commit": "abc1234", "changed": False}
    runs = {
        "quick seed 0 threads 1": facts | result(0.70),
        "quick seed 0 threads 2": facts | result(0.90, 6.25, ("PPO's score rose while gold fell",)),
        "quick seed 10 threads 1": facts | result(0.8) | {"recipe": "earlier"},
    }
    recipes = {"quick": "now", "full": "now"}
    page = tmp_path / "demo.md"
    page.write_text(f"before\n{demo_table.BEGIN}stale{demo_table.END}after\n")
    demo_table.write_page({"recipe": recipes, "runs": runs}, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "stale" not in text
    told = " ".join(text.split())
    assert "2 of 20 runs: PPO's win rate over SFT is 0.800 on average and 0.700 in the worst run" in told
    assert "6.2 nats at most, and it exploits the reward model in 1 of them. Commit abc1234." in told
    assert "| 0 | 1 | 0.700 [0.670, 0.730] | 4.0 | -0.50 → 1.50 | 0.700 | 4.0 | 0.700 / 0.800 | 141 |" in text
    assert text.count("\n| 0 |") == 2 and "| 10 |" not in text


def test_the_table_of_the_documentation_is_that_of_the_file() -> None:
    results = json.loads(demo_table.FILE.read_text(encoding="utf-8"))
    shown = demo_table.PAGE.read_text(encoding="utf-8").partition(demo_table.BEGIN)[2].partition(demo_table.END)[0]
    assert shown.strip() == demo_table.table(results).strip()


def test_the_recipe_follows_configs_and_sizes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("configs/demo", "rlhf_lightning/demo"):
        (tmp_path / name).mkdir(parents=True)
        for path in (ROOT / name).iterdir():
            if path.is_file():
                (tmp_path / name / path.name).write_bytes(path.read_bytes())
    monkeypatch.setattr(demo_table, "ROOT", tmp_path)
    for name, text, changes in (
        ("configs/demo/ppo.yaml", "# a comment\n", False),
        ("configs/demo/ppo.yaml", "more: 1\n", True),
        ("rlhf_lightning/demo/gold.py", "BEST = 5.0\n", True),
        ("rlhf_lightning/demo/results.py", "BEST = 5.0\n", False),
    ):
        before = demo_table.recipe("full")
        with (tmp_path / name).open("a", encoding="utf-8") as file:
            file.write(text)
        assert (demo_table.recipe("full") != before) == changes, (name, text)
    before = {size: demo_table.recipe(size) for size in demo_table.SIZES}
    monkeypatch.setattr(demo_table.stages, "QUICK", replace(demo_table.stages.QUICK, ranked=3))
    assert demo_table.recipe("quick") != before["quick"] and demo_table.recipe("full") == before["full"]


def test_other_words_make_no_other_recipe(tmp_path: Path) -> None:
    first, second, third = (tmp_path / f"{name}.py" for name in ("first", "second", "third"))
    first.write_text('"""One."""\nX = 1  # one\n"""The first."""\n\n\ndef f():\n    """Two."""\n')
    second.write_text('"""Uno."""\n\nX = 1\n\n\ndef f():\n    """Due."""\n')
    third.write_text('"""One."""\nX = 2  # one\n"""The first."""\n\n\ndef f():\n    """Two."""\n')
    trees = [demo_table._without_words(path) for path in (first, second, third)]
    assert trees[0] == trees[1] != trees[2]
