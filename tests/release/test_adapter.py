"""An adapter leaves with a card that says what it is, and whoever follows that card gets the trained logits."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from huggingface_hub import ModelCard, snapshot_download
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from training_ready.moe.adapter_files import save_expert_adapters
from training_ready.moe.experts_lora import add_expert_adapters
from training_ready.release.card import render_card
from training_ready.release.card_adapter import Adapter
from training_ready.release.commands import release_publish
from training_ready.release.contents import ContentsError
from training_ready.release.export import load_checkpoint
from training_ready.release.facts import CardError, check_facts
from training_ready.release.hub_server import EmbeddedHub
from training_ready.release.publish import publish_release
from training_ready.release.targets.commands import release_export, release_verify

from .test_card import words
from .test_export import checkpoint_of, logits, tiny_model, tiny_tokenizer

RECIPE = """output_dir: runs/tiny-run
model_name_or_path: org/tiny
data:
  corpus: tiny/manifest.json
release:
  license: mit
  summary: A tiny one.
  intended_use: Tests.
"""
LIMITS = ["release.limits=Knows nothing at all."]


@pytest.fixture
def checkpoint(summary: dict[str, Any], run_folder: Callable[[], Path], tmp_path: Path) -> Path:
    """The last checkpoint of a finished run that trained a LoRA of the attention over a local base."""
    base = tmp_path / "base"
    tiny_model().save_pretrained(base)
    summary["model"] |= {"base_model": str(base), "base_revision": None}
    run = run_folder()
    (run / "recipe.yaml").write_text(RECIPE)
    lora = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(3)
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora)
    return checkpoint_of(run, model, tiny_tokenizer())


def add_experts(checkpoint: Path, base: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(base)
    add_expert_adapters(model, rank=4, alpha=8.0, projections=["gate_up_proj", "down_proj"])
    for name, weight in model.named_parameters():
        if name.endswith(".B"):
            torch.nn.init.normal_(weight, std=0.3)
    save_expert_adapters(model, checkpoint, base_model=str(base))


@pytest.mark.parametrize("experts", [False, True])
def test_whoever_follows_the_card_of_an_adapter_gets_what_was_trained(
    hub: EmbeddedHub, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, experts: bool
) -> None:
    if experts:
        add_experts(checkpoint, tmp_path / "base")
    trained = logits(load_checkpoint(checkpoint)[0])
    out = tmp_path / "adapter"
    release_export(checkpoint, out, "adapter", LIMITS)
    with pytest.raises(ContentsError, match=r"it was not verified.*release verify"):
        publish_release(out, "me/tiny", endpoint=hub.endpoint_url)
    release_verify(out, "adapter", checkpoint)
    release_publish(out, "me/tiny", endpoint=hub.endpoint_url)

    copy = Path(snapshot_download("me/tiny", endpoint=hub.endpoint_url, local_dir=tmp_path / "copy"))
    assert not (copy / "config.json").exists()
    card = ModelCard.load(copy / "README.md")
    assert (card.data.library_name, card.data.base_model) == ("peft", None)
    assert "an adapter, not a model" in card.text
    assert "That one is a local model, `base`" in card.text
    assert str(tmp_path) not in card.text
    assert re.search(r"\| PEFT \| verified \| not measured \| tokenizer: .* tensors, equal", card.text)
    assert (
        "LoRA of rank 4, alpha 8, on " + ("q_proj, v_proj, w1" if experts else "q_proj, v_proj") in card.text
    )
    [code] = re.findall(r"```python\n(.*?)```", card.text, flags=re.DOTALL)
    shutil.copytree(tmp_path / "base", copy / "base")
    monkeypatch.chdir(copy)
    known: dict[str, Any] = {}
    exec(code, known)  # noqa: S102 - the card is what is tested
    assert (logits(known["model"]) - trained).abs().max() < 1e-5
    assert (logits(tiny_model()) - trained).abs().max() > 1e-2
    assert known["model"].generation_config.eos_token_id == [2]
    assert known["tokenizer"].chat_template == tiny_tokenizer().chat_template


def test_an_adapter_whose_run_tells_too_little_gets_no_card_and_is_not_published(
    checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "adapter"
    for spoil, said in (
        (lambda: None, "does not say release.limits"),
        (
            lambda: shutil.copytree(checkpoint, checkpoint.with_name("checkpoint-4000")),
            "are about checkpoint-4321",
        ),
        (lambda: (checkpoint / "tokenizer.json").rename(tmp_path / "t"), "holds no tokenizer.json"),
        (lambda: (checkpoint.parent / "summary.json").unlink(), "summary.json"),
        (lambda: (checkpoint.parent / "recipe.yaml").unlink(), "recipe.yaml is missing"),
    ):
        spoil()
        other = checkpoint.with_name("checkpoint-4000") if "about" in said else checkpoint
        release_export(other, out, "adapter", [] if "limits" in said else LIMITS)
        told = capsys.readouterr().err
        assert "No card, so this adapter cannot be published" in told
        assert said in told
        release_verify(out, "adapter", other)
        with pytest.raises(CardError, match=r"release\.json is missing"):
            publish_release(out, str(tmp_path / "models"))
    assert not (out / "README.md").exists()  # PEFT's form with nothing filled in is no card


def test_a_base_on_a_hub_is_named_where_hubs_look_for_it(summary: dict[str, Any]) -> None:
    summary["model"] |= {"base_model": "org/base", "base_revision": "c0ffee"}
    text = render_card(
        check_facts(summary),
        words(),
        title="tiny",
        chat_template="{{ messages }}",
        end_of_turn={2: "<|im_end|>"},
        special_tokens={},
        adapter=Adapter(rank=16, alpha=32.0, layers=("q_proj",)),
    )
    metadata = yaml.safe_load(text.split("---")[1])
    assert (metadata["base_model"], metadata["base_model_relation"]) == ("org/base", "adapter")
    assert 'from_pretrained("org/base", revision="c0ffee", dtype="auto")' in text
    assert "local model" not in text
    assert "| Parameters | 3,456,788 in the adapter, 3,456,789 in the base model |" in text
