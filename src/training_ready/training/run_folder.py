"""What does a run leave behind? One folder: resolved recipe, metrics, pictures, log, checkpoints, summary.

::

    runs/<name>/recipe.yaml        the resolved recipe; it alone reproduces the run
                metrics.jsonl      one line per logged step
                loss.png, expert_load.png
                train.log
                tokenizer/         when it was trained on the corpus
                checkpoint-<step>/ complete when it holds stream_state.json
                summary.json       written last: its existence means that the run has finished
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from training_ready import TrainingReadyError
from training_ready.storage.durable import write_durably

SUMMARY, METRICS, RECIPE, LOG = "summary.json", "metrics.jsonl", "recipe.yaml", "train.log"


class RunFolderError(TrainingReadyError):
    """The run folder cannot be used."""


class RunFolder:
    """The folder of one run. Only the first process of a run writes to it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def open(self, recipe_yaml: str) -> None:
        """Creates the folder, keeps the recipe and starts the log; the folder is this process's until it ends.

        Raises:
            RunFolderError: another process is training in it.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        self._lock = (self.path / ".lock").open("a")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the kernel lets go when the process dies
        except BlockingIOError as error:
            raise RunFolderError(
                f"another process is training in {self.path}: wait for it, or give this run another output_dir"
            ) from error
        write_durably(self.path / RECIPE, recipe_yaml)
        handler = logging.FileHandler(self.path / LOG, encoding="utf-8")
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        for name in ("training_ready", "transformers", "trl", "accelerate"):
            logging.getLogger(name).addHandler(handler)

    def forget_metrics_after(self, step: int) -> None:
        """Drops metric lines of steps that a resumed run will do again."""
        path = self.path / METRICS
        if path.exists():
            kept = [line for line in self.metrics() if line["step"] <= step]
            write_durably(path, "".join(json.dumps(line) + "\n" for line in kept))

    def append_metrics(self, line: dict[str, Any]) -> None:
        """
        Raises:
            RunFolderError: the disk is full; no half of the line stays.
        """
        path = self.path / METRICS
        size = path.stat().st_size if path.exists() else 0
        try:
            with path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            with suppress(OSError):
                os.truncate(path, size)
            raise RunFolderError(
                f"{path} cannot be written: {error}. {shutil.disk_usage(self.path).free:,} bytes are free there. Make "
                "room and continue with resume_from_checkpoint=auto; complete checkpoints are untouched."
            ) from error

    def metrics(self) -> list[dict[str, Any]]:
        path = self.path / METRICS
        if not path.exists():
            return []
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]

    def series(self, name: str) -> list[tuple[int, float]]:
        """(step, value) of one metric wherever it was logged."""
        return [(line["step"], line[name]) for line in self.metrics() if name in line]

    def summary(self) -> dict[str, Any] | None:
        path = self.path / SUMMARY
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None

    def finish(self, summary: dict[str, Any]) -> None:
        write_durably(self.path / SUMMARY, json.dumps(summary, indent=1, ensure_ascii=False))
