"""Which stages are done, and from what? A killed stage is redone, a finished one is skipped.

A stage fills a folder under a temporary name; its manifest is written last and the folder renamed, so a folder
of that name is a finished stage. The manifest holds what the stage was made from: another input is another
run, never a silent mixture of both.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_ready.moe.families import MoEError
from training_ready.moe.whole_files import flush_file

MANIFEST = "manifest.json"


@dataclass(frozen=True, kw_only=True, slots=True)
class FinishedStage:
    """What a stage left behind."""

    name: str
    folder: Path
    facts: dict[str, Any]
    sha256: str
    """Of its manifest: stands for everything that the stage was made from."""
    skipped: bool
    """It was finished already."""


def run_stage(
    work: Path, name: str, inputs: Mapping[str, Any], make: Callable[[Path], Mapping[str, Any]]
) -> FinishedStage:
    """Run ``make`` in an empty folder, unless the stage is finished; ``make`` returns facts for the manifest.

    Raises :class:`MoEError` when the stage was finished from other inputs, or a file of it is gone.
    """
    folder = work / name
    if (folder / MANIFEST).is_file():
        return _finished(folder, name, json.loads(json.dumps(inputs)))
    if folder.exists():
        raise MoEError(f"{folder} is in the way: it is no stage, for it has no {MANIFEST}.")
    partial = work / f".{name}.partial"
    if partial.exists():
        shutil.rmtree(partial)
    partial.mkdir(parents=True)
    facts = make(partial)
    files = [path for path in sorted(partial.rglob("*")) if path.is_file()]
    for path in files:
        flush_file(path)
    manifest = {
        "stage": name,
        "inputs": inputs,
        "facts": dict(facts),
        "files": {str(path.relative_to(partial)): path.stat().st_size for path in files},
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2, sort_keys=True) + "\n")
    flush_file(partial / MANIFEST)
    os.replace(partial, folder)
    return _read(folder, name, skipped=False)


def _finished(folder: Path, name: str, inputs: Any) -> FinishedStage:
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if manifest["inputs"] != inputs:
        before = manifest["inputs"]
        changed = sorted(key for key in {*before, *inputs} if before.get(key) != inputs.get(key))
        raise MoEError(
            f"{folder} was made from other inputs ({', '.join(changed)} differ): remove it and the stages after it, "
            "or choose another work folder."
        )
    for file, size in manifest["files"].items():
        path = folder / file
        if not path.is_file() or path.stat().st_size != size:
            raise MoEError(
                f"{path} is not the {size} bytes that the stage wrote: remove {folder} to redo it."
            )
    return _read(folder, name, skipped=True)


def _read(folder: Path, name: str, *, skipped: bool) -> FinishedStage:
    content = (folder / MANIFEST).read_bytes()
    return FinishedStage(
        name=name,
        folder=folder,
        facts=json.loads(content)["facts"],
        sha256=hashlib.sha256(content).hexdigest(),
        skipped=skipped,
    )


def fingerprint(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
