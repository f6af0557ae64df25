"""The local copy: the same bytes, within its budget, downloaded once, whatever process is killed."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from training_ready.storage.disk_cache import DiskCache
from training_ready.storage.errors import ObjectChanged, SettingsError
from training_ready.storage.objects import ObjectStore

DATA = os.urandom(300_000)
BLOCK = 32_000


@pytest.fixture
def cache(tmp_path: Path) -> DiskCache:
    return DiskCache(folder=tmp_path / "cache", budget_bytes=10_000_000, block_bytes=BLOCK)


def object_gets(proxy: Any) -> list[str]:
    return [seen.range for seen in proxy.seen if seen.range]


def test_what_was_read_once_is_not_fetched_again(proxied: ObjectStore, proxy: Any, cache: DiskCache) -> None:
    proxied.put_bytes("data", DATA)
    store = proxied.with_cache(cache)
    with store.open("data", range_bytes=20_000) as reader:
        assert reader.read() == DATA
    fetched = len(object_gets(proxy))
    again = pickle.loads(pickle.dumps(store))  # noqa: S301 - our own bytes
    with again.open("data", range_bytes=7_000, ahead=False) as reader:
        reader.seek(100_000)
        assert reader.read(1_000) == DATA[100_000:101_000]
        reader.seek(0)
        assert reader.read() == DATA
    assert len(object_gets(proxy)) == fetched
    assert sum(seen.answered for seen in proxy.seen if seen.method == "GET") == len(DATA)
    assert again.traffic.cost().cache_misses == again.traffic.cost().bytes == 0
    assert store.traffic.cost().bytes == len(DATA)


def test_another_version_is_another_block(store: ObjectStore, cache: DiskCache) -> None:
    cached, other = store.with_cache(cache), os.urandom(300_000)
    store.put_bytes("data", DATA)
    with cached.open("data", ahead=False) as reader:
        assert reader.read(10) == DATA[:10]
        store.put_bytes("data", other)
        with pytest.raises(ObjectChanged):
            reader.read()
    assert cached.get_bytes("data") == other


def test_threads_and_processes_download_a_block_once(
    proxied: ObjectStore, proxy: Any, cache: DiskCache, tmp_path: Path
) -> None:
    proxied.put_bytes("data", DATA)
    store = proxied.with_cache(cache)
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps(store))
    program = (
        "import hashlib, pickle, sys; store = pickle.load(open(sys.argv[1], 'rb'))\n"
        "print(hashlib.sha256(store.get_bytes('data')).hexdigest())"
    )
    others = [
        subprocess.Popen([sys.executable, "-c", program, str(job)], stdout=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(lambda _: store.get_bytes("data"), range(8))) == {DATA}
    import hashlib

    for other in others:
        assert other.communicate(timeout=60)[0].strip() == hashlib.sha256(DATA).hexdigest()
    assert sum(seen.answered for seen in proxy.seen if seen.method == "GET") == len(DATA)


def test_the_budget_holds_and_the_longest_unused_go_first(tmp_path: Path) -> None:
    cache = DiskCache(folder=tmp_path, budget_bytes=10_500, block_bytes=1_000)
    names = [f"{number:08x}-0" for number in range(40)]
    for name in names:
        cache.block(name, lambda: bytes(1_000))
        assert cache.block(names[0], lambda: bytes(1_000))[1], "used all the time, so it stays"
        assert cache.held_bytes() <= 10_500
    held = [cache.block(name, lambda: bytes(1_000))[1] for name in names[-5:]]
    assert all(held)
    assert not cache.block(names[1], lambda: bytes(1_000))[1]


def test_a_block_in_use_is_not_evicted_and_nothing_is_lost_when_all_are(tmp_path: Path) -> None:
    import fcntl

    cache = DiskCache(folder=tmp_path, budget_bytes=2_200, block_bytes=1_000)
    for name in ("aa000000-0", "bb000000-0"):
        cache.block(name, lambda: bytes(1_000))
    pins = [path.open("rb") for path in tmp_path.glob("blocks/*/*")]
    for pin in pins:
        fcntl.flock(pin, fcntl.LOCK_SH)
    assert cache.block("cc000000-0", lambda: b"c" * 1_000) == (b"c" * 1_000, False)
    assert cache.held_bytes() <= 2_200
    assert cache.block("aa000000-0", lambda: b"")[1]
    for pin in pins:
        pin.close()
    cache.block("cc000000-0", lambda: b"c" * 1_000)
    assert cache.block("cc000000-0", lambda: b"")[1]


def test_a_damaged_copy_is_fetched_again(store: ObjectStore, cache: DiskCache) -> None:
    store.put_bytes("data", DATA)
    cached = store.with_cache(cache)
    cached.get_bytes("data")
    for number, path in enumerate(sorted(cache.folder.glob("blocks/*/*"))):
        stored = bytearray(path.read_bytes())
        if number % 2:
            stored[number * 100] ^= 4
        path.write_bytes(stored[: -number or None])
    assert cached.get_bytes("data") == DATA
    assert cached.with_cache(cache).get_bytes("data") == DATA


def test_a_folder_that_cannot_be_written_costs_the_cache_only(
    store: ObjectStore, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.put_bytes("data", DATA)
    (tmp_path / "file").write_text("in the way")
    cached = store.with_cache(
        DiskCache(folder=tmp_path / "file" / "cache", budget_bytes=1 << 20, block_bytes=BLOCK)
    )
    assert cached.get_bytes("data") == DATA
    assert sum("cannot be used" in record.message for record in caplog.records) == 1


FILLER = """
import pickle, sys
store = pickle.load(open(sys.argv[1], "rb"))
print("ready", flush=True)
while True:
    for number in range(12):
        store.get_bytes(f"data-{number}")
