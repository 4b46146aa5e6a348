"""The web server of a study: the pages, and the API that they use.

| request | body, or what is asked | answer |
|---|---|---|
| ``GET /`` and ``GET /lead`` | | the pages of annotators and of the lead |
| ``GET /api/study`` | | task, criteria, scale, guidelines, annotators, whether a token is needed |
| ``GET /api/next?annotator=NAME`` | | the next item, the phase and the progress |
| ``POST /api/judgements`` | ``client_id, annotator, ask, value, skip, flag, comment, seconds`` | feedback, next |
| ``POST /api/undo`` | ``client_id, annotator`` | the item to judge again, with what was judged |
| ``GET /api/lead`` | | agreement, annotators, flags |

``docs/preferences.md`` has the fields. An answer 200 to a POST comes after the judgement is on the disk. Errors are
``{"error": TEXT}``: 400 for a faulty request, 401 for a wrong token, 403 for another host or origin, 409 for a
judgement that does not count, 413 for a body that is too large, and 503 for one that could not be saved and is to be
sent again.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import signal
import socket
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any
from urllib.parse import urlsplit

from rlhf_lightning.errors import InputError
from rlhf_lightning.preferences.assignment import Conflict
from rlhf_lightning.preferences.study import Study
from rlhf_lightning.preferences.tasks import SCALE

try:
    import uvicorn
    from starlette.applications import Starlette
    from starlette.requests import Request
    from starlette.responses import JSONResponse, Response
    from starlette.routing import Route
    from starlette.types import ASGIApp, Receive, Scope, Send
except ImportError as missing:
    message = f"annotate needs {missing.name}; run: pip install 'rlhf-lightning[annotate]'"
    raise InputError(message) from None

LEAD = "\0lead"  # whom the lead's token is for; no annotator can have this name
_BODY = 1 << 18  # bytes of a request
_ELSEWHERE = ("cross-site", "same-site")  # whose pages may not even ask: `next` holds an item for somebody
_PAGES = {"": "judge.html", "lead": "lead.html"}
_KINDS = {"html": "text/html", "css": "text/css", "js": "text/javascript"}
_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "x-content-type-options": "nosniff",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
}


@dataclass(frozen=True)
class Access:
    """Who may use the server.

    Args:
        host: the address that the server listens on. Unless it is this machine's own, annotators need a token. The lead
            always needs one, so that no annotator sees that page.
        key: the store's secret, from which tokens follow.
        url: the address that people use, if another server stands before this one; then all need a token.
    """

    host: str
    key: bytes
    url: str = ""

    @property
    def tokens(self) -> bool:
        """Whether annotators need a token."""
        return bool(self.url) or not is_loopback(self.host)

    def token(self, name: str) -> str:
        """The token of an annotator, or of `LEAD`."""
        return hmac.new(self.key, f"token\0{name}".encode(), hashlib.sha256).hexdigest()[:32]

    def admits(self, name: str, token: str) -> bool:
        """Whether this token opens the server to this name."""
        return (not self.tokens and name != LEAD) or hmac.compare_digest(self.token(name).encode(), token.encode())

    def serves(self, host: str) -> bool:
        """Whether a request may name the server so. A foreign name would let a foreign page read the answers."""
        if self.url and host.lower() == urlsplit(self.url).netloc.lower():
            return True
        name = host.rpartition(":")[0] if host.rpartition(":")[2].isdigit() and not host.endswith("]") else host
        name = name.strip("[]").lower()
        known = {"localhost", self.host.lower()} | ({socket.gethostname().lower()} if self.tokens else set())
        if name in known:
            return True
        try:
            address = ipaddress.ip_address(name)
        except ValueError:
            return False
        return self.tokens or address.is_loopback

    def comes_from_here(self, origin: str, host: str) -> bool:
        """Whether a page of this server sent a request: its origin is what the request calls the server, or `url`."""
        return origin.partition("://")[2] == host or (bool(self.url) and origin.lower() == self.url.lower())


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach the address."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def app(study: Study, access: Access) -> ASGIApp:
    """The server of a study as an ASGI application."""

    def page(request: Request) -> Response:
        return _file(_PAGES[request.url.path.strip("/")])

    def part(request: Request) -> Response:
        return _file(request.path_params["name"])

    def described(request: Request) -> Response:
        found = {
            "task": study.task.name,
            "criteria": list(study.task.criteria),
            "scale": list(SCALE),
            "guidelines": study.guidelines,
            # With tokens, the address that an annotator was sent says who they are.
            "annotators": None if access.tokens or study.annotators is None else list(study.annotators),
            "token_needed": access.tokens,
        }
        return JSONResponse(found)

    def following(request: Request) -> Response:
        annotator = study.named(request.query_params.get("annotator"))
        _admit(access, annotator, request)
        return JSONResponse(study.next(annotator))

    def posted(act: Callable[[Any], Awaitable[dict[str, Any]]]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:
            sent = await _body(request)
            _admit(access, study.named(sent.get("annotator") if isinstance(sent, dict) else None), request)
            return JSONResponse(await act(sent))

        return endpoint

    def lead(request: Request) -> Response:
        _admit(access, LEAD, request)
        return JSONResponse(study.lead())

    def get(make: Callable[[Request], Response]) -> Callable[[Request], Awaitable[Response]]:
        async def endpoint(request: Request) -> Response:  # a plain function would run in a thread, beside others
            return make(request)

        return endpoint

    routes = [
        Route("/", get(page)),
        Route("/lead", get(page)),
        Route("/page/{name}", get(part)),
        Route("/api/study", get(described)),
        Route("/api/next", get(following)),
        Route("/api/lead", get(lead)),
        Route("/api/judgements", posted(study.judge), methods=["POST"]),
        Route("/api/undo", posted(study.undo), methods=["POST"]),
    ]
    return _Guard(Starlette(routes=routes, exception_handlers=_handlers()), access)


def serve(study: Study, access: Access, listening: socket.socket) -> int:
    """Serves until SIGINT or SIGTERM, and returns 130 or 143. Requests at hand are answered first."""
    config = uvicorn.Config(
        app(study, access),
        log_level="warning",
        access_log=False,
        lifespan="off",
        ws="none",
        server_header=False,
        timeout_graceful_shutdown=5,
    )
    # uvicorn raises the signal again when it has stopped.
    before = signal.signal(signal.SIGTERM, _terminated)
    try:
        uvicorn.Server(config).run(sockets=[listening])
    except KeyboardInterrupt as stopped:
        return 143 if stopped.args else 130
    finally:
        signal.signal(signal.SIGTERM, before)
    return 0


class _Refused(Exception):
    """A request that is answered by an error.

    Args:
        status: the HTTP status.
        text: what is wrong.
    """

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class _Guard:
    """Refuses other hosts and origins, and puts the headers of safety on every answer."""

    def __init__(self, inner: ASGIApp, access: Access) -> None:
        self._inner, self._access = inner, access

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._inner(scope, receive, send)
            return

        async def guarded(message: Any) -> None:
            if message["type"] == "http.response.start":
                added = [(name.encode(), value.encode()) for name, value in _HEADERS.items()]
                message = {**message, "headers": [*message["headers"], *added]}
            await send(message)

        request = Request(scope)
        refusal = self._refusal(request)
        inner = self._inner if refusal is None else _error(403, refusal)
        await inner(scope, receive, guarded)

    def _refusal(self, request: Request) -> str | None:
        """Why a request is refused for where it goes to, or comes from."""
        host, origin = request.headers.get("host", ""), request.headers.get("origin")
        if not self._access.serves(host):
            return f"the server is not called {host!r}"
        foreign = origin is not None and not self._access.comes_from_here(origin, host)
        elsewhere = request.headers.get("sec-fetch-site") in _ELSEWHERE and request.url.path.startswith("/api/")
        return "the request comes from another site" if foreign or elsewhere else None


def _handlers() -> dict[Any, Any]:
    async def refused(request: Request, error: _Refused) -> Response:
        return _error(error.status, str(error))

    async def faulty(request: Request, error: InputError) -> Response:
        return _error(409 if isinstance(error, Conflict) else 400, str(error))

    async def unsaved(request: Request, error: OSError) -> Response:
        return _error(503, str(error))

    async def missing(request: Request, error: Exception) -> Response:
        return _error(getattr(error, "status_code", 404), "there is no such page")

    return {_Refused: refused, InputError: faulty, OSError: unsaved, 404: missing, 405: missing}


def _error(status: int, text: str) -> JSONResponse:
    return JSONResponse({"error": text}, status_code=status)


def _admit(access: Access, name: str, request: Request) -> None:
    if not access.admits(name, request.headers.get("x-token", "")):
        raise _Refused(401, "the token is missing or wrong; open the address that you were sent")


async def _body(request: Request) -> Any:
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise _Refused(400, "the content type must be application/json")
    data = b""
    async for piece in request.stream():
        data += piece
        if len(data) > _BODY:
            raise _Refused(413, f"a request has at most {_BODY >> 10} KiB")
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        raise _Refused(400, "the body is not valid JSON") from None


def _file(name: str) -> Response:
    place = resources.files("rlhf_lightning.preferences") / "page" / name
    kind = _KINDS.get(name.rpartition(".")[2])
    if kind is None or "/" in name or not place.is_file():
        raise _Refused(404, "there is no such page")
    return Response(place.read_bytes(), media_type=f"{kind}; charset=utf-8")


def _terminated(number: int, frame: object) -> None:
    raise KeyboardInterrupt(number)
