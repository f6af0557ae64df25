"""A recipe that was read: typed values, where each came from, and text that alone reproduces the run."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from training_ready.recipe.faults import Origin
from training_ready.recipe.interpolate import escape
from training_ready.recipe.sections import (
    SECTIONS,
    BudgetSection,
    CheckpointSection,
    DataSection,
    LaunchSection,
    ModelSection,
    MoeSection,
    ReleaseSection,
    StreamSection,
)
from training_ready.recipe.trl_keys import trl_keys


@dataclass(frozen=True, kw_only=True, slots=True)
class Recipe:
    """One run. ``trl`` holds only the keys that are set; equal recipes describe the same run.

    ``env`` is not exported by reading a recipe: the launcher does that. ``origins`` maps dotted keys to where each
    value was written.
    """

    path: Path = field(compare=False)
    name: str
    trl: Mapping[str, Any]
    data: DataSection
    stream: StreamSection
    model: ModelSection
    moe: MoeSection
    checkpoint: CheckpointSection
    budget: BudgetSection
    release: ReleaseSection
    launch: LaunchSection
    env: Mapping[str, str]
    origins: Mapping[str, Origin] = field(compare=False)

    @property
    def output_dir(self) -> Path:
        """The folder of the run; ``runs/<name>`` unless the recipe says otherwise."""
        return Path(self.trl["output_dir"])

    def trl_group(self, group: str) -> dict[str, Any]:
        """The set keys of one of TRL's dataclasses: ``SFTConfig``, ``ModelConfig``, ``ScriptArguments``."""
        keys = {name for name, key in trl_keys().items() if key.group == group}
        if not keys:
            raise ValueError(f"{group} is none of {sorted({key.group for key in trl_keys().values()})}")
        return {name: value for name, value in self.trl.items() if name in keys}

    def effective(self, key: str) -> Any:
        """The value of a TRL key: as set, else TRL's default."""
        return self.trl[key] if key in self.trl else trl_keys()[key].default

    def resolved(self) -> dict[str, Any]:
        """Every set key: TRL's in the order of its parser, our sections, the environment. A fresh copy."""
        found: dict[str, Any] = {name: _copied(value) for name, value in self.trl.items()}
        for name in SECTIONS:
            section = getattr(self, name).model_dump(exclude_unset=True)
            if section:
                found[name] = section
        if self.env:
            found["env"] = dict(self.env)
        return found

    def to_yaml(self) -> str:
        """The resolved recipe as text: the same run gives the same text, and reading it gives an equal recipe."""
        return yaml.dump(
            _ordered(self.resolved()),
            Dumper=_Writer,
            sort_keys=False,
            allow_unicode=True,
            width=110,
            indent=2,
        )

    @property
    def sha256(self) -> str:
        """The hash of ``to_yaml``: the identity of the run's description."""
        return hashlib.sha256(self.to_yaml().encode()).hexdigest()


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _copied(child) for name, child in value.items()}
    return [_copied(child) for child in value] if isinstance(value, list) else value


def _ordered(resolved: dict[str, Any]) -> dict[str, Any]:
    """Free mappings sorted by key, so that the order of writing does not change the text."""

    def tidy(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: tidy(value[name]) for name in sorted(value)}
        return [tidy(child) for child in value] if isinstance(value, list) else value

    return {name: tidy(value) for name, value in resolved.items()}


# --------------------------------------------------------------------------- text that reads back as itself
_BARE = re.compile(r"[A-Za-z_/][\w./\-]*")
_WORDS_WITH_A_MEANING = frozenset({"null", "true", "false", "yes", "no", "on", "off", "y", "n"})


class _Writer(yaml.SafeDumper):
    """Quotes text that a reader of YAML might take for a number, boolean, null, date or reference."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _write_text(writer: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    bare = bool(_BARE.fullmatch(text)) and text.lower() not in _WORDS_WITH_A_MEANING
    return writer.represent_scalar("tag:yaml.org,2002:str", escape(text), style=None if bare else '"')


_Writer.add_representer(str, _write_text)
