"""Every mistake is found at its line, under its key, with a message that says what to do."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from training_ready.recipe.faults import RecipeError
from training_ready.recipe.load import load_recipe

MODEL = "model_name_or_path: org/model\n"
DATA = "data: {corpus: final_dataset/x/manifest.json}\n"
HEAD = MODEL + DATA
EVAL = MODEL + "data: {corpus: c, eval_split: val}\n"
BEST = EVAL + "load_best_model_at_end: true\neval_strategy: steps\n"
JOB = "launch:\n  ovh:\n    image: i\n    flavor: f\n    region: r\n"
SCRATCH = DATA + "model:\n  tokenizer: {vocab_size: 300}\n  config: {model_type: llama, vocab_size: 300}\n"

# (name, recipe with `#!` behind the line at fault, key, words that the message must hold)
MISTAKES = [
    # ---- keys
    ("typing error", HEAD + "learning_rte: 1e-3 #!\n", "learning_rte", "did you mean `learning_rate`?"),
    ("typing error in a section", MODEL + "data:\n  corpus: c\n  eval_splt: val #!\n",
     "data.eval_splt", "`eval_split`"),
    ("TRL key inside a section", MODEL + "data:\n  corpus: c\n  max_length: 5 #!\n", "data.max_length", "top level"),
    ("section key outside", HEAD + "max_hours: 3 #!\n", "max_hours", "did you mean `budget.max_hours`?"),
    ("nothing near", HEAD + "zzzzzz: 3 #!\n", "zzzzzz", "recipe schema` lists"),
    ("unknown deep key", HEAD + JOB + "    gpu: 2 #!\n",
     "launch.ovh.gpu", "did you mean `gpus`?"),
    ("key twice", HEAD + "seed: 1\nseed: 2 #!\n", "seed", "first at"),
    ("key twice in a section", MODEL + "data:\n  corpus: c\n  corpus: d #!\n", "data.corpus", "written twice"),
    ("merge key", HEAD + "model_init_kwargs:\n  <<: {a: 1} #!\n", "model_init_kwargs.<<", "extends"),
    ("python tag", HEAD + "run_name: !!python/name:os.system x #!\n", "run_name", "not allowed"),
    ("old key", HEAD + "torch_dtype: bfloat16 #!\n", "torch_dtype", "`dtype`"),
    ("old warm-up", HEAD + "warmup_ratio: 0.1 #!\n", "warmup_ratio", "`warmup_steps`"),
    ("data by TRL", MODEL + "dataset_name: org/set #!\n", "dataset_name", "training-ready data build"),
    ("data by a mixture", MODEL + "datasets: [{path: org/set}] #!\n", "datasets", "not supported yet"),
    # ---- types
    ("text for a number", HEAD + "learning_rate: fast #!\n", "learning_rate", "expected a number"),
    ("comma in a number", HEAD + "max_length: 4,096 #!\n", "max_length", "'4,096'"),
    ("float for a count", HEAD + "max_steps: 1e3 #!\n", "max_steps", "without a decimal point or exponent"),
    ("decimal for a count", HEAD + "lora_r: 16.0 #!\nuse_peft: true\n", "lora_r", "whole number"),
    ("word for a boolean", HEAD + "packing: maybe #!\n", "packing", "true or false"),
    ("number for a boolean", HEAD + "packing: 1 #!\n", "packing", "true or false"),
    ("list for a number", HEAD + "max_length: [1, 2] #!\n", "max_length", "is a list"),
    ("mapping for text", HEAD + "run_name: {a: 1} #!\n", "run_name", "is a mapping"),
    ("null for a number", HEAD + "learning_rate: #!\n", "learning_rate", "is null"),
    ("number in a list of texts is a mapping", HEAD + "lora_target_modules:\n- {a: 1} #!\nuse_peft: true\n",
     "lora_target_modules[0]", "expected text"),
    ("octal", HEAD + "max_length: 0512 #!\n", "max_length", "octal"),
    ("infinite", HEAD + "learning_rate: 1e999 #!\n", "learning_rate", "too large"),
    ("not a number", HEAD + "learning_rate: .nan #!\n", "learning_rate", "expected a number"),
    ("ambiguous word in a free mapping", HEAD + "model_init_kwargs:\n  use_cache: no #!\n",
     "model_init_kwargs.use_cache", "true, false or quotes"),
    ("section is a word", MODEL + "data: final_dataset/x/manifest.json #!\n", "data", "`corpus`"),
    ("env is a list", HEAD + "env: [A=1] #!\n", "env", "mapping"),
    ("env name", HEAD + "env:\n  MY-VAR: 1 #!\n", "env.MY-VAR", "not the name of an environment variable"),
    ("env value is null", HEAD + "env:\n  HOME_OF: #!\n", "env.HOME_OF", "is null"),
    # ---- choices
    ("old strategy", HEAD + "packing_strategy: ffd #!\n", "packing_strategy", "'bfd'"),
    ("short dtype", HEAD + "dtype: bf16 #!\n", "dtype", "'bfloat16'"),
    ("scheduler", HEAD + "lr_scheduler_type: cosin #!\n", "lr_scheduler_type", "did you mean `cosine`?"),
    ("optimizer", HEAD + "optim: adamw #!\n", "optim", "expected one of"),
    ("role", MODEL + "data:\n  corpus: c\n  target_role: therapist #!\n", "data.target_role", "'assistant'"),
    ("stage", MODEL + "data:\n  corpus: c\n  stages: [stage1] #!\n", "data.stages[0]", "stage1_foundation"),
    ("overlong", HEAD + "stream:\n  overlong: cut #!\n", "stream.overlong", "'truncate'"),
    # ---- ranges
    ("negative epochs", HEAD + "num_train_epochs: -3 #!\n", "num_train_epochs", "> 0"),
    ("no accumulation", HEAD + "gradient_accumulation_steps: 0 #!\n", "gradient_accumulation_steps", ">= 1"),
    ("lost exponent", HEAD + "learning_rate: 2e5 #!\n", "learning_rate", "<= 1"),
    ("dropout of one", HEAD + "use_peft: true\nlora_dropout: 1 #!\n", "lora_dropout", "< 1"),
    ("half a step", HEAD + "save_steps: 10.5 #!\n", "save_steps", "whole number of steps"),
    ("zero steps", HEAD + "max_steps: 0 #!\n", "max_steps", "or -1"),
    ("no blocks", HEAD + "stream:\n  blocks_per_group: 0 #!\n",
     "stream.blocks_per_group", "greater than or equal to 1"),
    ("no hours", HEAD + "budget:\n  max_hours: 0 #!\n", "budget.max_hours", "greater than 0"),
    ("no language", HEAD + "release:\n  language: [] #!\n", "release.language", "at least 1"),
    ("repository", HEAD + "release:\n  repo_id: a/b/c #!\n", "release.repo_id", "pattern"),
    ("image missing", HEAD + "launch:\n  ovh: {flavor: f, region: r} #!\n", "launch.ovh.image", "is missing"),
    ("small vocabulary", DATA + "model:\n  config: {model_type: llama}\n  tokenizer:\n    vocab_size: 10 #!\n",
     "model.tokenizer.vocab_size", "258"),
    # ---- missing
    ("no model", DATA + "seed: 1\n", "model_name_or_path", "is missing"),
    ("no data", MODEL, "data", "data: {corpus"),
    ("no corpus", MODEL + "data: {eval_split: val} #!\n", "data.corpus", "is missing"),
    # ---- pairs: the model
    ("two models", HEAD + SCRATCH.removeprefix(DATA).replace("llama, vocab_size: 300}", "llama, vocab_size: 300} #!"),
     "model.config", "excludes `model_name_or_path`"),
    ("no model type", DATA + "model:\n  tokenizer: {vocab_size: 300}\n  config: {hidden_size: 64} #!\n",
     "model.config", "model_type"),
    ("no tokenizer", DATA + "model:\n  config: {model_type: llama} #!\n", "model.config", "model.tokenizer"),
    ("tokenizer too large", DATA + "model:\n  config: {model_type: llama, vocab_size: 300}\n  tokenizer:\n"
     "    vocab_size: 400 #!\n", "model.tokenizer.vocab_size", "400 tokens do not fit the 300 rows"),
    ("tokenizer alone", HEAD + "model:\n  tokenizer: {vocab_size: 300} #!\n",
     "model.tokenizer", "needs `model.config`"),
    ("four bits of nothing", SCRATCH + "load_in_4bit: true #!\nuse_peft: true #!\n", "load_in_4bit", "random"),
    ("revision of nothing", SCRATCH + "model_revision: v1 #!\n", "model_revision", "model_name_or_path"),
    ("too long for the positions", SCRATCH.replace("llama, ", "llama, max_position_embeddings: 512, ")
     + "max_length: 1024 #!\n", "max_length", "1024 > model.config.max_position_embeddings 512"),
    ("four and eight bits", HEAD + "use_peft: true\nload_in_4bit: true\nload_in_8bit: true #!\n",
     "load_in_8bit", "keep one"),
    ("quantized without LoRA", HEAD + "load_in_4bit: true #!\n", "load_in_4bit", "use_peft: true"),
    ("LoRA without use_peft", HEAD + "lora_r: 8 #!\n", "lora_r", "use_peft: true"),
    ("LoRA on the head", HEAD + "use_peft: true\nlora_target_modules: [q_proj, lm_head] #!\n",
     "lora_target_modules", "lm_head"),
    ("experts with dropout", HEAD + "use_peft: true\nlora_target_parameters: [mlp.experts.gate_up_proj] #!\n",
     "lora_target_parameters", "lora_dropout is 0.05"),
    ("foreign code", HEAD + "trust_remote_code: true #!\n", "trust_remote_code", "downloaded"),
    # ---- pairs: the data
    ("packs of no length", HEAD + "max_length: null\npacking: true #!\n", "packing", "`max_length`"),
    ("padding-free alone", HEAD + "padding_free: true #!\n", "padding_free", "max_length 1024"),
    ("evaluation of nothing", HEAD + "eval_strategy: steps #!\n", "eval_strategy", "data.eval_split"),
    ("evaluation asked twice", HEAD + "do_eval: true #!\n", "do_eval", "data.eval_split"),
    ("evaluation on learned rows", MODEL + "data:\n  corpus: c\n  eval_split: train #!\n",
     "data.eval_split", "'train'"),
    ("the wrong turns", MODEL + "data: {corpus: c, target_role: user}\nassistant_only_loss: true #!\n",
     "assistant_only_loss", "target_role"),
    # ---- pairs: the schedule
    ("warm-up longer than the run", HEAD + "max_steps: 100\nwarmup_steps: 200 #!\n",
     "warmup_steps", "200 steps of warm-up > 100"),
    ("warm-up and decay", HEAD + "max_steps: 100\nwarmup_steps: 60\nlr_scheduler_type: warmup_stable_decay\n"
     "lr_scheduler_kwargs: {num_decay_steps: 50} #!\n", "lr_scheduler_kwargs", "60 + decay 50 = 110"),
    ("no least rate", HEAD + "lr_scheduler_type: cosine_with_min_lr #!\n", "lr_scheduler_type", "0 are set"),
    ("no decay", HEAD + "lr_scheduler_type: warmup_stable_decay #!\n", "lr_scheduler_type", "num_decay_steps"),
    ("plateau without evaluation", HEAD + "lr_scheduler_type: reduce_lr_on_plateau #!\n",
     "lr_scheduler_type", "eval_strategy"),
    ("best of nothing", HEAD + "save_strategy: best #!\n", "save_strategy", "eval_strategy"),
    ("best of other steps", BEST + "eval_steps: 40\nsave_steps: 100 #!\n",
     "save_steps", "100 = 2 x 40 + 20"),
    ("best of other strategies", EVAL + "load_best_model_at_end: true #!\neval_strategy: epoch\n",
     "load_best_model_at_end", "save_strategy is steps"),
    ("steps and shares", BEST + "eval_steps: 0.1\nsave_steps: 100 #!\n",
     "save_steps", "both be shares"),
    # ---- pairs: the machine
    ("two halves", HEAD + "bf16: true\nfp16: true #!\n", "fp16", "excludes `bf16`"),
    ("prefetch without workers", HEAD + "dataloader_prefetch_factor: 2 #!\n",
     "dataloader_prefetch_factor", "num_workers"),
    ("two shardings", HEAD + "deepspeed: ds.json\nfsdp: full_shard #!\n", "fsdp", "excludes `deepspeed`"),
    ("job dies first", HEAD + "budget:\n  max_hours: 6 #!\n" + JOB + "    timeout_hours: 4\n",
     "budget.max_hours", "6 h >= launch.ovh.timeout_hours 4 h"),
    ("more processes than GPUs", HEAD + JOB + "    gpus: 4\n  num_processes: 8 #!\n",
     "launch.num_processes", "8 processes on 4 GPUs"),
    # ---- references to the environment
    ("variable not set", HEAD + "run_name: ${NOT_SET_ANYWHERE} #!\n", "run_name", "export NOT_SET_ANYWHERE"),
    ("secret variable", HEAD + "run_name: ${HF_TOKEN} #!\n", "run_name", "secrets stay in the environment"),
    ("open brace", HEAD + "run_name: a${b #!\n", "run_name", "$${"),
    # ---- secrets
    ("hub token", HEAD + "hub_token: abc #!\n", "hub_token", "secret"),
    ("token anywhere", HEAD + "run_name: hf_abcdefghijklmnopqrstuvwxyz #!\n", "run_name", "Hugging Face token"),
    ("access key", HEAD + "env:\n  OTHER: AKIAABCDEFGHIJKLMNOP #!\n", "env.OTHER", "AWS"),
    ("secret variable in env", HEAD + "env:\n  AWS_SECRET_ACCESS_KEY: abc #!\n",
     "env.AWS_SECRET_ACCESS_KEY", "named like"),
    ("password in a URL", MODEL + "data:\n  corpus: https://me:word@host/x #!\n",
     "data.corpus", "URL with a password"),
    ("secret of the job", HEAD + JOB + "    env:\n      HF_TOKEN: x #!\n",
     "launch.ovh.env.HF_TOKEN", "secret"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "key", "words"), [case[1:] for case in MISTAKES], ids=[case[0] for case in MISTAKES]
)
def test_mistake_is_found_at_its_line(tmp_path: Path, text: str, key: str, words: str) -> None:
    marked = [number for number, line in enumerate(text.splitlines(), 1) if line.endswith("#!")] or [1]
    path = tmp_path / "recipe.yaml"
    path.write_text(re.sub(r" ?#!", "", text), encoding="utf-8")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, environment={"HF_TOKEN": "x"})
    faults = caught.value.faults
    assert sorted(fault.origin.line or 0 for fault in faults) == marked, str(caught.value)
    mine = next(fault for fault in faults if fault.key == key)
    assert mine.origin.source == str(path)
    assert words in mine.message


def test_there_are_no_two_mistakes_of_one_name() -> None:
    assert len({case[0] for case in MISTAKES}) == len(MISTAKES) >= 60


def test_all_faults_at_once_sorted_by_line(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + "learning_rte: 1\nmax_length: x\ndata2: {}\nwarmup_steps: 5\nmax_steps: 2\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, ["--seed", "x"])
    assert [(fault.origin.line, fault.key) for fault in caught.value.faults] == [
        (3, "learning_rte"),
        (4, "max_length"),
        (5, "data2"),
        (6, "warmup_steps"),
        (None, "seed"),
    ]
    assert str(caught.value).splitlines()[0].endswith("5 faults")


def test_a_fault_in_a_base_is_shown_there(tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text(HEAD + "seed: x\n")
    (tmp_path / "recipe.yaml").write_text("extends: base.yaml\nmax_length: y\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(tmp_path / "recipe.yaml")
    assert [(Path(f.origin.source).name, f.origin.line) for f in caught.value.faults] == [
        ("base.yaml", 3),
        ("recipe.yaml", 2),
    ]


@pytest.mark.parametrize(
    ("text", "line", "words"),
    [
        ("a: [1, 2\nb: 3\n", 2, "YAML"),
        ("a: b: c\n", 1, "mapping values"),
        ("\tx: 1\n", 1, "tab"),
        ("a: 1\n---\nb: 2\n", 2, "more than one"),
        ("- a\n- b\n", 1, "a mapping of keys"),
        ("", 1, "empty"),
        ("# only a comment\n", 1, "empty"),
        ("a: &x [*x]\n", 1, ""),
    ],
)
def test_what_is_not_a_recipe_file(tmp_path: Path, text: str, line: int, words: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert caught.value.faults[0].origin.line == line
    assert words in str(caught.value)


def test_missing_file_names_the_way_to_the_shipped_recipes(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="no such file") as caught:
        load_recipe(tmp_path / "none.yaml")
    assert "recipe ls" in str(caught.value)


def test_an_alias_bomb_is_refused(tmp_path: Path) -> None:
    levels = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    levels += [f"a{n}: &a{n} [" + ", ".join([f"*a{n - 1}"] * 10) + "]" for n in range(1, 9)]
    path = tmp_path / "recipe.yaml"
    path.write_text("\n".join(levels))
    with pytest.raises(RecipeError, match="aliases"):
        load_recipe(path)


@pytest.mark.parametrize(
    "secret",
    [
        "hf_" + "a" * 30,
        "AKIA" + "B" * 16,
        "ghp_" + "c" * 36,
        "sk-" + "d" * 40,
        "postgres://u:" + "e" * 12 + "@h/db",
    ],
)
@pytest.mark.parametrize(
    "key", ["run_name", "hub_token", "learning_rate", "env.X", "unknown_key", "release.tags"]
)
def test_no_message_repeats_a_secret(tmp_path: Path, secret: str, key: str) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD)
    with pytest.raises(RecipeError) as caught:
        load_recipe(path, [f"{key}={secret}"])
    assert secret not in str(caught.value)
    assert key in str(caught.value)


def test_a_secret_that_a_reference_brings_in_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(HEAD + "run_name: ${NAME}\n")
    secret = "hf_" + "a" * 30
    with pytest.raises(RecipeError, match="Hugging Face token") as caught:
        load_recipe(path, environment={"NAME": secret})
    assert secret not in str(caught.value)


def test_an_old_recipe_is_told_from_a_typing_error(tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(MODEL + "torch_dtype: bfloat16\ndataset_mixer: {org/set: 1.0}\nwarmup_ratio: 0.1\n")
    with pytest.raises(RecipeError, match="looks like a recipe of alignment-handbook") as caught:
        load_recipe(path)
    assert f"training-ready recipe migrate {path}" in str(caught.value)
    path.write_text(HEAD + "warmup_ratio: 0.1\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert "looks like a recipe of" not in str(caught.value)
