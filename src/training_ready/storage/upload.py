"""Which files go to which keys, and which are there already?"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from training_ready.storage.errors import StorageError
from training_ready.storage.fingerprint import Fingerprint
from training_ready.storage.objects import ObjectStore


@dataclass(frozen=True, kw_only=True, slots=True)
class Upload:
    path: Path
    key: str
    size: int


@dataclass(kw_only=True, slots=True)
class UploadReport:
    """files = uploaded + identical; hidden files of folders were left out of both."""

    uploaded: int = 0
    identical: int = 0
    hidden: int = 0
    bytes_sent: int = 0


def plan_uploads(paths: Sequence[Path], prefix: str) -> tuple[list[Upload], int]:
    """The uploads for files and folders (whose inner paths are kept), and how many hidden files were left out.

    ``prefix`` is a full key prefix, taken as a folder. Hidden files inside a folder (``.env``, ``.git`` …)
    stay at home; a hidden file given by its own name goes.

    Raises:
        StorageError: a path is missing, nothing is left to upload, or two files would share a key.
    """
    folder = prefix.strip("/") + "/" if prefix.strip("/") else ""
    uploads: dict[str, Upload] = {}
    hidden = 0
    for path in paths:
        for file, name in _files(path):
            if name is None:
                hidden += 1
                continue
            key = folder + name
            if key in uploads:
                raise StorageError(
                    f"{file} and {uploads[key].path} would both become {key}: upload them separately."
                )
            uploads[key] = Upload(path=file, key=key, size=file.stat().st_size)
    if not uploads:
        raise StorageError(
            f"Nothing to upload in {', '.join(map(str, paths))} ({hidden} hidden files left out)."
        )
    return list(uploads.values()), hidden


def _files(path: Path) -> Iterable[tuple[Path, str | None]]:
    if path.is_file():
        yield path, path.name
    elif path.is_dir():
        for file in sorted(path.rglob("*")):
            inside = file.relative_to(path)
            if not file.is_dir():
                if not file.is_file():
                    raise StorageError(f"{file} is neither a file nor a folder (a broken link?): remove it.")
                yield file, None if any(part.startswith(".") for part in inside.parts) else inside.as_posix()
    else:
        raise StorageError(f"{path}: no such file or folder.")


def upload_all(
    store: ObjectStore, uploads: Iterable[Upload], progress: Callable[[int], None] | None = None
) -> UploadReport:
    """Upload what is not there already, in order; each object is compared with its file afterwards.

    ``progress`` is called with numbers of bytes done, those of identical objects included.
    """
    report = UploadReport()
    for upload in uploads:
        fingerprint = Fingerprint.of_file(upload.path)
        if store.holds(upload.key, fingerprint):
            report.identical += 1
            if progress:
                progress(upload.size)
            continue
        stored = store.put_file(upload.key, upload.path, progress, fingerprint=fingerprint)
        report.uploaded += 1
        report.bytes_sent += stored.size
    return report
