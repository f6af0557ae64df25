"""Where do the hub's models live? Commits and refs over the blobs of :mod:`.hub_blobs`, never half-written.

    root/
      repos/<owner>/<name>/
        repo.json               visibility, time of creation
        commits/<oid>.json      parent, message, date, tree {path: sha256, size, oid, lfs}; named by its hash
        refs/heads/main         the oid of a branch's newest commit; refs/tags/… likewise

A change is written in that order (blob, commit, ref), each under a temporary name, fsynced, then renamed. The
rename of the ref is the only moment anything becomes visible: a hub killed before it still serves the old
commit, whole. File names inside a model are keys of a JSON tree and never touch the file system, so no path
can leave the root.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from types import TracebackType
from urllib.parse import quote, unquote

from training_ready.release.hub_blobs import BlobStore, HubError, sync_folder

DEFAULT_BRANCH = "main"

_NAME = re.compile(r"[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?")
_REF = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._/-]{0,150}")
_OID = re.compile(r"[0-9a-f]{40}")
# First path segments that mean something else in the hub's URLs.
_RESERVED_OWNERS = frozenset({"api", "datasets", "spaces", "buckets", "kernels", "models"})


@dataclass(kw_only=True, slots=True, frozen=True)
class Entry:
    """One file of a commit: sha256 and size (bytes) of its content, and the git object id of a clone."""

    sha256: str
    size: int
    oid: str
    lfs: bool


@dataclass(kw_only=True, slots=True, frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    message: str
    date: str
    tree: Mapping[str, Entry]


@dataclass(kw_only=True, slots=True, frozen=True)
class Repo:
    repo_id: str
    private: bool
    created_at: str


def pointer_text(sha256: str, size: int) -> bytes:
    """The Git LFS pointer that stands for a large file in a git tree (git-lfs specification v1)."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def git_oid(content: bytes) -> str:
    """Git's object id of a blob; the client compares it to skip files that did not change."""
    return hashlib.sha1(b"blob %d\x00" % len(content) + content, usedforsecurity=False).hexdigest()


def check_repo_id(repo_id: str) -> tuple[str, str]:
    """Split `owner/name`, refusing anything that could be read as another place."""
    owner, _, name = repo_id.partition("/")
    well_formed = _NAME.fullmatch(owner) and _NAME.fullmatch(name) and owner not in _RESERVED_OWNERS
    if not well_formed or ".." in repo_id or "--" in repo_id or name.endswith((".git", ".ipynb")):
        raise HubError(
            f"{repo_id!r} is not a repository id: write owner/name with letters, digits, '-', '_' and '.'",
            status=404,
            code="RepoNotFound",
        )
    return owner, name


def check_path(path: str) -> str:
    """A file's path inside a model: relative, POSIX, no dots that climb, no control characters."""
    parts = path.split("/")
    bad = any(part in ("", ".", "..") for part in parts) or parts[0] == ".git"
    if bad or "\\" in path or any(ord(char) < 32 for char in path) or len(path.encode()) > 1000:
        raise HubError(f"{path!r} is not a path inside a repository", status=400)
    return path


