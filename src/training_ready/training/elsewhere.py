"""Which of TRL's keys does this trainer not read, and where is the same thing said here?"""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.recipe.recipe import Recipe

_STREAM = "the stream makes its own batches and reads ahead by itself"

ELSEWHERE = {
    "push_to_hub": "a release is exported, verified and pushed after the run: `training-ready release publish`",
    "hub_model_id": "release.repo_id names the repository",
    "hub_strategy": "a release is pushed once, after the run; checkpoint.mirror keeps checkpoints in a bucket",
    "hub_revision": "a release is pushed to main",
    "hub_private_repo": "a repository that a push creates is private unless told otherwise",
    "hub_always_push": "nothing is pushed while the run trains",
    "enable_jit_checkpoint": "SIGTERM always ends a run with a checkpoint",
    "packing_strategy": "packs are filled best-fit-decreasing; stream.overlong says what happens to long conversations",
    "assistant_only_loss": "data.target_role says whose turns are learned",
    "completion_only_loss": "data.target_role says whose turns are learned",
    "eval_packing": "evaluation packs as training does (`packing`)",
    "shuffle_dataset": "the stream shuffles by `data_seed` (or `seed`)",
    "dataset_num_proc": "the stream tokenises once and keeps the tokens in the bucket",
    "truncation_mode": "stream.overlong says what happens to long conversations",
    "padding_free": "`packing: true` trains without padding",
    "dataset_kwargs": "the stream prepares the data",
    "dataloader_num_workers": _STREAM,
    "dataloader_drop_last": _STREAM,
    "dataloader_prefetch_factor": _STREAM,
    "dataloader_persistent_workers": _STREAM,
    "train_sampling_strategy": "the stream shuffles; `packing: true` trains without padding",
    "auto_find_batch_size": "the order of the packs depends on the batch size: find one by `training-ready check`",
}
"""Keys that a recipe may not set to anything that counts as true, each with the way to do it here."""


def unread(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """(key, what to do instead) of every set key that would be ignored."""
    for key, instead in ELSEWHERE.items():
        if recipe.trl.get(key) and recipe.trl[key] != _harmless(key):
            yield key, instead


def _harmless(key: str) -> object:
    """A value that says in TRL's words what happens here anyway."""
    return {
        "truncation_mode": "keep_start",
        "train_sampling_strategy": "random",
        "packing_strategy": "bfd",
    }.get(key)
