"""What of a model does a checkpoint hold, when most of it is frozen and comes from elsewhere?"""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol


class TrainedPart(Protocol):
    """Writes and reads what moves in training."""

    def write(self, model: Any, folder: Path) -> None:
        """Put the part into ``folder``, which may hold PEFT's adapters already. Called by one process."""

    def read(self, model: Any, folder: Path) -> None:
        """Restore everything that moves from a checkpoint.

        Raises ResumeError or MoEError when the checkpoint and the model differ.
        """
