"""Which processes look after files? Those of one node, and all that share its disk, see one run folder."""

from __future__ import annotations

import os
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from training_ready import TrainingReadyError
from training_ready.storage.durable import write_durably

_MARK = ".attempt"
_PATIENCE_SECONDS = 10.0


@dataclass(frozen=True, kw_only=True, slots=True)
class RunNodes:
    """This process's part in looking after the run folder.

    ``keeper``: it alone does the file work in the folder that it sees. ``first``: the keeper of the folder in which
    checkpoints are sealed. ``others``: the nodes that keep parts of a checkpoint in folders of their own.
    ``attempt`` is the same in all processes of one start and in no other.
    """

    node: int
    keeper: bool
    first: bool
    others: tuple[int, ...] = ()
    attempt: str


def find_nodes(output_dir: Path) -> RunNodes:
    """Find out which nodes share the run folder. A collective call."""
    rank, local_rank = int(os.environ.get("RANK", "0")), int(os.environ.get("LOCAL_RANK", "0"))
    attempt = uuid.uuid4().hex
    if rank == 0:
        output_dir.mkdir(parents=True, exist_ok=True)
        write_durably(output_dir / _MARK, attempt)
    attempt = gathered(attempt)[0]
    node = int(os.environ.get("GROUP_RANK", "0"))
    alone = node > 0 and local_rank == 0 and not _sees(output_dir / _MARK, attempt)
    others = tuple(sorted(number for number in gathered(node if alone else None) if number is not None))
    return RunNodes(node=node, keeper=rank == 0 or alone, first=rank == 0, others=others, attempt=attempt)


def gathered(value: Any) -> list[Any]:
    """The values of all ranks, in their order. A collective call; without other ranks just the value.

    Raises:
        TrainingReadyError: there are other ranks, but no process group yet.
    """
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        return [value]
    if not dist.is_initialized():
        raise TrainingReadyError(
            f"WORLD_SIZE is {world}, but no process group was made: start the ranks with accelerate or torchrun"
        )
    values: list[Any] = [None] * world
    dist.all_gather_object(values, value)
    return values


def _sees(mark: Path, attempt: str) -> bool:
    """Whether the first node's file is visible here; network file systems may take a moment."""
    deadline = time.monotonic() + _PATIENCE_SECONDS
    while time.monotonic() < deadline:
        if mark.exists() and mark.read_text(encoding="utf-8") == attempt:
            return True
        time.sleep(0.2)
    return False
