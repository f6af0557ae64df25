"""The hub as the unmodified huggingface_hub client sees it, and as a stranger with raw HTTP sees it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import (
    CommitOperationAdd,
    HfApi,
    hf_hub_download,
    hf_hub_url,
    snapshot_download,
)
from huggingface_hub.errors import (
    HfHubHTTPError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.place_bucket import BucketPlace
from training_ready.release.place_folder import FolderPlace
from training_ready.release.places import Place

REPO = "me/model"


@pytest.fixture(params=["folder", "bucket"])
def hub(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[EmbeddedHub]:
    """Everything below holds whether the models lie in a folder or in a bucket."""
    if request.param == "folder":
        place: Place = FolderPlace(tmp_path / "hub")
    else:
        place = BucketPlace(request.getfixturevalue("moto_store"), "models/here")
    with EmbeddedHub(place) as hub:
        yield hub


def raw(
    hub: EmbeddedHub, method: str, path: str, body: bytes = b"", **headers: str
) -> http.client.HTTPResponse:
    """One request, its path sent byte for byte."""
    connection = http.client.HTTPConnection(hub.endpoint_url.removeprefix("http://"), timeout=20)
    connection.putrequest(method, path, skip_host="Host" in headers)
    for name, value in {"Content-Length": str(len(body)), **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    connection.endheaders(body)
    return connection.getresponse()


def stored_blobs(hub: EmbeddedHub) -> set[str]:
    return {name.rpartition("/")[2] for name in hub.place.names("blobs/")}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "upload"
    (folder / "deep" / "er").mkdir(parents=True)
    (folder / "text.md").write_text("# grüße\n")
    (folder / "empty.txt").write_bytes(b"")
    (folder / "deep" / "er" / "weights.safetensors").write_bytes(os.urandom(3_000_000))
    return folder


def test_upload_and_download_are_byte_identical(api: HfApi, folder: Path, tmp_path: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    names = ["deep/er/weights.safetensors", "empty.txt", "text.md"]
    assert sorted(api.list_repo_files(REPO)) == names
    copy = Path(snapshot_download(REPO, endpoint=api.endpoint, cache_dir=tmp_path / "cache"))
    assert {name: (copy / name).read_bytes() for name in names} == {
        name: (folder / name).read_bytes() for name in names
    }
    single = hf_hub_download(
        REPO, "text.md", subfolder=None, endpoint=api.endpoint, cache_dir=tmp_path / "other"
    )
    assert Path(single).read_text() == "# grüße\n"


def test_uploading_the_same_folder_again_makes_no_commit(api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    first = api.upload_folder(repo_id=REPO, folder_path=folder)
    assert api.upload_folder(repo_id=REPO, folder_path=folder).oid == first.oid
    assert len(api.list_repo_commits(REPO)) == 2  # creation, upload


def test_creating_twice_is_409_unless_told_otherwise(api: HfApi) -> None:
    assert api.create_repo(REPO, private=True).repo_id == REPO
    assert api.create_repo(REPO, exist_ok=True).repo_id == REPO
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_repo(REPO)
    assert refused.value.response.status_code == 409
    assert api.repo_info(REPO).private is True
    assert api.create_repo("bare").repo_id == "local/bare"
    assert {model.id for model in api.list_models()} == {REPO, "local/bare"}


def test_branches_tags_and_revisions(api: HfApi) -> None:
    api.create_repo(REPO)
    first = api.upload_file(repo_id=REPO, path_or_fileobj=b"one", path_in_repo="a.txt").oid
    api.create_tag(REPO, tag="v1")
    api.create_branch(REPO, branch="feature/x")
    api.create_branch(REPO, branch="feature/x", exist_ok=True)
    with pytest.raises(HfHubHTTPError, match="already exists"):
        api.create_branch(REPO, branch="feature/x")
    api.upload_file(repo_id=REPO, path_or_fileobj=b"two", path_in_repo="a.txt", revision="feature/x")
    refs = api.list_repo_refs(REPO)
    assert {branch.name for branch in refs.branches} == {"main", "feature/x"}
    assert [(tag.name, tag.target_commit) for tag in refs.tags] == [("v1", first)]

    def content(revision: str) -> bytes:
        url = hf_hub_url(REPO, "a.txt", revision=revision, endpoint=api.endpoint)
        with raw_url(url) as response:
            return response.read()

    assert (content("main"), content("v1"), content(first), content("feature/x")) == (
        b"one",
        b"one",
        b"one",
        b"two",
    )
    api.delete_branch(REPO, branch="feature/x")
    api.delete_tag(REPO, tag="v1")
    assert not api.revision_exists(REPO, "feature/x")
    assert not api.revision_exists(REPO, "v1")


def raw_url(url: str) -> Any:
    from urllib.request import urlopen

    return urlopen(url, timeout=20)  # noqa: S310  (a loopback URL of this test)


def test_missing_things_have_the_clients_own_errors(api: HfApi, tmp_path: Path) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a/b.txt")
    with pytest.raises(RepositoryNotFoundError):
        api.repo_info("me/other")
    with pytest.raises(RevisionNotFoundError):
        api.repo_info(REPO, revision="v9")
    with pytest.raises(RemoteEntryNotFoundError):
        hf_hub_download(REPO, "nope.txt", endpoint=api.endpoint, cache_dir=tmp_path)
    with pytest.raises(RemoteEntryNotFoundError):
        list(api.list_repo_tree(REPO, "nope"))
    with pytest.raises(RemoteEntryNotFoundError):
        api.delete_file("nope.txt", REPO)
    assert api.file_exists(REPO, "a/b.txt")
    assert not api.file_exists(REPO, "a")
    api.delete_repo(REPO)
    assert not api.repo_exists(REPO)


def test_delete_file_and_folder_and_tree_listing(api: HfApi, folder: Path) -> None:
    api.create_repo(REPO)
    api.upload_folder(repo_id=REPO, folder_path=folder)
    assert {entry.path for entry in api.list_repo_tree(REPO)} == {"deep", "empty.txt", "text.md"}
    assert {entry.path for entry in api.list_repo_tree(REPO, "deep", recursive=True)} == {
        "deep/er",
        "deep/er/weights.safetensors",
    }
    info = {
        entry.path: entry for entry in api.get_paths_info(REPO, ["deep", "deep/er/weights.safetensors", "no"])
    }
    sha256 = hashlib.sha256((folder / "deep/er/weights.safetensors").read_bytes()).hexdigest()
    assert set(info) == {"deep", "deep/er/weights.safetensors"}
    assert info["deep/er/weights.safetensors"].lfs.sha256 == sha256
    api.delete_folder("deep", REPO)
    api.delete_file("text.md", REPO)
    assert api.list_repo_files(REPO) == ["empty.txt"]


def test_a_commit_on_an_old_parent_is_refused(api: HfApi) -> None:
    api.create_repo(REPO)
    old = api.repo_info(REPO).sha
    api.upload_file(repo_id=REPO, path_or_fileobj=b"1", path_in_repo="a")
    with pytest.raises(HfHubHTTPError) as refused:
        api.create_commit(REPO, [CommitOperationAdd("b", b"2")], commit_message="late", parent_commit=old)
    assert refused.value.response.status_code == 412
    assert api.list_repo_files(REPO) == ["a"]


def test_sixteen_uploads_at_once_lose_nothing(api: HfApi, hub: EmbeddedHub) -> None:
    """Sixteen clients, each with a large file of its own, all on the same branch."""
    api.create_repo(REPO)
    contents = {f"part-{index}.bin": b"\0" + os.urandom(300_000) for index in range(16)}
    together = threading.Barrier(16)

    def upload(name: str) -> None:
        together.wait()
        client = HfApi(endpoint=hub.endpoint_url, token=False)
        client.upload_file(repo_id=REPO, path_or_fileobj=contents[name], path_in_repo=name)

    with ThreadPoolExecutor(16) as pool:
        list(pool.map(upload, contents))
    assert len(api.list_repo_commits(REPO)) == 17
    listed = {entry.path: entry.lfs.sha256 for entry in api.list_repo_tree(REPO)}
    assert listed == {name: hashlib.sha256(data).hexdigest() for name, data in contents.items()}
    assert stored_blobs(hub) == set(listed.values())


def test_whoami(api: HfApi) -> None:
    assert api.whoami(token="anything")["name"] == "local"


# --- headers and ranges


def test_resolve_headers_and_range(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    data = os.urandom(100_000)
    commit = api.upload_file(repo_id=REPO, path_or_fileobj=data, path_in_repo="w.bin").oid
    url = f"/{REPO}/resolve/main/w.bin"
    head = raw(hub, "HEAD", url)
    assert head.read() == b""
    sha256 = hashlib.sha256(data).hexdigest()
    assert head.headers["X-Repo-Commit"] == commit
    assert head.headers["X-Linked-Etag"] == head.headers["ETag"] == f'"{sha256}"'
    assert head.headers["X-Linked-Size"] == head.headers["Content-Length"] == "100000"
    part = raw(hub, "GET", url, Range="bytes=10-19")
    assert (part.status, part.headers["Content-Range"], part.read()) == (
        206,
        "bytes 10-19/100000",
        data[10:20],
    )
    probe = raw(hub, "GET", url, Range="bytes=0-0")
    assert (probe.status, probe.read()) == (206, data[:1])
    assert raw(hub, "GET", url, Range="bytes=100000-").status == 416
    missing = raw(hub, "GET", f"/{REPO}/resolve/main/no.bin")
    assert (missing.status, missing.headers["X-Error-Code"]) == (404, "EntryNotFound")


# --- large files


def lfs_upload_url(hub: EmbeddedHub, sha256: str, size: int) -> str:
    body = {"operation": "upload", "objects": [{"oid": sha256, "size": size}]}
    headers = {"Content_Type": "application/json"}
    answer = raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/batch", json.dumps(body).encode(), **headers)
    href: str = json.load(answer)["objects"][0]["actions"]["upload"]["href"]
    return href.removeprefix(hub.endpoint_url)


def test_an_upload_that_is_not_what_was_announced_is_not_stored(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    data = os.urandom(50_000)
    sha256 = hashlib.sha256(data).hexdigest()
    url = lfs_upload_url(hub, sha256, len(data))
    flipped = bytes([data[0] ^ 1]) + data[1:]
    for wrong in (flipped, data[:-1], data + b"x", b""):
        assert raw(hub, "PUT", url, wrong).status == 422
    assert stored_blobs(hub) == set()
    assert list(hub.place.spool().parent.iterdir()) == []
    verify = json.dumps({"oid": sha256, "size": len(data)}).encode()
    headers = {"Content_Type": "application/json"}
    assert raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/verify", verify, **headers).status == 404
    assert raw(hub, "PUT", url, data).status == 200
    assert stored_blobs(hub) == {sha256}
    assert raw(hub, "POST", f"/{REPO}.git/info/lfs/objects/verify", verify, **headers).status == 200


def test_an_upload_url_is_good_for_one_content_only(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    one, two = os.urandom(1000), os.urandom(1000)
    sha_one, sha_two = (hashlib.sha256(data).hexdigest() for data in (one, two))
    url = lfs_upload_url(hub, sha_one, 1000)
    assert raw(hub, "PUT", url.replace(sha_one, sha_two), two).status == 403
    assert raw(hub, "PUT", url.replace("expires=", "expires=9"), one).status == 403
    assert stored_blobs(hub) == set()


def test_a_commit_cannot_name_a_content_that_never_arrived(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "lfsFile", "value": {"path": "w", "algo": "sha256", "oid": "0" * 64, "size": 5}},
    ]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    answer = raw(hub, "POST", f"/api/models/{REPO}/commit/main", body)
    assert answer.status == 400
    assert b"never" not in answer.read()
    assert api.list_repo_files(REPO) == []
