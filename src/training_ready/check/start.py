"""The check at the start of training: made once, by the first process; the others wait, and fail along."""

from __future__ import annotations

import os
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

from rich.console import Console

from training_ready.check.run import CheckError, Report, check_recipe
from training_ready.check.show import said, show

_PATIENCE = timedelta(minutes=30)
_meeting_points: list[Any] = []  # kept: training's process group meets at the same one afterwards


def check_before_start(recipe: str, overrides: Sequence[str], skip: Sequence[str]) -> None:
    """Examine the recipe on the machine that will train it.

    Raises:
        CheckError: a probe failed, in this process or in the first.
    """
    world_size, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if world_size == 1:
        _check(recipe, overrides, skip)
        return
    store, key = _meeting_point(), f"training_ready/check/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    if rank:
        store.wait([key], _PATIENCE)
        if store.get(key) != b"passed":
            raise CheckError("the check failed in the first process, which says why")
        return
    verdict = "failed"
    try:
        _check(recipe, overrides, skip)
        verdict = "passed"
    finally:
        store.set(key, verdict)


def _check(recipe: str, overrides: Sequence[str], skip: Sequence[str]) -> None:
    report = check_recipe(recipe, overrides, skip=skip, starting=True)
    if not report.passed:
        raise CheckError(_refusal(report))
    show(report, Console())


def _refusal(report: Report) -> str:
    lines = [f"{report.recipe} was not started:"]
    lines += [f"  {probe}: {said(finding)}" for probe, finding in report.failures]
    return "\n".join([*lines, "`--skip PROBE` before the recipe starts it without that probe."])


def _meeting_point() -> Any:
    """The launcher's own key-value store."""
    from torch.distributed.rendezvous import rendezvous

    store, _, _ = next(iter(rendezvous("env://", timeout=_PATIENCE)))
    _meeting_points.append(store)
    return store
