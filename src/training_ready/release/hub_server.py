"""Who serves the hub, and whom? The app around the routes: token, host check, errors, a thread to run in.

The embedded hub is a Hugging Face Hub small enough to start inside a test, on a laptop or on a machine
without the internet. It listens on loopback unless told otherwise. Clients need `HF_ENDPOINT` and
`HF_HUB_DISABLE_XET=1` (:meth:`EmbeddedHub.environment`).
"""

from __future__ import annotations

import secrets
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import JSONResponse, Response
from starlette.middleware.trustedhost import TrustedHostMiddleware

from training_ready import TrainingReadyError
from training_ready.release import hub_downloads, hub_pages, hub_routes, hub_upload
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_store import HubStore
from training_ready.release.hub_tokens import Scope, TokenBook, check_caller
from training_ready.release.place_folder import FolderPlace
from training_ready.release.places import Place, PlaceError
from training_ready.storage.errors import StorageError

_LOOPBACK = ("127.0.0.1", "localhost", "[::1]", "::1")


def is_loopback(host: str) -> bool:
    return host in _LOOPBACK


def create_hub_app(
    place: Place, tokens: Mapping[str, Scope] | None = None, *, allowed_hosts: Sequence[str] = _LOOPBACK
) -> FastAPI:
    """The hub over `place` as an ASGI app; `app.state.store.close()` gives the place back.

    With `tokens` (secret: scope), or with tokens made by `hub token add`, every request must carry one. Requests are
    answered only under `allowed_hosts` (the Host header), which keeps a web page from reaching a loopback hub
    through a name it controls.

    Raises HubError when another process serves `place`.
    """
    app = FastAPI(title="Training Ready hub", docs_url=None, redoc_url=None, openapi_url=None)
    app.state.store = HubStore(place)
    app.state.tokens = TokenBook(place, tokens)
    app.state.signing_key = secrets.token_bytes(32)
    for routes in (hub_routes, hub_downloads, hub_upload, hub_pages):
        app.include_router(routes.router)
    for kind in (HubError, PlaceError, StorageError):
        app.add_exception_handler(kind, _refuse)

    @app.middleware("http")
    async def guard(request: Request, call_next: Callable[[Request], Awaitable[Response]]) -> Response:
        try:
            request.state.caller = await run_in_threadpool(check_caller, request, app.state.tokens)
        except TrainingReadyError as error:
            return _refuse(request, error)
        return await call_next(request)

    app.add_middleware(_QuotedPaths)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(allowed_hosts))
    return app


def _refuse(request: Request, error: Exception) -> JSONResponse:
    status, code = (error.status, error.code) if isinstance(error, HubError) else (500, None)
    if isinstance(error, StorageError):
        status = 503  # the bucket behind this hub; asking again may help
    headers = {"X-Error-Message": " ".join(str(error).encode("ascii", "replace").decode().split())}
    if code:
        headers["X-Error-Code"] = code
    if status == 401:
        headers["WWW-Authenticate"] = (
            'Basic realm="hub", charset="UTF-8"'  # a browser then asks for the token
        )
    return JSONResponse({"error": str(error)}, status_code=status, headers=headers)


class _QuotedPaths:
    """Route on the URL as it was sent: `feature%2Fx` is one segment, a branch, not a folder and a file."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict[str, Any], receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            scope["path"] = scope["raw_path"].decode("ascii")
        await self.app(scope, receive, send)


class EmbeddedHub:
    """A hub in a thread of this process: `with EmbeddedHub(folder) as hub: HfApi(endpoint=hub.endpoint_url)`.

    Port 0 takes a free one. State stays in `root`, a folder or a place; the next hub over it continues with it.
    `token` reads and writes, `read_token` reads; with neither, and none in the place, the hub is open.
    """

    def __init__(
        self,
        root: Path | Place,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        token: str | None = None,
        read_token: str | None = None,
    ) -> None:
        self.root = root
        self._address = (host, port)
        self._token = token
        given: dict[str | None, Scope] = {read_token: "read", token: "write"}
        self._tokens = {secret: scope for secret, scope in given.items() if secret}

    def __enter__(self) -> EmbeddedHub:
        host, port = self._address
        self._socket = _listen(host, port)
        name = f"[{host}]" if ":" in host else host
        self.endpoint_url = f"http://{name}:{self._socket.getsockname()[1]}"
        try:
            self.place = FolderPlace(self.root) if isinstance(self.root, Path) else self.root
            # Beyond loopback the hub goes by names that it does not know, and the token keeps strangers out.
            hosts = _LOOPBACK if is_loopback(host) else ("*",)
            self.app = create_hub_app(self.place, self._tokens, allowed_hosts=hosts)
        except TrainingReadyError:
            self._socket.close()
            raise
        self._server = uvicorn.Server(uvicorn.Config(self.app, log_level="warning", lifespan="off"))
        self._thread = threading.Thread(
            target=self._server.run, kwargs={"sockets": [self._socket]}, name="hub", daemon=True
        )
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                self.app.state.store.close()
                raise HubError(f"the hub's thread ended before it answered at {self.endpoint_url}")
            time.sleep(0.01)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.should_exit = True
        self._thread.join()
        self._socket.close()
        self.app.state.store.close()

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
