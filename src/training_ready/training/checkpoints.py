"""Which checkpoints lie in a run folder, which are complete, and which make room for the next?

A checkpoint is complete when it holds ``stream_state.json``, written after every other file has reached the disk. On
a node with a disk of its own, which holds only that node's part, ``part.json`` says the same of the part.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Collection
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from training_ready import TrainingReadyError

logger = logging.getLogger(__name__)

STREAM_STATE = "stream_state.json"
PART = "part.json"
_PREFIX = "checkpoint-"


class ResumeError(TrainingReadyError):
    """The run cannot be continued as asked."""


class SaveError(TrainingReadyError):
    """A checkpoint could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """Where the data stands at a checkpoint, and everything that the order of the data depends on."""

    position: int  # packs consumed
    global_batch: int  # packs per optimizer step
    manifest_sha256: str
    tokens: str  # fingerprint of tokenizer, template and target role
    plan: str  # fingerprint of token shards, pack length, seed and grouping

    def write(self, checkpoint: Path) -> None:
        """Written last of all files of a checkpoint: its presence means that the checkpoint is complete."""
        write_durably(checkpoint / STREAM_STATE, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, checkpoint: Path) -> StreamState:
        try:
            return cls(**json.loads((checkpoint / STREAM_STATE).read_text(encoding="utf-8")))
        except (OSError, TypeError, ValueError) as error:
            raise ResumeError(
                f"{checkpoint} has no readable {STREAM_STATE}: the checkpoint is incomplete or was not written by "
                "this trainer. Choose an earlier one."
            ) from error

    def refuse_unless_same_data(self, now: StreamState, checkpoint: Path) -> None:
        """
        Raises:
            ResumeError: something that the order of rows depends on has changed since the checkpoint.
        """
        changed = [
            f"{field.name}: {getattr(self, field.name)} then, {getattr(now, field.name)} now"
            for field in fields(self)
            if field.name != "position" and getattr(self, field.name) != getattr(now, field.name)
        ]
        if changed:
            raise ResumeError(
                f"{checkpoint} was trained on another stream ({'; '.join(changed)}), so rows would be repeated or "
                "lost. Restore the recipe and corpus of that run, or start anew with another output_dir."
            )


def write_durably(path: Path, text: str) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it into place."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def flush_to_disk(folder: Path) -> None:
    """Waits until every file below ``folder`` and every name in it would survive a loss of power."""
    for path in [*folder.rglob("*"), folder, folder.parent]:
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def folder_of(output_dir: Path, step: int) -> Path:
    """Where the Trainer saves a step."""
    return output_dir / f"{_PREFIX}{step}"


def step_of(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(_PREFIX))


def checkpoints_in(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """(complete, incomplete) checkpoint folders, oldest first."""
    folders = _folders(output_dir)
    complete = [path for path in folders if (path / STREAM_STATE).exists()]
    return complete, [path for path in folders if path not in complete]


def make_room(
    output_dir: Path, step: int, *, limit: int | None, protected: Collection[Path] = frozenset()
) -> None:
    """Deletes what ``save_total_limit`` does not cover, before ``step`` is saved or (again) after.

    The newest sealed checkpoint stays whatever the limit is, and so do the protected ones: those on their way to the
    bucket, and the best one. Folders that an interrupted save left behind go first, the one of ``step`` among them.
    """
    folders = _folders(output_dir)
    sealed = [path for path in folders if (path / STREAM_STATE).exists() or (path / PART).exists()]
    for path in folders:
        if path not in sealed:
            logger.warning(f"removing {path}: incomplete, its save was interrupted")
            shutil.rmtree(path)
    if limit is None:
        return
    keep = limit if sealed and step_of(sealed[-1]) == step else max(limit - 1, 1)
    for path in [one for one in sealed[:-keep] if one not in protected]:
        logger.info(f"removing {path}: save_total_limit is {limit}")
        # The seal goes first: a folder that is half removed must not look complete.
        (path / STREAM_STATE).unlink(missing_ok=True)
        (path / PART).unlink(missing_ok=True)
        shutil.rmtree(path)


def copies_on_disk(limit: int | None, *, mirrored: bool) -> int | None:
    """The most checkpoint folders that the disk of a run must hold at once, the one being written among them.

    None: there is no limit. A mirrored run keeps one more, on its way to the bucket.
    """
    return None if limit is None else max(limit, 2) + int(mirrored)


def _folders(output_dir: Path) -> list[Path]:
    """Checkpoint folders, oldest first."""
    found = (
        path for path in output_dir.glob(f"{_PREFIX}*") if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()
    )
    return sorted(found, key=step_of)
