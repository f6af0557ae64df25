"""How does a release get onto a hub? Contents, one commit on its own branch, proof, tag; `main` last, in one commit.

The public API of hubs cannot point a branch at a commit, so `main` gets a commit of its own. It sends no weights: large
files are copied on the hub from the proven commit, small ones travel inside the commit. Afterwards both trees are
compared, path by path.
"""

from __future__ import annotations

import hashlib
import shlex
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from training_ready.release.connection import Journey, PublishError, clear_errors, hub_api, is_passing
from training_ready.release.contents import ReleaseFile
from training_ready.release.publish import Progress, Publication, counter, damaged
from training_ready.release.publish_read_back import is_same, read_back, record_at, remote_files
from training_ready.release.publish_replace import refuse_another
from training_ready.release.record import ReleaseRecord

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_PAUSES = (0.2, 1.0)
Result = TypeVar("Result")


def publish_to_hub(
    folder: Path,
    repo_id: str,
    files: Sequence[ReleaseFile],
    record: ReleaseRecord,
    *,
    name: str,
    replace: bool,
    endpoint: str,
    token: str | None,
    private: bool,
    report: Progress,
) -> Publication:
    """Commit `files` on a branch, read them back, tag them `name`, then let `main` be the same. Raises PublishError."""
    again = ["training-ready", "release", "publish", str(folder), repo_id, "--endpoint", endpoint]
    again += ["--replace"] if replace else []
    journey = Journey(folder=folder, again=shlex.join(again))
    with clear_errors(journey, endpoint, repo_id), hub_api(endpoint, token) as api:
        repo_id = _patiently(lambda: api.create_repo(repo_id, exist_ok=True, private=private).repo_id)
        hub = _Repo(api, repo_id, journey, report)
        main = hub.head("main")
        if not replace:
            there = hub.listing(main)
            found = _patiently(lambda: record_at(api, repo_id, main, there))
            refuse_another(journey, repo_id, found, len(there), record)
        revision = _prove(hub, record.branch, main, files)
        report("tag", 0, 1)
        hub.tag(name, revision)
        report("main", 0, 1)
        moved = hub.follow(revision, main, files)
        report("main", 1, 1)
    return Publication(
        target=repo_id,
        name=name,
        revision=moved,
        files=tuple(files),
        uploaded=moved != main,
        url=f"{endpoint}/{repo_id}",
    )


def _prove(hub: _Repo, branch: str, main: str, files: Sequence[ReleaseFile]) -> str:
    """The commit of `branch` that holds exactly `files`, read back; made if it is not there yet."""
    head = hub.branch(branch, main)
    there = hub.listing(head)
    changed = [file for file in files if not is_same(hub.folder / file.path, file, there.get(file.path))]
    stale = sorted(there.keys() - {file.path for file in files})
    revision = hub.commit_files(branch, head, changed, stale) if changed or stale else head
    faults = read_back(hub.api, hub.repo_id, revision, files, hub.report)
    if faults and revision == head:  # listed, yet lost or damaged: offer the contents once more
        again = [file for file in files if file.path in faults]
        revision = hub.commit_files(branch, head, again, [])
        faults = read_back(hub.api, hub.repo_id, revision, files, hub.report)
    if faults:
        advice = damaged(f"{hub.repo_id} at {hub.api.endpoint}, revision {revision} on {branch},", faults)
        raise PublishError(
            f"{advice} Do not use this revision. On an embedded hub: stop it, run `training-ready hub check --root "
            "FOLDER`, start it and publish again. On any other hub: publish again and tell its operator."
        )
    return revision


