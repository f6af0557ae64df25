"""From a recipe's flat keys to TRL's argument objects; every automatic choice is made here."""

from __future__ import annotations

import os

from transformers.distributed import DistributedConfig
from trl import ModelConfig, SFTConfig

from training_ready import TrainingReadyError
from training_ready.recipe.recipe import Recipe
from training_ready.training.elsewhere import unread


class ArgumentsError(TrainingReadyError):
    """A recipe key that this trainer cannot honour."""


def sft_config(recipe: Recipe) -> SFTConfig:
    """TRL's ``SFTConfig`` for a stream that is prepared already.

    Raises:
        ArgumentsError: a key is set that would be ignored, or TRL refuses a value.
    """
    chosen = recipe.trl_group("SFTConfig")
    ignored = [f"{key}: not used here; {instead}" for key, instead in unread(recipe)]
    if ignored:
        raise ArgumentsError("\n".join(ignored))
    chosen.pop("model_init_kwargs", None)  # see distributed_config
    chosen.pop("resume_from_checkpoint", None)  # found and checked by training/checkpoints.py
    ours = {
        "output_dir": str(recipe.output_dir),
        "dataset_kwargs": {"skip_prepare_dataset": True},
        "ignore_data_skip": True,  # the stream starts at its position
        "disable_tqdm": True,  # progress is shown by our callback
    }
    try:
        return SFTConfig(**{"report_to": "none", **chosen, **ours})
    except (ValueError, TypeError) as error:
        hint = " bf16 needs a GPU here; to try the recipe on a CPU add bf16=false use_cpu=true." * (
            "bf16" in str(error)
        )
        raise ArgumentsError(f"TRL refuses the recipe's arguments: {error}.{hint}") from error


def model_config(recipe: Recipe) -> ModelConfig:
    """TRL's ``ModelConfig`` as the recipe sets it."""
    return ModelConfig(**recipe.trl_group("ModelConfig"))


def distributed_config(recipe: Recipe, ranks: int | None = None) -> DistributedConfig | None:
    """``model_init_kwargs.distributed_config``: FSDP2 and expert parallelism of transformers itself.

    Args:
        ranks: processes of the run; None: those of this launch.

    Raises:
        ArgumentsError: another keyword is given, the sizes do not fit, or the model starts from scratch.
    """
    given = dict(recipe.trl.get("model_init_kwargs") or {})
    sizes = given.pop("distributed_config", None)
    if given:
        raise ArgumentsError(
            f"model_init_kwargs.{next(iter(given))}: only distributed_config is used here; the other ways to load a "
            "model have keys of their own (dtype, attn_implementation, model_revision, load_in_4bit)"
        )
    if sizes is None:
        return None
    try:
        chosen = DistributedConfig(**sizes)
    except (TypeError, ValueError) as error:
        raise ArgumentsError(f"model_init_kwargs.distributed_config: {error}") from error
    if chosen.tp_size != 1 or chosen.pp_size not in (None, 1):
        raise ArgumentsError(
            "model_init_kwargs.distributed_config: tensor and pipeline parallel ranks must share their packs, which "
            "this stream does not do yet: leave tp_size and pp_size out"
        )
    if not recipe.trl.get("save_only_model") or recipe.trl.get("resume_from_checkpoint"):
        raise ArgumentsError(
            "model_init_kwargs.distributed_config: transformers cannot save the optimizer of weights that were sharded "
            "while loading, so such a run cannot be continued. Set save_only_model: true and leave "
            "resume_from_checkpoint out, or shard with accelerate's FSDP2"
        )
    ranks = world()[1] if ranks is None else ranks
    if chosen.dp_size != ranks:
        raise ArgumentsError(
            "model_init_kwargs.distributed_config: fsdp_size x dp_replicate_size = "
            f"{chosen.fsdp_size} x {chosen.dp_replicate_size} = {chosen.dp_size} ranks, but {ranks} run"
        )
    return chosen


def world() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher says, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
