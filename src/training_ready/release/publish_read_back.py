"""Does the hub return the bytes that were sent? Listings compared by hash, files downloaded and hashed."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.release.contents import ReleaseFile
from training_ready.release.publish import Progress, counter
from training_ready.release.record import RECORD

if TYPE_CHECKING:
    from huggingface_hub import HfApi

# Written by the public Hub into every repository; not part of a release, and left alone.
_HUB_OWN_FILES = frozenset({".gitattributes"})
_READ_ATTEMPTS = 3
_GONE = (404, 410)
_RECORD_BYTES = 16 << 20


def remote_files(api: HfApi, repo_id: str, revision: str) -> dict[str, Any]:
    """{path: what the hub lists about it} of every file at `revision`."""
    from huggingface_hub.hf_api import RepoFile

    tree = api.list_repo_tree(repo_id, recursive=True, revision=revision)
    return {
        entry.path: entry
        for entry in tree
        if isinstance(entry, RepoFile) and entry.path not in _HUB_OWN_FILES
    }


def is_same(path: Path, file: ReleaseFile, remote: Any) -> bool:
    """Whether the hub lists this very content: by sha256 for large files, by git's object id for small ones."""
    from huggingface_hub.utils import sha

    if remote is None or remote.size != file.size:
        return False
    if remote.lfs is not None:
        return bool(remote.lfs.sha256 == file.sha256)
    return bool(remote.blob_id == sha.git_hash(path.read_bytes()))


def read_back(
    api: HfApi,
    repo_id: str,
    revision: str,
    files: Sequence[ReleaseFile],
    report: Progress,
    *,
    whole: bool = True,
) -> dict[str, str]:
    """Download `files` at `revision` (past the local cache), hash them on the way; return {path: what is wrong}.

    `whole`: nothing else may be there.
    """
    from huggingface_hub.errors import HfHubHTTPError

    listed = remote_files(api, repo_id, revision) if whole else {}
    faults = dict.fromkeys(listed.keys() - {file.path for file in files}, "not part of the release")
    total = sum(file.size for file in files)
    done = 0
    report("read back", 0, total)
    for file in files:
        received = counter(report, "read back", done, total)
        try:
            size, sha256 = _download_hash(api, repo_id, revision, file.path, received)
        except HfHubHTTPError as error:
            if error.response.status_code not in _GONE:
                raise
            faults[file.path] = f"missing, the hub answers HTTP {error.response.status_code}"
        else:
            if (size, sha256) != (file.size, file.sha256):
                sent = f"sent {file.size} bytes with sha256 {file.sha256}"
                faults[file.path] = f"{sent}, the hub returns {size} bytes with sha256 {sha256}"
        done += file.size
    return faults


def _download_hash(
    api: HfApi, repo_id: str, revision: str, path: str, received: Callable[[int], None]
) -> tuple[int, str]:
    """(size, sha256) of the bytes that the hub serves for one file."""
    import httpx2
    from huggingface_hub.utils import (  # type: ignore[attr-defined]  # documented, but not in its __all__
        hf_raise_for_status,
        http_stream_backoff,
    )

    url, headers = _request(api, repo_id, revision, path)
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


def record_at(api: HfApi, repo_id: str, revision: str, there: dict[str, Any]) -> bytes | None:
    """The release.json of a revision with the files `there`; None when it has none that could be one, or lost it."""
    from huggingface_hub.utils import get_session, hf_raise_for_status  # type: ignore[attr-defined]  # as above

    if RECORD not in there or there[RECORD].size > _RECORD_BYTES:
        return None
    url, headers = _request(api, repo_id, revision, RECORD)
    response = get_session().get(url, headers=headers, follow_redirects=True, timeout=60)
    if response.status_code in _GONE:
        return None
    hf_raise_for_status(response)
    return bytes(response.content)


def _request(api: HfApi, repo_id: str, revision: str, path: str) -> tuple[str, dict[str, str]]:
    """Where to ask for a file past the local cache, and the headers to send."""
    from huggingface_hub import hf_hub_url
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # as above

    url = hf_hub_url(repo_id, path, revision=revision, endpoint=api.endpoint)
    return url, {**build_hf_headers(token=api.token), "Accept-Encoding": "identity"}
