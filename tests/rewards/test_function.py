"""Reward functions that raise, hang, die or return nonsense: a clear error, or the response is left out."""

import math
import os
import time
import warnings
from pathlib import Path

import pytest
from test_rewards import make_rollout

from rlhf_lightning.errors import InputError
from rlhf_lightning.rewards import FunctionReward

SOURCE = """
import os, time

def trouble(prompts, responses, log=None):
    for response in responses:
        if response == "raise":
            raise KeyError("lexicon")
        if response == "hang":
            time.sleep(60)
        if response == "die":
            os._exit(7)
        if response == "orphan":
            os.spawnlp(os.P_NOWAIT, "sh", "sh", "-c", f"echo $$ > {log[0]}; sleep 60")
            time.sleep(0.5)
            os._exit(7)
        if response == "child":
            os.spawnlp(os.P_WAIT, "sh", "sh", "-c", f"echo $$ > {log[0]}; sleep 60")
    print("scored", len(responses))
    return [float("nan") if r == "nan" else float("inf") if r == "inf" else len(r) for r in responses]

def words(prompts, responses):
    return ["good"] * len(responses)

def short(prompts, responses):
    return [1.0]

def arrays(prompts, responses):
    import torch
    return torch.tensor([len(r) for r in responses])

def where(prompts, responses):
    return [os.getpid()] * len(responses)

def objects(prompts, responses):
    return [object() for _ in responses]

def leaving(prompts, responses):
    raise SystemExit(3)
"""


def ends(pid: int) -> bool:
    """Whether a process has ended or soon does; one that nobody has waited for yet (Z) has."""
    for _ in range(100):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except (FileNotFoundError, ProcessLookupError):
            return True
        time.sleep(0.1)
    return False


@pytest.fixture
def source(tmp_path):
    (tmp_path / "mine.py").write_text(SOURCE)
    return f"{tmp_path / 'mine.py'}:"


@pytest.mark.parametrize("timeout", [None, 20.0])
@pytest.mark.parametrize(
    ("name", "responses", "message"),
    [
        ("trouble", ["fine", "raise"], r"raised KeyError: 'lexicon' \(mine.py:7\); it fails so for row 1: "),
        ("words", ["a", "b"], "expected 2 numbers, got list .*; it fails so for row 0: "),
        ("short", ["a", "b"], r"each of 2 responses, got shape \(1,\).*no single response, the first of 2 is row 0: "),
        ("trouble", ["a", "inf"], "the score of response 1 is inf; .*row 1: "),
        ("objects", ["a", "b"], "expected 2 numbers|else than a list of numbers"),
        ("leaving", ["a"], "raised SystemExit: 3"),
    ],
)
def test_an_error_names_function_row_and_prompt(source, name, responses, message, timeout):
    with pytest.raises(InputError, match=message) as caught:
        FunctionReward(source + name, timeout)(make_rollout(responses))
    text = str(caught.value)
    assert f"mine.py:{name}" in text
    assert "prompt 'prompt " in text
    assert "\n" not in text


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_columns_of_the_names_of_its_texts_are_left_out(tmp_path, timeout):
    (tmp_path / "mine.py").write_text(
        "def named(prompts, responses):\n    return [len(r) for r in responses]\n"
        "def others(prompts, responses, log):\n    return log\n"
        "def all(p, responses, **columns):\n    assert set(columns) == {'prompts', 'log'}\n    return columns['log']\n"
        "def by_place(prompts, responses, /, **columns):\n    return columns['responses']\n"
    )
    rollout = make_rollout(["a", "bb"], prompts=["x", "y"], responses=[7, 8], p=[3, 4], log=[5, 6])
    expected = {"named": [1.0, 2.0], "others": [5.0, 6.0], "all": [5.0, 6.0], "by_place": [7.0, 8.0]}
    for name, scores in expected.items():
        assert FunctionReward(f"{tmp_path / 'mine.py'}:{name}", timeout)(rollout).tolist() == scores


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_column_that_rows_lack_is_named_whatever_may_be_skipped(tmp_path, on_error):
    (tmp_path / "mine.py").write_text("def ours(prompts, responses, answer, *, log, extra=1):\n    return answer\n")
    reward = FunctionReward(f"{tmp_path / 'mine.py'}:ours", on_error=on_error)
    assert reward(make_rollout(["a", "b"], answer=[1, 2], log=[0, 0])).tolist() == [1.0, 2.0]
    with pytest.raises(InputError, match=r"asks for column 'log', and the rows have answer, other; add it to the rows"):
        reward(make_rollout(["a", "b"], answer=[1, 2], other=[0, 0]))
    with pytest.raises(InputError, match="asks for column 'answer', and the rows have none beside the prompt"):
        reward(make_rollout(["a", "b"]))


