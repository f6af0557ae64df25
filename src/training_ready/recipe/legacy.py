"""Keys of older recipes (alignment-handbook, open-r1, older TRL): what became of each, and how to tell the family."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

RENAMED: Mapping[str, str] = {
    "torch_dtype": "dtype",
    "max_seq_length": "max_length",
    "evaluation_strategy": "eval_strategy",
    "hub_model_revision": "hub_revision",
    "preprocessing_num_workers": "dataset_num_proc",
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

MEANS_NOTHING: Mapping[str, tuple[frozenset[str], str]] = {
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
    "max_prompt_length": (frozenset(), ""),
    "tokenizer_name_or_path": (frozenset(), ""),
    "system_prompt": (frozenset(), ""),
    "benchmarks": (frozenset(), ""),
    "callbacks": (frozenset(), ""),
}
"""Old key -> the values that may go without any loss (null and empty lists always may), and why."""

REFUSED: Mapping[str, str] = {
    "group_by_length": "set `train_sampling_strategy: group_by_length` by hand; packs are all of one length anyway",
    "save_safetensors": "weights are saved as safetensors only",
    "max_prompt_length": "belongs to preference training; SFT cuts whole conversations at `max_length`",
    "tokenizer_name_or_path": "the tokenizer comes with the model; save both in one folder and name that",
    "system_prompt": "a prompt belongs to the records: add it when the corpus is built",
    "auto_insert_empty_system_msg": "a system message belongs to the records: add it when the corpus is built",
    "benchmarks": "no benchmark is run at the end of training here; run them on the release",
    "callbacks": "callbacks are not named in a recipe; a push is made by `training-ready release`",
    "vllm_device": "belongs to reinforcement learning; this project trains SFT",
    "packing_strategy": "`ffd` arranged packs in another way than `bfd`; drop it to take the default",
    "dataset_kwargs": "only `skip_prepare_dataset` is left of it; special tokens come from the chat template",
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
    "group_by_length": "it is now `train_sampling_strategy: group_by_length`",
    "use_flash_attention_2": "it is now `attn_implementation: flash_attention_2`",
}

GONE: Mapping[str, str] = {
    **{key: f"it {reason}" for key, (_, reason) in MEANS_NOTHING.items() if reason},
    **{key: reason for key, reason in REFUSED.items() if key not in ("packing_strategy", "dataset_kwargs")},
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
