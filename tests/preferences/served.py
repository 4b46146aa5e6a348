"""Runs ``annotate`` as users do, in a process of its own, and speaks to it over loopback."""

from __future__ import annotations

import http.client
import json
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any
from urllib.parse import quote


class Server:
    """A running ``annotate``.

    Args:
        arguments: of the command, but for the port.
        port: the port; None for a free one.
    """

    def __init__(self, *arguments: str | Path, port: int | None = None) -> None:
        if port is None:
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                port = free.getsockname()[1]
        self.port = port
        command = [sys.executable, "-m", "rlhf_lightning", "annotate", *map(str, arguments), "--port", str(port)]
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        self.lines: list[str] = []
        self.judge: list[str] = []  # addresses
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line.rstrip())
            if line.startswith("judge"):
                self.judge.append(line.split()[1])
            if line.startswith("stop"):
                break
        assert self.judge, self.lines

    def send(self, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """One request to this server, see `request`."""
        return self.request(self.port, method, path, body, **headers)

    @staticmethod
    def request(port: int, method: str, path: str, body: Any = None, **headers: str) -> tuple[int, Any, dict[str, str]]:
        """One request; status, the JSON or the text of the answer, headers."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        sent = {"content-type": "application/json"} if body is not None else {}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        try:
            connection.request(method, path, data, sent)
            answer = connection.getresponse()
            text = answer.read().decode()
        finally:
            connection.close()
        found = {name.lower(): value for name, value in answer.getheaders()}
        return answer.status, json.loads(text) if "json" in found.get("content-type", "") else text, found

    def next(self, annotator: str) -> dict[str, Any]:
        """What the annotator is asked."""
        status, found, _ = self.send("GET", f"/api/next?annotator={quote(annotator)}")
        assert status == 200, found
        return found

    def post(self, client: str, annotator: str, ask: str, value: Any = None, **more: Any) -> tuple[int, Any]:
        """Sends a judgement."""
        body = {"client_id": client, "annotator": annotator, "ask": ask, "value": value, **more}
        return self.send("POST", "/api/judgements", body)[:2]

    def stop(self, number: int = signal.SIGINT) -> tuple[int, str]:
        """Stops it; the exit code, and what it said since it served."""
        self.process.send_signal(number)
        said = self.process.communicate(timeout=30)[0]
        return self.process.returncode, said

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
