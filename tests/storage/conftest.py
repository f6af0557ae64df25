"""What the tests of storage share: nobody's settings but their own."""

from __future__ import annotations

import pytest

from training_ready.storage.embedded import EmbeddedStore
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import VARIABLES


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
