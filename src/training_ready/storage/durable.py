"""How does a small text appear on the local disk whole or not at all?"""

from __future__ import annotations

import os
from pathlib import Path


def write_durably(path: Path, text: str, *, mode: int | None = None) -> None:
    """Writes a file under a temporary name, flushes it to disk and renames it into place.

    The temporary name is `.<name>.tmp`. ``mode``: permissions whatever the umask is; None leaves them to it.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    if mode is not None:
        temporary.chmod(mode)
    os.replace(temporary, path)
