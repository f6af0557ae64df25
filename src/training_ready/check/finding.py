"""What a probe says: what it measured, what is wrong and where, and the next thing to do."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

Status = Literal["pass", "warn", "fail", "not run"]
WORST_FIRST: tuple[Status, ...] = ("fail", "not run", "warn", "pass")


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One sentence of a probe; a probe returns at least one.

    ``message`` of a ``pass`` is the measurement, of a ``fail`` the fault with its arithmetic, of a ``not run`` the
    reason ("because ..."). ``key`` is the dotted recipe key at fault; the runner adds the file and line of it.
    ``measured`` is for machines only: plain JSON values.
    """

    status: Status
    message: str
    key: str | None = None
    where: str | None = None
    """``recipe.yaml:12`` or an s3 address; left empty, the runner fills in the origin of ``key``."""
    fix: str | None = None
    measured: Mapping[str, Any] = field(default_factory=dict)


def passed(message: str, **measured: Any) -> Finding:
    """A measurement that is as it should be."""
    return Finding(status="pass", message=message, measured=measured)


def failed(
    message: str, *, key: str | None = None, fix: str | None = None, where: str | None = None, **measured: Any
) -> Finding:
    """A fault that would waste the run: the check ends with exit status 1."""
    return Finding(status="fail", message=message, key=key, fix=fix, where=where, measured=measured)


def warned(
    message: str, *, key: str | None = None, fix: str | None = None, where: str | None = None, **measured: Any
) -> Finding:
    """Something a person should know, which does not stop the run."""
    return Finding(status="warn", message=message, key=key, fix=fix, where=where, measured=measured)


def not_run(because: str, *, key: str | None = None) -> Finding:
    """Nothing was measured. ``because`` completes the sentence "not run: because ..."."""
    return Finding(status="not run", message=f"because {because}", key=key)


def counted(number: int, one: str, many: str | None = None) -> str:
    """``1 pack``, ``1,200 packs``."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"


def worst(findings: list[Finding]) -> Status:
    """The status of a probe: its worst finding. A probe that found nothing to say has not run."""
    return next((status for status in WORST_FIRST if any(f.status == status for f in findings)), "not run")
