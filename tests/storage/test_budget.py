from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from training_ready.storage.budget import RequestBudget, TokenBucket
from training_ready.storage.errors import SettingsError
from training_ready.storage.objects import ObjectStore


def test_threads_share_one_rate() -> None:
    bucket = TokenBucket(50)
    start = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        waited = list(pool.map(lambda _: bucket.take(), range(80)))
    took = time.monotonic() - start
    assert 50 + 50 * (took + 0.01) >= 80, "never more than the burst and the rate allow"
    assert sum(wait > 0 for wait in waited) >= 80 - 50 - 50 * took


def test_each_process_has_its_share() -> None:
    whole = RequestBudget.from_environment({})
    share = RequestBudget.from_environment({"WORLD_SIZE": "6"})
    own = RequestBudget.from_environment({"WORLD_SIZE": "2", "OVH_S3_READS_PER_SECOND": "10"})
    assert (whole.reads.rate, whole.writes.rate) == (900, 300)
    assert (share.reads.rate, share.writes.rate) == (150, 50)
    assert (own.reads.rate, own.writes.rate) == (5, 150)


@pytest.mark.parametrize("bad", ["fast", "0", "-1", "inf", "nan"])
def test_a_limit_that_is_none_is_refused(bad: str) -> None:
    with pytest.raises(SettingsError, match="OVH_S3_WRITES_PER_SECOND"):
        RequestBudget.from_environment({"OVH_S3_WRITES_PER_SECOND": bad})


def test_every_request_waits_for_its_turn_retries_included(
    proxied: ObjectStore, proxy: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OVH_S3_READS_PER_SECOND", "20")
    proxied.put_bytes("data", bytes(40_000))
    proxy.seen.clear()
    start = time.monotonic()
    proxy.faults = ["busy"]
    with proxied.open("data", range_bytes=1_000, in_flight=8, ahead=False) as reader:
        assert reader.read() == bytes(40_000)
    took = time.monotonic() - start
    assert 42 <= len(proxy.seen) <= 20 + 20 * (took + 0.05)
