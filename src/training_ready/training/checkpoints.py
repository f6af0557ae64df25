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
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from training_ready import TrainingReadyError
from training_ready.storage.durable import write_durably

logger = logging.getLogger(__name__)

INTERRUPTED_STATUS = 75
"""Exit status of a run that a signal stopped and that can be continued: EX_TEMPFAIL of sysexits.h."""
STREAM_STATE = "stream_state.json"
PART = "part.json"
_PREFIX = "checkpoint-"


class ResumeError(TrainingReadyError):
    """The run cannot be continued as asked."""


class Interrupted(TrainingReadyError):
    """A signal stopped the run; it is saved and can be continued."""


class Unfinished(TrainingReadyError):
    """The run stopped before its end, and nothing can continue it."""


class SaveError(TrainingReadyError):
    """A checkpoint could not be written."""


@dataclass(frozen=True, kw_only=True, slots=True)
class StreamState:
    """Where the data stands at a checkpoint, and everything that the order of the data depends on."""

    position: int  # packs consumed
    step: int  # optimizer steps done
    global_batch: int  # packs per optimizer step
    manifests: dict[str, str]  # sha256 of every corpus's manifest, by its URI
    tokens: str  # fingerprint of tokenizer, template and target role
    order: dict[str, Any]  # mixture, seed, pack length … (training/data.py: order_facts)

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

    def refuse_unless_same_data(
        self, now: StreamState, checkpoint: Path, allowed: Collection[str] = ()
    ) -> None:
        """
        Args:
            allowed: names of what may have changed (``stream.resume_allow``).

        Raises:
            ResumeError: something else that the order of rows depends on has changed since the checkpoint.
        """
        changed = self._changes(now)
        for name in sorted(set(changed) & set(allowed)):
            logger.warning(f"continuing although {name} has changed: {changed[name]}")
        refused = {name: change for name, change in changed.items() if name not in allowed}
        if refused:
            listed = "; ".join(f"{name}: {change}" for name, change in refused.items())
            raise ResumeError(
                f"{checkpoint} was trained on another stream ({listed}), so rows would be repeated or lost. Restore "
                "the recipe and corpus of that run, or start anew with another output_dir; stream.resume_allow="
                f"[{','.join(refused)}] continues nevertheless."
            )

    def refuse_weights_only(self, checkpoint: Path, last_step: int) -> None:
        """
        Raises:
            ResumeError: steps are left to train, and the checkpoint holds no optimizer (``save_only_model``), which
                transformers would replace by a new one without a word.
        """
        if self.step < last_step and not any(checkpoint.glob("rng_state*.pth")):
            raise ResumeError(
                f"{checkpoint} holds weights only (save_only_model): step {self.step} of {last_step} cannot be "
                "continued without its optimizer. Start anew with another output_dir."
            )

    def _changes(self, now: StreamState) -> dict[str, str]:
        """What differs, by the names of ``stream.resume_allow``."""
        then_and_now: dict[str, tuple[Any, Any]] = {
            "global_batch": (self.global_batch, now.global_batch),
            "manifests": (self.manifests, now.manifests),
            "tokens": (self.tokens[:12], now.tokens[:12]),
            **{
                name: (self.order.get(name), now.order.get(name))
                for name in sorted({*self.order, *now.order})
            },
        }
        return {name: f"{then} then, {new} now" for name, (then, new) in then_and_now.items() if then != new}


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
        path
        for path in output_dir.glob(f"{_PREFIX}*")
        if path.name.removeprefix(_PREFIX).isdigit() and path.is_dir()
    )
    return sorted(found, key=step_of)
