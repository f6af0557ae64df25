"""What a killed hub leaves behind: the state before the unfinished request, whole."""

from __future__ import annotations

import hashlib
import http.client
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
from huggingface_hub import HfApi

from training_ready.release.connection import without_xet
from training_ready.release.hub_blobs import HubError
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.hub_store import HubStore
from training_ready.release.place_bucket import BucketPlace
from training_ready.release.place_folder import FolderPlace
from training_ready.release.places import Place, open_place
from training_ready.storage.objects import ObjectStore

from .conftest import use

REPO = "me/model"
SERVE = "import sys; from training_ready.release.hub_commands import hub_serve; "
SERVE += "hub_serve(sys.argv[1], port=0)"
# Prints the id of every commit that the hub acknowledged.
WRITE = """
import itertools, os, sys
os.environ["HF_HUB_DISABLE_XET"] = "1"
from huggingface_hub import CommitOperationAdd, HfApi
api = HfApi(endpoint=sys.argv[1], token=False)
for number in itertools.count():
    both = [CommitOperationAdd(name, b"\\0" + str(number).encode()) for name in ("a.bin", "b.bin")]
    print(api.create_commit("me/model", both, commit_message=str(number)).oid, flush=True)
"""
# Every other kind of request that changes something, over and over.
ARRANGE = """
import itertools, os, sys
os.environ["HF_HUB_DISABLE_XET"] = "1"
from huggingface_hub import HfApi
api = HfApi(endpoint=sys.argv[1], token=False)
for number in itertools.count():
    name = f"me/model-{number % 3}"
    api.create_repo(name, exist_ok=True)
    api.upload_file(repo_id=name, path_or_fileobj=b"\\0%d" % number, path_in_repo="a.bin")
    api.create_branch(name, branch=f"b/{number}", exist_ok=True)
    api.create_tag(name, tag=f"v{number}", exist_ok=True)
    print(number, flush=True)
    api.delete_tag(name, tag=f"v{number}")
    api.delete_branch(name, branch=f"b/{number}")
    if number % 2:
        api.delete_repo(name)
"""


