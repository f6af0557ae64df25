"""Older recipes become ours with every change listed, or are refused with a reason at the line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from training_ready import cli
from training_ready.recipe.faults import RecipeError
from training_ready.recipe.load import load_recipe
from training_ready.recipe.migrate import Migration, migrate

from .old_recipes import MIXER, MIXTURE, TEMPLATE

CORPUS = "final_dataset/x/manifest.json"

COMMON = """\
model_name_or_path: org/base
model_revision: main
torch_dtype: bfloat16
attn_implementation: flash_attention_2
bf16: true
gradient_accumulation_steps: 2
gradient_checkpointing: true
gradient_checkpointing_kwargs:
  use_reentrant: False
hub_model_id: a-model
hub_strategy: every_save
learning_rate: 2.0e-05
log_level: info
logging_steps: 5
logging_strategy: steps
lr_scheduler_type: cosine
max_steps: -1
num_train_epochs: 1
output_dir: data/a-model
overwrite_output_dir: true
per_device_eval_batch_size: 8
per_device_train_batch_size: 16
push_to_hub: true
remove_unused_columns: true
report_to:
- wandb
save_strategy: "steps"
save_steps: 100
save_total_limit: 1
seed: 42
warmup_ratio: 0.1
"""

# name -> (text, family, keys that stop the migration)
SHAPES: dict[str, tuple[str, str, set[str]]] = {
    "full with an inline template": (
        COMMON + TEMPLATE + MIXTURE + "max_seq_length: 2048\ndo_eval: true\neval_strategy: epoch\n",
        "alignment-handbook",
        set(),
    ),
    "old packing and foreign code": (
        COMMON
        + MIXTURE
        + "max_length: 65536\npacking: true\npacking_strategy: ffd\ntrust_remote_code: true\n",
        "alignment-handbook",
        {"packing_strategy", "trust_remote_code"},
    ),
    "empty system message": (
        COMMON + MIXER + "auto_insert_empty_system_msg: true\n",
        "alignment-handbook",
        {"auto_insert_empty_system_msg"},
    ),
    "open-r1 distillation": (
        COMMON
        + TEMPLATE
        + "dataset_name: org/set\ndataset_configs:\n- all\ndataset_num_proc: 48\nuse_liger: true\n"
        "packing: true\nmax_seq_length: 32768\ndo_eval: false\neval_strategy: 'no'\n"
        "wandb_project: p\nwandb_entity: e\nhub_model_revision: main\nsystem_prompt: null\nbenchmarks: []\n",
        "open-r1",
        set(),
    ),
    "open-r1 with its own script's keys": (
        COMMON + "dataset_name: org/set\ndataset_config: part\nuse_liger: true\nsystem_prompt: Be kind.\n"
        "benchmarks:\n- math\ncallbacks:\n- push_to_hub_revision\n",
        "open-r1",
        {"system_prompt", "benchmarks", "callbacks"},
    ),
    "open-r1 reinforcement": (
        COMMON
        + "dataset_name: org/set\nuse_vllm: true\nvllm_device: auto\nnum_generations: 16\nreward_funcs: [a]\n"
        "max_prompt_length: 512\nmax_completion_length: 1024\nwandb_project: p\n",
        "open-r1",
        {
            "use_vllm",
            "vllm_device",
            "num_generations",
            "reward_funcs",
            "max_prompt_length",
            "max_completion_length",
        },
    ),
    "older TRL": (
        "model_name_or_path: m\ntorch_dtype: auto\ndataset_name: org/set\nmax_seq_length: 512\nno_cuda: true\n"
        "use_flash_attention_2: true\nsave_safetensors: true\nloss_type: chunked_nll\ngroup_by_length: false\n"
        "packing_strategy: bfd\nlogging_dir: logs\nnum_processes: 8\naccelerate_config: zero3\n"
        "dataset_kwargs: {skip_prepare_dataset: true}\n",
        "an older TRL",
        set(),
    ),
    "older TRL with options that are gone": (
        "model_name_or_path: m\ntorch_dtype: auto\ndataset_name: org/set\nmax_seq_length: 512\n"
        "num_of_sequences: 1024\ntokenizer_name_or_path: other\ndataset_kwargs: {add_special_tokens: true}\n"
        "packing_strategy: bfd-requeue\ngroup_by_length: true\nhub_strategy: all_checkpoints\n",
        "an older TRL",
        {
            "num_of_sequences",
            "tokenizer_name_or_path",
            "dataset_kwargs",
            "packing_strategy",
            "group_by_length",
            "hub_strategy",
        },
    ),
}


def run(folder: Path, text: str, **options: Any) -> Migration:
    path = folder / "old.yaml"
    path.write_text(text, encoding="utf-8")
    return migrate(path, **{"corpus": CORPUS, "output": folder / "new.yaml", **options})


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_migrates_or_is_refused_for_its_own_keys(tmp_path: Path, name: str) -> None:
    text, family, refused = SHAPES[name]
    if refused:
        with pytest.raises(RecipeError) as caught:
            run(tmp_path, text)
        assert {fault.key for fault in caught.value.faults} == refused
        lines = text.splitlines()
        for fault in caught.value.faults:
            assert lines[(fault.origin.line or 0) - 1].startswith(fault.key)
        return
    done = run(tmp_path, text)
    assert done.family == family
    (written, *rest) = done.write(tmp_path / "new.yaml")
    assert load_recipe(written) == done.recipe
    assert done.recipe.data.corpus == CORPUS
    assert bool(rest) == ("chat_template" in text)


@pytest.mark.parametrize("name", SHAPES)
def test_none_is_taken_for_a_recipe_of_ours(tmp_path: Path, name: str) -> None:
    text, family, _ = SHAPES[name]
    (tmp_path / "old.yaml").write_text(text)
    with pytest.raises(
        RecipeError, match=f"looks like a recipe of {family}; run: training-ready recipe migrate"
    ):
        load_recipe(tmp_path / "old.yaml")


def test_every_value_arrives(tmp_path: Path) -> None:
    done = run(tmp_path, SHAPES["full with an inline template"][0])
    trl = done.recipe.trl
    assert trl["dtype"] == "bfloat16"
    assert trl["warmup_steps"] == 0.1
    assert trl["max_length"] == 2048
    assert trl["activation_checkpointing"] is True
    assert trl["activation_checkpointing_kwargs"] == {"use_reentrant": False}
    assert trl["chat_template_path"] == str(tmp_path / "new.jinja")
    assert done.template == "{% for m in messages %}\n{{ m['content'] + eos_token }}${x}\n{% endfor %}"
    assert done.recipe.data.eval_split == "val"
    assert done.recipe.release.repo_id == "a-model"
    kept = set(COMMON.splitlines()) - {line for line in COMMON.splitlines() if line.startswith((" ", "-"))}
    gone = {"torch_dtype", "overwrite_output_dir", "warmup_ratio", "gradient_checkpointing"}
    gone |= {"gradient_checkpointing_kwargs", "hub_model_id", "hub_strategy", "push_to_hub"}
    assert {line.partition(":")[0] for line in kept} - gone <= trl.keys()
    done.write(tmp_path / "new.yaml")
    assert (tmp_path / "new.jinja").read_text() == done.template


def test_every_change_is_listed_with_its_line_and_the_meaning_of_a_weight(tmp_path: Path) -> None:
    text = SHAPES["full with an inline template"][0]
    changes = run(tmp_path, text).changes
    by_key = {change.old: change for change in changes}
    lines = text.splitlines()
    for old in ("torch_dtype", "warmup_ratio", "max_seq_length", "overwrite_output_dir", "chat_template"):
        assert lines[(by_key[old].origin.line or 0) - 1].startswith(old)
    half = by_key["dataset_mixture: org/chat default train_sft"]
    assert "0.5 of its own rows" in half.meaning
    assert "`fraction`" in half.meaning
    assert "all rows" in by_key["dataset_mixture: org/other train"].meaning


def test_values_of_an_older_trl(tmp_path: Path) -> None:
    recipe = run(tmp_path, SHAPES["older TRL"][0]).recipe
    assert recipe.trl["attn_implementation"] == "flash_attention_2"
    assert {"packing_strategy", "group_by_length", "dataset_kwargs"}.isdisjoint(recipe.trl)
    assert recipe.trl["loss_type"] == "nll"
    assert recipe.trl["use_cpu"] is True
    assert (recipe.launch.num_processes, recipe.launch.accelerate_config) == (8, "zero3")
    assert recipe.env == {"TENSORBOARD_LOGGING_DIR": "logs"}


def test_without_a_corpus_the_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="training-ready data build") as caught:
        run(tmp_path, COMMON + MIXTURE, corpus=None)
    assert {fault.key for fault in caught.value.faults} == {"dataset_mixture"}


def test_what_means_something_goes_only_by_name(tmp_path: Path) -> None:
    text = SHAPES["old packing and foreign code"][0]
    done = run(tmp_path, text, drop=["packing_strategy", "trust_remote_code"])
    assert {"packing_strategy", "trust_remote_code"}.isdisjoint(done.recipe.trl)
    assert [change.meaning for change in done.changes if change.old == "packing_strategy"] == [
        "dropped as asked"
    ]
    with pytest.raises(RecipeError, match="a key that the recipe does not have"):
        run(tmp_path, text, drop=["packing_strategy", "trust_remote_code", "not_there"])


@pytest.mark.parametrize(
    ("extra", "key", "words"),
    [
        ("dtype: float16\n", "torch_dtype", "keep one"),
        ("train_sampling_strategy: sequential\n", "train_sampling_strategy", "the stream shuffles"),
        ("run_name: hf_abcdefghijklmnopqrstuv\n", "run_name", "Hugging Face token"),
        ("learning_rte: 1\n", "learning_rte", "no such key"),
        ("max_length: x\n", "max_length", "whole number"),
    ],
)
def test_what_cannot_be_kept_exactly(tmp_path: Path, extra: str, key: str, words: str) -> None:
    with pytest.raises(RecipeError) as caught:
        run(tmp_path, COMMON + "dataset_name: s\n" + extra)
    assert [(fault.key, words in fault.message) for fault in caught.value.faults] == [(key, True)]


@pytest.mark.parametrize(
    ("text", "repo_id"),
    [
        ("push_to_hub: true\noutput_dir: data/my-run/\n", "my-run"),
        ("push_to_hub: true\noutput_dir: data/my-run\nhub_model_id: org/x\n", "org/x"),
        ("push_to_hub: false\nhub_model_id: org/x\n", "org/x"),
        ("push_to_hub: false\n", None),
    ],
)
def test_where_a_push_went(tmp_path: Path, text: str, repo_id: str | None) -> None:
    assert run(tmp_path, "model_name_or_path: m\ndataset_name: s\n" + text).recipe.release.repo_id == repo_id


def test_a_push_to_nowhere_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="`output_dir`, which is not set"):
        run(tmp_path, "model_name_or_path: m\ndataset_name: s\npush_to_hub: true\n")


@pytest.mark.parametrize(
    ("text", "warmup"),
    [
        ("warmup_ratio: 0.1\nwarmup_steps: 20\n", 20),
        ("warmup_ratio: 0.1\nwarmup_steps: 0\n", 0.1),
        ("warmup_ratio: 0\n", 0.0),
        ("warmup_steps: 20\n", 20),
    ],
)
def test_which_warm_up_held(tmp_path: Path, text: str, warmup: float) -> None:
    assert (
        run(tmp_path, "model_name_or_path: m\ndataset_name: s\n" + text).recipe.trl["warmup_steps"] == warmup
    )


def test_a_ratio_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="not a share of the run"):
        run(tmp_path, "model_name_or_path: m\ndataset_name: s\nwarmup_ratio: 3\n")


def test_the_command_writes_and_overwrites_nothing(tmp_path: Path) -> None:
    old = tmp_path / "old.yaml"
    old.write_text(SHAPES["full with an inline template"][0])
    words = ["recipe", "migrate", str(old), "--corpus", CORPUS, "--output", str(tmp_path / "new.yaml")]
    done = CliRunner().invoke(cli.app, words)
    assert done.exit_code == 0, done.output
    assert "torch_dtype -> dtype" in done.stdout
    assert load_recipe(tmp_path / "new.yaml").trl["dtype"] == "bfloat16"
    again = CliRunner().invoke(cli.app, words)
    assert "exists" in str(again.exception)
