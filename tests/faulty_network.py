"""A proxy that breaks answers as real networks do, and a second kind of server, which honours If-Match."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import os
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit

import pytest
from moto.server import ThreadedMotoServer

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings


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
        self.answered = 0
        self.stall_seconds = 0.0
        self.expired_token: str | None = None
        self.lost_parts = 0  # so many parts of uploads are welcomed and forgotten
        self.after: list[
            tuple[int, Callable[[], object]]
        ] = []  # (GETs of objects answered, what happens then)
        self.seen: list[Seen] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def next_fault(self) -> str | None:
        with self.lock:
            self.answered += 1
            if self.after and self.answered > self.after[0][0]:
                self.after.pop(0)[1]()
            return self.faults.pop(0) if self.faults else self.always

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that went away is no news here."""


class _Handler(BaseHTTPRequestHandler):
    server: FaultyProxy

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "Expect" in self.headers:  # botocore would wait a second for this before it sends a body
            self.wfile.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.lost_parts and self.command == "PUT" and "partNumber=" in self.path:
            self.server.lost_parts -= 1
            etag = hashlib.md5(body, usedforsecurity=False).hexdigest()
            return self.respond(200, {"ETag": f'"{etag}"'}, b"")
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
            own = ("connection", "content-length", "transfer-encoding")  # what comes is answered in one piece
            headers = {k: v for k, v in answer.getheaders() if k.lower() not in own}
            headers["Content-Length"] = answer.getheader("Content-Length", str(len(data)))
            return self.answer(fault, answer.status, headers, data)

    do_HEAD = do_PUT = do_DELETE = do_POST = do_GET

    def answer(self, fault: str | None, status: int, headers: dict[str, str], data: bytes) -> None:
        if fault == "busy":
            return self.respond(503, {}, b"<Error><Code>SlowDown</Code><Message>later</Message></Error>")
        if fault == "short":  # a body that is complete by its own account, and too short
            data = data[: len(data) // 2]
            headers["Content-Length"] = str(len(data))
        if fault == "flip" and data:
            damaged = bytearray(data)
            damaged[len(data) // 3] ^= 1
            data = bytes(damaged)
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
        return self.respond(status, headers, data, stall=self.server.stall_seconds if fault == "stall" else 0)

    def respond(self, status: int, headers: dict[str, str], data: bytes, *, stall: float = 0) -> None:
        self.send_response_only(status)
        for name, value in {"Content-Length": str(len(data)), "Connection": "close", **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            half = len(data) // 2 if stall else len(data)
            self.wfile.write(data[:half])
            if stall:
                self.wfile.flush()
                time.sleep(stall)
                self.wfile.write(data[half:])
        self.close_connection = True


@pytest.fixture
def proxy(store_server: EmbeddedStore) -> Iterator[FaultyProxy]:
    with proxy_before(store_server.endpoint_url) as server:
        yield server


@contextlib.contextmanager
def proxy_before(url: str) -> Iterator[FaultyProxy]:
    server = FaultyProxy(url)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
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
