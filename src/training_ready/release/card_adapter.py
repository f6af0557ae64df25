"""What does a card say of an adapter that it need not say of a whole model? Read from its adapter_config.json."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from training_ready.release.contents import ContentsError

CONFIG = "adapter_config.json"


@dataclass(kw_only=True, slots=True, frozen=True)
class Adapter:
    """A LoRA: rank, alpha, and which layers it changes, by their names or as one expression."""

    rank: int
    alpha: float
    layers: tuple[str, ...]


def read_adapter(folder: Path) -> Adapter | None:
    """The adapter in `folder`; None where there is a whole model. Raises ContentsError when it cannot be read."""
    path = folder / CONFIG
    if not path.is_file():
        return None
    try:
        config = json.loads(path.read_bytes())
        modules = config.get("target_modules") or []
        names = (
            {modules} if isinstance(modules, str) else {*modules, *(config.get("target_parameters") or [])}
        )
        return Adapter(rank=int(config["r"]), alpha=float(config["lora_alpha"]), layers=tuple(sorted(names)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ContentsError(f"{path} is not the configuration of a LoRA adapter: {error!r}") from error
