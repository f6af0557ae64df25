"""The shapes of the recipes that alignment-handbook and open-r1 published: their keys, with values of our own.

Keys as in huggingface/alignment-handbook (``recipes/``, several revisions) and huggingface/open-r1; an entry is named
after the recipe it has the keys of.
"""

from __future__ import annotations

MODEL = """\
model_name_or_path: org/base
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
"""
TEMPLATE = "chat_template: \"{% for m in messages %}\\n{{ m['content'] + eos_token }}${x}\\n{% endfor %}\"\n"
MIXTURE = """\
dataset_mixture:
  datasets:
    - id: org/chat
      config: default
      split: train_sft
      columns: [messages]
      weight: 0.5
    - id: org/other
      split: train
      columns: [messages]
      weight: 1.0
  test_split_size: 1000
  seed: 0
dataset_num_proc: 12
"""
MIXER = """\
dataset_mixer:
  org/set: 1.0
dataset_splits:
- train
- test
preprocessing_num_workers: 12
"""
NAMED = "dataset_name: org/set\ndataset_config: all\ndataset_num_proc: 24\n"
RUN = """\
bf16: true
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
learning_rate: 2.0e-05
logging_steps: 5
num_train_epochs: 3
output_dir: data/a-model
per_device_train_batch_size: 16
seed: 42
"""
COSINE = "lr_scheduler_type: cosine\nlog_level: info\nwarmup_ratio: 0.1\n"
LEAST = (
    "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs:\n  min_lr_rate: 0.1\nlog_level: info\n"
    "warmup_ratio: 0.03\nmax_grad_norm: 0.2\n"
)
PUSH = "hub_model_id: a-model\npush_to_hub: true\n"
SFT = (
    "hub_strategy: every_save\nlogging_strategy: steps\nmax_steps: -1\noverwrite_output_dir: true\n"
    "per_device_eval_batch_size: 8\nreport_to:\n- wandb\n"
)
COLUMNS = "remove_unused_columns: true\n"
EVALUATED = "do_eval: true\neval_strategy: epoch\n"
UNEVALUATED = "do_eval: false\neval_strategy: 'no'\n"
STEPS = 'save_strategy: "steps"\nsave_steps: 100\nsave_total_limit: 1\n'
NEVER = 'save_strategy: "no"\n'
LORA = (
    "use_peft: true\nload_in_4bit: true\nlora_r: 16\nlora_alpha: 16\nlora_dropout: 0.05\n"
    "lora_target_modules:\n- q_proj\n- v_proj\n"
)

PREFERENCES = """\
beta: 0.01
per_device_eval_batch_size: 8
optim: adamw_torch
"""
PROMPTS = "max_prompt_length: 512\n"
OLD_EVALUATION = "do_eval: true\nevaluation_strategy: steps\neval_steps: 100\n"
NEW_EVALUATION = "do_eval: true\neval_strategy: steps\neval_steps: 100\n"
SCAN = (
    "model_name_or_path: org/base\ntorch_dtype: null\n"
    + MIXER
    + RUN
    + "lr_scheduler_type: cosine\nwarmup_ratio: 0.1\nloss_type: sigmoid\ndo_train: true\nhub_model_id: org/a-model\n"
    + "hub_model_revision: v1.0\npush_to_hub_revision: true\n"
    + OLD_EVALUATION
    + PREFERENCES
    + PROMPTS
    + STEPS
)
WITHOUT = "model_name_or_path: org/sft\ntorch_dtype: {}\n"
OLD_DPO = MIXER + RUN + COSINE + OLD_EVALUATION + PREFERENCES + PROMPTS + PUSH + "max_length: 1024\n"
NEW_DPO = MIXTURE + RUN + COSINE + NEW_EVALUATION + PREFERENCES + PROMPTS + PUSH + "max_length: 1024\n"
ORPO = (
    "beta: 0.05\nlr_scheduler_type: inverse_sqrt\nlog_level: info\nmax_length: 2048\nmax_prompt_length: 1792\n"
    "optim: adamw_bnb_8bit\nreport_to:\n- tensorboard\nwarmup_steps: 100\n"
)
HANDBOOK = MODEL + TEMPLATE + MIXTURE + RUN + COSINE + SFT + PUSH
SMOL3 = (
    MODEL
    + "trust_remote_code: true\n"
    + RUN
    + LEAST
    + UNEVALUATED
    + "run_name: a-name\nhub_strategy: every_save\npush_to_hub: true\nlogging_strategy: steps\nreport_to:\n- wandb\n"
    + "overwrite_output_dir: true\nsave_total_limit: 1\nuse_liger_kernel: true\n"
)
SMOL3_SFT = (
    TEMPLATE + MIXTURE + "eos_token: <|im_end|>\nddp_timeout: 18000\naverage_tokens_across_devices: true\n"
    "max_steps: -1\npacking: true\nmax_length: 65536\n"
)
OPEN_R1 = MODEL + RUN + LEAST + UNEVALUATED + SFT + PUSH
REFUSED_DPO = {"beta", "max_prompt_length"}

