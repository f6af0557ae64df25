"""Keys of older recipes (alignment-handbook, open-r1, older TRL): what became of each, and how to tell the family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

RENAMED: Mapping[str, str] = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "use_liger": "use_liger_kernel",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "num_processes": "launch.num_processes",
    "accelerate_config": "launch.accelerate_config",
    "wandb_project": "env.WANDB_PROJECT",
    "wandb_entity": "env.WANDB_ENTITY",
    "wandb_run_group": "env.WANDB_RUN_GROUP",
    "logging_dir": "env.TENSORBOARD_LOGGING_DIR",
}
"""Old key -> the key that holds the same value with the same meaning."""

_ONLY_SPEED = "it was about speed: the stream tokenises once, keeps the tokens in the bucket and reads ahead"
_WHOSE = "whose turns are learned is `data.target_role`: the assistant's unless you say otherwise"
_TO_MAIN = "a release is pushed to `main`"

# Removals and old defaults: MIGRATION_GUIDE_V5.md of transformers, the model cards that transformers 4 wrote (they list
# every argument), and the argument classes of alignment-handbook and open-r1.
MEANS_NOTHING: Mapping[str, tuple[frozenset[str] | None, str]] = {
    "overwrite_output_dir": (
        frozenset({"true", "false"}),
        "no run is overwritten any more: it resumes or refuses",
    ),
    "save_safetensors": (frozenset({"true"}), "weights are always saved as safetensors"),
    "half_precision_backend": (frozenset({"auto"}), "torch's own is the only one left"),
    "use_legacy_prediction_loop": (frozenset({"false"}), "the legacy loop is gone"),
    "include_tokens_per_second": (frozenset({"true", "false"}), "tokens per second are always recorded"),
    "ray_scope": (frozenset({"last"}), "only mattered to hyper-parameter search"),
    "use_mps_device": (frozenset({"false"}), "the device is found automatically"),
    "jit_mode_eval": (frozenset({"false"}), "gone from transformers"),
    "use_ipex": (frozenset({"false"}), "gone from transformers"),
    "adafactor": (frozenset({"false"}), "`optim` alone chooses the optimizer"),
    "group_by_length": (frozenset({"false"}), "is `train_sampling_strategy: random`, the default"),
    "use_flash_attention_2": (frozenset({"false"}), "`attn_implementation` chooses the attention"),
    "auto_insert_empty_system_msg": (frozenset({"false"}), "off, as here"),
    "preprocessing_num_workers": (None, _ONLY_SPEED),
    "hub_model_revision": (frozenset({"main"}), _TO_MAIN),
    "max_prompt_length": (frozenset(), ""),
    "tokenizer_name_or_path": (frozenset(), ""),
    "system_prompt": (frozenset(), ""),
    "benchmarks": (frozenset(), ""),
    "callbacks": (frozenset(), ""),
}
"""Old key -> the values that may go without any loss (None: all; null and empty lists always may), and why."""

NOT_READ: Mapping[str, tuple[frozenset[str] | None, str]] = {
    "dataset_num_proc": (None, _ONLY_SPEED),
    "dataloader_num_workers": (None, _ONLY_SPEED),
    "dataloader_prefetch_factor": (None, _ONLY_SPEED),
    "dataloader_persistent_workers": (None, _ONLY_SPEED),
    "dataloader_drop_last": (frozenset({"false"}), "the stream makes its own batches, all of them full"),
    "assistant_only_loss": (None, _WHOSE),
    "completion_only_loss": (None, _WHOSE),
    "packing_strategy": (
        frozenset({"bfd"}),
        "packs are filled best-fit-decreasing here; `stream.overlong` says what happens to long conversations",
    ),
    "padding_free": (frozenset({"false"}), "`packing: true` trains without padding"),
    "eval_packing": (frozenset(), "evaluation packs as training does (`packing`)"),
    "shuffle_dataset": (frozenset({"true"}), "the stream shuffles by `data_seed` (or `seed`)"),
    "train_sampling_strategy": (
        frozenset({"random"}),
        "the stream shuffles by `data_seed` (or `seed`); `packing: true` leaves nothing to group by length",
    ),
    "truncation_mode": (frozenset({"keep_start"}), "is `stream.overlong: truncate`, the default"),
    "auto_find_batch_size": (frozenset({"false"}), "the order of the packs depends on the batch size"),
    "enable_jit_checkpoint": (None, "SIGTERM always ends a run with a checkpoint here"),
    "hub_always_push": (None, "nothing is pushed while the run trains"),
    "hub_strategy": (
        frozenset({"end", "every_save"}),
        "the release is pushed once, after the run; `checkpoint.mirror: true` keeps checkpoints in a bucket",
    ),
    "hub_private_repo": (
        frozenset({"true"}),
        "a repository that a push creates is private unless told otherwise",
    ),
    "hub_revision": (frozenset({"main"}), _TO_MAIN),
}
"""TRL keys that this trainer does not read -> the values that say what it does anyway (None: all), and why."""

REFUSED: Mapping[str, str] = {
    "group_by_length": NOT_READ["train_sampling_strategy"][1],
    "hub_model_revision": _TO_MAIN,
    "save_safetensors": "weights are saved as safetensors only",
    "max_prompt_length": "belongs to preference training; SFT cuts whole conversations at `max_length`",
    "tokenizer_name_or_path": "the tokenizer comes with the model; save both in one folder and name that",
    "system_prompt": "a prompt belongs to the records: add it when the corpus is built",
    "auto_insert_empty_system_msg": "a system message belongs to the records: add it when the corpus is built",
    "benchmarks": "no benchmark is run at the end of training here; run them on the release",
    "callbacks": "callbacks are not named in a recipe; a push is made by `training-ready release`",
    "vllm_device": "belongs to reinforcement learning; this project trains SFT",
    "dataset_kwargs": "the stream prepares the data; special tokens come from the chat template alone",
}
"""Old key -> why it cannot be carried over by a machine."""

DATA_KEYS: Mapping[str, str] = {
    "dataset_mixture": "the mixture",
    "dataset_mixer": "the mixture",
    "dataset_splits": "the splits",
    "dataset_configs": "the configurations",
    "dataset_name": "the dataset",
    "dataset_config": "its configuration",
    "dataset_train_split": "the training split",
    "dataset_test_split": "the evaluation split",
    "dataset_streaming": "streaming",
    "streaming": "streaming",
    "datasets": "the mixture",
    "test_split_size": "the size of the evaluation split",
    "text_column": "the text column",
    "dataset_text_field": "the text column",
}
"""Keys that loaded data from the hub. A built corpus replaces them all."""

OTHER_METHODS: Mapping[str, str] = {
    "beta": "preference training (DPO, ORPO)",
    "rpo_alpha": "preference training (DPO)",
    "reward_funcs": "reinforcement learning (GRPO)",
    "num_generations": "reinforcement learning (GRPO)",
    "max_completion_length": "reinforcement learning (GRPO)",
    "use_vllm": "reinforcement learning (GRPO)",
}
"""Keys that only a recipe of another method has."""

_PHRASES = {
    "warmup_ratio": "it is now `warmup_steps` with a value below 1 (a share of the run)",
    "chat_template": "it is now `chat_template_path`, a Jinja file or a tokenizer",
    "use_flash_attention_2": "it is now `attn_implementation: flash_attention_2`",
}

GONE: Mapping[str, str] = {
    **{key: f"it {reason}" for key, (_, reason) in MEANS_NOTHING.items() if reason},
    **{key: reason for key, reason in REFUSED.items() if key != "dataset_kwargs"},
    **{key: f"it is now `{new}`" for key, new in RENAMED.items() if not key.startswith("gradient_")},
    **dict.fromkeys(DATA_KEYS, "a built corpus, `data.corpus`, replaces it"),
    **{key: f"it belongs to {method}; this project trains SFT" for key, method in OTHER_METHODS.items()},
    "overwrite_output_dir": "it is gone; no run is overwritten any more",
    **_PHRASES,
}
"""Old key -> what to say about it when it stands in a recipe of ours."""

_HANDBOOK = frozenset({"dataset_mixture", "dataset_mixer", "dataset_splits", "preprocessing_num_workers"})
_OPEN_R1 = frozenset(
    {"benchmarks", "callbacks", "hub_model_revision", "wandb_project", "wandb_entity", "use_liger"}
)
_STILL_TRL = frozenset(DATA_KEYS) - _HANDBOOK - {"dataset_configs", "text_column"}


def family_of(keys: Iterable[str]) -> str | None:
    """The family of an old recipe by its top-level keys; None if fewer than two of them are gone."""
    gone = set(keys) & GONE.keys() - _STILL_TRL - {"num_processes", "accelerate_config"}
    if len(gone) < 2:
        return None
    if gone & _HANDBOOK:
        return "alignment-handbook"
    return "open-r1" if gone & _OPEN_R1 else "an older TRL"
