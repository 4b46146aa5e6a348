"""The process in which a user's function runs, and how a function is found by its name and called.

The process runs this file as a script and never imports ``rlhf_lightning.rewards``. So it loads no torch and no
transformers, but what the function itself needs.
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
    """A call gave no result; the text says how, to be read after "the function": "raised KeyError: 'x' (my.py:3)"."""


def call_here(function: Callable[..., Any], arguments: list[Any], keywords: dict[str, Any]) -> Any:
    """``function(*arguments, **keywords)`` in this process.

    Raises: CallFailed where the function raises, or asks Python to exit.
    """
    try:
        return function(*arguments, **keywords)
    except (Exception, SystemExit) as error:
        raise CallFailed(f"raised {_told(error)}") from error


class FunctionProcess:
    """A named function in a process of its own, started at the first call and kept for the next ones.

    A thread cannot be stopped from outside, and a signal is not seen by code that hangs in C; a process can be ended
    whatever it does. It imports the function's file anew, so the function has its own globals there; what goes in and
    comes out is JSON. It ends with this process, and what it prints is printed.

    Args:
        source: the function's name, as for `load_function`.
    """

    def __init__(self, source: str) -> None:
        self.source = source
        self._process: subprocess.Popen[bytes] | None = None
        self._pipe: Connection | None = None
        self._end: Callable[[], Any] = lambda: None

    def call(self, arguments: list[Any], keywords: dict[str, Any], timeout: float) -> Any:
        """The function's result, with arrays and tensors as lists.

        Raises:
            CallFailed: the function raises, does not answer within ``timeout`` seconds (its process, with all that it
                started, is then ended, and the next call starts another), ends its own process, or returns what is no
                list of numbers or text.
            InputError: an argument is no JSON.
        """
        try:
            request = json.dumps([arguments, keywords]).encode()
        except (TypeError, ValueError) as error:
            raise InputError(
                f"function {self.source}: with a timeout it runs in a process of its own, which columns of text, "
                f"numbers, lists and objects can be sent to ({error}); leave the timeout out, or the column"
            ) from error
        if self._process is None or self._process.poll() is not None:
            self._start()
        process, pipe = self._process, self._pipe
        assert process is not None and pipe is not None
        try:
            pipe.send_bytes(request)
            if not pipe.poll(timeout):
                self.stop()
                raise CallFailed(f"did not answer within {timeout:g} s, so its process was ended")
            result, failure = json.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)  # the pipe closes a moment before the exit code is known
            self.stop()
            raise CallFailed(f"ended its process (exit code {process.returncode})") from error
        if failure is not None:
            raise CallFailed(failure)
        return result

    def stop(self) -> None:
        """End the process and what it started, at once; the next call starts another."""
        self._end()
        self._process = self._pipe = None

    def _start(self) -> None:
        self.stop()
        ours, theirs = Pipe()
        paths = [path or os.getcwd() for path in sys.path]
        process = self._process = subprocess.Popen(
            # -P: the files beside this one do not stand in for modules of their names.
            [sys.executable, "-P", __file__, str(theirs.fileno()), self.source],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(),),
            start_new_session=True,  # Ctrl-C is for the training, and what the function starts ends with it
        )
        theirs.close()
        self._pipe = ours
        self._end = weakref.finalize(self, _end, process, ours)  # called once: here, or when Python exits
        try:
            # Without a limit: the same import has been through in this process.
            failure = json.loads(ours.recv_bytes())
        except (EOFError, OSError) as error:
            self.stop()
            raise InputError(
                f"function {self.source}: importing it ended the process made for it (exit code {process.returncode})"
            ) from error
        if failure is not None:
            raise InputError(failure)


def serve() -> None:
    """What a `FunctionProcess` runs: read calls from the pipe that the command line names, and answer them."""
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
            os._exit(0)  # the training has ended, however long the function still takes

    threading.Thread(target=read, daemon=True).start()
    while True:
        arguments, keywords = json.loads(requests.get())
        try:
            reply = json.dumps([_plain(call_here(function, arguments, keywords)), None])
        except CallFailed as error:
            reply = json.dumps([None, str(error)])
        except (TypeError, ValueError) as error:
            reply = json.dumps([None, f"returned what is no list of numbers ({_told(error)})"])
        pipe.send_bytes(reply.encode())


def _plain(result: Any) -> Any:
    """A result as JSON has it: lists for arrays, tensors and sequences, numbers for their scalars."""
    if hasattr(result, "tolist"):
        return result.tolist()
    if isinstance(result, (str, bool, int, float, dict)) or result is None:
        return result
    return [item.item() if hasattr(item, "item") else item for item in result]


def _end(process: subprocess.Popen[bytes], pipe: Connection) -> None:
    # The group before the pipe: a process that sees its pipe closed ends by itself, and what it started would live on.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    pipe.close()
    process.wait()


def _told(error: BaseException) -> str:
    """``KeyError: 'lexicon' (my_rewards.py:12)``, in one line."""
    frames = traceback.extract_tb(error.__traceback__)
    where = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return " ".join(f"{type(error).__name__}: {error}{where}".split())


def load_function(name: str) -> Callable[..., Any]:
    """The function that ``file.py:name`` or ``package.module:name`` names; InputError where there is none."""
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
    # A name of its own: two files may have the same name, or that of a package.
    name = f"reward_{path.stem}_{hashlib.blake2b(os.fsencode(path), digest_size=8).hexdigest()}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None, "a .py file always has a loader"
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses and pickle look a class's module up there
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
