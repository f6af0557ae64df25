"""Did the release arrive? One commit on a hub, then every byte read back and compared."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.release.connection import PUBLIC_HUB, PublishError, clear_errors, hub_api
from training_ready.release.contents import ReleaseFile, release_files

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Written by the public Hub into every repository; not part of a release, and left alone.
_HUB_OWN_FILES = frozenset({".gitattributes"})
_READ_ATTEMPTS = 3

Progress = Callable[[str, int, int], None]
"""Called as `progress(label, bytes_done, bytes_total)`; labels in order: "hash", "upload", "read back"."""


@dataclass(kw_only=True, slots=True, frozen=True)
class Publication:
    """What is on the hub, verified: all `files` were read back at commit `revision` with these hashes.

    `uploaded` is False when the hub already held exactly this release.
    """

    repo_id: str
    endpoint: str
    revision: str
    files: tuple[ReleaseFile, ...]
    uploaded: bool
    url: str

    def as_json(self) -> str:
        """One line for machines; files as objects."""
        return json.dumps(asdict(self) | {"files": [file._asdict() for file in self.files]})


def publish_release(
    folder: Path,
    repo_id: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = True,
    progress: Progress | None = None,
) -> Publication:
    """Make `main` of the model `repo_id` equal to `folder` by one commit, and prove it by reading everything back.

    Args:
        folder: a release folder, see :func:`.contents.release_files` for what it must and must not hold.
        repo_id: `owner/name`; created when missing.
        endpoint: base URL of the hub; default `HF_ENDPOINT`, else the public Hub.
        token: write token. None means the stored login on the public Hub, and no token anywhere else.
        private: visibility of a repository that this call creates.

    Publishing the same folder again makes no commit and reads everything back again. Files of an earlier release that
    are not in the folder are removed from `main` by the same commit (its history keeps them).

    Raises:
        ContentsError: the folder must not leave as it is; nothing was sent.
        PublishError: the hub is down, refuses, or does not hold what was sent.
    """
    report = progress or _silent
    files = release_files(folder, lambda done, total: report("hash", done, total))
    endpoint = (endpoint or os.environ.get("HF_ENDPOINT") or PUBLIC_HUB).rstrip("/")
    with clear_errors(endpoint, repo_id, folder), hub_api(endpoint, token) as api:
        repo_id = api.create_repo(repo_id, exist_ok=True, private=private).repo_id
        head = api.repo_info(repo_id).sha
        there = _remote_files(api, repo_id, head) if head else {}
        changed = [file for file in files if not _is_same(folder / file.path, file, there.get(file.path))]
        stale = sorted(there.keys() - {file.path for file in files})
        revision = head
        if changed or stale or revision is None:
            revision = _commit(api, repo_id, folder, changed, stale, parent=head, report=report)
        faults = _read_back(api, repo_id, revision, files, report)
        if faults and revision == head:  # listed, yet lost or damaged: offer the contents once more
            again = [file for file in files if file.path in faults]
            revision = _commit(api, repo_id, folder, again, [], parent=head, report=report)
            faults = _read_back(api, repo_id, revision, files, report)
        if faults:
            raise _damaged(api.endpoint, repo_id, revision, faults)
    return Publication(
        repo_id=repo_id,
        endpoint=endpoint,
        revision=revision,
        files=tuple(files),
        uploaded=revision != head,
        url=f"{endpoint}/{repo_id}",
    )


def _silent(label: str, done: int, total: int) -> None:
    """No progress wanted."""


def _counter(report: Progress, label: str, before: int, total: int) -> Callable[[int], None]:
    """Progress within one file, given what the files before it held."""
    return lambda here: report(label, before + here, total)


def _remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, Any]:
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {
        entry.path: entry
        for entry in tree
        if isinstance(entry, RepoFile) and entry.path not in _HUB_OWN_FILES
    }


def _is_same(path: Path, file: ReleaseFile, remote: Any) -> bool:
    """Whether the hub lists this very content: by sha256 for large files, by git's object id for small ones."""
    from huggingface_hub.utils import sha

    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.sha256)
    return bool(remote.blob_id == sha.git_hash(path.read_bytes()))


