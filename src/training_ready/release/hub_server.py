"""Who serves the hub, and whom? The app around the routes: token, host check, errors, a thread to run in.

The embedded hub is a Hugging Face Hub small enough to start inside a test, on a laptop or on a machine
without the internet. It listens on loopback unless told otherwise. Clients need `HF_ENDPOINT` and
`HF_HUB_DISABLE_XET=1` (:meth:`EmbeddedHub.environment`).
"""

from __future__ import annotations

import hmac
import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from training_ready.release import hub_routes, hub_upload
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_store import HubStore

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")
_READS = ("GET", "HEAD")


def is_loopback(host: str) -> bool:
    return host in _LOOPBACK


def create_hub_app(
    root: Path, token: str | None = None, *, allowed_hosts: Sequence[str] = _LOOPBACK
) -> FastAPI:
    """The hub over `root` as an ASGI app; `app.state.store.close()` gives the folder back.

    With a `token`, every request must carry it as a bearer token. Requests are answered only under
    `allowed_hosts` (the Host header), which keeps a web page from reaching a loopback hub through a name it
    controls.

    Raises HubError when another process serves `root`.
    """
    app = FastAPI(title="Training Ready hub", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = HubStore(root)
    app.state.signing_key = secrets.token_bytes(32)
    for routes in (hub_routes, hub_upload):
        app.include_router(routes.router)
    app.add_exception_handler(HubError, _refuse)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            _check_caller(request, token)
        except HubError as error:
            return _refuse(request, error)
        return await call_next(request)

    app.add_middleware(_QuotedPaths)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    return app


def _check_caller(request: Request, token: str | None) -> None:
    origin = request.headers.get("origin")
    if origin and request.method not in _READS and origin != str(request.base_url).rstrip("/"):
        raise HubError(f"a page of {origin} may not write to this hub", status=403)
    if token is None or (request.method == "PUT" and "signature" in request.query_params):
        return  # The signed upload URL is checked by its route.
    if request.url.path == "/api/validate-yaml":
        return  # Clients send no token there; it reads nothing of the hub.
    given = request.headers.get("authorization", "")
    if not given:
        raise HubError("this hub wants a token: set HF_TOKEN to the one it was started with", status=401)
    if not hmac.compare_digest(given.encode(), f"Bearer {token}".encode()):
        # The client tells a bad token from a missing repository by this text only.
        raise HubError("Invalid credentials in Authorization header", status=401)


def _refuse(request: Request, error: Exception) -> JSONResponse:
    status, code = (error.status, error.code) if isinstance(error, HubError) else (500, None)
    headers = {"X-Error-Message": str(error).encode("ascii", "replace").decode().replace("\n", " ")}
    if code:
        headers["X-Error-Code"] = code
    return JSONResponse({"error": str(error)}, status_code=status, headers=headers)


class _QuotedPaths:
    """Route on the URL as it was sent: `feature%2Fx` is one segment, a branch, not a folder and a file."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self._app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("ascii")
        await self._app(scope, receive, send)


class EmbeddedHub:
    """A hub in a thread of this process: `with EmbeddedHub(folder) as hub: HfApi(endpoint=hub.endpoint_url)`.

    Port 0 takes a free one. State stays in `root`; the next hub over the same folder continues with it.
    """

    def __init__(
        self, root: Path, port: int = 0, *, host: str = "127.0.0.1", token: str | None = None
    ) -> None:
        self.root = root
        self._address = (host, port)
        self._token = token

    def __enter__(self) -> EmbeddedHub:
        host, port = self._address
        self._socket = _listen(host, port)
        name = f"[{host}]" if ":" in host else host
        self.endpoint_url = f"http://{name}:{self._socket.getsockname()[1]}"
        try:
            self._app = create_hub_app(self.root, self._token, allowed_hosts=(*_LOOPBACK, name))
        except HubError:
            self._socket.close()
            raise
        self._server = uvicorn.Server(uvicorn.Config(self._app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="hub", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self._app.state.store.close()
                raise HubError(f"the hub's thread ended before it answered at {self.endpoint_url}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self._app.state.store.close()

    def environment(self) -> dict[str, str]:
        """Variables for a child process whose `huggingface_hub` is to use this hub."""
        variables = {"HF_ENDPOINT": self.endpoint_url, "HF_HUB_DISABLE_XET": "1"}
        return variables if self._token is None else {**variables, "HF_TOKEN": self._token}


def _listen(host: str, port: int) -> socket.socket:
    # asyncio turns Nagle's algorithm off only on sockets that name TCP; without, every answer waits 40 ms.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((host, port))
        listening.listen(128)
    except OSError as error:
        listening.close()
        raise HubError(f"cannot listen on {host}:{port}: {error.strerror}; choose another port") from error
    return listening
