"""What is written, shown and measured after each step: metrics file, progress, the cost of uploads."""

from __future__ import annotations

import logging
import statistics
import time
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from training_ready.training.checkpoint_mirror import CheckpointMirror
from training_ready.training.run_folder import RunFolder

logger = logging.getLogger(__name__)

_STEPS_TO_COMPARE = 5


class MetricsFile(TrainerCallback):
    """Appends everything that is logged to the run folder's ``metrics.jsonl``."""

    def __init__(self, folder: RunFolder) -> None:
        self._folder = folder

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        if state.is_world_process_zero and logs:
            self._folder.append_metrics({"step": state.global_step, "time": round(time.time(), 3), **logs})


class ProgressDisplay(TrainerCallback):
    """A progress bar on a terminal, a line per log elsewhere."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._bar: Progress | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if state.is_world_process_zero and self._console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, TimeRemainingColumn(), console=self._console)
            self._bar.start()
            self._task = self._bar.add_task("training", total=state.max_steps, completed=state.global_step)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar:
            self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        loss = (logs or {}).get("loss")
        if loss is None or not state.is_world_process_zero:
            return
        if self._bar:
            self._bar.update(self._task, description=f"training, loss {loss:.3f}")
        else:
            logger.info(f"step {state.global_step}/{state.max_steps}  loss {loss:.4f}")

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._bar:
            self._bar.stop()


class MirrorCost(TrainerCallback):
    """Compares steps during which a checkpoint was being uploaded with the others, and says what that cost."""

    def __init__(self, mirror: CheckpointMirror) -> None:
        self._mirror = mirror
        self._began: tuple[float, bool] | None = None
        self._seconds: dict[bool, list[float]] = {True: [], False: []}

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._began = time.perf_counter(), bool(self._mirror.pending)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._began is None:
            return
        began, uploading = self._began
        if uploading == bool(self._mirror.pending):  # a step that is partly both says nothing
            self._seconds[uploading].append(time.perf_counter() - began)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        during, alone = self._seconds[True], self._seconds[False]
        if len(during) >= _STEPS_TO_COMPARE and len(alone) >= _STEPS_TO_COMPARE:
            slow, usual = statistics.median(during), statistics.median(alone)
            logger.info(
                f"uploads: a step took {slow:.3f} s during one and {usual:.3f} s otherwise, {slow / usual - 1:+.1%} "
                f"(medians of {len(during)} and {len(alone)} steps)"
            )
