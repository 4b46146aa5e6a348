"""Finds a user's function by its name, and calls it in this process or in one of its own.

The other process runs this file as a script and never imports ``rlhf_lightning.rewards``. So it loads neither torch nor
transformers, only what the function itself needs.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import importlib.util
import inspect
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Callable
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from rlhf_lightning.errors import InputError


class CallFailed(Exception):
    """A call gave no result. The text continues a sentence that begins with "the function": "raised KeyError: 'x'"."""


def call_here(function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> Any:
    """``function(*arguments, **keywords)`` in this process.

    Raises: CallFailed if the function raises an error, or asks Python to exit.
    """
    try:
        return function(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        raise CallFailed(f"raised {_told(error)}") from error


class FunctionProcess:
    """A named function in a process of its own, started at the first call and used for all later ones.

    A thread cannot be stopped from outside, and code that hangs in C does not see signals. A process can always be
    ended. The process imports the function's file again, so the function has its own globals there. Arguments and
    results are sent as JSON. The process ends with this one, and its output goes to the same terminal.

    Args:
        source: the function's name, as for `load_function`.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._end: Callable[[], Any] = lambda: None
        self._number = 0  # of the last call, which its answer repeats

    def call(self, arguments: list[Any], keywords: dict[str, Any], timeout: float) -> Any:
        """The function's result, with arrays and tensors as lists.

        Raises:
            CallFailed: the function raises an error, ends its own process, returns something else than a list of
                numbers or text, answers twice, or does not answer within ``timeout`` seconds. In the last two cases its
                process is ended, with all that it started, and the next call starts another.
            InputError: JSON cannot hold an argument.
        """
        self._number += 1
        try:
            request = json.dumps([self._number, arguments, keywords]).encode()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"function {self.source}: with a timeout it runs in a process of its own, and only columns of text, "
                f"numbers, lists and objects can be sent there ({error}); leave the timeout out, or the column"
            ) from error
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, pipe = self._process, self._pipe
        assert process is not None and pipe is not None
        try:
            left_over = pipe.poll(0)
            pipe.send_bytes(request)
            if not pipe.poll(timeout):
                self.stop()
                raise CallFailed(f"did not answer within {timeout:g} s, so its process was ended")
            number, result, failure = json.loads(pipe.recv_bytes())
            if left_over or number != self._number:
                self.stop()
                raise CallFailed(
                    "answered a call twice (a process that it forks must end there and not return), so its process "
                    "was ended"
                )
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # the pipe closes a moment before the exit code is known
            self.stop()
            raise CallFailed(f"ended its process (exit code {process.returncode})") from error
        if failure is not None:
            raise CallFailed(failure)
        return result

    def stop(self) -> None:
        """Ends the process and all that it started, at once. The next call starts another."""
        self._end()
        self._process = self._pipe = None

    def _start(self) -> None:
        self.stop()
        ours, theirs = Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        process = self._process = subprocess.Popen(
            # -P: files beside this one must not replace modules of the same names.
            [sys.executable, "-P", __file__, str(theirs.fileno()), self.source],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C goes only to the training, and the whole group can be ended
        )
        theirs.close()
        self._pipe = ours
        self._end = weakref.finalize(self, _end, process, ours)  # called once: here, or when Python exits
        try:
            # No time limit, since the same import has succeeded in this process.
            failure = json.loads(ours.recv_bytes())
        except (EOFError, OSError) as error:
            self.stop()
            raise InputError(
                f"function {self.source}: importing it ended the process made for it (exit code {process.returncode})"
            ) from error
        if failure is not None:
            raise InputError(failure)


def serve() -> None:
    """The main function of a `FunctionProcess`: answers calls from the pipe that the command line names."""
    pipe, source = Connection(int(sys.argv[1])), sys.argv[2]
    sys.path[:] = list(dict.fromkeys(os.environ["PYTHONPATH"].split(os.pathsep)))
    try:
        function = load_function(source)
    except InputError as error:
        pipe.send_bytes(json.dumps(str(error)).encode())
        return
    pipe.send_bytes(b"null")
    requests: queue.Queue[bytes] = queue.Queue()

    def read() -> None:
        try:
            while True:
                requests.put(pipe.recv_bytes())
        except (EOFError, OSError):
            os._exit(0)  # the training has ended; the function is not waited for

    threading.Thread(target=read, daemon=True).start()
    while True:
        number, arguments, keywords = json.loads(requests.get())
        try:
            reply = json.dumps([number, _plain(call_here(function, arguments, keywords)), None])
        except CallFailed as error:
            reply = json.dumps([number, None, str(error)])
        except (TypeError, ValueError) as error:
            reply = json.dumps([number, None, f"returned something else than a list of numbers ({_told(error)})"])
        pipe.send_bytes(reply.encode())


def _plain(result: Any) -> Any:
    """A result in JSON's types: arrays, tensors and sequences become lists, their scalars become numbers."""
    if hasattr(result, "tolist"):
        return result.tolist()
    if isinstance(result, (str, bool, int, float, dict)) or result is None:
        return result
    return [item.item() if hasattr(item, "item") else item for item in result]


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    # The group is ended before the pipe is closed: the process would end by itself, and leave what it started running.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    pipe.close()
    process.wait()


def _told(error: BaseException) -> str:
    """``KeyError: 'lexicon' (my_rewards.py:12)``, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    said = f": {error}" if str(error) else ""
    return " ".join(f"{type(error).__name__}{said}{where}".split())


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``package.module:name`` names. Raises an InputError if there is none."""
    module_name, _, attribute = name.rpartition(":")
    if not module_name or not attribute:
        raise InputError(f"reward function {name!r}: expected file.py:name or package.module:name")
    try:
        module = (
            _import_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        )
    except InputError:
        raise
    except Exception as error:
        raise InputError(
            f"reward function {name!r}: importing {module_name} raised {type(error).__name__}: {error}"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        found = ", ".join(sorted(n for n, v in vars(module).items() if inspect.isfunction(v))) or "none"
        raise InputError(
            f"reward function {name!r}: {module_name} has no function {attribute!r}; its functions: {found}"
        )
    return function


def _import_file(path: Path) -> Any:
    if not path.is_file():
        raise InputError(f"reward function file {path} does not exist; the path is relative to {Path.cwd()}")
    path = path.resolve()
    # A unique name, since two files may have the same name, or the name of a package.
    name = f"reward_{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs, since dataclasses and pickle look up modules there
    if str(path.parent) not in sys.path:
        sys.path.append(str(path.parent))  # last, so that a helper cannot stand in for an installed package
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


if __name__ == "__main__":
    serve()
