"""Did the release arrive? Under a revision of its own, every byte read back, and only then `main` moves to it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from training_ready.release.card import refresh_card
from training_ready.release.connection import PublishError, hub_endpoint
from training_ready.release.contents import ReleaseFile, release_files
from training_ready.release.record import read_record

Progress = Callable[[str, int, int], None]
"""Called as `progress(label, done, total)`; labels in order: "hash", "upload", "commit", "read back", "tag", "main"."""
# Words that a killed publication or verification was writing; each is written anew.
_LEFT_BY_A_KILL = (".README.md.tmp", ".release.json.tmp", ".verified-*.json.tmp")


@dataclass(kw_only=True, slots=True, frozen=True)
class Publication:
    """What is there now, verified: all `files` were read back with these hashes.

    `uploaded` is False when `main` was exactly this release already.
    """

    target: str
    name: str
    """The revision's name, of its step and its contents; never moved."""
    revision: str
    """What `main` is at: a commit on a hub, `name` elsewhere."""
    files: tuple[ReleaseFile, ...]
    uploaded: bool
    url: str

    def as_json(self) -> str:
        """One line for machines; files as objects."""
        return json.dumps(asdict(self) | {"files": [file._asdict() for file in self.files]})


def publish_release(
    folder: Path,
    target: str,
    *,
    endpoint: str | None = None,
    token: str | None = None,
    private: bool = True,
    only_writer: bool = False,
    replace: bool = False,
    progress: Progress | None = None,
) -> Publication:
    """Bring `folder` to `target`, prove it by reading everything back, and let `main` be it.

    Args:
        folder: a release folder or an export, see :func:`.contents.release_files`. Its README.md is written again
            from release.json and from what `release verify` found.
        target: `owner/name` on a hub, created when missing; `s3://bucket/models/name`; or the path of a folder, which
            starts with `/` or `.`.
        endpoint: base URL of the hub; default `HF_ENDPOINT`, else the public Hub.
        token: write token. None means the stored login on the public Hub, and no token anywhere else.
        private: visibility of a repository that this call creates.
        only_writer: see :func:`.places.open_place`.
        replace: also when `main` holds another model's release, or what is no release (:mod:`.publish_replace`).

    Every step finds out what is there already, so that an interrupted publication is continued by the same call.
    Publishing the same folder again changes nothing and reads everything back again.

    Raises:
        CardError, ContentsError: the folder must not leave as it is; nothing was sent.
        PublishError: the target is down, refuses, or does not hold what was sent; `main` did not move, or the message
            says that it may have.
    """
    report = progress or _silent
    record = read_record(folder)
    for half_written in _LEFT_BY_A_KILL:
        for path in folder.glob(half_written):
            path.unlink()
    files = release_files(folder, lambda done, total: report("hash", done, total))
    card = refresh_card(folder, record, files)
    files = [card if file.path == card.path else file for file in files]
    name = f"{record.branch}-{digest_of(files)[:8]}"
    if target.lower().startswith((".", "/", "s3://")):
        from training_ready.release.publish_place import publish_to_place

        return publish_to_place(
            folder, target, files, record, name=name, only_writer=only_writer, replace=replace, report=report
        )
    from training_ready.release.publish_hub import publish_to_hub

    return publish_to_hub(
        folder,
        target,
        files,
        record,
        name=name,
        replace=replace,
        endpoint=hub_endpoint(endpoint),
        token=token,
        private=private,
        report=report,
    )


def digest_of(files: Sequence[ReleaseFile]) -> str:
    """One sha256 for a whole release: of the lines `sha256  path`, sorted by path."""
    lines = [f"{file.sha256}  {file.path}\n" for file in sorted(files, key=lambda file: file.path)]
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def damaged(where: str, faults: Mapping[str, str]) -> PublishError:
    """The refusal of what was read back."""
    listing = "\n  ".join(f"{path}: {fault}" for path, fault in sorted(faults.items()))
    return PublishError(f"{where} is not what was sent:\n  {listing}\nmain did not move to it.")


def counter(report: Progress, label: str, before: int, total: int) -> Callable[[int], None]:
    """Progress within one file, given what the files before it held."""
    return lambda here: report(label, before + here, total)


def _silent(label: str, done: int, total: int) -> None:
    """No progress wanted."""
