"""How many processes would run it, and what does each of them hold? Read from the launch file, or from the launcher."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import yaml

from training_ready import TrainingReadyError
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.shipped import accelerate_config, shipped_root

Sharding = Literal["single", "ddp", "fsdp1", "fsdp2", "zero0", "zero1", "zero2", "zero3"]


class TopologyError(TrainingReadyError):
    """A launch file that cannot be read, or that names what does not exist."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Topology:
    """The processes of a run. ``fsdp`` and ``deepspeed`` hold those sections as written (the JSON's content for
    DeepSpeed), ``parallel`` the sizes of accelerate's parallelism_config (``tp_size``, ``cp_size`` ...)."""

    name: str
    path: Path | None
    processes: int
    machines: int
    sharding: Sharding
    use_cpu: bool
    launch_uses_cpu: bool
    """The launch file says so; ``use_cpu`` is true when it or the recipe does."""
    mixed_precision: str | None
    fsdp: Mapping[str, Any] = field(default_factory=dict)
    deepspeed: Mapping[str, Any] = field(default_factory=dict)
    parallel: Mapping[str, int] = field(default_factory=dict)
    moe_leaf_classes: tuple[str, ...] = ()

    @property
    def shards_weights(self) -> bool:
        return self.sharding in ("fsdp1", "fsdp2", "zero3")


def topology_of(recipe: Recipe) -> Topology:
    """The topology that ``launch`` names; without one, a single process on the device that the recipe chooses.

    Under a launcher (``WORLD_SIZE`` is set) the number of processes is the launcher's.

    Raises:
        TopologyError: the launch file cannot be read. ``NotShipped``: there is no such file.
    """
    launched = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    if recipe.launch.accelerate_config is None:
        count = launched or recipe.launch.num_processes or 1
        return Topology(
            name="no launch file",
            path=None,
            processes=count,
            machines=1,
            sharding="ddp" if count > 1 else "single",
            use_cpu=bool(recipe.effective("use_cpu")),
            launch_uses_cpu=False,
            mixed_precision=None,
        )
    path = accelerate_config(recipe.launch.accelerate_config)
    written = _mapping(path, yaml.safe_load(_text(path)))
    deepspeed_file = (written.get("deepspeed_config") or {}).get("deepspeed_config_file")
    deepspeed = _deepspeed(path, deepspeed_file, written)
    count = launched or recipe.launch.num_processes or int(written.get("num_processes") or 1)
    classes = (written.get("deepspeed_config") or {}).get("deepspeed_moe_layer_cls_names") or ""
    return Topology(
        name=recipe.launch.accelerate_config,
        path=path,
        processes=count,
        machines=int(written.get("num_machines") or 1),
        sharding=_sharding(path, written, deepspeed, count),
        use_cpu=bool(written.get("use_cpu")) or bool(recipe.effective("use_cpu")),
        launch_uses_cpu=bool(written.get("use_cpu")),
        mixed_precision=written.get("mixed_precision"),
        fsdp=written.get("fsdp_config") or {},
        deepspeed=deepspeed,
        parallel=_parallel(written),
        moe_leaf_classes=tuple(name.strip() for name in classes.split(",") if name.strip()),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TopologyError(f"{path} cannot be read: {error}") from error


def _mapping(path: Path, content: object) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TopologyError(f"{path} holds {type(content).__name__}, not a mapping of keys")
    return content


def _deepspeed(path: Path, file: str | None, written: Mapping[str, Any]) -> dict[str, Any]:
    """The DeepSpeed JSON; paths in a launch file are relative to the folder that the run starts in."""
    if file is None:
        section = dict(written.get("deepspeed_config") or {})
        stage = section.get("zero_stage")
        return {} if stage is None else {"zero_optimization": {"stage": stage}, **section}
    for candidate in (Path(file), shipped_root() / file):
        if candidate.is_file():
            try:
                return _mapping(candidate, json.loads(_text(candidate)))
            except ValueError as error:
                raise TopologyError(f"{candidate} is not JSON: {error}") from error
    raise TopologyError(
        f"{path} names {file}, which is not there; run from the folder that holds it, or correct "
        "deepspeed_config.deepspeed_config_file"
    )


def _sharding(
    path: Path, written: Mapping[str, Any], deepspeed: Mapping[str, Any], processes: int
) -> Sharding:
    kind = str(written.get("distributed_type") or "NO").upper()
    if kind == "DEEPSPEED":
        stage = (deepspeed.get("zero_optimization") or {}).get("stage", 0)
        return f"zero{stage}"  # type: ignore[return-value]
    if kind == "FSDP":
        version = (written.get("fsdp_config") or {}).get("fsdp_version", 1)
        return "fsdp2" if int(version) == 2 else "fsdp1"
    if kind in ("NO", "MULTI_GPU", "MULTI_CPU"):
        return "ddp" if processes > 1 else "single"
    raise TopologyError(f"{path}: distributed_type {kind} is none that this trainer has been made for")


def _parallel(written: Mapping[str, Any]) -> dict[str, int]:
    section = written.get("parallelism_config") or {}
    prefix = "parallelism_config_"
    return {
        name.removeprefix(prefix): int(size)
        for name, size in section.items()
        if name.endswith("_size") and size is not None
    }
