"""What is written, shown and decided after each step: metrics file, progress, time budget."""

from __future__ import annotations

import logging
import time
from typing import Any

import torch
import torch.distributed as dist
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

from training_ready.training.run_folder import RunFolder

logger = logging.getLogger(__name__)


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


class TimeBudget(TrainerCallback):
    """Stops and saves when ``max_hours`` have passed since the process started; all ranks decide alike."""

    def __init__(self, max_hours: float) -> None:
        self._deadline = time.monotonic() + max_hours * 3600

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        over = torch.tensor(int(time.monotonic() > self._deadline), device=args.device)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(over, op=dist.ReduceOp.MAX)
        if over.item() and state.global_step < state.max_steps:
            control.should_save = True
            control.should_training_stop = True
