"""A proxy that breaks answers as real networks do, and a server that honours If-Match and permissions."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from moto.server import ThreadedMotoServer

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import VARIABLES, StorageSettings


@dataclass
class Seen:
    """One request: its method, what it asked for, and the bytes of the body answered by the store itself."""

    method: str
    path: str
    range: str | None
    answered: int


class FaultyProxy(ThreadingHTTPServer):
    """Forwards to the store; the GETs of objects are answered with the next fault in ``faults``, if any is left."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.upstream = urlsplit(upstream).netloc
        self.faults: list[str] = []
        self.always: str | None = None
        self.down = False
        self.expired_token: str | None = None
        self.seen: list[Seen] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self.lock:
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        upstream = http.client.HTTPConnection(self.server.upstream, timeout=30)
        with contextlib.closing(upstream):
            upstream.request(self.command, self.path, body=body or None, headers=dict(self.headers))
            answer = upstream.getresponse()
            data = answer.read()
            asked = self.headers.get("Range")
            self.server.seen.append(Seen(self.command, self.path, asked, len(data)))
            token = self.headers.get("X-Amz-Security-Token")
            if token is not None and token == self.server.expired_token:
                return self.respond(
                    400, {}, b"<Error><Code>ExpiredToken</Code><Message>old</Message></Error>"
                )
            if self.server.down:
                return self.answer("busy", 503, {}, b"")
            fault = self.server.next_fault() if self.command == "GET" and asked else None
            headers = {
                k: v for k, v in answer.getheaders() if k.lower() not in ("connection", "content-length")
            }
            headers["Content-Length"] = answer.getheader("Content-Length", str(len(data)))
            return self.answer(fault, answer.status, headers, data)

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

    def answer(self, fault: str | None, status: int, headers: dict[str, str], data: bytes) -> None:
        if fault == "busy":
            return self.respond(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
        if fault == "short":  # a body that is complete by its own account, and too short
            data = data[: len(data) // 2]
            headers["Content-Length"] = str(len(data))
        if fault == "elsewhere":
            headers["Content-Range"] = "bytes 0-0/1"
        if fault == "whole":
            status = 200
            headers = {k: v for k, v in headers.items() if k.lower() != "content-range"}
        if fault in ("cut", "reset", "nothing"):
            part = b"" if fault == "nothing" else data[: len(data) // 2]
            self.respond(status, headers, part)
            if fault == "reset":
                self.wfile.flush()
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            return None
        return self.respond(status, headers, data)

    def respond(self, status: int, headers: dict[str, str], data: bytes) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data)
        self.close_connection = True


@pytest.fixture
def proxy(store_server: EmbeddedStore) -> Iterator[FaultyProxy]:
    server = FaultyProxy(store_server.endpoint_url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def proxied(proxy: FaultyProxy, store: ObjectStore) -> ObjectStore:
    """The same bucket as ``store``, seen through the proxy."""
    return ObjectStore(replace(store.settings, endpoint_url=proxy.url))


@pytest.fixture(scope="session")
def moto_url() -> Iterator[str]:
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def moto_store(moto_url: str) -> ObjectStore:
    settings = StorageSettings(
        bucket=f"moto-{os.urandom(6).hex()}",
        endpoint_url=moto_url,
        access_key_id="testing",
        secret_access_key="testing",
    )
    store = ObjectStore(settings)
    store.create_bucket_if_missing()
    return store


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: pytest.TempPathFactory) -> None:
    """No test reads the settings of the person who runs it."""
    for name in {name for names in VARIABLES.values() for name in names} | {
        "AWS_SESSION_TOKEN",
        "AWS_PROFILE",
    }:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.chdir(tmp_path)  # type: ignore[arg-type]


@pytest.fixture
def store_environment(
    store: ObjectStore, store_server: EmbeddedStore, monkeypatch: pytest.MonkeyPatch
) -> ObjectStore:
    """The environment of a person who uses ``store``."""
    for name, value in store_server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("OVH_S3_BUCKET", store.bucket)
    return store
