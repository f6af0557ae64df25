"""A network between a reader and a store on this machine: counts bytes, and can be as slow as a real one.

``python slow_network.py HOST:PORT [--latency 0.03] [--rate 80e6]`` prints its own port; each line on its standard
input is answered with the counts so far as JSON. Latency is added before the first byte of each answer, the rate
(bytes per second) holds for each connection. It runs in a process of its own, so that its work is not the reader's.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import subprocess
import sys
import time
from types import TracebackType

CHUNK = 256 << 10
_BURST_SECONDS = 0.005


class Counter:
    def __init__(self, latency: float, rate: float) -> None:
        self.latency, self.rate = latency, rate
        self.answers = self.bytes = self.connections = 0

    async def serve(self, upstream: str, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        host, port = upstream.rsplit(":", 1)
        there_reader, there_writer = await asyncio.open_connection(host, int(port), limit=CHUNK)
        asked = [True]  # since the last answer began
        await asyncio.gather(
            self.pump(reader, there_writer, asked, answers=False),
            self.pump(there_reader, writer, asked, answers=True),
            return_exceptions=True,
        )

    async def pump(
        self, source: asyncio.StreamReader, sink: asyncio.StreamWriter, asked: list[bool], *, answers: bool
    ) -> None:
        ready = time.monotonic()
        try:
            while data := await source.read(CHUNK):
                if answers:
                    if asked[0]:
                        asked[0] = False
                        self.answers += 1
                        if self.latency:
                            await asyncio.sleep(self.latency)
                    self.bytes += len(data)
                    if self.rate:
                        # A timer wakes up to milliseconds late; what a connection missed meanwhile it may send now.
                        ready = max(ready, time.monotonic() - _BURST_SECONDS) + len(data) / self.rate
                        if (early := ready - time.monotonic()) > _BURST_SECONDS:
                            await asyncio.sleep(early)
                else:
                    asked[0] = True
                sink.write(data)
                await sink.drain()
        finally:
            sink.close()


async def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("upstream")
    parser.add_argument("--latency", type=float, default=0.0)
    parser.add_argument("--rate", type=float, default=0.0)
    options = parser.parse_args()
    counter = Counter(options.latency, options.rate)
    server = await asyncio.start_server(
        lambda reader, writer: counter.serve(options.upstream, reader, writer), "127.0.0.1", 0, limit=CHUNK
    )
    print(server.sockets[0].getsockname()[1], flush=True)
    while await asyncio.to_thread(sys.stdin.readline):
        counts = {"bytes": counter.bytes, "answers": counter.answers, "connections": counter.connections}
        print(json.dumps(counts), flush=True)


class SlowNetwork:
    """The proxy as a process: ``with SlowNetwork("127.0.0.1:9000") as network: network.url, network.counts()``."""

    def __init__(self, upstream: str, *, latency: float = 0.0, rate: float = 0.0) -> None:
        self._command = [sys.executable, __file__, upstream, "--latency", str(latency), "--rate", str(rate)]

    def __enter__(self) -> SlowNetwork:
        self._process = subprocess.Popen(
            self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout is not None  # noqa: S101
        self.url = f"http://127.0.0.1:{int(self._process.stdout.readline())}"
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()

    def counts(self) -> dict[str, int]:
        assert self._process.stdin is not None and self._process.stdout is not None  # noqa: PT018, S101
        self._process.stdin.write("\n")
        self._process.stdin.flush()
        counts: dict[str, int] = json.loads(self._process.stdout.readline())
        return counts


if __name__ == "__main__":
    asyncio.run(main())
