"""The process of a named function: it ends when the training's process does, even in the middle of a call."""

import os
import signal
import subprocess
import sys
import time

from rlhf_lightning.rewards.process import FunctionProcess

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
