"""Runs the commands of a page's ``bash`` blocks, in order, and stops at the first that fails.

A command is left out, and said to be, when its line ends in ``# needs …`` (a GPU, an account) or when the gate has run
it already.
"""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

ALREADY_RUN = {"make test"}


def commands(page: str) -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", page, flags=re.MULTILINE | re.DOTALL)
    joined = "".join(blocks).replace("\\\n", "")
    return [
        line.strip() for line in joined.splitlines() if line.strip() and not line.lstrip().startswith("#")
    ]


def main(path: str) -> int:
    found = commands(Path(path).read_text(encoding="utf-8"))
    if not found:
        sys.exit(f"{path} has no bash block: nothing was checked")
    for line in found:
        command, _, comment = (part.strip() for part in line.partition("  # "))
        if comment.startswith("needs ") or command in ALREADY_RUN:
            print(f"left out: {line}")
            continue
        print(f"$ {command}", flush=True)
        started = time.monotonic()
        status = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", f"PATH=$PWD/.venv/bin:$PATH; {command}"]
        ).returncode
        print(f"[{status}] {command}: {time.monotonic() - started:.0f} s", flush=True)
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
