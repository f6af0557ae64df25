"""What do the hub's models consist of? Commits and refs over the contents of :mod:`.hub_blobs`, never half-written.

    <place>/                      a folder or a bucket, see :mod:`.places`
      repos/<owner>/<name>/
        commits/<oid>.json        parent, message, date, tree {path: sha256, size, oid, lfs}; named by its hash
        refs/heads/main           the oid of a branch's newest commit; refs/tags/… likewise
        repo.json                 visibility, time of creation; the model exists while this does

A change is written in that order: contents, commit, ref. The swap of the ref is the only moment anything becomes
visible: a hub killed before it still serves the old commit, whole. File names inside a model are keys of a JSON tree
and never names of the place, so no path can leave it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import lru_cache
from types import TracebackType

from training_ready.release.hub_blobs import BlobStore, HubError
from training_ready.release.hub_names import (
    OID,
    check_path,
    check_repo_id,
    git_oid,
    is_ref_name,
    pointer_text,
)
from training_ready.release.places import Place, PlaceError

DEFAULT_BRANCH = "main"
_COMMITS_IN_MEMORY = 256


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


def _now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


class HubStore:
    """All state of a hub. Many threads may call its methods; whether several processes may, the place says."""

    def __init__(self, place: Place) -> None:
        """Raises HubError when another process serves the place."""
        self._held = contextlib.ExitStack()
        try:
            self._held.enter_context(place.sole_server())
        except PlaceError as error:
            raise HubError(str(error)) from error
        self.place = place
        self.blobs = BlobStore(place)
        self._writing = threading.RLock()
        self._commit = lru_cache(_COMMITS_IN_MEMORY)(self._read_commit)

    def close(self) -> None:
        self._held.close()

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

    def _under(self, repo_id: str, name: str) -> str:
        owner, model = check_repo_id(repo_id)
        return f"repos/{owner}/{model}/{name}"

    def create_repo(self, repo_id: str, *, private: bool) -> None:
        """Create with one empty commit on `main`. Raises HubError 409 when it exists."""
        facts, main = self._under(repo_id, "repo.json"), self._ref(repo_id, "heads", DEFAULT_BRANCH)
        taken = HubError(f"You already created this model repo: {repo_id}", status=409)
        with self._writing:
            if self.place.read(facts) is not None:
                raise taken
            before = self.place.read(main)
            leftovers = list(self.place.names(self._under(repo_id, "refs/")))
            # Asked again: what was read above is of an interrupted deletion only if no other hub has created it since.
            if self.place.read(facts) is not None:
                raise taken
            for leftover in leftovers:
                if leftover != main:
                    self.place.delete(leftover)
            oid = self._write_commit(repo_id, parent=None, title="Create the repository", message="", tree={})
            content = json.dumps({"private": private, "created_at": _now()}).encode()
            if not self.place.swap(main, oid.encode(), expected=before):
                raise taken
            if not self.place.swap(facts, content, expected=None):
                raise taken

    def delete_repo(self, repo_id: str) -> None:
        """Forget the repository: first that it exists, then what it was. Its contents stay, see delete_unreferenced."""
        with self._writing:
            facts = self._under(repo_id, "repo.json")
            if self.place.size(facts) is None:  # a damaged one can be deleted, too
                raise _no_model(repo_id)
            self.place.delete(facts)
            for name in list(self.place.names(self._under(repo_id, ""))):
                self.place.delete(name)
            self._commit.cache_clear()

    def repo(self, repo_id: str) -> Repo:
        content = self.place.read(self._under(repo_id, "repo.json"))
        if content is None:
            raise _no_model(repo_id)
        try:
            facts = json.loads(content)
            return Repo(repo_id=repo_id, private=facts["private"], created_at=facts["created_at"])
        except (ValueError, KeyError, TypeError) as error:
            raise self._damaged(self._under(repo_id, "repo.json"), repr(error)) from error

    def repo_ids(self) -> list[str]:
        found = [name.split("/") for name in self.place.names("repos/")]
        return sorted(f"{parts[1]}/{parts[2]}" for parts in found if parts[3:] == ["repo.json"])

    def damaged_repos(self) -> dict[str, str]:
        """{repository: what is damaged} of those with a ref or a commit that cannot be read."""
        found = {}
        for repo_id in self.repo_ids():
            try:
                for kind in ("heads", "tags"):
                    for oid in self.refs(repo_id, kind).values():
                        self._commit(repo_id, oid)
                self.resolve(repo_id, DEFAULT_BRANCH)
                self._mentioned(repo_id)
            except HubError as error:
                found[repo_id] = str(error)
        return found

    def users_of(self, contents: Collection[str]) -> dict[str, list[str]]:
        """For each sha256, the repositories with a commit that mentions it; the damaged ones cannot be asked."""
        intact = sorted(set(self.repo_ids()) - self.damaged_repos().keys())
        mentioned = {repo_id: self._mentioned(repo_id) for repo_id in intact}
        return {
            sha256: [repo_id for repo_id, known in mentioned.items() if sha256 in known]
            for sha256 in contents
        }

    def delete_unreferenced(self) -> int:
        """Delete contents that no commit mentions; returns the bytes freed.

        Raises HubError where another hub may be taking an upload, or a commit cannot be read: what it mentions is
        not known.
        """
        if not self.place.exclusive:
            raise HubError(
                f"another hub may be serving {self.place.where}, which has no lock: a content that a commit is about "
                "to mention would be deleted. Nothing was. Stop every hub over it, then say --only-writer."
            )
        with self._writing:
            return self.blobs.delete_except(
                {sha256 for repo_id in self.repo_ids() for sha256 in self._mentioned(repo_id)}
            )

    def _mentioned(self, repo_id: str) -> set[str]:
        names = self.place.names(self._under(repo_id, "commits/"))
        oids = [name.rpartition("/")[2].removesuffix(".json") for name in names]
        return {entry.sha256 for oid in oids for entry in self._commit(repo_id, oid).tree.values()}

    # --- commits ---------------------------------------------------------------------------------------

    def resolve(self, repo_id: str, revision: str) -> Commit:
        """The commit that a branch, tag or full commit id names."""
        self.repo(repo_id)
        for kind in ("heads", "tags"):
            name = revision.removeprefix(f"refs/{kind}/")
            if is_ref_name(name) and (oid := self._target(self._ref(repo_id, kind, name))):
                return self._commit(repo_id, oid)
        if OID.fullmatch(revision) and self.place.size(self._under(repo_id, f"commits/{revision}.json")):
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
        branch = branch.removeprefix("refs/heads/")
        while True:  # until no other hub over this place was faster
            with self._writing:
                head = self.resolve(repo_id, f"refs/heads/{branch}")
                if parent is not None and (len(parent) < 5 or not head.oid.startswith(parent)):
                    raise HubError(
                        f"{branch} of {repo_id} is at {head.oid}, no longer at {parent}: read it again and retry",
                        status=412,
                    )
                tree = _edited(head.tree, edits)
                if tree == head.tree:
                    return head.oid
                oid = self._write_commit(repo_id, parent=head.oid, title=title, message=message, tree=tree)
                ref = self._ref(repo_id, "heads", branch)
                if self.place.swap(ref, oid.encode(), expected=head.oid.encode()):
                    return oid

    def _write_commit(
        self, repo_id: str, *, parent: str | None, title: str, message: str, tree: Mapping[str, Entry]
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
        self.place.write(self._under(repo_id, f"commits/{oid}.json"), data)
        return oid

    def _read_commit(self, repo_id: str, oid: str) -> Commit:
        name = self._under(repo_id, f"commits/{oid}.json")
        data = self.place.read(name)
        if data is None or hashlib.sha256(data).hexdigest()[:40] != oid:
            raise self._damaged(name, "its content no longer has the hash in its name")
        body = json.loads(data)
        body["tree"] = {path: Entry(**entry) for path, entry in body["tree"].items()}
        return Commit(oid=oid, **body)

    # --- refs ------------------------------------------------------------------------------------------

    def _ref(self, repo_id: str, kind: str, name: str) -> str:
        if not is_ref_name(name):
            raise HubError(f"{name!r} is not a name for a branch or tag", status=400)
        # One name for one ref: "~" is in no branch, and unlike "%2F" every S3 server lists it as it was written.
        return self._under(repo_id, f"refs/{kind}/{name.replace('/', '~')}")

    def _target(self, ref: str) -> str | None:
        """The commit that a ref names; None when there is no such ref."""
        content = self.place.read(ref)
        oid = None if content is None else content.decode(errors="replace")
        if oid is not None and not OID.fullmatch(oid):
            raise self._damaged(ref, "it names no commit")
        return oid

    def _damaged(self, name: str, why: str) -> HubError:
        return HubError(f"{name} in {self.place.where} is damaged: {why}", status=410)

    def refs(self, repo_id: str, kind: str) -> dict[str, str]:
        """{name: commit id} of all branches (`heads`) or `tags`."""
        self.repo(repo_id)
        found = {}
        for name in self.place.names(self._under(repo_id, f"refs/{kind}/")):
            if (oid := self._target(name)) is not None:
                found[name.rpartition("/")[2].replace("~", "/")] = oid
        return found

    def create_ref(self, repo_id: str, kind: str, name: str, *, revision: str) -> None:
        with self._writing:
            oid = self.resolve(repo_id, revision).oid
            if not self.place.swap(self._ref(repo_id, kind, name), oid.encode(), expected=None):
                raise HubError(f"Reference already exists: {name} of {repo_id}", status=409)

    def delete_ref(self, repo_id: str, kind: str, name: str) -> None:
        if kind == "heads" and name == DEFAULT_BRANCH:
            raise HubError(f"{DEFAULT_BRANCH} cannot be deleted", status=403)
        with self._writing:
            self.repo(repo_id)
            ref = self._ref(repo_id, kind, name)
            if self.place.read(ref) is None:
                message = f"{repo_id} has no {'branch' if kind == 'heads' else 'tag'} {name!r}"
                raise HubError(message, status=404, code="RevisionNotFound")
            self.place.delete(ref)


def _no_model(repo_id: str) -> HubError:
    return HubError(f"no model {repo_id} on this hub", status=404, code="RepoNotFound")


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
