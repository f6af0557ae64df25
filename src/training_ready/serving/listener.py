"""Where does the service listen? Binds first, so that a taken port is known before a model is loaded."""

from __future__ import annotations

import ipaddress
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI

from training_ready.serving.errors import ServingError

BACKLOG = 2048
GRACE_SECONDS = 10  # for running answers, when the service is told to stop


def bind(host: str, port: int, *, protected: bool) -> socket.socket:
    """A listening socket on ``host``; port 0 takes a free one.

    Raises:
        ServingError: the address is taken or not ours, or other machines could reach an unprotected service.
    """
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        if not protected and not ipaddress.ip_address(address[0]).is_loopback:
            raise ServingError(
                f"--host {host} lets other machines in: set TRAINING_READY_API_KEY, which they must then send, or "
                "listen on 127.0.0.1"
            )
        return _listen(family, address)
    except OSError as error:
        raise ServingError(
            f"cannot listen on {host}:{port}: {error}. Choose another --port or stop what holds it."
        ) from error


def _listen(family: socket.AddressFamily, address: Any) -> socket.socket:
    # Naming TCP makes asyncio send each event at once: it leaves Nagle's algorithm on for sockets of protocol 0.
    listening = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(BACKLOG)
    except OSError:
        listening.close()
        raise
    return listening


def url_of(listening: socket.socket) -> str:
    host, port = listening.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104 - not binding, naming
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class _Server(uvicorn.Server):
    """Says when requests are accepted."""

    def __init__(self, app: FastAPI, when_ready: Callable[[], None]) -> None:
        super().__init__(
            uvicorn.Config(
                app, log_level="warning", access_log=False, timeout_graceful_shutdown=GRACE_SECONDS
            )
        )
        self._when_ready = when_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets=sockets)
        if self.started:
            self._when_ready()


def run(app: FastAPI, listening: socket.socket, when_ready: Callable[[], None]) -> None:
    """Serve until the process is told to stop (Ctrl+C, SIGTERM)."""
    _Server(app, when_ready).run(sockets=[listening])


@contextmanager
def in_background(
    app: FastAPI, *, host: str = "127.0.0.1", port: int = 0, protected: bool = False
) -> Iterator[str]:
    """Serve from a thread of this process; gives the URL, and stops on leaving."""
    ready = threading.Event()
    with bind(host, port, protected=protected) as listening:
        server = _Server(app, ready.set)
        thread = threading.Thread(
            target=server.run, kwargs={"sockets": [listening]}, name="service", daemon=True
        )
        thread.start()
        while not ready.wait(0.05):
            if not thread.is_alive():
                raise ServingError(f"the service on {url_of(listening)} ended before it was ready")
        try:
            yield url_of(listening)
        finally:
            server.should_exit = True
            thread.join()