@pytest.mark.parametrize("timeout", [None, 20.0])
def test_skipped_responses_have_no_score_and_the_others_theirs(source, timeout):
    reward = FunctionReward(source + "trouble", timeout, on_error="skip")
    with pytest.warns(
        UserWarning, match=r"the function raised KeyError: 'lexicon' .*; responses that it fails for are"
    ):
        scores = reward(make_rollout(["four", "raise", "nan", "inf", "sixsix"])).tolist()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        reward(make_rollout(["raise"]))  # told once
    assert [None if math.isnan(s) else s for s in scores] == [4.0, None, None, None, 6.0]


def test_a_hang_is_ended_named_and_the_next_call_works(source):
    reward = FunctionReward(source + "trouble", timeout=1.0)
    assert reward(make_rollout(["warm"])).tolist() == [4.0]  # the process is up
    began = time.monotonic()
    with pytest.raises(InputError, match=r"did not answer within 1 s.*row 2: prompt 'prompt 2', response 'hang'"):
        reward(make_rollout(["a", "b", "hang"]))
    assert time.monotonic() - began < 15  # 1 s for all, 1 s for the one; the rest is starting anew
    assert reward(make_rollout(["abc"])).tolist() == [3.0]


def test_a_hang_and_a_death_can_be_skipped(source):
    reward = FunctionReward(source + "trouble", timeout=2.0, on_error="skip")
    scores = reward(make_rollout(["die", "four", "hang"])).tolist()
    assert [None if math.isnan(s) else s for s in scores] == [None, 4.0, None]


def test_a_death_is_told_with_its_exit_code(source):
    with pytest.raises(InputError, match=r"ended its process \(exit code 7\); it fails so for row 1"):
        FunctionReward(source + "trouble", timeout=20.0)(make_rollout(["a", "die"]))


@pytest.mark.parametrize("how", ["child", "orphan"])
def test_what_a_function_started_ends_with_it(how, source, tmp_path):
    """Where it hangs, and where its own process ends first."""
    log = tmp_path / "pid"
    reward = FunctionReward(source + "trouble", timeout=1.5, on_error="skip")
    reward(make_rollout([how], log=[str(log)]))
    assert ends(int(log.read_text()))


def test_with_a_timeout_the_function_has_a_process_of_its_own_and_keeps_it(source):
    reward = FunctionReward(source + "where", timeout=20.0)
    (first, same), (second,) = reward(make_rollout(["a", "b"])).tolist(), reward(make_rollout(["c"])).tolist()
    assert first == same == second != os.getpid()
    assert FunctionReward(source + "where")(make_rollout(["a"])).item() == os.getpid()


def test_tensors_come_back_and_prints_come_through(source, capfd):
    assert FunctionReward(source + "arrays", timeout=60.0)(make_rollout(["a", "bbb"])).tolist() == [1.0, 3.0]
    FunctionReward(source + "trouble", timeout=20.0)(make_rollout(["a", "b"]))
    assert "scored 2" in capfd.readouterr().out


def test_the_process_ends_with_the_reward(source):
    reward = FunctionReward(source + "where", timeout=20.0)
    pid = int(reward(make_rollout(["a"])).item())
    os.kill(pid, 0)
    del reward
    assert ends(pid)


def test_columns_that_no_json_can_hold_are_refused(source):
    with pytest.raises(InputError, match=r"with a timeout .* not JSON serializable"):
        FunctionReward(source + "trouble", timeout=5.0)(make_rollout(["a"], log=[object()]))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"timeout": 0.0}, "reward timeout: expected seconds above 0, got 0.0; null sets no limit"),
        ({"timeout": float("inf")}, "reward timeout: expected seconds above 0, got inf"),
        ({"on_error": "ignore"}, "reward on_error: expected raise or skip, got 'ignore'"),
    ],
)
def test_options_that_cannot_work_are_refused(source, options, message):
    with pytest.raises(InputError, match=message):
        FunctionReward(source + "words", **options)
