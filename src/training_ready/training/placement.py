"""Is the model placed as it was asked for? Several back-ends give way in silence to plain data parallelism or to one
process; a run that was planned on sharded weights then dies an hour later, or trains on a quarter of the machine.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from torch import nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainerCallback

from training_ready import TrainingReadyError
from training_ready.recipe.sections import LaunchSection

logger = logging.getLogger(__name__)

TOPOLOGIES = Path("accelerate_configs")
ONE, DDP, FSDP1, FSDP2, NATIVE = "one process", "DDP", "FSDP1", "FSDP2", "FSDP2 of transformers"


class PlacementError(TrainingReadyError):
    """The back-end that wraps the model is not the one that was asked for."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """What wraps the model; ``zero`` is DeepSpeed's stage, None without DeepSpeed."""

    backend: str
    processes: int
    zero: int | None = None

    def __str__(self) -> str:
        stage = "" if self.zero is None else f" ZeRO-{self.zero}"
        return f"{self.backend}{stage}, {self.processes} process{'es' * (self.processes > 1)}"


def asked_for(environment: Mapping[str, str], *, native: bool) -> Placement:
    """What the launcher's environment asks for; ``native``: the model was sharded while it was loaded."""
    processes = int(environment.get("WORLD_SIZE", "1"))
    if environment.get("ACCELERATE_USE_DEEPSPEED", "false").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE")
        return Placement(backend="DeepSpeed", processes=processes, zero=None if stage is None else int(stage))
    if environment.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return Placement(
            backend=FSDP2 if environment.get("FSDP_VERSION", "1") == "2" else FSDP1, processes=processes
        )
    backend = NATIVE if native else DDP if processes > 1 else ONE
    return Placement(backend=backend, processes=processes)


def found(model: nn.Module, processes: int, *, native: bool) -> Placement:
    """What really wraps ``model``, after the trainer has prepared it."""
    if type(model).__name__ == "DeepSpeedEngine":
        engine: Any = model
        return Placement(backend="DeepSpeed", processes=processes, zero=int(engine.zero_optimization_stage()))
    if isinstance(model, FullyShardedDataParallel):
        return Placement(backend=FSDP1, processes=processes)
    if isinstance(model, DistributedDataParallel):
        return Placement(backend=DDP, processes=processes)
    if any(isinstance(module, FSDPModule) for module in model.modules()):
        return Placement(backend=NATIVE if native else FSDP2, processes=processes)
    return Placement(backend=ONE, processes=processes)


def refuse_other_placement(asked: Placement, got: Placement, launch: LaunchSection) -> None:
    """
    Raises:
        PlacementError: the placement is not the asked one, or not the one that the recipe's ``launch:`` names.
    """
    same_stage = asked.zero in (None, got.zero)
    if (asked.backend, asked.processes) != (got.backend, got.processes) or not same_stage:
        raise PlacementError(
            f"asked for {asked}, but the model is wrapped as {got}. FSDP and DeepSpeed need GPUs (with use_cpu they "
            "give way to DDP), and DeepSpeed needs its package: pip install '.[gpu]'. For this placement on purpose "
            "start without their accelerate config."
        )
    if launch.num_processes is not None and got.processes < launch.num_processes:
        raise PlacementError(
            f"the recipe asks for launch.num_processes {launch.num_processes}, and {got.processes} run. "
            "`accelerate launch --cpu --num_processes N` starts one: on CPUs use torchrun --nproc-per-node N with "
            "ACCELERATE_USE_CPU=1. To train on fewer on purpose: "
            f"launch.num_processes={got.processes} (each step then has fewer packs)."
        )
    shards = _sharding_of(launch.accelerate_config)
    if shards is not None and got.backend in (ONE, DDP):
        raise PlacementError(
            f"launch.accelerate_config {launch.accelerate_config} shards the model by {shards}, but the run was "
            f"started as {got}. Start it with accelerate launch --config_file "
            f"{_topology(str(launch.accelerate_config))} ..., or set launch.accelerate_config=null to train like this "
            "on purpose."
        )


def _topology(name: str) -> Path:
    return (
        TOPOLOGIES / f"{name}.yaml"
        if "/" not in name and not name.endswith((".yaml", ".yml"))
        else Path(name)
    )


def _sharding_of(accelerate_config: str | None) -> str | None:
    """FSDP or DEEPSPEED where the recipe's topology shards; a topology that is not in reach says nothing."""
    if accelerate_config is None or not _topology(accelerate_config).is_file():
        return None
    kind = yaml.safe_load(_topology(accelerate_config).read_text(encoding="utf-8")).get("distributed_type")
    return kind if kind in ("FSDP", "DEEPSPEED") else None


class PlacementCheck(TrainerCallback):
    """Compares and prints the placement when the model is wrapped and before the first batch."""

    def __init__(self, trainer: Any, launch: LaunchSection) -> None:
        self._trainer, self._launch = trainer, launch

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        trainer = self._trainer
        native = bool(trainer.is_distributed_loading_by_transformers)
        got = found(trainer.model_wrapped, trainer.accelerator.num_processes, native=native)
        refuse_other_placement(asked_for(os.environ, native=native), got, self._launch)
        logger.info(f"placement: {got}; {describe_parameters(trainer.model)}")


def describe_parameters(model: nn.Module) -> str:
    """Where this rank's parameters lie and what part of the whole they are."""
    here, whole, devices, split = 0, 0, set(), set()
    for parameter in model.parameters():
        local = parameter.to_local() if isinstance(parameter, DTensor) else parameter
        here += local.numel() * local.element_size()
        whole += int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
        devices.add(str(local.device))
        if isinstance(parameter, DTensor):
            names = parameter.device_mesh.mesh_dim_names or ("mesh",)
            split.add(
                " x ".join(
                    f"{name} {size}" for name, size in zip(names, parameter.device_mesh.shape, strict=True)
                )
            )
    meshes = f", sharded over {'; '.join(sorted(split))}" if split else ""
    return f"{here / 1e9:.3f} of {whole / 1e9:.3f} GB of parameters on {', '.join(sorted(devices))} of rank 0{meshes}"
