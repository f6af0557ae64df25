"""Recipes that are unusual and right: none may be refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from training_ready.recipe.load import load_recipe

HEAD = "model_name_or_path: org/model\ndata: {corpus: c}\n"
EVAL = "model_name_or_path: org/model\ndata: {corpus: c, eval_split: val}\n"
LORA = HEAD + "use_peft: true\n"
SCRATCH = (
    "data: {corpus: c}\nmodel:\n  tokenizer: {vocab_size: 512}\n"
    "  config: {model_type: mixtral, vocab_size: 512, max_position_embeddings: 2048, num_local_experts: 4}\n"
)

CORRECT = {
    "smallest": HEAD,
    "an S3 corpus": "model_name_or_path: m\ndata: {corpus: s3://bucket/final_dataset/x/manifest.json}\n",
    "a local model": "model_name_or_path: ./models/mine\ndata: {corpus: c}\n",
    "from scratch": SCRATCH + "max_length: 2048\n",
    "from scratch, smaller vocabulary than rows": SCRATCH.replace("{vocab_size: 512}", "{vocab_size: 400}"),
    "epochs and a limit of steps": HEAD + "num_train_epochs: 3\nmax_steps: 100\n",
    "no steps, no epochs, a share of warm-up": HEAD + "warmup_steps: 0.03\n",
    "warm-up as long as the run": HEAD + "max_steps: 10\nwarmup_steps: 10\n",
    "warm-up of an open run": HEAD + "warmup_steps: 5000\n",
    "an eval split that is not used yet": EVAL,
    "evaluation each epoch": EVAL
    + "eval_strategy: epoch\nsave_strategy: epoch\nload_best_model_at_end: true\n",
    "best by steps": EVAL
    + "eval_strategy: steps\neval_steps: 50\nsave_steps: 200\nload_best_model_at_end: true\n",
    "best by shares": EVAL
    + "eval_strategy: steps\neval_steps: 0.1\nsave_steps: 0.3\nload_best_model_at_end: true\n",
    "best saved only": EVAL + "eval_strategy: steps\nsave_strategy: best\nload_best_model_at_end: true\n",
    "no length, no packs": HEAD + "max_length: null\n",
    "QLoRA": LORA + "load_in_4bit: true\nlora_target_modules: all-linear\n",
    "experts without dropout": LORA + "lora_dropout: 0\nlora_target_parameters: [mlp.experts.gate_up_proj]\n",
    "LoRA kept in the file but off": HEAD + "use_peft: false\nlora_r: 8\nlora_alpha: 16\n",
    "a client is learned": "model_name_or_path: m\ndata: {corpus: c, target_role: user}\n",
    "special tokens are no secrets": HEAD + "eos_token: <|im_end|>\npad_token: <pad>\n",
    "ids of tokens are no secrets": SCRATCH.replace("num_local", "eos_token_id: 2, pad_token: x, num_local"),
    "a token that is null": HEAD + "hub_token: null\n",
    "least learning rate": HEAD
    + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr_rate: 0.1}\n",
    "stable then decay": HEAD
    + "max_steps: 100\nwarmup_steps: 10\nlr_scheduler_type: warmup_stable_decay\n"
    + "lr_scheduler_kwargs: {num_decay_steps: 90}\n",
    "both names of checkpointing": HEAD + "gradient_checkpointing: true\nactivation_checkpointing: true\n",
    "a job that outlives the budget": HEAD
    + "budget: {max_hours: 3.9}\nlaunch: {num_processes: 4, ovh: {image: i, flavor: f, region: r, gpus: 4, "
    + "timeout_hours: 4, env: {A: 1}, volumes: ['b@R:/m:ro']}}\n",
    "empty sections": HEAD + "stream: {}\nmoe:\nrelease: null\nlaunch: {ovh: null}\nenv: {}\n",
    "an anchor": HEAD + "model_init_kwargs: {a: &x {b: 1}, c: *x}\n",
    "windows line ends": HEAD.replace("\n", "\r\n"),
    "a byte-order mark": "\ufeff" + HEAD,
    "another alphabet": HEAD + "release: {summary: 'Für Gespräche – 対話', tags: [対話]}\n",
}


@pytest.mark.parametrize("name", CORRECT)
def test_it_is_read_and_its_text_gives_it_again(tmp_path: Path, name: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_bytes(CORRECT[name].encode())
    recipe = load_recipe(path, environment={})
    (tmp_path / "again.yaml").write_text(recipe.to_yaml(), encoding="utf-8")
    assert load_recipe(tmp_path / "again.yaml", environment={}) == recipe


def test_there_are_enough_of_them() -> None:
    assert len(CORRECT) >= 20
