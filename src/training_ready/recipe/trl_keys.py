"""TRL's own flat keys, as committed in ``trl_schema.json``, and the ranges that their types do not say."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from training_ready.recipe.kinds import Kind

SCHEMA_FILE = Path(__file__).with_name("trl_schema.json")


@dataclass(frozen=True, slots=True)
class TrlKey:
    """One field of TRL's dataclasses."""

    name: str
    group: str
    kind: Kind
    default: Any
    help: str


@cache
def trl_keys() -> Mapping[str, TrlKey]:
    """Every TRL key by name, in the order of TRL's parser."""
    fields = json.loads(SCHEMA_FILE.read_text(encoding="utf-8"))["fields"]
    return {
        name: TrlKey(
            name=name, group=entry["group"], kind=_kind(entry), default=entry["default"], help=entry["help"]
        )
        for name, entry in fields.items()
    }


def _kind(entry: dict[str, Any]) -> Kind:
    choices = entry.get("choices")
    return Kind(
        types=tuple(entry["types"]),
        nullable=entry["nullable"],
        choices=None if choices is None else tuple(choices),
        items=_kind(entry["items"]) if "items" in entry else None,
    )


@dataclass(frozen=True, slots=True)
class Range:
    """Bounds of a number; ``also`` lists values outside them that mean something, such as -1 for "unset"."""

    least: float | None = None
    above: float | None = None
    most: float | None = None
    below: float | None = None
    also: tuple[float, ...] = ()
    steps_or_share: bool = False

    def describe(self) -> str:
        """The bounds in words."""
        if self.steps_or_share:
            low = "0, " if self.least == 0 else ""
            return f"{low}a whole number of steps from 1 up, or a share of the run between 0 and 1"
        bounds = [(">=", self.least), (">", self.above), ("<=", self.most), ("<", self.below)]
        words = " and ".join(f"{sign} {bound:g}" for sign, bound in bounds if bound is not None)
        return words + "".join(f", or {value:g}" for value in self.also)

    def holds(self, value: float) -> bool:
        """Whether ``value`` lies in the range."""
        if value in self.also:
            return True
        inside = (
            (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.most is None or value <= self.most)
            and (self.below is None or value < self.below)
        )
        return inside and not (self.steps_or_share and value > 1 and value != int(value))


_COUNT = Range(least=1)
_NOT_NEGATIVE = Range(least=0)
_SHARE = Range(least=0, below=1)
_STEPS = Range(above=0, steps_or_share=True)

RANGES: Mapping[str, Range] = {
    "adam_beta1": _SHARE,
    "adam_beta2": _SHARE,
    "adam_epsilon": Range(above=0),
    "dataloader_num_workers": _NOT_NEGATIVE,
    "dataloader_prefetch_factor": _COUNT,
    "dataset_num_proc": _COUNT,
    "ddp_bucket_cap_mb": _COUNT,
    "ddp_timeout": _COUNT,
    "eval_accumulation_steps": _COUNT,
    "eval_delay": _NOT_NEGATIVE,
    "eval_steps": _STEPS,
    "gradient_accumulation_steps": _COUNT,
    "label_smoothing_factor": _SHARE,
    "learning_rate": Range(above=0, most=1),
    "logging_steps": _STEPS,
    "lora_alpha": _COUNT,
    "lora_dropout": _SHARE,
    "lora_r": _COUNT,
    "max_grad_norm": _NOT_NEGATIVE,
    "max_length": Range(least=2),
    "max_steps": Range(least=1, also=(-1,)),
    "neftune_noise_alpha": Range(above=0),
    "num_train_epochs": Range(above=0),
    "pad_to_multiple_of": _COUNT,
    "per_device_eval_batch_size": _COUNT,
    "per_device_train_batch_size": _COUNT,
    "router_aux_loss_coef": _NOT_NEGATIVE,
    "save_steps": _STEPS,
    "save_total_limit": _COUNT,
    "seed": Range(least=0, below=2**32),
    "data_seed": Range(least=0, below=2**32),
    "test_split_size": Range(above=0, below=1),
    "torch_empty_cache_steps": _COUNT,
    "warmup_steps": Range(least=0, steps_or_share=True),
    "weight_decay": _NOT_NEGATIVE,
}

CORPUS_INSTEAD = frozenset(
    {
        "dataset_name",
        "dataset_config",
        "dataset_train_split",
        "dataset_test_split",
        "dataset_streaming",
        "datasets",
        "streaming",
        "test_split_size",
    }
)
"""Keys by which TRL itself would load data. Here a built corpus (``data.corpus``) is the only source of rows."""


def settled(name: str, value: Any) -> Any:
    """The value as TRL expects it: a whole number of steps is an int, a share of the run stays a float."""
    bounds = RANGES.get(name)
    if (
        bounds is not None
        and bounds.steps_or_share
        and isinstance(value, float)
        and value >= 1
        and value.is_integer()
    ):
        return int(value)
    return value