def _commit(
    api: HfApi,
    repo_id: str,
    folder: Path,
    changed: Sequence[ReleaseFile],
    stale: Sequence[str],
    *,
    parent: str | None,
    report: Progress,
) -> str:
    """Upload the contents one by one, then make them visible by one commit; returns its id.

    `upload_folder` would do it in several commits where Xet is active, and a reader could see half a model.
    """
    from huggingface_hub import CommitOperationDelete

    total = sum(file.size for file in changed)
    done = 0
    additions = []
    for file in changed:
        addition = _addition(folder / file.path, file, _counter(report, "upload", done, total))
        api.preupload_lfs_files(repo_id, [addition], free_memory=False)
        additions.append(addition)
        done += file.size
        report("upload", done, total)
    deletions = [CommitOperationDelete(path, is_folder=False) for path in stale]
    commit = api.create_commit(
        repo_id, [*additions, *deletions], commit_message="Release", parent_commit=parent, revision="main"
    )
    return str(commit.oid)


def _addition(path: Path, file: ReleaseFile, sent: Callable[[int], None]) -> Any:
    from huggingface_hub import CommitOperationAdd

    class CountedAddition(CommitOperationAdd):
        """Tells `sent` how far the file has been read; `with_tqdm` marks the reading of an LFS upload."""

        @contextmanager
        def as_file(self, with_tqdm: bool = False) -> Iterator[Any]:
            with path.open("rb") as source:
                read = source.read

                def counted(size: int | None = -1) -> bytes:
                    data = read(size)
                    sent(source.tell())
                    return data

                if with_tqdm:
                    source.read = counted  # type: ignore[method-assign]
                yield source

    addition = CountedAddition(path_in_repo=file.path, path_or_fileobj=str(path))
    addition.upload_info.sha256 = bytes.fromhex(
        file.sha256
    )  # known already: saves reading the file once more
    return addition


def _read_back(
    api: HfApi, repo_id: str, revision: str, files: Sequence[ReleaseFile], report: Progress
) -> dict[str, str]:
    """Download everything at `revision` (past the local cache), hash it on the way; return {path: what is wrong}."""
    from huggingface_hub.errors import HfHubHTTPError

    listed = _remote_files(api, repo_id, revision)
    faults = dict.fromkeys(listed.keys() - {file.path for file in files}, "not part of the release")
    total = sum(file.size for file in files)
    done = 0
    for file in files:
        received = _counter(report, "read back", done, total)
        try:
            size, sha256 = _download_hash(api, repo_id, revision, file.path, received)
        except HfHubHTTPError as error:
            if error.response.status_code not in (404, 410):
                raise
            faults[file.path] = f"missing, the hub answers HTTP {error.response.status_code}"
        else:
            if (size, sha256) != (file.size, file.sha256):
                sent = f"sent {file.size} bytes with sha256 {file.sha256}"
                faults[file.path] = f"{sent}, the hub returns {size} bytes with sha256 {sha256}"
        done += file.size
    return faults


def _damaged(endpoint: str, repo_id: str, revision: str, faults: Mapping[str, str]) -> PublishError:
    listing = "\n  ".join(f"{path}: {fault}" for path, fault in sorted(faults.items()))
    return PublishError(
        f"{repo_id} at {endpoint}, revision {revision}, is not what was sent:\n  {listing}\n"
        "Do not use this revision. On an embedded hub: stop it, run `training-ready hub check --root FOLDER`, "
        "start it and publish again. On any other hub: publish again and tell its operator."
    )


def _download_hash(
    api: HfApi, repo_id: str, revision: str, path: str, received: Callable[[int], None]
) -> tuple[int, str]:
    """(size, sha256) of the bytes that the hub serves for one file."""
    import httpx2
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
        build_hf_headers,
        hf_raise_for_status,
        http_stream_backoff,
    )

    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    headers = {**build_hf_headers(token=api.token), "Accept-Encoding": "identity"}
    attempt = 1
    while True:
        digest, size = hashlib.sha256(), 0
        try:
            with http_stream_backoff(
                "GET", url, headers=headers, follow_redirects=True, timeout=60
            ) as response:
                hf_raise_for_status(response)
                for block in response.iter_bytes(2**20):
                    digest.update(block)
                    size += len(block)
                    received(size)
            return size, digest.hexdigest()
        except httpx2.TransportError:
            if attempt == _READ_ATTEMPTS:
                raise
            attempt += 1
