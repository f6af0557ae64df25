from __future__ import annotations

import json
import multiprocessing
import os
import pickle
import socket
import urllib.request
from dataclasses import replace
from pathlib import Path
from typing import Any

import boto3
import pytest
from botocore.config import Config

from training_ready.storage.client import client_for
from training_ready.storage.errors import ObjectNotFound, StorageError, UploadForgotten
from training_ready.storage.fingerprint import Fingerprint, part_bytes
from training_ready.storage.objects import ObjectInfo, ObjectStore
from training_ready.storage.settings import StorageSettings


def test_written_listed_read_deleted(store: ObjectStore) -> None:
    store.put_bytes("a/one", b"1")
    store.put_bytes("a/two", b"22", metadata={"sha256": "x"})
    store.put_bytes("b/three", b"")
    assert [(info.key, info.size) for info in store.list("a/")] == [("a/one", 1), ("a/two", 2)]
    assert [info.key for info in store.list()] == ["a/one", "a/two", "b/three"]
    assert store.get_bytes("a/two") == b"22"
    assert store.get_bytes("b/three") == b""
    assert store.head("a/two").metadata == {"sha256": "x"}
    assert next(store.list("a/one")).etag == store.head("a/one").etag == "c4ca4238a0b923820dcc509a6f75849b"
    store.delete("a/one")
    store.delete("a/one")
    assert not store.exists("a/one")
    assert store.uri("a/two") == f"s3://{store.bucket}/a/two"


def test_a_listing_has_all_its_pages(store: ObjectStore, store_server: Any) -> None:
    folder = store_server.root / store.bucket / "many"
    folder.mkdir(parents=True)
    for number in range(2_345):
        (folder / f"{number:05}").write_bytes(b"x")
    assert [info.key for info in store.list("many/")] == [f"many/{number:05}" for number in range(2_345)]


def test_what_is_missing_is_named(store: ObjectStore, store_server: Any) -> None:
    for ask in (store.head, store.get_bytes, store.open):
        with pytest.raises(ObjectNotFound, match=f"s3://{store.bucket}/no/such"):
            ask("no/such")
    nowhere = ObjectStore(store_server.settings("no-such-bucket"))
    for ask in (nowhere.exists, lambda key: list(nowhere.list(key)), lambda key: nowhere.put_bytes(key, b"")):
        with pytest.raises(StorageError, match="bucket 'no-such-bucket' does not exist") as caught:
            ask("key")
        assert not isinstance(caught.value, ObjectNotFound)


def test_create_bucket_if_missing_says_whether_it_did(store_server: Any) -> None:
    store = ObjectStore(store_server.settings(f"fresh-{os.urandom(6).hex()}"))
    assert [store.create_bucket_if_missing(), store.create_bucket_if_missing()] == [True, False]


@pytest.mark.parametrize("key", ["", "/a", "a/../b", "../b", "./a", "s3://bucket/key", "a\0b"])
def test_keys_that_are_none_are_refused(store: ObjectStore, key: str) -> None:
    for ask in (store.head, store.delete, lambda key: store.put_bytes(key, b"")):
        with pytest.raises(StorageError, match=r"not a usable key|address, not a key"):
            ask(key)


def test_a_wrong_secret_is_blamed_on_its_variable(store: ObjectStore) -> None:
    env = {
        "OVH_S3_ENDPOINT": store.settings.endpoint_url or "",
        "OVH_S3_ACCESS_KEY": store.settings.access_key_id or "",
        "AWS_SECRET_ACCESS_KEY": "wrong-secret-value",
    }
    wrong = ObjectStore(StorageSettings.from_environment(env, dotenv=False), store.bucket)
    with pytest.raises(StorageError, match="OVH_S3_ACCESS_KEY and AWS_SECRET_ACCESS_KEY") as caught:
        list(wrong.list())
    assert "wrong-secret-value" not in str(caught.value)


