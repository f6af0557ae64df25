"""A run goes on only where its recipe still makes the same function of a checkpoint's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors.torch import load_file

from training_ready.recipe.load import load_recipe
from training_ready.training.checkpoints import ResumeError
from training_ready.training.same_model import refuse_other_model

from . import dense_base

LORA = "use_peft: true\nlora_r: 4\nlora_alpha: 8\nlora_target_modules: [q_proj, o_proj]\n"
ADAPTERS = "moe: {adapters: {rank: 4, alpha: 8}}\n"
SHARED = "moe: {shared_base: {experts: 3, top_k: 2, rank: 4, alpha: 8}}\n"
NF4 = "moe: {experts_4bit: nf4, adapters: {rank: 4, alpha: 8}}\n"
SCRATCH = """model:
  config: {model_type: mixtral, num_local_experts: 4, num_experts_per_tok: 2, layer_types: [a, b]}
  tokenizer: {vocab_size: 600}
"""
Run = Callable[..., Path]


@pytest.fixture
def run(corpus_environment: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Trains a recipe's text in this process."""
    from training_ready.training.run import run_sft

    for name, value in corpus_environment.items():
        monkeypatch.setenv(name, value)

    def start(text: str, *overrides: str) -> Path:
        path = tmp_path / "here.yaml"
        path.write_text(text, encoding="utf-8")
        return run_sft(load_recipe(path, overrides), Console(quiet=True))

    return start


@pytest.mark.parametrize(
    ("extra", "override", "says", "file"),
    [
        (LORA, "lora_alpha=64", "lora_alpha: 8 then, 64 now", "adapter_model"),
        (ADAPTERS, "moe.adapters.alpha=64", "moe.adapters.alpha: 8.0 then, 64.0 now", "adapter_model"),
        (SHARED, "moe.shared_base.top_k=3", "moe.shared_base.top_k: 2 then, 3 now", "shared_base"),
    ],
    ids=["LoRA", "expert adapters", "shared base"],
)
def test_the_same_weights_under_another_function_are_refused(
    run: Run, tmp_path: Path, extra: str, override: str, says: str, file: str
) -> None:
    sparse = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": None}
    kind = ("mixtral", sparse) if extra == ADAPTERS else ("mistral", {})
    base = dense_base.write_model(tmp_path / "base", kind[0], **kind[1])
    text = f"output_dir: {tmp_path / 'run'}\nmodel_name_or_path: {base}\n{dense_base.RECIPE}{extra}"
    run(text, "budget.max_hours=1.0e-7")
    again = shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=shutil.ignore_patterns(".lock"))
    begun = tmp_path / "run/checkpoint-1"
    with pytest.raises(ResumeError) as refusal:
        run(text, f"output_dir={tmp_path / 'other'}", f"resume_from_checkpoint={begun}", override)
    assert f"{begun} holds weights of another model ({says})" in str(refusal.value)
    assert "another output_dir" in str(refusal.value)

    # What is not the function may change.
    run(text, f"output_dir={again}", "resume_from_checkpoint=auto", "learning_rate=1.0e-3", "max_steps=2")
    assert json.loads((again / "summary.json").read_text())["steps"] == 2
    before, after = (load_file(again / f"checkpoint-{step}/{file}.safetensors") for step in (1, 2))
    assert before.keys() == after.keys()
    assert any(not before[name].equal(after[name]) for name in before)


def checkpoint_of(tmp_path: Path, text: str) -> Path:
    """What a checkpoint knows of the recipe that it was saved under."""
    path, folder = tmp_path / "then.yaml", tmp_path / "checkpoint-4"
    path.write_text(whole(text), encoding="utf-8")
    folder.mkdir()
    (folder / "recipe.yaml").write_text(load_recipe(path).to_yaml(), encoding="utf-8")
    return folder


def whole(text: str) -> str:
    return "data: {corpus: a}\n" + ("" if "model:" in text else "model_name_or_path: base\n") + text


def now(tmp_path: Path, text: str) -> None:
    path = tmp_path / "now.yaml"
    path.write_text(whole(text), encoding="utf-8")
    refuse_other_model(tmp_path / "checkpoint-4", load_recipe(path))


