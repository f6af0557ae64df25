"""Every family, trained whole, through its attention, and through its experts: five steps, saved, loaded, equal."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM

from training_ready.recipe.load import load_recipe
from training_ready.release.export import load_checkpoint
from training_ready.storage.embedded import EmbeddedStore
from training_ready.training import run
from training_ready.training.moe_trainer import MoETrainer
from training_ready.training.tokenizer import train_tokenizer

from ..moe.conftest import small_config
from .moe_corpus import build_sixteen

RECIPE = """
data: {corpus: final_dataset/sixteen/manifest.json, eval_split: null}
dtype: float32
bf16: false
use_cpu: true
activation_checkpointing: true
max_length: 288
max_steps: 5
per_device_train_batch_size: 2
gradient_accumulation_steps: 2
learning_rate: 1.0e-2
logging_steps: 1
save_steps: 5
seed: 5
"""
FAMILIES = ["mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "phimoe", "gpt_oss", "deepseek_v3"]
LORA = "use_peft: true\nlora_r: 4\nlora_alpha: 8\nlora_target_modules: [q_proj, o_proj]\n"
ADAPTERS = "moe: {adapters: {rank: 4, alpha: 8, dropout: 0.1}}\n"
MODES = {"full": "", "attention": LORA, "experts": ADAPTERS, "both": LORA + ADAPTERS}
BALANCED_BY_A_BIAS = {"deepseek_v3"}


@pytest.fixture(scope="module")
def corpus(store_server: EmbeddedStore, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return build_sixteen(store_server, tmp_path_factory.mktemp("c"))


@pytest.fixture(scope="module")
def base_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny random model of a family with a tokenizer, in a folder."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train_tokenizer(["what goes through your mind"], vocab_size=260)

    def build(family: str) -> Path:
        path = folder / family
        if not path.exists():
            config = small_config(
                family,
                vocab_size=len(tokenizer),
                pad_token_id=tokenizer.pad_token_id,
                bos_token_id=tokenizer.pad_token_id,
                eos_token_id=tokenizer.eos_token_id,
                max_position_embeddings=512,
                router_jitter_noise=0.01,
                output_router_logits=False,
            )
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(path)
            tokenizer.save_pretrained(path)
        return path

    return build


Train = Callable[..., MoETrainer]


@pytest.fixture
def train(
    corpus: dict[str, str],
    base_model: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> Train:
    """Runs a recipe in this process and returns the trainer that ran."""
    kept: list[MoETrainer] = []

    class Kept(MoETrainer):
        def __init__(self, **kwargs: Any) -> None:
            super().__init__(**kwargs)
            kept.append(self)

    for name, value in corpus.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(run, "MoETrainer", Kept)

    def start(family: str, recipe: str, *overrides: str) -> MoETrainer:
        # Its sinks need eager attention, which the stream finds leaking between packed conversations.
        attention, packing = ("eager", "false") if family == "gpt_oss" else ("sdpa", "true")
        path = tmp_path / "recipe.yaml"
        path.write_text(
            f"output_dir: {tmp_path / 'run'}\nmodel_name_or_path: {base_model(family)}\n"
            f"attn_implementation: {attention}\npacking: {packing}\n{RECIPE}{recipe}",
            encoding="utf-8",
        )
        run.run_sft(load_recipe(path, overrides), Console(quiet=True))
        return kept[-1]

    return start


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 63).view(2, 30)
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def of(history: list[dict[str, Any]], name: str) -> list[float]:
    return [logs[name] for logs in history if name in logs]


def check(trainer: MoETrainer, family: str, mode: str, start: Path) -> None:
    history = trainer.state.log_history
    losses = of(history, "loss")
    assert len(losses) == 5
    assert all(map(math.isfinite, losses))
    trained = logits(trainer.model)
    loaded, _ = load_checkpoint(Path(trainer.args.output_dir) / "checkpoint-5")
    assert (trained - logits(loaded)).abs().max() < 1e-5
    before = AutoModelForCausalLM.from_pretrained(
        start, attn_implementation=loaded.config._attn_implementation
    )
    assert (trained - logits(before)).abs().max() > 1e-3
    balanced_by_loss = mode == "full" and family not in BALANCED_BY_A_BIAS
    assert len(of(history, "aux_loss")) == (5 if balanced_by_loss else 0)
    assert all(0.99 < value < 4.01 for value in of(history, "aux_loss_worst"))
    assert len(of(history, "moe/entropy_worst")) == 5
    for name, parameter in trainer.model.named_parameters():
        ours = {"full": True, "attention": "lora_" in name, "experts": "split_lora" in name}
        expected = ours.get(mode, "lora_" in name or "split_lora" in name)
        assert parameter.requires_grad == expected, name


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("family", FAMILIES)
def test_five_steps_saved_and_loaded(
    train: Train, base_model: Callable[[str], Path], family: str, mode: str
) -> None:
    check(train(family, MODES[mode]), family, mode, base_model(family))


def test_granite_which_fails_in_trl_trains_balanced(train: Train, base_model: Callable[[str], Path]) -> None:
    check(train("granitemoe", MODES["full"]), "granitemoe", "full", base_model("granitemoe"))


def test_the_biases_of_deepseek_move_with_the_load(train: Train, base_model: Callable[[str], Path]) -> None:
    trainer = train("deepseek_v3", "moe: {bias_rate: 0.01}")
    biases = [
        value for name, value in trainer.model.named_buffers() if name.endswith("e_score_correction_bias")
    ]
    assert len(biases) == 2
    for bias in biases:
        assert bias.abs().max() > 0.005
        assert bias.abs().max() <= 0.05 + 1e-6
    loaded, _ = load_checkpoint(Path(trainer.args.output_dir) / "checkpoint-5")
    saved = [value for name, value in loaded.named_buffers() if name.endswith("e_score_correction_bias")]
    assert all(torch.equal(a, b) for a, b in zip(biases, saved, strict=True))


def test_adapters_of_experts_and_attention_continue_where_they_stopped(train: Train, tmp_path: Path) -> None:
    recipe = (
        LORA + "moe: {adapters: {rank: 4, alpha: 8}}\nsave_strategy: steps\nlora_modules_to_save: [gate]\n"
    )
    whole = train("mixtral", recipe, "save_steps=2", f"output_dir={tmp_path / 'whole'}")
    half = train("mixtral", recipe, "save_steps=2", "budget.max_hours=1.0e-7")
    assert half.state.global_step == 1
    copied = shutil.copytree(tmp_path / "run", tmp_path / "again", ignore=shutil.ignore_patterns(".lock"))
    again = train("mixtral", recipe, "save_steps=2", "resume_from_checkpoint=auto", f"output_dir={copied}")
    expected = {name: p for name, p in whole.model.named_parameters() if p.requires_grad}
    found = {name: p for name, p in again.model.named_parameters() if p.requires_grad}
    assert expected.keys() == found.keys()
    assert any("split_lora" in name for name in expected)
    assert any("gate" in name for name in expected)
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert of(whole.state.log_history, "aux_loss")[-1] == of(again.state.log_history, "aux_loss")[-1]


def test_what_a_family_cannot_have_is_refused(train: Train) -> None:
    for family, recipe, reason in (
        ("deepseek_v3", "router_aux_loss_coef: 0.01", "balanced by a bias"),
        ("mixtral", LORA + "moe: {balance_coefficient: 0.01}", "the routers are frozen"),
        ("mixtral", "activation_checkpointing_kwargs: {use_reentrant: true}", "re-entrant"),
        ("phimoe", "moe: {fp32_router: true}", "in place"),
        ("mixtral", "pad_to_multiple_of: 8", "pad_to_multiple_of"),
    ):
        with pytest.raises(Exception, match=reason):
            train(family, recipe)


def test_each_evaluation_leaves_a_picture_and_no_balance_in_its_loss(train: Train, tmp_path: Path) -> None:
    trainer = train("mixtral", "eval_strategy: steps\neval_steps: 5\n", "data.eval_split=val")
    assert (tmp_path / "run/expert_load/step-000005.png").read_bytes().startswith(b"\x89PNG")
    history = trainer.state.log_history
    assert len(of(history, "eval_moe/entropy_worst")) == 1
    # Language loss alone: that of the same conversations without the trainer's router losses.
    trainer.router_losses = None
    assert trainer.evaluate()["eval_loss"] == pytest.approx(of(history, "eval_loss")[0], abs=1e-6)
    assert of(history, "aux_loss")[-1] > 0.9
