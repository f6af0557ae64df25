"""From a recipe's flat keys to TRL's argument objects; every automatic choice is made here."""

from __future__ import annotations

import os

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


def world() -> tuple[int, int]:
    """(rank, number of ranks) as the launcher says, before any process group exists."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
