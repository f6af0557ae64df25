"""What does Redis gain a second machine over the bucket?

``python benchmarks/shared_cache.py [--mb 256] [--latency 0.03] [--redis-latency 5e-4]`` needs redis-server. One reader
fills Redis, another machine (an empty disk) reads the same blocks of 4 MiB: from the bucket, and from Redis. Bucket and
Redis lie behind networks of their own; each connection of both carries ``--rate`` bytes per second.
"""

from __future__ import annotations

import argparse
import os
import socket
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from urllib.parse import urlsplit

from measure import machine, show, write
from slow_network import SlowNetwork

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.storage.shared_cache import SharedCache


def read(store: ObjectStore) -> float:
    """Seconds for the whole object, fetched ahead as the stream does."""
    began = time.perf_counter()
    with store.open("data", whole=True) as reader:
        while reader.read(4 << 20):
            pass
    return time.perf_counter() - began


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--mb", type=int, default=256)
    parser.add_argument("--rate", type=float, default=80e6)
    parser.add_argument("--latency", type=float, default=0.03)
    parser.add_argument("--redis-latency", type=float, default=0.0005)
    parser.add_argument("--note")
    options = parser.parse_args()
    facts = machine(options.note) | {"mb": options.mb, "rate": options.rate, "latency_s": options.latency}
    port = free_port()
    redis = ["redis-server", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    with (
        tempfile.TemporaryDirectory() as place,
        EmbeddedStore(Path(place) / "buckets") as server,
        subprocess.Popen([*redis, "--dir", place], stdout=subprocess.DEVNULL) as process,
    ):
        try:
            settings = server.settings("shared")
            ObjectStore(settings).create_bucket_if_missing()
            ObjectStore(settings).put_bytes("data", os.urandom(options.mb << 20))
            rows = measure(urlsplit(server.endpoint_url).netloc, port, settings, options)
        finally:
            process.kill()
    write("shared-cache", rows, facts)


def measure(bucket: str, port: int, settings: object, options: argparse.Namespace) -> list[dict[str, object]]:
    with (
        SlowNetwork(bucket, latency=options.latency, rate=options.rate) as far,
        SlowNetwork(f"127.0.0.1:{port}", latency=options.redis_latency, rate=options.rate) as near,
    ):
        store = ObjectStore(replace(settings, endpoint_url=far.url))  # type: ignore[type-var]
        shared = store.with_cache(SharedCache(url=near.url.replace("http", "redis", 1)))
        seconds = {"bucket": read(store), "bucket, filling Redis": read(shared), "Redis": read(shared)}
    rows: list[dict[str, object]] = []
    for source, took in seconds.items():
        rows.append({"source": source, "seconds": took, "mb_per_second": options.mb * 1.048576 / took})
        show(rows[-1])
    gain = seconds["bucket"] - seconds["Redis"]
    print(f"Redis gains {gain:+.2f} s of {seconds['bucket']:.2f} s ({gain / seconds['bucket']:+.0%})")
    return rows


if __name__ == "__main__":
    main()
