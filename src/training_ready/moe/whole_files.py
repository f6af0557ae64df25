"""How does a file appear whole or not at all?"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let ``write`` fill a file beside ``path``, flush it, then rename it into place, readable for all."""
    partial = path.with_name(f".{path.name}.partial")
    write(partial)
    partial.chmod(0o644)  # safetensors writes 0600
    flush_file(partial)
    os.replace(partial, path)


def flush_file(path: Path) -> None:
    """Until it is on the disk."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