def test_an_unreachable_endpoint_is_named(store: ObjectStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    with socket.socket() as taken:  # bound, but nobody listens
        taken.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{taken.getsockname()[1]}"
        lost = ObjectStore(replace(store.settings, endpoint_url=url))
        with pytest.raises(StorageError, match=rf"{url}.*OVH_S3_ENDPOINT.*data verify"):
            lost.exists("key")


def test_a_proxy_of_the_environment_is_not_asked_for_loopback(
    store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    fresh = ObjectStore(replace(store.settings, checkpoint_bucket="another-client"))
    fresh.put_bytes("a", b"direct")
    assert fresh.get_bytes("a") == b"direct"


def test_nothing_shown_is_secret(store: ObjectStore) -> None:
    secret = store.settings.secret_access_key
    assert secret
    assert secret not in repr(store)
    assert store.bucket in repr(store)


def test_a_store_travels_to_another_process(store: ObjectStore) -> None:
    store.put_bytes("a", b"here")  # the client is in use when the process forks
    assert pickle.loads(pickle.dumps(store)).get_bytes("a") == b"here"  # noqa: S301 - our own bytes
    for method in ("fork", "spawn"):
        with multiprocessing.get_context(method).Pool(2) as pool:
            assert pool.map(store.get_bytes, ["a"] * 4) == [b"here"] * 4


@pytest.mark.parametrize("size", [0, 1, (16 << 20) - 1, 16 << 20, (16 << 20) + 1, 40_000_000])
def test_a_file_of_any_size_arrives_whole(store: ObjectStore, tmp_path: Path, size: int) -> None:
    data = os.urandom(size)
    path = tmp_path / "file"
    path.write_bytes(data)
    sent: list[int] = []
    stored = store.put_file("file", path, sent.append)
    assert (stored.size, sum(sent)) == (size, size)
    assert store.get_bytes("file") == data


def test_the_fingerprint_knows_both_kinds_of_etag(moto_store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    for size in (5, part_bytes(0), 20_000_000):
        path.write_bytes(os.urandom(size))
        stored = moto_store.put_file("file", path)
        fingerprint = Fingerprint.of_file(path)
        assert stored.etag == (fingerprint.parts_etag or fingerprint.md5)
        assert fingerprint.proves(stored)
        assert not fingerprint.contradicts(stored)
    other = replace(fingerprint, sha256="0", md5="0", parts_etag=None)
    assert other.contradicts(stored)
    assert not other.proves(stored)


def test_an_etag_that_is_no_hash_proves_nothing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x")
    fingerprint = Fingerprint.of_file(path)
    encrypted = ObjectInfo(key="k", size=1, etag="f" * 32, etag_is_hash=False)
    assert not fingerprint.contradicts(encrypted)
    assert not fingerprint.proves(encrypted)
    assert fingerprint.contradicts(replace(encrypted, etag_is_hash=True))


@pytest.mark.parametrize("forgotten", ["a part", "the upload"])
def test_an_upload_that_the_server_forgot_is_begun_anew(
    proxy: Any, proxied: ObjectStore, store: ObjectStore, tmp_path: Path, forgotten: str
) -> None:
    data, path = os.urandom(17_000_000), tmp_path / "file"
    path.write_bytes(data)
    direct, victims = client_for(store.settings), ["the upload"]

    def abort(**_: Any) -> None:  # before the parts are joined
        if victims:
            victims.clear()
            for one in direct.list_multipart_uploads(Bucket=store.bucket)["Uploads"]:
                direct.abort_multipart_upload(Bucket=store.bucket, Key=one["Key"], UploadId=one["UploadId"])

    if forgotten == "the upload":
        joining = "before-call.s3.CompleteMultipartUpload"
        client_for(proxied.settings).meta.events.register(joining, abort)
    else:
        proxy.lost_parts = 1
    sent: list[int] = []
    proxied.put_file("file", path, sent.append)
    assert begun(proxy) == 2
    assert sum(sent) == len(data)
    assert min(sent) == -len(data)
    assert store.get_bytes("file") == data
    assert "Uploads" not in direct.list_multipart_uploads(Bucket=store.bucket)


def test_a_server_that_forgets_every_upload_is_given_up(
    proxy: Any, proxied: ObjectStore, tmp_path: Path
) -> None:
    path = tmp_path / "file"
    path.write_bytes(os.urandom(17_000_000))
    proxy.lost_parts = 99
    sent: list[int] = []
    with pytest.raises(UploadForgotten, match=r"no longer knows.*Upload the file again"):
        proxied.put_file("file", path, sent.append)
    assert begun(proxy) == 3
    assert sum(sent) == 0
    assert not proxied.exists("file")


def begun(proxy: Any) -> int:
    return sum(seen.method == "POST" and seen.path.endswith("?uploads") for seen in proxy.seen)


@pytest.mark.parametrize("size", [0, 1, 10**9, 160 * 2**30, 5 * 2**40])
def test_no_upload_has_more_parts_than_s3_takes(size: int) -> None:
    assert part_bytes(size) * 10_000 >= size
    assert part_bytes(size) % (1 << 20) == 0


def test_a_file_that_changes_while_it_is_sent_is_noticed(store: ObjectStore, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")
    before = Fingerprint.of_file(path)
    path.write_bytes(b"after!")
    with pytest.raises(StorageError, match="Did the file change"):
        store.put_file("file", path, fingerprint=before)


def test_an_expired_token_is_renewed_from_the_dotenv(proxy: Any, store: ObjectStore, tmp_path: Path) -> None:
    def write(token: str) -> None:
        (tmp_path / ".env").write_text(
            f"AWS_ENDPOINT_URL={proxy.url}\nAWS_ACCESS_KEY_ID={store.settings.access_key_id}\n"
            f"AWS_SECRET_ACCESS_KEY={store.settings.secret_access_key}\nAWS_SESSION_TOKEN={token}\n"
        )

    write("first")
    renewed = ObjectStore(StorageSettings.from_environment(), store.bucket)
    renewed.put_bytes("a", b"with the first")
    proxy.expired_token = "first"
    with pytest.raises(StorageError, match=r"expired.*AWS_ACCESS_KEY_ID"):
        list(renewed.list())
    write("second")
    assert [info.key for info in renewed.list()] == ["a"]


def restricted(moto_url: str, bucket: str, actions: list[str]) -> StorageSettings:
    """Credentials of a user who may do only ``actions``, from a server that enforces it."""
    admin = {"aws_access_key_id": "testing", "aws_secret_access_key": "testing", "region_name": "us-east-1"}
    iam = boto3.client("iam", endpoint_url=moto_url, config=Config(), **admin)
    user = f"user-{os.urandom(4).hex()}"
    iam.create_user(UserName=user)
    statement = {"Effect": "Allow", "Action": actions, "Resource": "*"}
    policy = json.dumps({"Version": "2012-10-17", "Statement": [statement]})
    iam.put_user_policy(UserName=user, PolicyName="p", PolicyDocument=policy)
    keys = iam.create_access_key(UserName=user)["AccessKey"]
    return StorageSettings(
        bucket=bucket,
        endpoint_url=moto_url,
        access_key_id=keys["AccessKeyId"],
        secret_access_key=keys["SecretAccessKey"],
        sources={"access_key_id": "OVH_S3_ACCESS_KEY", "secret_access_key": "OVH_S3_SECRET_KEY"},
    )


def enforce(moto_url: str, *, after: int) -> None:
    plain = {"Content-Type": "text/plain"}
    url, data = f"{moto_url}/moto-api/reset-auth", str(after).encode()
    request = urllib.request.Request(url, data=data, headers=plain)  # noqa: S310 - loopback
    urllib.request.urlopen(request).read()  # noqa: S310 - loopback


def test_a_refusal_names_the_permission(moto_url: str, moto_store: ObjectStore) -> None:
    moto_store.put_bytes("a", b"x")
    store = ObjectStore(restricted(moto_url, moto_store.bucket, ["s3:ListBucket"]))
    enforce(moto_url, after=0)
    try:
        assert [info.key for info in store.list()] == ["a"]
        for action, ask in (
            ("s3:GetObject", lambda: store.head("a")),
            ("s3:PutObject", lambda: store.put_bytes("b", b"")),
            ("s3:DeleteObject", lambda: store.delete("a")),
        ):
            with pytest.raises(StorageError, match=rf"403.*OVH_S3_ACCESS_KEY.* need {action}"):
                ask()
    finally:
        enforce(moto_url, after=10**9)


def test_a_forked_child_has_a_client_of_its_own(store: ObjectStore) -> None:
    mine = id(client_for(store.settings))
    with multiprocessing.get_context("fork").Pool(1) as pool:
        theirs = pool.apply(_client_id, (store.settings,))
    assert theirs != mine


def _client_id(settings: StorageSettings) -> int:
    return id(client_for(settings))