def _is_ref_name(name: str) -> bool:
    bad = ".." in name or "//" in name or name.endswith(("/", ".", ".lock")) or _OID.fullmatch(name)
    return not bad and _REF.fullmatch(name) is not None


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class HubStore:
    """All state of a hub. One process per root (a file lock says so); many threads may call its methods."""

    def __init__(self, root: Path) -> None:
        self.root = root.resolve()
        (self.root / "repos").mkdir(parents=True, exist_ok=True)
        self._lock_file = (self.root / ".lock").open("a")
        try:
            fcntl.flock(self._lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock_file.close()
            raise HubError(
                f"another hub already serves {self.root}; stop it or choose another --root"
            ) from error
        self.blobs = BlobStore(self.root)  # only after the lock: it empties incoming/
        self._writing = threading.RLock()

    def close(self) -> None:
        self._lock_file.close()

    def __enter__(self) -> HubStore:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # --- files -----------------------------------------------------------------------------------------

    def small_entry(self, data: bytes) -> Entry:
        """Store a file that arrived inside a commit and return its tree entry."""
        return Entry(sha256=self.blobs.put(data), size=len(data), oid=git_oid(data), lfs=False)

    def lfs_entry(self, sha256: str) -> Entry:
        """The tree entry of an uploaded large file. Raises HubError when its upload never arrived."""
        size = self.blobs.size(sha256)
        if size is None:
            raise HubError(f"no upload with sha256 {sha256} arrived; upload it before the commit", status=400)
        return Entry(sha256=sha256, size=size, oid=git_oid(pointer_text(sha256, size)), lfs=True)

    # --- repositories ----------------------------------------------------------------------------------

    def _folder(self, repo_id: str) -> Path:
        owner, name = check_repo_id(repo_id)
        return self.root / "repos" / owner / name

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        """Create with one empty commit on `main`. Raises HubError 409 when it exists."""
        folder = self._folder(repo_id)
        with self._writing:
            if folder.exists():
                raise HubError(f"You already created this model repo: {repo_id}", status=409)
            staging = self.blobs.new_incoming()
            for part in ("commits", "refs/heads", "refs/tags"):
                (staging / part).mkdir(parents=True)
            facts = {"private": private, "created_at": _now()}
            self._write(staging / "repo.json", json.dumps(facts).encode())
            oid = self._write_commit(staging, parent=None, title="Create the repository", message="", tree={})
            self._write(staging / "refs" / "heads" / DEFAULT_BRANCH, oid.encode())
            folder.parent.mkdir(exist_ok=True)
            os.rename(staging, folder)
            sync_folder(folder.parent)

    def delete_repo(self, repo_id: str) -> None:
        """Forget the repository. Blobs stay until :meth:`delete_unreferenced`."""
        with self._writing:
            self.repo(repo_id)
            grave = self.blobs.new_incoming()
            os.rename(self._folder(repo_id), grave)
            shutil.rmtree(grave)

    def repo(self, repo_id: str) -> Repo:
        try:
            facts = json.loads((self._folder(repo_id) / "repo.json").read_bytes())
        except FileNotFoundError:
            raise HubError(f"no model {repo_id} on this hub", status=404, code="RepoNotFound") from None
        return Repo(repo_id=repo_id, private=facts["private"], created_at=facts["created_at"])

    def repo_ids(self) -> list[str]:
        return sorted(f"{path.parent.name}/{path.name}" for path in (self.root / "repos").glob("*/*"))

    def users_of(self, contents: Collection[str]) -> dict[str, list[str]]:
        """For each sha256, the repositories with a commit that mentions it."""
        return {
            sha256: [repo_id for repo_id in self.repo_ids() if sha256 in self._mentioned(repo_id)]
            for sha256 in contents
        }

    def delete_unreferenced(self) -> int:
        """Delete blobs that no commit mentions, while no upload runs; returns the bytes freed."""
        with self._writing:
            return self.blobs.delete_except(
                {sha256 for repo_id in self.repo_ids() for sha256 in self._mentioned(repo_id)}
            )

    def _mentioned(self, repo_id: str) -> set[str]:
        commits = (self._folder(repo_id) / "commits").glob("*.json")
        return {entry.sha256 for path in commits for entry in self._commit(repo_id, path.stem).tree.values()}

    # --- commits ---------------------------------------------------------------------------------------

    def resolve(self, repo_id: str, revision: str) -> Commit:
        """The commit that a branch, tag or full commit id names."""
        self.repo(repo_id)
        for kind in ("heads", "tags"):
            name = revision.removeprefix(f"refs/{kind}/")
            if _is_ref_name(name) and (path := self._ref(repo_id, kind, name)).is_file():
                return self._commit(repo_id, path.read_text())
        if _OID.fullmatch(revision) and (self._folder(repo_id) / "commits" / f"{revision}.json").is_file():
            return self._commit(repo_id, revision)
        raise HubError(f"{repo_id} has no revision {revision!r}", status=404, code="RevisionNotFound")

    def entry(self, commit: Commit, path: str) -> Entry:
        try:
            return commit.tree[path]
        except KeyError:
            raise HubError(f"no file {path!r} at {commit.oid}", status=404, code="EntryNotFound") from None

    def history(self, repo_id: str, revision: str) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        commit: Commit | None = self.resolve(repo_id, revision)
        while commit is not None:
            yield commit
            commit = self._commit(repo_id, commit.parent) if commit.parent else None

    def commit(
        self,
        repo_id: str,
        branch: str,
        edits: Sequence[tuple[str, Entry | None]],
        *,
        title: str,
        message: str = "",
        parent: str | None = None,
    ) -> str:
        """Apply `edits` (path → entry; None deletes, a trailing slash a folder) as one commit on `branch`.

        `parent`, when given, must still be the branch's newest commit (HubError 412 otherwise). Returns the
        commit id; the current one when nothing changed.
        """
        with self._writing:
            head = self.resolve(repo_id, f"refs/heads/{branch.removeprefix('refs/heads/')}")
            if parent is not None and (len(parent) < 5 or not head.oid.startswith(parent)):
                raise HubError(
                    f"{branch} of {repo_id} is at {head.oid}, no longer at {parent}: read it again and retry",
                    status=412,
                )
            tree = _edited(head.tree, edits)
            if tree == head.tree:
                return head.oid
            folder = self._folder(repo_id)
            oid = self._write_commit(folder, parent=head.oid, title=title, message=message, tree=tree)
            self._write(self._ref(repo_id, "heads", branch.removeprefix("refs/heads/")), oid.encode())
            return oid

    def _write_commit(
        self, folder: Path, *, parent: str | None, title: str, message: str, tree: Mapping[str, Entry]
    ) -> str:
        body = {
            "parent": parent,
            "title": title,
            "message": message,
            "date": _now(),
            "tree": {path: asdict(tree[path]) for path in sorted(tree)},
        }
        data = json.dumps(body, sort_keys=True).encode()
        oid = hashlib.sha256(data).hexdigest()[:40]
        self._write(folder / "commits" / f"{oid}.json", data)
        return oid

    def _commit(self, repo_id: str, oid: str) -> Commit:
        path = self._folder(repo_id) / "commits" / f"{oid}.json"
        data = path.read_bytes()
        if hashlib.sha256(data).hexdigest()[:40] != oid:
            raise HubError(f"{path} is damaged: its content no longer has the hash in its name", status=410)
        body = json.loads(data)
        body["tree"] = {name: Entry(**entry) for name, entry in body["tree"].items()}
        return Commit(oid=oid, **body)

    # --- refs ------------------------------------------------------------------------------------------

    def _ref(self, repo_id: str, kind: str, name: str) -> Path:
        if not _is_ref_name(name):
            raise HubError(f"{name!r} is not a name for a branch or tag", status=400)
        return self._folder(repo_id) / "refs" / kind / quote(name, safe="")

    def refs(self, repo_id: str, kind: str) -> dict[str, str]:
        """{name: commit id} of all branches (`heads`) or `tags`."""
        self.repo(repo_id)
        folder = self._folder(repo_id) / "refs" / kind
        return {unquote(path.name): path.read_text() for path in sorted(folder.iterdir())}

    def create_ref(self, repo_id: str, kind: str, name: str, *, revision: str) -> None:
        with self._writing:
            oid = self.resolve(repo_id, revision).oid
            path = self._ref(repo_id, kind, name)
            if path.exists():
                raise HubError(f"Reference already exists: {name} of {repo_id}", status=409)
            self._write(path, oid.encode())

    def delete_ref(self, repo_id: str, kind: str, name: str) -> None:
        if kind == "heads" and name == DEFAULT_BRANCH:
            raise HubError(f"{DEFAULT_BRANCH} cannot be deleted", status=403)
        with self._writing:
            self.repo(repo_id)
            try:
                self._ref(repo_id, kind, name).unlink()
            except FileNotFoundError:
                message = f"{repo_id} has no {'branch' if kind == 'heads' else 'tag'} {name!r}"
                raise HubError(message, status=404, code="RevisionNotFound") from None

    def _write(self, path: Path, data: bytes) -> None:
        temporary = self.blobs.new_incoming()
        with temporary.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path.parent)


def _edited(tree: Mapping[str, Entry], edits: Sequence[tuple[str, Entry | None]]) -> dict[str, Entry]:
    """A copy of `tree` with the edits applied in order. Raises HubError when they contradict it."""
    result = dict(tree)
    for path, entry in edits:
        check_path(path.removesuffix("/") if entry is None else path)
        if entry is not None:
            result[path] = entry
            continue
        doomed = [
            known for known in result if known == path or (path.endswith("/") and known.startswith(path))
        ]
        if not doomed:
            raise HubError(f"A file with this name doesn't exist: {path}", status=404, code="EntryNotFound")
        for known in doomed:
            del result[known]
    folders = {path[:index] for path in result for index, char in enumerate(path) if char == "/"}
    if clash := sorted(folders & result.keys()):
        raise HubError(f"{clash[0]} would be a file and a folder at once", status=400)
    return result
