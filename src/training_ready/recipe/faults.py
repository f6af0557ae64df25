"""What is wrong with a recipe, and where: every fault carries its file and line."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from training_ready import TrainingReadyError

COMMAND_LINE = "command line"
DEFAULT = "default"


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value was written: a file and its 1-based line, the command line, or nowhere (a default)."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


@dataclass(frozen=True, slots=True)
class Fault:
    """One mistake: where it stands, the dotted key, and what to do about it."""

    origin: Origin
    key: str
    message: str

    def __str__(self) -> str:
        subject = f"`{self.key}`: " if self.key else ""
        return f"{self.origin}: {subject}{self.message}"

    @property
    def position(self) -> tuple[bool, str, int, str]:
        """Sort key: files first, by name and line; the command line last."""
        return (self.origin.source == COMMAND_LINE, self.origin.source, self.origin.line or 0, self.key)


class RecipeError(TrainingReadyError):
    """A recipe that cannot run. ``faults`` holds every mistake found, sorted by file and line."""

    def __init__(self, path: str, faults: Iterable[Fault], *, advice: str | None = None) -> None:
        self.path = path
        self.faults = tuple(sorted(dict.fromkeys(faults), key=lambda fault: fault.position))
        count = len(self.faults)
        heading = f"recipe {path}: {count} fault{'s' if count != 1 else ''}"
        lines = [heading, *(f"  {fault}" for fault in self.faults)]
        if advice:
            lines.append(advice)
        super().__init__("\n".join(lines))


def did_you_mean(word: str, known: Iterable[str], *, most: int = 3) -> str:
    """A phrase naming the nearest known words, or the empty string."""
    near = difflib.get_close_matches(word, sorted(known), n=most, cutoff=0.7)
    if not near:
        return ""
    return "did you mean " + " or ".join(f"`{name}`" for name in near) + "?"
