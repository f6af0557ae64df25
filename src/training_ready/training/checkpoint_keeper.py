"""What happens to the files around a save: room before it, a seal when it is whole, a way to the bucket after it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from training_ready.storage.durable import write_durably
from training_ready.training.checkpoint_mirror import CheckpointMirror
from training_ready.training.checkpoints import (
    PART,
    STREAM_STATE,
    SaveError,
    StreamState,
    checkpoints_in,
    flush_to_disk,
    folder_of,
    make_room,
)
from training_ready.training.nodes import RunNodes
from training_ready.training.run_folder import METRICS, RECIPE

logger = logging.getLogger(__name__)


class CheckpointKeeper:
    """Looks after the checkpoints of one run folder; in processes that keep no folder every method does nothing."""

    def __init__(
        self, output_dir: Path, nodes: RunNodes, *, limit: int | None, mirror: CheckpointMirror | None
    ) -> None:
        """
        Args:
            limit: ``save_total_limit``; None or 0 keeps all.
        """
        self._output_dir, self._nodes, self._limit, self._mirror = output_dir, nodes, limit or None, mirror

    def make_room(self, step: int, best: str | None) -> None:
        """Before a save: the disk then holds what the limit promises, the new checkpoint included."""
        if self._nodes.keeper:
            pending = self._mirror.pending if self._mirror else frozenset()
            make_room(
                self._output_dir,
                step,
                limit=self._limit,
                protected=pending | ({Path(best)} if best else set()),
            )

    def complete(self, step: int) -> None:
        """When every rank has written its files: add the run's own, and wait until all are on the disk."""
        if not self._nodes.keeper:
            return
        folder = folder_of(self._output_dir, step)
        for name in (RECIPE, METRICS):
            if (self._output_dir / name).exists():
                shutil.copyfile(self._output_dir / name, folder / name)
        if not self._nodes.first:
            write_durably(folder / PART, "{}")
        flush_to_disk(folder)

    def seal(self, step: int, state: StreamState, best: str | None) -> None:
        """When every node's files are on its disk: from here on the checkpoint exists."""
        if not self._nodes.keeper:
            return
        folder = folder_of(self._output_dir, step)
        if self._nodes.first:
            state.write(folder)
        if self._mirror:
            self._mirror.add(folder)
        self.make_room(step, best)

    def failed(self, step: int, error: Exception) -> SaveError:
        """The error to raise when a save did not succeed; what it wrote makes room again."""
        folder = folder_of(self._output_dir, step)
        if self._nodes.keeper and not (folder / STREAM_STATE).exists():
            shutil.rmtree(folder, ignore_errors=True)
        free = shutil.disk_usage(self._output_dir).free
        complete, _ = checkpoints_in(self._output_dir)
        if complete:
            takes = sum(path.stat().st_size for path in complete[-1].rglob("*") if path.is_file())
            kept = f"{complete[-1]}, which takes {takes:,} bytes, is complete and untouched"
        else:
            kept = "there is no earlier checkpoint"
        return SaveError(
            f"step {step} could not be saved to {folder}: {type(error).__name__}: {error}\n{free:,} bytes are free "
            f"there now that its files are removed; {kept}. Make room, or lower save_total_limit, and continue with "
            "resume_from_checkpoint=auto."
        )
