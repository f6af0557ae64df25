"""The hub as the unmodified huggingface_hub client sees it, and as a stranger with raw HTTP sees it."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import threading
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

from training_ready.release.connection import without_xet
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_server import EmbeddedHub

REPO = "me/model"


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
    return {path.name for path in (hub.root / "blobs").glob("??/*")}


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


def test_parallel_commits_lose_nothing(api: HfApi, hub: EmbeddedHub) -> None:
    api.create_repo(REPO)

    def upload(index: int) -> None:
        HfApi(endpoint=hub.endpoint_url, token=False).upload_file(
            repo_id=REPO, path_or_fileobj=os.urandom(20_000), path_in_repo=f"part-{index}.bin"
        )

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(upload, range(16)))
    assert len(api.list_repo_files(REPO)) == 16
    assert len(api.list_repo_commits(REPO)) == 17


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
    assert list((hub.root / "incoming").iterdir()) == []
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


# --- strangers


@pytest.mark.parametrize(
    "path",
    [
        "/../../etc/resolve/main/passwd",
        "/%2e%2e/%2e%2e/resolve/main/passwd",
        "/..%2f..%2fetc/x/resolve/main/passwd",
        "/api/models/../../../etc/passwd",
        "/api/models/%2e%2e/x",
        "/api/models/me/model/revision/..%2f..%2fheads%2fmain",
        "/api/models/me/model/tree/%2e%2e%2f%2e%2e%2frepo.json",
        "/me/model/resolve/main/..%2f..%2frepo.json",
        "/me/model/resolve/main/%2fetc%2fpasswd",
        "/me/model/resolve/%2e%2e%2ftags%2fv1/a.txt",
        "/me/model%00/resolve/main/a.txt",
    ],
)
def test_no_url_leaves_the_root(api: HfApi, hub: EmbeddedHub, path: str) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a.txt")
    answer = raw(hub, "GET", path)
    assert answer.status in (400, 404), (answer.status, answer.read())


@pytest.mark.parametrize(
    "path", ["../x", "/etc/x", "a/../../x", "a//b", "a\\b", ".git/config", "a/./b", "a\nb", ""]
)
def test_no_commit_holds_a_path_that_climbs(api: HfApi, hub: EmbeddedHub, path: str) -> None:
    api.create_repo(REPO)
    lines = [
        {"key": "header", "value": {"summary": "x"}},
        {"key": "file", "value": {"path": path, "content": "eA==", "encoding": "base64"}},
    ]
    body = "\n".join(json.dumps(line) for line in lines).encode()
    assert raw(hub, "POST", f"/api/models/{REPO}/commit/main", body).status == 400
    assert api.list_repo_files(REPO) == []


@pytest.mark.parametrize(
    "repo_id", ["a", "../x", "a/..", "a/b/c", "a/b.git", "api/models", "a/--b", "-a/b", "a/b c"]
)
def test_no_repository_has_a_name_that_means_something_else(hub: EmbeddedHub, repo_id: str) -> None:
    owner, _, name = repo_id.partition("/")
    body = json.dumps({"name": name, "organization": owner}).encode()
    answer = raw(hub, "POST", "/api/repos/create", body, Content_Type="application/json")
    assert answer.status == 404
    assert list((hub.root / "repos").iterdir()) == []


def test_a_file_cannot_be_inside_a_file(api: HfApi) -> None:
    api.create_repo(REPO)
    api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a")
    with pytest.raises(HfHubHTTPError, match="file and a folder"):
        api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="a/b")


def test_a_web_page_cannot_use_a_loopback_hub(hub: EmbeddedHub) -> None:
    body = json.dumps({"name": "m", "organization": "me"}).encode()
    kind = {"Content_Type": "application/json"}
    assert raw(hub, "POST", "/api/repos/create", body, **kind, Origin="http://evil.example").status == 403
    assert raw(hub, "GET", "/api/models", Host="evil.example").status == 400
    assert list((hub.root / "repos").iterdir()) == []


def test_a_token_is_wanted_for_everything(tmp_path: Path) -> None:
    secret = "correct-horse"
    with EmbeddedHub(tmp_path / "hub", token=secret) as hub, without_xet(hub.endpoint_url):
        friend = HfApi(endpoint=hub.endpoint_url, token=secret)
        friend.create_repo(REPO)
        friend.upload_file(repo_id=REPO, path_or_fileobj=os.urandom(9000), path_in_repo="w.bin")
        for token in ("wrong", False):
            stranger = HfApi(endpoint=hub.endpoint_url, token=token)
            for attempt in (
                lambda api=stranger: api.repo_info(REPO),
                lambda api=stranger: api.create_repo("me/other"),
                lambda api=stranger: api.upload_file(repo_id=REPO, path_or_fileobj=b"x", path_in_repo="x"),
                lambda api=stranger: api.delete_repo(REPO),
            ):
                with pytest.raises(HfHubHTTPError) as refused:
                    attempt()
                assert refused.value.response.status_code == 401
        assert raw(hub, "GET", f"/{REPO}/resolve/main/w.bin").status == 401
        assert (
            raw(
                hub, "PUT", f"/{REPO}.git/info/lfs/objects/{'0' * 64}?size=1&expires=1&signature=x", b"x"
            ).status
            == 403
        )
        assert friend.list_repo_files(REPO) == ["w.bin"]
        assert hub.environment()["HF_TOKEN"] == secret


# --- the folder


def test_the_next_hub_continues_with_the_folder(tmp_path: Path) -> None:
    with EmbeddedHub(tmp_path / "hub") as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        api.create_repo(REPO)
        commit = api.upload_file(repo_id=REPO, path_or_fileobj=b"kept", path_in_repo="a.txt").oid
        with pytest.raises(HubError, match="another hub already serves"):
            EmbeddedHub(tmp_path / "hub").__enter__()
    with EmbeddedHub(tmp_path / "hub") as hub:
        assert HfApi(endpoint=hub.endpoint_url, token=False).repo_info(REPO).sha == commit
        assert raw(hub, "GET", f"/{REPO}/resolve/main/a.txt").read() == b"kept"
        assert [thread.name for thread in threading.enumerate()].count("hub") == 1


def test_a_taken_port_is_named(hub: EmbeddedHub, tmp_path: Path) -> None:
    port = int(hub.endpoint_url.rpartition(":")[2])
    with pytest.raises(HubError, match=f"{port}.*choose another port"):
        EmbeddedHub(tmp_path / "other", port).__enter__()
