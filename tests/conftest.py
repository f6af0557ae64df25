"""Shared by all rooms' tests: a real S3 server on loopback, and an empty bucket of one's own in it."""

from __future__ import annotations

import uuid
from collections.abc import Iterator

import pytest

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore

from .faulty_network import moto_store, moto_url, proxied, proxy

__all__ = ["moto_store", "moto_url", "proxied", "proxy"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with whole runs first: two workers that take file after file then end together."""
    items.sort(key=lambda item: not {"training", "journeys"} & set(item.path.parts))


@pytest.fixture(scope="session")
def store_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedStore]:
    """One embedded store for the whole run."""
    with EmbeddedStore(tmp_path_factory.mktemp("store") / "buckets") as server:
        yield server


@pytest.fixture
def store(store_server: EmbeddedStore) -> ObjectStore:
    """An empty bucket that no other test sees."""
    bucket = f"test-{uuid.uuid4().hex}"
    store = ObjectStore(store_server.settings(bucket))
    store.create_bucket_if_missing()
    return store