@contextmanager
def hub_process(root: Path | str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A hub in a process of its own, started by its command; (process, endpoint)."""
    process = subprocess.Popen([sys.executable, "-c", SERVE, str(root)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("export HF_ENDPOINT=http://127.0.0.1:"), line
        yield process, line.strip().partition("=")[2]
    finally:
        process.kill()
        process.wait()


def test_a_hub_killed_during_an_upload_keeps_the_old_main(tmp_path: Path) -> None:
    root = tmp_path / "hub"
    data = os.urandom(2_000_000)
    sha256 = hashlib.sha256(data).hexdigest()
    with hub_process(root) as (process, endpoint), without_xet(endpoint):
        api = HfApi(endpoint=endpoint, token=False)
        api.create_repo(REPO)
        old = api.upload_file(repo_id=REPO, path_or_fileobj=b"old\0", path_in_repo="model.safetensors").oid
        connection = http.client.HTTPConnection(endpoint.removeprefix("http://"), timeout=20)
        body = json.dumps({"operation": "upload", "objects": [{"oid": sha256, "size": len(data)}]})
        connection.request(
            "POST", f"/{REPO}.git/info/lfs/objects/batch", body, {"Content-Type": "application/json"}
        )
        href = json.load(connection.getresponse())["objects"][0]["actions"]["upload"]["href"]
        connection.putrequest("PUT", href.removeprefix(endpoint))
        connection.putheader("Content-Length", str(len(data)))
        connection.endheaders(data[: len(data) // 2])
        incoming = root / ".incoming"
        deadline = time.monotonic() + 20
        while not any(path.stat().st_size for path in incoming.iterdir()) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert any(path.stat().st_size for path in incoming.iterdir()), "the upload was never seen in flight"
        process.send_signal(signal.SIGKILL)
        process.wait()
    with EmbeddedHub(root) as hub, without_xet(hub.endpoint_url):
        api = HfApi(endpoint=hub.endpoint_url, token=False)
        assert api.repo_info(REPO).sha == old
        assert list(incoming.iterdir()) == []
        assert not (root / "blobs" / sha256[:2] / sha256).exists()
        api.upload_file(repo_id=REPO, path_or_fileobj=data, path_in_repo="model.safetensors")
        assert (root / "blobs" / sha256[:2] / sha256).read_bytes() == data


def writing_hub_killed_after(root: Path | str, patience: float) -> list[str]:
    """The ids of the commits that a hub acknowledged before it was killed."""
    with hub_process(root) as (process, endpoint):
        HfApi(endpoint=endpoint, token=False).create_repo(REPO)
        writer = subprocess.Popen([sys.executable, "-c", WRITE, endpoint], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        seen = [writer.stdout.readline().strip()]
        time.sleep(patience)
        process.send_signal(signal.SIGKILL)
        process.wait()
        writer.kill()
        seen += [
            line.strip() for line in writer.communicate()[0].splitlines(keepends=True) if line.endswith("\n")
        ]
    return seen


def has_every_commit_and_no_half(place: Place, seen: list[str]) -> None:
    assert len(seen[0]) == 40
    with HubStore(place) as store:
        assert set(seen) <= {commit.oid for commit in store.history(REPO, "main")}
        for commit in store.history(REPO, "main"):
            assert len({store.blobs.read(entry.sha256) for entry in commit.tree.values()}) <= 1
        assert list(store.blobs.damaged()) == []


@pytest.mark.parametrize("patience", [0.05, 0.2, 0.45])
def test_a_hub_killed_between_commits_has_every_acknowledged_one_and_no_half(
    tmp_path: Path, patience: float
) -> None:
    """Each commit writes the same number into two files; a reader must never find two different numbers."""
    seen = writing_hub_killed_after(tmp_path / "hub", patience)
    has_every_commit_and_no_half(FolderPlace(tmp_path / "hub"), seen)


@pytest.mark.slow  # hub processes over a bucket
@pytest.mark.parametrize("patience", [0.1, 0.4, 0.9])
def test_so_does_a_hub_over_a_bucket(
    moto_store: ObjectStore, monkeypatch: pytest.MonkeyPatch, patience: float
) -> None:
    use(moto_store, monkeypatch)
    seen = writing_hub_killed_after(f"s3://{moto_store.bucket}/hub", patience)
    has_every_commit_and_no_half(BucketPlace(moto_store, "hub"), seen)


@pytest.mark.slow  # two hub processes over a bucket
def test_two_hubs_over_one_bucket_lose_nothing(
    moto_store: ObjectStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Eight clients commit through two hub processes that know nothing of each other."""
    use(moto_store, monkeypatch)
    root = f"s3://{moto_store.bucket}/hub"
    with hub_process(root) as (_, one), hub_process(root) as (_, other):
        HfApi(endpoint=one, token=False).create_repo(REPO)

        def upload(number: int) -> None:
            api = HfApi(endpoint=(one, other)[number % 2], token=False)
            api.upload_file(repo_id=REPO, path_or_fileobj=b"x%d" % number, path_in_repo=f"{number}.txt")

        with ThreadPoolExecutor(8) as pool:
            list(pool.map(upload, range(24)))
        for endpoint in (one, other):
            api = HfApi(endpoint=endpoint, token=False)
            assert len(api.list_repo_files(REPO)) == 24
            assert len(api.list_repo_commits(REPO)) == 25


@pytest.mark.parametrize("late", [1, 2])
def test_a_creation_that_comes_second_takes_nothing_away(moto_store: ObjectStore, late: int) -> None:
    """Another hub creates the model and commits to it while this one believes that there is none."""
    other = HubStore(BucketPlace(moto_store, "hub"))

    class SlowPlace(BucketPlace):
        asked = 0

        def read(self, name: str) -> bytes | None:
            found = super().read(name)
            self.asked += name.endswith("/repo.json")
            if found is None and name.endswith("/repo.json") and self.asked == late:
                other.create_repo(REPO, private=False)
                other.commit(REPO, "main", [("kept.txt", other.small_entry(b"kept"))], title="kept")
                other.create_ref(REPO, "tags", "v1", revision="main")
            return found

    with HubStore(SlowPlace(moto_store, "hub")) as store:
        with pytest.raises(HubError, match="already created"):
            store.create_repo(REPO, private=False)
        assert list(store.resolve(REPO, "main").tree) == list(store.resolve(REPO, "v1").tree) == ["kept.txt"]


@pytest.mark.slow  # many hub processes
@pytest.mark.parametrize("patience", [0.02, 0.11, 0.23, 0.37, 0.52])
@pytest.mark.parametrize("storage", ["folder", "bucket"])
def test_whatever_a_killed_hub_was_arranging_is_whole_or_not_there(
    tmp_path: Path,
    moto_store: ObjectStore,
    monkeypatch: pytest.MonkeyPatch,
    storage: str,
    patience: float,
) -> None:
    use(moto_store, monkeypatch)
    root = str(tmp_path / "hub") if storage == "folder" else f"s3://{moto_store.bucket}/hub"
    with hub_process(root) as (process, endpoint):
        command = [sys.executable, "-c", ARRANGE, endpoint]
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        ) as client:
            assert client.stdout is not None
            assert client.stdout.readline() == "0\n"
            time.sleep(patience)
            process.send_signal(signal.SIGKILL)
            process.wait()
            client.kill()
    with HubStore(open_place(root)) as store:
        for repo_id in store.repo_ids():
            refs = store.refs(repo_id, "heads") | store.refs(repo_id, "tags")
            assert "main" in refs
            for name in refs:
                for commit in store.history(repo_id, name):
                    for entry in commit.tree.values():
                        assert store.blobs.size(entry.sha256) == entry.size
        assert list(store.blobs.damaged()) == []
        for number in range(3):  # and everything can go on
            repo_id = f"me/model-{number}"
            if repo_id not in store.repo_ids():
                store.create_repo(repo_id, private=False)
            edits = [("again.txt", store.small_entry(b"again"))]
            store.commit(repo_id, "main", edits, title="again")
            assert "again.txt" in store.resolve(repo_id, "main").tree
