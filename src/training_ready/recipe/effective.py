"""The value of every key as a rule about several keys sees it: as set, or by default."""

from __future__ import annotations

from typing import Any

from training_ready.recipe.faults import Origin
from training_ready.recipe.sections import SECTIONS
from training_ready.recipe.trl_keys import trl_keys
from training_ready.recipe.typed import Typed


class Unknowable(Exception):
    """A rule asks for a key that is itself at fault; that fault is reported already."""


class Settings:
    """What the rules see: the value of every key, as set or by default."""

    def __init__(self, typed: Typed) -> None:
        self._typed = typed

    def get(self, key: str) -> Any:
        """The effective value of a TRL key, or of ``section.key``."""
        first, _, rest = key.partition(".")
        if first in self._typed.broken:
            raise Unknowable(first)
        if not rest:
            return self._typed.trl[key] if key in self._typed.trl else trl_keys()[key].default
        section = self._typed.sections.get(first)
        if section is None:
            if first == "data":
                raise Unknowable(first)
            section = SECTIONS[first]()
        return getattr(section, rest)

    def is_set(self, key: str) -> bool:
        """Whether the recipe sets the key to something other than null."""
        if key.partition(".")[0] in self._typed.broken:
            raise Unknowable(key)
        return key in self._typed.origins and self.get(key) is not None

    def origin(self, key: str) -> Origin | None:
        """Where the key, or the nearest section above it, is written."""
        while key not in self._typed.origins and "." in key:
            key = key.rpartition(".")[0]
        return self._typed.origins.get(key)
