from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from training_ready.storage.errors import ObjectNotFound, StorageError
from training_ready.storage.layout import dataset_keys, get_s3_dataset_path, locate, resolve_dataset, rooted
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.storage.uri import S3Uri, parse_s3_uri

PROCESSED, RAW, ACQUIRED = "gdrive/processed/c/x.json", "gdrive/raw/x.json", "acquired/x.json"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("s3://bkt/a/b.json", S3Uri("bkt", "a/b.json")),
        ("S3://bkt/a", S3Uri("bkt", "a")),
        ("s3://bkt", S3Uri("bkt", "")),
        ("s3://bkt//odd", S3Uri("bkt", "/odd")),
        ("a/b.json", None),
        ("s3/bkt/a", None),
        ("s3:bkt/a", None),
        ("a/s3://b", None),
        ("", None),
    ],
)
def test_an_address_is_no_key(text: str, expected: S3Uri | None) -> None:
    assert parse_s3_uri(text) == expected


@pytest.mark.parametrize(
    "text", ["s3://", "s3:///key", "https://bkt/key", "gs://bkt/key", "file:///etc/passwd"]
)
def test_addresses_of_another_kind_are_refused(text: str) -> None:
    with pytest.raises(StorageError):
        parse_s3_uri(text)


def test_the_order() -> None:
    assert dataset_keys("x.json", "c") == (PROCESSED, RAW, ACQUIRED)
    assert dataset_keys("x.json", "c", prefer_processed=False) == (RAW, ACQUIRED, PROCESSED)
    assert dataset_keys("x.json") == (RAW, ACQUIRED)


def test_the_first_that_exists_wins(store: ObjectStore) -> None:
    for key in (ACQUIRED, RAW, PROCESSED):  # each one put before those found so far
        store.put_bytes(key, b"{}")
        found = get_s3_dataset_path("x.json", "c", settings=store.settings)
        assert found == f"s3://{store.bucket}/{key}"
    assert get_s3_dataset_path("x.json", "c", prefer_processed=False, settings=store.settings).endswith(RAW)
    assert get_s3_dataset_path("x.json", settings=store.settings).endswith(RAW)


def test_nothing_is_invented_and_every_key_tried_is_named(store: ObjectStore) -> None:
    with pytest.raises(ObjectNotFound) as caught:
        get_s3_dataset_path("x.json", "c", settings=store.settings)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The data set 'x.json' does not exist. Tried, in this order:"
    assert lines[1:4] == [f"  s3://{store.bucket}/{key}" for key in (PROCESSED, RAW, ACQUIRED)]
    with pytest.raises(ObjectNotFound, match=r"A category would add gdrive/processed/<category>/x\.json"):
        get_s3_dataset_path("x.json", settings=store.settings)


def test_an_address_and_a_bare_key_mean_one_object_only(store: ObjectStore) -> None:
    store.put_bytes("gdrive/raw/lightning/train.json", b"{}")
    store.put_bytes("lightning/other.json", b"{}")
    place = f"s3://{store.bucket}/lightning/other.json"
    assert get_s3_dataset_path("lightning/other.json", settings=store.settings) == place
    assert get_s3_dataset_path(place, settings=store.settings) == place
    with pytest.raises(ObjectNotFound) as caught:  # not looked for below gdrive/raw/
        get_s3_dataset_path("lightning/train.json", settings=store.settings)
    assert str(caught.value).count("s3://") == 1


def test_with_a_category_a_name_may_have_folders(store: ObjectStore) -> None:
    store.put_bytes("gdrive/processed/c/deep/x.json", b"{}")
    assert resolve_dataset(store.settings, "deep/x.json", "c").key == "gdrive/processed/c/deep/x.json"


def test_the_root_prefix_holds_for_names_and_keys_but_not_addresses(store: ObjectStore) -> None:
    below = replace(store.settings, root_prefix="datasets")
    store.put_bytes("datasets/gdrive/raw/x.json", b"{}")
    assert rooted(below, "config/a") == "datasets/config/a"
    assert resolve_dataset(below, "x.json").key == "datasets/gdrive/raw/x.json"
    assert resolve_dataset(below, "gdrive/raw/x.json").key == "datasets/gdrive/raw/x.json"
    address = f"s3://{store.bucket}/datasets/gdrive/raw/x.json"
    assert str(resolve_dataset(below, address)) == address
    with pytest.raises(ObjectNotFound):
        resolve_dataset(below, f"s3://{store.bucket}/gdrive/raw/x.json")


def test_another_bucket_by_argument_or_by_address_but_not_two(store: ObjectStore, store_server: Any) -> None:
    other = store_server.settings("other-default-bucket")
    store.put_bytes("acquired/x.json", b"{}")
    assert resolve_dataset(other, "x.json", bucket=store.bucket) == S3Uri(store.bucket, ACQUIRED)
    assert resolve_dataset(other, f"s3://{store.bucket}/{ACQUIRED}") == S3Uri(store.bucket, ACQUIRED)
    with pytest.raises(StorageError, match="another bucket"):
        resolve_dataset(other, f"s3://{store.bucket}/{ACQUIRED}", bucket="third")


def test_a_missing_bucket_is_not_a_missing_data_set(store_server: Any) -> None:
    with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist") as caught:
        resolve_dataset(store_server.settings("no-such-bucket"), "x.json")
    assert not isinstance(caught.value, ObjectNotFound)


@pytest.mark.parametrize("path", ["../x", "a/../../x", "/x", "", "s3://bkt/../x", "s3://bkt"])
def test_no_path_escapes(path: str) -> None:
    with pytest.raises(StorageError):
        locate(StorageSettings(), path)


def test_the_environment_is_the_default(store_environment: ObjectStore) -> None:
    store_environment.put_bytes(ACQUIRED, b"{}")
    assert get_s3_dataset_path("x.json", "c") == f"s3://{store_environment.bucket}/{ACQUIRED}"
