"""Blocks in Redis: read once for all machines, and never a reason to fail or to read something else."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import redis

from training_ready.storage import shared_cache
from training_ready.storage.disk_cache import DiskCache
from training_ready.storage.errors import SettingsError
from training_ready.storage.objects import ObjectStore
from training_ready.storage.shared_cache import SharedCache, cache_from_environment

DATA = os.urandom(300_000)
BLOCK = 32_000
BLOCKS = 10

needs_redis = pytest.mark.skipif(
    shutil.which("redis-server") is None, reason="redis-server is not installed on this machine"
)


@contextmanager
def serving(port: int, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    options = {"port": port, "bind": "127.0.0.1", "save": "", "dir": folder, "requirepass": "hidden"}
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    process = subprocess.Popen(["redis-server", *words], stdout=subprocess.DEVNULL)
    try:
        client = redis.Redis(port=port, password="hidden")
        for _ in range(200):
            try:
                client.ping()
                break
            except redis.ConnectionError:
                time.sleep(0.05)
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.fixture
def cache(port: int, monkeypatch: pytest.MonkeyPatch) -> SharedCache:
    monkeypatch.setattr(shared_cache, "_resting_until", {})
    return SharedCache(url=f"redis://:hidden@127.0.0.1:{port}/0", block_bytes=BLOCK)


def object_gets(proxy: Any) -> int:
    return sum(bool(seen.range) for seen in proxy.seen)


def read(store: ObjectStore, cache: SharedCache) -> bytes:
    with store.with_cache(cache).open("data", range_bytes=20_000) as reader:
        return bytes(reader.read())


@needs_redis
def test_another_machine_reads_what_one_has_read(
    proxied: ObjectStore, proxy: Any, cache: SharedCache, port: int, tmp_path: Path
) -> None:
    proxied.put_bytes("data", DATA)
    with serving(port, tmp_path):
        assert read(proxied, cache) == DATA
        fetched = object_gets(proxy)
        other = SharedCache(
            url=cache.url,
            disk=DiskCache(folder=tmp_path / "disk", budget_bytes=1_000_000, block_bytes=BLOCK),
            block_bytes=BLOCK,
        )
        assert read(proxied, other) == DATA
        assert object_gets(proxy) == fetched >= BLOCKS
    assert read(proxied, other) == DATA  # from its disk, without Redis
    assert object_gets(proxy) == fetched


@needs_redis
def test_an_object_that_was_replaced_is_another_block(
    proxied: ObjectStore, cache: SharedCache, port: int, tmp_path: Path
) -> None:
    proxied.put_bytes("data", DATA)
    with serving(port, tmp_path):
        read(proxied, cache)
        changed = DATA[::-1]
        proxied.put_bytes("data", changed)
        assert read(proxied, cache) == changed


@needs_redis
def test_a_damaged_block_comes_from_the_bucket(
    proxied: ObjectStore, cache: SharedCache, port: int, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    proxied.put_bytes("data", DATA)
    with serving(port, tmp_path):
        read(proxied, cache)
        client = redis.Redis(port=port, password="hidden")
        keys = list(client.scan_iter("*"))
        assert len(keys) == BLOCKS
        client.setrange(keys[0], 5, b"wrong")
        client.set(keys[1], b"short")
        assert read(proxied, cache) == DATA
        assert "damaged" in caplog.text
        caplog.clear()
        assert read(proxied, cache) == DATA  # and is mended
        assert "damaged" not in caplog.text


@needs_redis
def test_a_server_that_dies_hangs_or_is_full_costs_nothing_but_itself(
    proxied: ObjectStore,
    cache: SharedCache,
    port: int,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    proxied.put_bytes("data", DATA)
    with serving(port, tmp_path) as process:
        client = redis.Redis(port=port, password="hidden")
        client.config_set("maxmemory", "1")  # the policy is to refuse
        assert read(proxied, cache) == DATA
        client.config_set("maxmemory", "0")
        monkeypatch.setattr(shared_cache, "_resting_until", {})
        assert read(proxied, cache) == DATA
        process.send_signal(19)  # stopped: it accepts and never answers
        assert read(proxied, cache) == DATA
        process.send_signal(18)
        process.kill()
        monkeypatch.setattr(shared_cache, "_resting_until", {})
        with ThreadPoolExecutor(4) as threads:
            assert all(data == DATA for data in threads.map(lambda _: read(proxied, cache), range(4)))
    assert f"127.0.0.1:{port} cannot be used" in caplog.text
    assert "hidden" not in caplog.text + repr(cache)


def test_settings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert cache_from_environment({}) is None
    assert isinstance(cache_from_environment({"TRAINING_READY_CACHE": str(tmp_path)}), DiskCache)
    both = cache_from_environment(
        {"TRAINING_READY_CACHE": str(tmp_path), "TRAINING_READY_REDIS": "rediss://:pw@cache.example:7000"}
    )
    assert isinstance(both, SharedCache)
    assert both.disk is not None
    assert both.server == "cache.example:7000"
    with pytest.raises(SettingsError, match="redis://host") as refused:
        cache_from_environment({"TRAINING_READY_REDIS": "http://:pw@cache.example"})
    assert "pw" not in str(refused.value)