@pytest.mark.parametrize(
    ("then", "changed", "says"),
    [
        (LORA, LORA + "use_rslora: true\n", "use_rslora: false then, true now"),
        (LORA, LORA + "use_dora: true\n", "use_dora: false then, true now"),
        (LORA, LORA.replace("lora_r: 4", "lora_r: 8"), "lora_r: 4 then, 8 now"),
        (LORA, LORA.replace("lora_alpha: 8", ""), "lora_alpha: 8 then, 32 now"),
        (
            LORA,
            LORA.replace("o_proj", "v_proj"),
            "lora_target_modules: [o_proj, q_proj] then, [q_proj, v_proj] now",
        ),
        (LORA, LORA + "load_in_4bit: true\n", "load_in_4bit: false then, true now"),
        (LORA, "", "use_peft: true then, false now"),
        ("", LORA, "use_peft: false then, true now"),
        (ADAPTERS, ADAPTERS.replace("rank: 4", "rank: 8"), "moe.adapters.rank: 4 then, 8 now"),
        (
            ADAPTERS,
            ADAPTERS.replace("}}", ", projections: [down_proj]}}"),
            "moe.adapters.projections: [down_proj, gate_up_proj] then, [down_proj] now",
        ),
        (ADAPTERS, LORA, "moe.adapters: {alpha: 8.0, "),
        (SHARED, SHARED.replace("alpha: 8", "alpha: 4"), "moe.shared_base.alpha: 8.0 then, 4.0 now"),
        (ADAPTERS, NF4, "moe.experts_4bit: null then, nf4 now"),
        (NF4, NF4.replace("nf4", "nf4_double"), "moe.experts_4bit: nf4 then, nf4_double now"),
        (
            SCRATCH,
            SCRATCH.replace("per_tok: 2", "per_tok: 3"),
            "model.config.num_experts_per_tok: 2 then, 3 now",
        ),
        (SCRATCH, SCRATCH.replace("[a, b]", "[b, a]"), "model.config.layer_types: [a, b] then, [b, a] now"),
    ],
)
def test_every_key_that_makes_the_function_is_named(
    tmp_path: Path, then: str, changed: str, says: str
) -> None:
    checkpoint_of(tmp_path, then)
    now(tmp_path, then)
    with pytest.raises(ResumeError) as refusal:
        now(tmp_path, changed)
    assert says in str(refusal.value)
    assert str(refusal.value).count(" then, ") == 1 + ("{" in says)


@pytest.mark.parametrize(
    ("then", "changed"),
    [
        (LORA, "use_rslora: false\n" + LORA.replace("[q_proj, o_proj]", "[o_proj, q_proj]")),
        (LORA, LORA + "lora_dropout: 0.2\nlearning_rate: 1.0e-6\nmax_steps: 99\n"),
        ("use_peft: true\n", "use_peft: true\nlora_r: 16\nlora_alpha: 32\n"),
        ("use_peft: false\nlora_r: 8\n", "use_peft: false\nlora_r: 16\n"),
        (ADAPTERS, "moe: {z_loss: 0.1, adapters: {rank: 4, alpha: 8.0, dropout: 0.1}}\n"),
        (SCRATCH, SCRATCH.replace("layer_types", "attention_dropout: 0.1, layer_types")),
        (SHARED, SHARED.replace("top_k: 2, ", "").replace("alpha: 8", "alpha: 8, dropout: 0.1, start: mix")),
    ],
)
def test_what_is_written_otherwise_or_is_no_part_of_the_function_goes_on(
    tmp_path: Path, then: str, changed: str
) -> None:
    checkpoint_of(tmp_path, then)
    now(tmp_path, changed)


def test_a_checkpoint_that_does_not_know_its_recipe_is_refused(tmp_path: Path) -> None:
    recipe = checkpoint_of(tmp_path, LORA) / "recipe.yaml"
    for broken in ("[", "- a\n", "moe: {adapters: 3}\n"):
        recipe.write_text(broken, encoding="utf-8")
        with pytest.raises(ResumeError, match=r"no readable recipe\.yaml"):
            now(tmp_path, LORA)
    recipe.unlink()
    with pytest.raises(ResumeError, match=r"no readable recipe\.yaml"):
        now(tmp_path, LORA)


def test_keys_of_another_version_in_the_saved_recipe_are_no_obstacle(tmp_path: Path) -> None:
    recipe = checkpoint_of(tmp_path, ADAPTERS) / "recipe.yaml"
    saved = yaml.safe_load(recipe.read_text(encoding="utf-8"))
    saved["moe"]["adapters"]["forgotten"] = saved["forgotten"] = 1
    recipe.write_text(yaml.safe_dump(saved), encoding="utf-8")
    now(tmp_path, ADAPTERS)
