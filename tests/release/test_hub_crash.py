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
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from huggingface_hub import HfApi
from safetensors.numpy import save_file

from training_ready.release.connection import PublishError, without_xet
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.hub_store import HubStore
from training_ready.release.publish import publish_release

REPO = "me/model"
SERVE = "import sys; from pathlib import Path; from training_ready.release.commands import hub_serve; "
SERVE += "hub_serve(Path(sys.argv[1]), port=0)"
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


@contextmanager
def hub_process(root: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
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
        incoming = root / "incoming"
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


@pytest.mark.parametrize("patience", [0.05, 0.2, 0.45])
def test_a_hub_killed_between_commits_has_every_acknowledged_one_and_no_half(
    tmp_path: Path, patience: float
) -> None:
    """Each commit writes the same number into two files; a reader must never find two different numbers."""
    root = tmp_path / "hub"
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
    assert len(seen[0]) == 40
    with HubStore(root) as store:
        history = [commit.oid for commit in store.history(REPO, "main")]
        assert set(seen) <= set(history)
        for commit in store.history(REPO, "main"):
            contents = {store.blobs.path(entry.sha256).read_bytes() for entry in commit.tree.values()}
            assert len(contents) <= 1
        assert list(store.blobs.damaged()) == []


@pytest.mark.slow  # the client retries a lost upload for 23 s
def test_a_hub_that_dies_during_a_publication_never_moves_main(tmp_path: Path, release: Path) -> None:
    root = tmp_path / "hub"
    with hub_process(root) as (process, endpoint):
        old = publish_release(release, REPO, endpoint=endpoint)
        save_file({"w": np.zeros((500, 500), np.float32)}, release / "model.safetensors")

        def kill(label: str, done: int, total: int) -> None:
            if label == "upload":
                process.kill()

        with pytest.raises(PublishError, match=r"main did not move.*release publish"):
            publish_release(release, REPO, endpoint=endpoint, progress=kill)
    with EmbeddedHub(root) as hub:
        assert HfApi(endpoint=hub.endpoint_url, token=False).repo_info(REPO).sha == old.revision
        again = publish_release(release, REPO, endpoint=hub.endpoint_url)
        assert again.uploaded
