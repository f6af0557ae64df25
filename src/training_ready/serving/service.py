"""The HTTP service: both dialects over one engine, who may ask, and what a body that cannot be read is answered."""

from __future__ import annotations

import hmac
import ipaddress
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from training_ready import __version__
from training_ready.serving.answers import CLIENT_LEFT, ClientLeft, Service, json_response
from training_ready.serving.engine import Engine
from training_ready.serving.errors import RequestError
from training_ready.serving.openai_api import openai_router
from training_ready.serving.tgi_api import tgi_router

MAX_BODY_BYTES = 2_000_000  # TGI's payload limit


def create_app(engine: Engine, *, api_key: str | None = None) -> FastAPI:
    """The service over ``engine``.

    Args:
        engine: runs the model; closing it stays with the caller.
        api_key: if set, every POST needs ``Authorization: Bearer <api_key>``; facts, health and metrics stay open.
            If not, only requests to a loopback name are answered.
    """
    service = Service(engine=engine)
    app = FastAPI(
        title="Training Ready inference",
        version=__version__,
        openapi_url="/api-doc/openapi.json",
        docs_url=None,  # the interactive pages load scripts from a third party
        redoc_url=None,
    )
    app.include_router(tgi_router(service))
    app.include_router(openai_router(service))
    _answer_failures(app, service)
    app.add_middleware(Gate, api_key=api_key)
    return app


def _answer_failures(app: FastAPI, service: Service) -> None:
    @app.exception_handler(RequestError)
    async def failed(_: Request, error: RequestError) -> Response:
        service.metrics.count("tgi_request_failure", err=error.error_type)
        return json_response(error.body(), status=error.status)

    @app.exception_handler(ClientLeft)
    async def left(_: Request, __: ClientLeft) -> Response:
        return Response(status_code=CLIENT_LEFT)

    @app.exception_handler(RequestValidationError)
    async def unreadable(request: Request, error: RequestValidationError) -> Response:
        service.metrics.count("tgi_request_failure", err="validation")
        return _unreadable_body(request, error)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> Response:
        return PlainTextResponse(str(error.detail), error.status_code, headers=error.headers)


def _unreadable_body(request: Request, error: RequestValidationError) -> Response:
    """A body that never became a request is answered in plain text, as TGI's web framework does."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if not (
        media_type == "application/json"
        or (media_type.startswith("application/") and media_type.endswith("+json"))
    ):
        return PlainTextResponse("Expected request with `Content-Type: application/json`", 415)
    details = error.errors()
    if any(each["type"] == "json_invalid" for each in details):
        reason = details[0].get("ctx", {}).get("error", details[0]["msg"])
        return PlainTextResponse(f"Failed to parse the request body as JSON: {reason}", 400)
    reasons = "; ".join(
        ".".join(str(part) for part in each["loc"][1:]) + ": " + each["msg"] for each in details[:5]
    )
    return PlainTextResponse(f"Failed to deserialize the JSON body into the target type: {reasons}", 422)


class Gate:
    """Turns strangers and oversized bodies away before anything reads them.

    Without a key the service answers only to the names of this machine's loopback, so that no web page reaches it by
    pointing a name of its own at 127.0.0.1.
    """

    def __init__(self, app: ASGIApp, api_key: str | None) -> None:
        self._app = app
        self._expected = None if api_key is None else f"Bearer {api_key}".encode()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        if self._expected is None and not _names_loopback(headers.get(b"host", b"")):
            await _misdirected()(scope, receive, send)
            return
        if scope["method"] == "POST" and not self._knows(headers.get(b"authorization", b"")):
            await Response(status_code=401)(scope, receive, send)
            return
        declared = headers.get(b"content-length", b"0")
        if not declared.isdigit() or int(declared) > MAX_BODY_BYTES:
            await _too_large()(scope, receive, send)
            return
        await self._app(scope, _limited(receive), send)

    def _knows(self, given: bytes) -> bool:
        return self._expected is None or hmac.compare_digest(given, self._expected)


def _names_loopback(host: bytes) -> bool:
    try:
        name = urlsplit(b"//" + host).hostname or b""
        return name == b"localhost" or ipaddress.ip_address(name.decode("ascii")).is_loopback
    except ValueError:
        return False


def _misdirected() -> Response:
    return PlainTextResponse(
        "without an API key this service answers only to localhost and loopback addresses", 421
    )


def _limited(receive: Receive) -> Callable[[], Awaitable[Message]]:
    """The same messages, as long as the bodies together stay within the limit (a chunked body declares no length)."""
    seen = 0

    async def limited() -> Message:
        nonlocal seen
        message = await receive()
        seen += len(message.get("body", b""))
        if seen > MAX_BODY_BYTES:
            raise HTTPException(413, f"length limit exceeded: a body may have {MAX_BODY_BYTES} bytes")
        return message

    return limited


def _too_large() -> Response:
    return PlainTextResponse(f"length limit exceeded: a body may have {MAX_BODY_BYTES} bytes", 413)
