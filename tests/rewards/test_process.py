"""The process of a named function: it ends when the training's process does, even in the middle of a call."""

import os
import signal
import subprocess
import sys
import time

import pytest

from rlhf_lightning.rewards.process import CallFailed, FunctionProcess, call_here

TRAINING = """
import sys
from rlhf_lightning.rewards.process import FunctionProcess
FunctionProcess(sys.argv[1] + ":hang").call([], {}, 60.0)
"""


def test_a_killed_training_leaves_no_process_behind(tmp_path):
    note = tmp_path / "pid"
    (tmp_path / "mine.py").write_text(
        f"import os, time\ndef hang():\n    open({str(note)!r}, 'w').write(str(os.getpid()))\n    time.sleep(60)\n"
    )
    training = subprocess.Popen([sys.executable, "-c", TRAINING, str(tmp_path / "mine.py")])
    deadline = time.monotonic() + 60
    while not (note.exists() and note.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    pid = int(note.read_text())
    os.kill(pid, 0)
    training.send_signal(signal.SIGKILL)
    training.wait()
    while time.monotonic() < deadline:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("the function's process is still there")


def test_the_process_loads_what_the_function_needs_and_no_more(tmp_path):
    (tmp_path / "mine.py").write_text(
        "def loaded(*names):\n    import sys\n    return [name in sys.modules for name in names]\n"
    )
    process = FunctionProcess(f"{tmp_path / 'mine.py'}:loaded")
    names = ["torch", "transformers", "rlhf_lightning.rewards", "rlhf_lightning.errors"]
    assert process.call(names, {}, 60.0) == [False, False, False, True]
    process.stop()


FORKING = """
import os, time
def length(texts, twice):
    if twice and not os.fork():
        time.sleep(0.5)
    return [len(text) for text in texts]
"""


def test_an_answer_too_many_is_never_the_score_of_another_call(tmp_path):
    (tmp_path / "mine.py").write_text(FORKING)
    process = FunctionProcess(f"{tmp_path / 'mine.py'}:length")
    assert process.call([["a"], True], {}, 60.0) == [1]
    with pytest.raises(CallFailed, match="answered a call twice"):
        for texts in (["bb"], ["ccc"], ["dddd"]):  # the second answer comes half a second after the first
            assert process.call([texts, False], {}, 60.0) == [len(texts[0])]
            time.sleep(0.4)
    assert process.call([["ccccc"], False], {}, 60.0) == [5]
    process.stop()


def test_an_error_without_a_text_is_told_by_its_type():
    def fail():
        raise StopIteration

    with pytest.raises(CallFailed, match=r"^raised StopIteration \(test_process.py:\d+\)$"):
        call_here(fail, [], {})