class _Repo:
    """One model on a hub: every step finds out what is there, and is tried again when the hub stumbles."""

    def __init__(self, api: HfApi, repo_id: str, journey: Journey, report: Progress) -> None:
        self.api, self.repo_id, self.folder, self.report = api, repo_id, journey.folder, report
        self._journey = journey

    def head(self, branch: str) -> str:
        return _patiently(lambda: str(self.api.repo_info(self.repo_id, revision=branch).sha))

    def listing(self, revision: str) -> dict[str, Any]:
        return remote_files(self.api, self.repo_id, revision)  # the client itself asks again

    def branch(self, branch: str, start: str) -> str:
        """The newest commit of `branch`, which begins at `start` when it is new."""
        _patiently(lambda: self.api.create_branch(self.repo_id, branch=branch, revision=start, exist_ok=True))
        return self.head(branch)

    def commit_files(
        self, branch: str, parent: str, changed: Sequence[ReleaseFile], stale: Sequence[str]
    ) -> str:
        """Upload the contents one by one, then make them visible by one commit; returns its id.

        `upload_folder` would do it in several commits where Xet is active, and a reader could see half a model.
        """
        from huggingface_hub import CommitOperationDelete

        total, done = sum(file.size for file in changed), 0
        self.report("upload", 0, total)
        operations: list[Any] = []
        for file in changed:
            addition = _addition(self.folder / file.path, file, counter(self.report, "upload", done, total))
            _patiently(
                lambda addition=addition: self.api.preupload_lfs_files(  # type: ignore[misc]
                    self.repo_id, [addition], free_memory=False, revision=branch
                )
            )
            operations.append(addition)
            done += file.size
            self.report("upload", done, total)
        operations += [CommitOperationDelete(path, is_folder=False) for path in stale]
        self.report("commit", 0, 1)
        return self._commit(branch, parent, operations, title="Release")

    def tag(self, name: str, revision: str) -> None:
        """Name the proven commit. The name contains a hash of the files, so an earlier tag holds the same ones."""
        _patiently(lambda: self.api.create_tag(self.repo_id, tag=name, revision=revision, exist_ok=True))
        if faults := self._differences(name, revision):
            raise PublishError(
                f"the tag {name} of {self.repo_id} names other files ({', '.join(faults)}): somebody moved it. Delete "
                "it. main did not move."
            )

    def follow(self, revision: str, main: str, files: Sequence[ReleaseFile]) -> str:
        """Let `main` hold the tree of `revision` by one commit on `main`; returns the commit that main is at."""
        from huggingface_hub import CommitOperationAdd, CommitOperationCopy, CommitOperationDelete

        wanted, there = self.listing(revision), self.listing(main)
        operations: list[Any] = []
        for path in sorted(wanted.keys() | there.keys()):
            if path not in wanted:
                operations.append(CommitOperationDelete(path, is_folder=False))
            elif _identity(there.get(path)) != _identity(wanted[path]):
                operations.append(
                    CommitOperationCopy(path, path, src_revision=revision)
                    if wanted[path].lfs
                    else CommitOperationAdd(path, self._proven(path, files))
                )
        self._journey.main_may_have_moved = bool(operations)
        now = self._commit("main", main, operations, title=f"Release {revision}") if operations else main
        faults = self._differences(now, revision)
        if not faults and operations:
            small = [file for file in files if not wanted[file.path].lfs]
            faults = sorted(read_back(self.api, self.repo_id, now, small, lambda *_: None, whole=False))
        if faults:
            raise PublishError(
                f"main of {self.repo_id} moved from {main} to {now} but differs from the proven revision {revision} in "
                f"{', '.join(faults)}. Do not use main; {revision} is whole. Publish again, and tell the operator."
            )
        return now

    def _proven(self, path: str, files: Sequence[ReleaseFile]) -> bytes:
        """A small file as it was read back. Raises PublishError when it was changed here since."""
        data = (self.folder / path).read_bytes()
        if hashlib.sha256(data).hexdigest() not in {file.sha256 for file in files if file.path == path}:
            raise PublishError(f"{self.folder / path} was changed while it was published. main did not move.")
        return data

    def _differences(self, one: str, other: str) -> list[str]:
        left, right = self.listing(one), self.listing(other)
        paths = left.keys() | right.keys()
        return sorted(path for path in paths if _identity(left.get(path)) != _identity(right.get(path)))

    def _commit(self, branch: str, parent: str, operations: Sequence[Any], *, title: str) -> str:
        """One commit on top of `parent`. When its answer is lost, the branch says whether it was made."""
        from huggingface_hub.errors import HfHubHTTPError

        for pause in (*_PAUSES, None):
            try:
                commit = self.api.create_commit(
                    self.repo_id,
                    list(operations),
                    commit_message=title,
                    parent_commit=parent,
                    revision=branch,
                )
                return str(commit.oid)
            except Exception as error:
                if not is_passing(error) and _status(error) != 412:
                    self._journey.main_may_have_moved &= not isinstance(error, HfHubHTTPError)
                    raise
                moved = self.head(branch)
                if moved != parent:
                    newest = self.api.list_repo_commits(self.repo_id, revision=branch)
                    if newest[1].commit_id == parent and newest[0].title == title:
                        return moved  # ours: the comparison that follows proves it
                    raise PublishError(
                        f"somebody else moved {branch} of {self.repo_id} meanwhile, to {moved}; it was left there."
                    ) from error
                if pause is None or (isinstance(error, HfHubHTTPError) and _status(error) == 412):
                    raise
                time.sleep(pause)
        raise AssertionError("the loop returns or raises")


def _status(error: Exception) -> int | None:
    return getattr(getattr(error, "response", None), "status_code", None)


def _identity(entry: Any) -> tuple[int, str] | None:
    """Size and hash of one file as a hub lists it."""
    if entry is None:
        return None
    return entry.size, entry.lfs.sha256 if entry.lfs else entry.blob_id


def _patiently(step: Callable[[], Result]) -> Result:
    """Run an idempotent step; again after a pause when the hub stumbled."""
    for pause in _PAUSES:
        try:
            return step()
        except Exception as error:
            if not is_passing(error):
                raise
            time.sleep(pause)
    return step()


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
    # Known already: saves reading the file once more.
    addition.upload_info.sha256 = bytes.fromhex(file.sha256)
    return addition
