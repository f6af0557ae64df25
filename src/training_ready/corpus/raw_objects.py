"""Which objects is a raw source made of, and what keeps them the same? In a bucket, on this disk, or on a hub.

=====================================  ======================================================================
``s3://bucket/key``, ``a/key``         pinned by ETag at each opening and in every answer; read in ranges; where the
                                       ETag is an MD5, text that was read from its beginning to its end is compared
``s3://bucket/folder/*.jsonl.gz``      the same, for what a listing finds now, in the order of the keys
``/path``, ``./path``, ``file:///…``   size and modification time are compared at each opening, and that is all:
                                       whoever rewrites a file and sets its time back is not noticed
``hf://datasets/owner/name@rev/*``     pinned to the commit that ``rev`` names now; a file is downloaded whole, once
                                       for the machine, before its first row is read
=====================================  ======================================================================
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from training_ready.corpus.readers import SourceError
from training_ready.storage.objects import ObjectStore
from training_ready.storage.uri import parse_s3_uri

_PATTERN = re.compile(r"[*?\[]")
_HUB = re.compile(r"hf://datasets/(?P<repo>[^/@]+/[^/@]+)(?:@(?P<revision>[^/]+))?/(?P<pattern>.+)")


class RawObject(Protocol):
    """One object as it was when it was found. ``version`` changes whenever its bytes do, as far as can be told."""

    @property
    def uri(self) -> str: ...
    @property
    def version(self) -> str: ...
    def open(self) -> BinaryIO:
        """A seekable stream of it. Raises SourceError if it is another version by now."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class BucketObject:
    store: ObjectStore
    key: str
    version: str

    @property
    def uri(self) -> str:
        return self.store.uri(self.key)

    def open(self) -> BinaryIO:
        reader = self.store.open(self.key, compare=True)
        if reader.info.etag != self.version:
            raise _changed(self.uri, self.version, reader.info.etag)
        return cast(BinaryIO, io.BufferedReader(reader, 1 << 20))


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalFile:
    path: Path
    version: str

    @property
    def uri(self) -> str:
        return self.path.as_uri()

    def open(self) -> BinaryIO:
        now = _file_version(self.path)
        if now != self.version:
            raise _changed(self.uri, self.version, now)
        return self.path.open("rb")


@dataclass(frozen=True, kw_only=True, slots=True)
class HubFile:
    """A file of a dataset repository; ``version`` is the commit."""

    repo: str
    path: str
    version: str

    @property
    def uri(self) -> str:
        return f"hf://datasets/{self.repo}@{self.version}/{self.path}"

    def open(self) -> BinaryIO:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

        try:
            local = HfApi().hf_hub_download(self.repo, self.path, repo_type="dataset", revision=self.version)
        except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
            raise SourceError(f"{self.uri} cannot be downloaded: {error}") from error
        return Path(local).open("rb")


def find_objects(paths: Sequence[str], store: ObjectStore) -> tuple[RawObject, ...]:
    """The objects that ``paths`` name, in their order, those of a pattern by name. Keys are full keys in ``store``.

    Raises:
        SourceError: a path names nothing, or two paths name the same object.
    """
    found: list[RawObject] = []
    for path in paths:
        some = list(_find(path, store))
        if not some:
            raise SourceError(f"{path}: nothing there has this name. Correct the path, or upload it")
        found += some
    uris = [one.uri for one in found]
    if repeated := sorted({uri for uri in uris if uris.count(uri) > 1}):
        raise SourceError(f"named more than once, so its rows would come twice: {', '.join(repeated)}")
    return tuple(found)


def _find(path: str, store: ObjectStore) -> Iterator[RawObject]:
    if path.startswith("hf://"):
        yield from _on_hub(path)
    elif path.startswith(("file://", "/", "./", "../", "~")):
        yield from _on_disk(path.removeprefix("file://"))
    else:
        uri = parse_s3_uri(path)
        home = store if uri is None or uri.bucket == store.bucket else ObjectStore(store.settings, uri.bucket)
        yield from _in_bucket(home, path if uri is None else uri.key)


def _in_bucket(store: ObjectStore, key: str) -> Iterator[BucketObject]:
    fixed = _PATTERN.split(key, maxsplit=1)[0]
    for info in store.list(fixed):  # a listing knows the ETag, so that opening costs the only HEAD
        if info.key == key or (fixed != key and fnmatchcase(info.key, key)):
            yield BucketObject(store=store, key=info.key, version=info.etag)


def _on_disk(path: str) -> Iterator[LocalFile]:
    place = Path(path).expanduser().absolute()
    parts = place.parts[1:]
    fixed = next((n for n, part in enumerate(parts) if _PATTERN.search(part)), None)
    paths = [place] if fixed is None else sorted(Path("/", *parts[:fixed]).glob("/".join(parts[fixed:])))
    for one in paths:
        if one.is_file():
            yield LocalFile(path=one, version=_file_version(one))


def _on_hub(path: str) -> Iterator[HubFile]:
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    named = _HUB.fullmatch(path)
    if named is None:
        raise SourceError(
            f"{path}: expected hf://datasets/owner/name@revision/path (the revision may be left out)"
        )
    try:
        info = HfApi().dataset_info(named["repo"], revision=named["revision"])
    except (HfHubHTTPError, OSError) as error:
        raise SourceError(f"{path}: the hub does not show this dataset: {error}") from error
    for name in sorted(sibling.rfilename for sibling in info.siblings or ()):
        if name == named["pattern"] or fnmatchcase(name, named["pattern"]):
            yield HubFile(repo=named["repo"], path=name, version=str(info.sha))


def _file_version(path: Path) -> str:
    try:
        status = path.stat()
    except OSError as error:
        raise SourceError(f"{path} cannot be read: {error.strerror}") from error
    return f"{status.st_size}-{status.st_mtime_ns}"


def _changed(uri: str, before: str, now: str) -> SourceError:
    return SourceError(
        f"{uri} was changed after it was found (version {before}, now {now}): its rows are other ones. Start anew"
    )