# name -> (text, the keys that stop the migration)
RECIPES: dict[str, tuple[str, set[str]]] = {
    # ----------------------------------------------------------------- alignment-handbook
    "constitutional-ai/sft/config_anthropic": (
        HANDBOOK + EVALUATED + COLUMNS + STEPS + "do_train: true\nmax_seq_length: 2048\n",
        set(),
    ),
    "constitutional-ai/sft/config_grok": (
        HANDBOOK + EVALUATED + COLUMNS + STEPS + "do_train: true\nmax_length: 2048\n",
        set(),
    ),
    "constitutional-ai/dpo/config_anthropic": (
        WITHOUT.format("null") + OLD_DPO.replace("adamw_torch", "rmsprop") + STEPS + "do_train: true\n",
        REFUSED_DPO,
    ),
    "gpt2-nl/cpt/config_full": (
        "model_name_or_path: org/base\nmodel_revision: main\ntorch_dtype: bfloat16\n"
        + MIXER
        + "dataset_configs:\n- tiny\n"
        + RUN
        + COSINE
        + SFT
        + PUSH
        + COLUMNS
        + UNEVALUATED
        + STEPS
        + "max_seq_length: 1024\n",
        set(),
    ),
    "gpt2-nl/sft/config_full": (
        "model_name_or_path: org/base\nmodel_revision: main\ntorch_dtype: bfloat16\n"
        + TEMPLATE
        + MIXER
        + RUN
        + COSINE
        + SFT
        + PUSH
        + COLUMNS
        + STEPS
        + "do_eval: true\nevaluation_strategy: epoch\nmax_seq_length: 1024\n",
        set(),
    ),
    "gpt2-nl/dpo/config_full": (
        WITHOUT.format("bfloat16") + OLD_DPO + STEPS + "report_to:\n- wandb\n",
        REFUSED_DPO,
    ),
    "mistral-capybara/orpo/config_full": (
        MODEL.replace("attn_implementation: flash_attention_2", "use_flash_attention_2: true")
        + TEMPLATE
        + MIXER
        + RUN.replace("False", "true")
        + ORPO
        + PUSH
        + NEVER,
        REFUSED_DPO,
    ),
    "pref_align_scan/dpo/config_openhermes": (
        SCAN,
        {*REFUSED_DPO, "loss_type", "hub_model_revision", "push_to_hub_revision"},
    ),
    "pref_align_scan/dpo/config_zephyr": (
        SCAN.replace("v1.0", "dpo-beta-0.01").replace("org/a-model", "a-model"),
        {*REFUSED_DPO, "loss_type", "hub_model_revision", "push_to_hub_revision"},
    ),
    "smollm/sft/config": (
        HANDBOOK
        + EVALUATED
        + COLUMNS
        + NEVER
        + "dataset_kwargs:\n  add_special_tokens: false\n  append_concat_token: false\nmax_length: 2048\n",
        set(),
    ),
    "smollm2/sft/config": (
        MODEL
        + TEMPLATE
        + NAMED
        + "dataset_train_split: train\ndataset_test_split: test\n"
        + RUN
        + COSINE
        + SFT
        + PUSH
        + EVALUATED
        + COLUMNS
        + NEVER
        + "max_length: 8192\n",
        set(),
    ),
    "smollm2/dpo/config": (
        WITHOUT.format("bfloat16") + NEW_DPO + NEVER + "hub_private_repo: true\nreport_to:\n- wandb\n",
        REFUSED_DPO,
    ),
    "smollm3/sft/mid": (
        SMOL3 + SMOL3_SFT + "save_strategy: steps\nsave_steps: 0.05\n",
        {"trust_remote_code"},
    ),
    "smollm3/sft/sft": (
        SMOL3 + SMOL3_SFT + "save_strategy: epoch\nassistant_only_loss: true\npacking_strategy: ffd\n",
        {"trust_remote_code", "packing_strategy"},
    ),
    "smollm3/dpo/apo": (
        SMOL3
        + MIXTURE
        + "beta: 0.05\nloss_type: apo_zero\nmax_length: 24576\npadding_free: true\n"
        + "save_strategy: steps\nsave_steps: 0.5\n",
        {"trust_remote_code", "beta", "loss_type", "padding_free"},
    ),
    "starchat2-15b/sft/config_v0.1": (HANDBOOK + EVALUATED + COLUMNS + NEVER + "max_length: 2048\n", set()),
    "starchat2-15b/dpo/config_v0.1": (
        WITHOUT.format("bfloat16") + NEW_DPO + NEVER + "report_to:\n- wandb\n",
        REFUSED_DPO,
    ),
    "zephyr-141b-A35b/orpo/config_full": (
        MODEL
        + TEMPLATE
        + "dataset_name: org/set\ndataset_train_split: train\ndataset_num_proc: 8\n"
        + RUN
        + ORPO
        + PUSH
        + NEVER,
        REFUSED_DPO,
    ),
    "zephyr-7b-beta/sft/config_full": (
        HANDBOOK + EVALUATED + COLUMNS + STEPS + "max_seq_length: 2048\n",
        set(),
    ),
    "zephyr-7b-beta/sft/config_qlora": (HANDBOOK + LORA + EVALUATED + STEPS + "max_length: 2048\n", set()),
    "zephyr-7b-beta/dpo/config_full": (WITHOUT.format("null") + NEW_DPO + STEPS, REFUSED_DPO),
    "zephyr-7b-beta/dpo/config_qlora": (
        WITHOUT.format("float16") + LORA + OLD_DPO.replace("adamw_torch", "paged_adamw_32bit") + STEPS,
        REFUSED_DPO,
    ),
    "zephyr-7b-gemma/sft/config_full": (
        MODEL.replace("attn_implementation: flash_attention_2", "use_flash_attention_2: true")
        + "tokenizer_name_or_path: org/tokenizer\n"
        + TEMPLATE
        + MIXER
        + RUN
        + COSINE
        + SFT
        + PUSH
        + COLUMNS
        + STEPS
        + "dataset_kwargs:\n  add_special_tokens: false\n  append_concat_token: false\ndo_eval: true\n"
        + 'evaluation_strategy: "epoch"\nmax_seq_length: 2048\n',
        {"tokenizer_name_or_path"},
    ),
    "zephyr-7b-gemma/dpo/config_full": (
        WITHOUT.format("bfloat16") + OLD_DPO + NEVER + "report_to:\n- wandb\n",
        REFUSED_DPO,
    ),
    # ---------------------------------------------------------------------------- open-r1
    "OlympicCoder-7B/sft": (
        OPEN_R1 + NAMED + 'packing: false\nmax_length: 32768\nsave_strategy: "steps"\nsave_steps: 0.2\n'
        "save_total_limit: 1\nuse_liger: true\n",
        set(),
    ),
    "OlympicCoder-32B/sft": (
        OPEN_R1
        + NAMED
        + "packing: false\nmax_length: 22528\nhub_always_push: true\noptim: paged_adamw_8bit\n"
        "save_only_model: true\nsave_strategy: epoch\nsave_total_limit: 1\nuse_liger: false\n",
        set(),
    ),
    "Qwen2.5-1.5B-Instruct/sft/config_demo": (
        OPEN_R1
        + TEMPLATE
        + "dataset_name: org/set\ndataset_configs:\n- all\ndataset_num_proc: 48\npacking: true\n"
        'max_seq_length: 32768\nsave_strategy: "epoch"\nsave_total_limit: 1\nuse_liger: true\n',
        set(),
    ),
    "OpenR1-Distill-7B/sft/config_distill": (
        OPEN_R1 + TEMPLATE + NAMED + "eos_token: <|im_end|>\nmax_length: 32768\nsave_strategy: epoch\n"
        "save_total_limit: 1\nuse_liger_kernel: true\n",
        set(),
    ),
}
