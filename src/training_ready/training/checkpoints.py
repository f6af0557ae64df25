"""Which checkpoint does a run continue from? The newest whose last file, the stream's position, was written."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from training_ready import TrainingReadyError

logger = logging.getLogger(__name__)

STREAM_STATE = "stream_state.json"


class ResumeError(TrainingReadyError):
    """The run cannot be continued as asked."""


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


def checkpoints_in(output_dir: Path) -> tuple[list[Path], list[Path]]:
    """(complete, incomplete) checkpoint folders, oldest first."""
    folders = sorted(
        (path for path in output_dir.glob("checkpoint-*") if path.name.removeprefix("checkpoint-").isdigit()),
        key=lambda path: int(path.name.removeprefix("checkpoint-")),
    )
    complete = [path for path in folders if (path / STREAM_STATE).exists()]
    return complete, [path for path in folders if path not in complete]


def checkpoint_to_resume(output_dir: Path, wanted: str | None) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means: a folder, ``auto`` for the newest complete one, or None.

    Raises:
        ResumeError: the named checkpoint is incomplete, or checkpoints are there and nothing says what to do with them.
    """
    complete, incomplete = checkpoints_in(output_dir)
    if wanted in ("auto", "true", "True"):
        for path in incomplete:
            logger.warning(f"ignoring {path}: incomplete, its save was interrupted")
        return complete[-1] if complete else None
    if wanted:
        StreamState.read(Path(wanted))
        return Path(wanted)
    if complete:
        raise ResumeError(
            f"{output_dir} already holds {complete[-1].name}. Continue it with resume_from_checkpoint=auto, or give "
            "this run another output_dir."
        )
    return None
