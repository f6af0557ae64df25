"""How does a release get into a bucket or a folder? Revisions that never change, and one small ref that says which.

<target>/
  step-000123-1a2b3c4d/     the files, as from_pretrained and engines want them
    manifest.json           path, size and sha256 of each; written last: its existence means that it is whole
  refs/main.json            {"revision": "step-000123-1a2b3c4d", …}; moved by a conditional write
"""

from __future__ import annotations

import hashlib
import json
import shlex
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.release.connection import Journey, PublishError
from training_ready.release.contents import ReleaseFile
from training_ready.release.places import Place, PlaceError, open_place
from training_ready.release.publish import Progress, Publication, counter, damaged, digest_of
from training_ready.release.publish_replace import refuse_another
from training_ready.release.record import RECORD, ReleaseRecord

MANIFEST = "manifest.json"
_MAIN = "refs/main.json"


def publish_to_place(
    folder: Path,
    target: str,
    files: Sequence[ReleaseFile],
    record: ReleaseRecord,
    *,
    name: str,
    only_writer: bool,
    replace: bool,
    report: Progress,
) -> Publication:
    """Write the revision `name` below `target`, read it back, then point `main` at it. Raises PublishError."""
    again = ["training-ready", "release", "publish", str(folder), target]
    again += ["--only-writer"] if only_writer else []
    again += ["--replace"] if replace else []
    if any(file.path == MANIFEST for file in files):
        raise PublishError(
            f"{folder / MANIFEST} cannot be published here: a revision keeps its own list of files under that name. "
            "Rename the file."
        )
    journey = Journey(folder=folder, again=shlex.join(again))
    with _told(journey, target), ExitStack() as held:
        place = open_place(target, only_writer=only_writer)
        held.enter_context(place.sole_server())
        before = place.read(_MAIN)
        if before is not None and not replace:
            refuse_another(journey, place.where, _record(place, before), 1, record)
        manifest = _manifest(name, files)
        known = place.read(f"{name}/{MANIFEST}")
        if known is None:
            _send(place, folder, name, files, report)
        elif known != manifest:
            raise PublishError(
                f"{place.where}/{name} is another release of the same step: its manifest differs, and revisions never "
                "change. main did not move. Delete it if nobody uses it."
            )
        faults = _read_back(place, name, files, report)
        if faults:  # of an earlier attempt, or damaged since: sent once more
            lost = [file for file in files if file.path in faults]
            _send(place, folder, name, lost, report)
            faults = _read_back(place, name, files, report)
        if faults:
            raise damaged(f"{place.where}/{name}", faults)
        report("tag", 0, 1)
        place.write(f"{name}/{MANIFEST}", manifest)
        report("main", 0, 1)
        journey.main_may_have_moved = True
        moved = _move_main(place, name, files, before)
        report("main", 1, 1)
    return Publication(
        target=target,
        name=name,
        revision=name,
        files=tuple(files),
        uploaded=moved,
        url=f"{place.where}/{name}",
    )


@contextmanager
def _told(journey: Journey, target: str) -> Iterator[None]:
    """Say of every failure what is where and how to continue."""
    try:
        yield
    except PublishError as error:
        raise PublishError(f"{error} To continue, run: {journey.again}") from error
    except TrainingReadyError as error:
        raise PublishError(f"{str(error).rstrip('.')}. {journey.rest()}") from error
    except OSError as error:
        raise PublishError(f"{target} cannot be written ({error}). {journey.rest()}") from error


def _record(place: Place, main: bytes) -> bytes | None:
    """The release.json of the revision that `main` names; None when there is none."""
    try:
        return place.read(f"{json.loads(main)['revision']}/{RECORD}")
    except (ValueError, TypeError, KeyError, PlaceError):
        return None


def _manifest(name: str, files: Sequence[ReleaseFile]) -> bytes:
    listed = [file._asdict() for file in sorted(files, key=lambda file: file.path)]
    return json.dumps({"revision": name, "digest": digest_of(files), "files": listed}, indent=1).encode()


def _send(place: Place, folder: Path, name: str, files: Sequence[ReleaseFile], report: Progress) -> None:
    total, done = sum(file.size for file in files), 0
    report("upload", 0, total)
    for file in files:
        if _hash(place, f"{name}/{file.path}", lambda here: None) != (file.size, file.sha256):
            place.put_file(f"{name}/{file.path}", folder / file.path)
        done += file.size
        report("upload", done, total)


def _read_back(place: Place, name: str, files: Sequence[ReleaseFile], report: Progress) -> dict[str, str]:
    """Read every file of the revision and hash it; {path: what is wrong}."""
    known = {f"{name}/{file.path}" for file in files} | {f"{name}/{MANIFEST}"}
    strangers = set(place.names(f"{name}/")) - known
    faults = {stranger.removeprefix(f"{name}/"): "not part of the release" for stranger in strangers}
    total, done = sum(file.size for file in files), 0
    report("read back", 0, total)
    for file in files:
        found = _hash(place, f"{name}/{file.path}", counter(report, "read back", done, total))
        if found is None:
            faults[file.path] = "missing"
        elif found != (file.size, file.sha256):
            sent = f"sent {file.size} bytes with sha256 {file.sha256}"
            faults[file.path] = f"{sent}, there are {found[0]} bytes with sha256 {found[1]}"
        done += file.size
    return faults


def _hash(place: Place, name: str, received: Callable[[int], None]) -> tuple[int, str] | None:
    """(size, sha256) of what is there; None when nothing is."""
    if place.size(name) is None:
        return None
    digest, size = hashlib.sha256(), 0
    for block in place.blocks(name):
        digest.update(block)
        size += len(block)
        received(size)
    return size, digest.hexdigest()


def _move_main(place: Place, name: str, files: Sequence[ReleaseFile], before: bytes | None) -> bool:
    """Point `main` at the revision, if it is still where it was found; whether it had to move."""
    wanted = json.dumps({"revision": name, "digest": digest_of(files)}, indent=1).encode()
    if before == wanted:
        return False
    if not place.swap(_MAIN, wanted, expected=before):
        now = (place.read(_MAIN) or b"nothing").decode(errors="replace")
        raise PublishError(
            f"somebody else moved main of {place.where} meanwhile, to {' '.join(now.split())}; it was left there."
        )
    if place.read(_MAIN) != wanted:
        raise PublishError(f"main of {place.where} was written but does not read back as {name}.")
    return True
