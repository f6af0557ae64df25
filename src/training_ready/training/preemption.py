"""When does a run stop before its end, and how do all ranks stop after the same step?

SIGTERM or SIGINT at any rank, or ``budget.max_hours``, asks. After every optimizer step the ranks vote, one number
per rank; signals are also voted on between the micro-batches of a step and between the batches of an evaluation, both
of which may take minutes. Whoever is asked first, all save the same step, once, and stop.
"""

from __future__ import annotations

import enum
import logging
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable
from types import TracebackType
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# Launchers repeat to their children what they were sent, so the second signal of one Ctrl-C may follow at once.
_SECOND_AFTER_SECONDS = 5.0


class EvaluationAbandoned(Exception):
    """All ranks left an evaluation because a signal arrived."""


class StopSignals:
    """Remembers SIGTERM and SIGINT instead of dying of them; a second one, seconds later, ends the process at once.

    A thread reads them, so that the second works even while the main thread waits inside a collective call. Only for
    the main thread, as a context manager.
    """

    def __init__(self) -> None:
        self.received: signal.Signals | None = None
        self._first = 0.0

    def __enter__(self) -> StopSignals:
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs = theirs
        self._before = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
        self._wakeup = signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        self._thread = threading.Thread(target=self._listen, name="signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        self._theirs.close()
        self._thread.join()
        self._ours.close()

    def _listen(self) -> None:
        while data := self._ours.recv(1):
            if data[0] not in _SIGNALS:
                continue
            number = signal.Signals(data[0])
            if self.received is None:
                self.received, self._first = number, time.monotonic()
                logger.warning(
                    f"{number.name}: will save and stop; another one, {_SECOND_AFTER_SECONDS:.0f} s from now or later, "
                    "ends at once"
                )
            elif time.monotonic() - self._first >= _SECOND_AFTER_SECONDS:
                os.write(2, f"{number.name} again: ending at once\n".encode())
                os._exit(128 + number)


class StopReason(enum.IntEnum):
    """The larger one wins a vote."""

    NONE = 0
    BUDGET = 1
    SIGNAL = 2


class StopTogether(TrainerCallback):
    """Lets all ranks save and stop after the same optimizer step."""

    def __init__(
        self,
        signals: StopSignals,
        *,
        deadline: float | None,
        whole_steps: bool,
        mark_step: Callable[[], Callable[[], None]],
    ) -> None:
        """
        Args:
            deadline: stop at this time of ``time.monotonic``.
            whole_steps: finish the optimizer step that has begun, for engines that keep gradients of their own;
                otherwise its micro-batches are given up, and done again after the restart.
            mark_step: called before a step that may be given up; what it returns, when it is.
        """
        self.reason = StopReason.NONE
        self._signals, self._whole_steps = signals, whole_steps
        self._deadline = deadline
        self._saved_step = 0
        self._mark_step = mark_step
        self._undo: list[Callable[[], None]] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._saved_step = state.global_step

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        self._saved_step = state.global_step

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if args.gradient_accumulation_steps > 1 and not self._whole_steps:
            self._undo = [_RandomState().restore, self._mark_step()]

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        over = self._deadline is not None and time.monotonic() > self._deadline
        over = over and state.global_step < state.max_steps
        reason = self._vote(args, StopReason.BUDGET if over else StopReason.NONE)
        if reason is not StopReason.NONE:
            self._stop(reason, state, control)

    def on_substep_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._whole_steps or self._vote(args) is not StopReason.SIGNAL:
            return
        for undo in self._undo:  # all as it was when the step that is saved ended
            undo()
        self._stop(StopReason.SIGNAL, state, control)

    def on_prediction_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        if self._vote(args) is StopReason.SIGNAL:
            self._stop(StopReason.SIGNAL, state, control)
            raise EvaluationAbandoned

    def _stop(self, reason: StopReason, state: TrainerState, control: TrainerControl) -> None:
        self.reason = reason
        control.should_save = state.global_step > self._saved_step
        control.should_training_stop = True
        if reason is StopReason.SIGNAL:
            control.should_evaluate = False

    def _vote(self, args: TrainingArguments, own: StopReason = StopReason.NONE) -> StopReason:
        """The gravest reason that any rank has; a collective call."""
        if self._signals.received is not None:
            own = StopReason.SIGNAL
        if not (dist.is_available() and dist.is_initialized()):
            return own
        vote = torch.tensor(int(own), device=args.device)
        dist.all_reduce(vote, op=dist.ReduceOp.MAX)
        return StopReason(int(vote.item()))


class _RandomState:
    """Every generator that a training step may draw from, as it was when this was made."""

    def __init__(self) -> None:
        self._python, self._numpy, self._torch = (
            random.getstate(),
            np.random.get_state(),
            torch.get_rng_state(),
        )
        self._cuda = torch.cuda.get_rng_state() if torch.cuda.is_available() else None

    def restore(self) -> None:
        random.setstate(self._python)
        np.random.set_state(self._numpy)
        torch.set_rng_state(self._torch)
        if self._cuda is not None:
            torch.cuda.set_rng_state(self._cuda)