"""


def test_killed_at_any_moment_it_stays_whole_and_within_budget(store: ObjectStore, tmp_path: Path) -> None:
    """Two fillers of a cache that is too small for everything, killed -9 again and again."""
    objects = {f"data-{number}": os.urandom(100_000) for number in range(12)}
    for key, data in objects.items():
        store.put_bytes(key, data)
    cache = DiskCache(folder=tmp_path / "cache", budget_bytes=500_000, block_bytes=BLOCK)
    cached = store.with_cache(cache)
    job = tmp_path / "job.pickle"
    job.write_bytes(pickle.dumps(cached))
    for turn in range(4):
        fillers = [
            subprocess.Popen([sys.executable, "-c", FILLER, str(job)], stdout=subprocess.PIPE)
            for _ in range(2)
        ]
        for filler in fillers:
            assert filler.stdout is not None
            assert filler.stdout.readline() == b"ready\n"
        time.sleep(0.3 + 0.11 * turn)
        for filler in fillers:
            filler.send_signal(signal.SIGKILL)
            filler.wait()
        assert cache.held_bytes() <= 500_000
    for key, data in objects.items():
        assert cached.get_bytes(key) == data
    assert cache.held_bytes() <= 500_000
    for number in range(20):  # enough new blocks for a count, which removes what the killed were writing
        cache.block(f"{number:08x}-0", lambda: bytes(BLOCK))
    assert not list(cache.folder.glob("blocks/*/.new-*"))


def test_a_reader_waits_for_another_process_block_and_takes_over_if_it_dies(tmp_path: Path) -> None:
    """The lock of a killed downloader is free at once."""
    folder = tmp_path / "cache"
    program = f"""
import pathlib, sys, time
from training_ready.storage.disk_cache import DiskCache
def fetch():
    print("fetching", flush=True)
    time.sleep(600)
DiskCache(folder=pathlib.Path({str(folder)!r}), budget_bytes=100_000, block_bytes=1_000).block("aa000000-0", fetch)
"""
    other = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"fetching\n"
    cache = DiskCache(folder=folder, budget_bytes=100_000, block_bytes=1_000)
    got: list[tuple[bytes, bool]] = []
    waiter = threading.Thread(target=lambda: got.append(cache.block("aa000000-0", lambda: b"mine")))
    waiter.start()
    waiter.join(0.3)
    assert waiter.is_alive(), "it must wait while the other process downloads"
    other.kill()
    other.wait()
    waiter.join(20)
    assert got == [(b"mine", False)]


def test_settings_of_the_environment(tmp_path: Path) -> None:
    assert DiskCache.from_environment({}) is None
    found = DiskCache.from_environment(
        {"TRAINING_READY_CACHE": str(tmp_path), "TRAINING_READY_CACHE_GB": "2.5"}
    )
    assert found == DiskCache(folder=tmp_path, budget_bytes=2_500_000_000)
    for bad in ("many", "inf", "0.001", "-4"):
        with pytest.raises(SettingsError, match=r"gigabytes|too small"):
            DiskCache.from_environment(
                {"TRAINING_READY_CACHE": str(tmp_path), "TRAINING_READY_CACHE_GB": bad}
            )
