"""NF4 experts from a recipe: adapters train over them, go on after a stop, and end in the unquantised weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from training_ready.moe.adapter_files import load_expert_adapters
from training_ready.moe.quant import quantised_experts
from training_ready.recipe.faults import RecipeError
from training_ready.release.build import build_release

from . import dense_base

RunHere = Callable[..., Any]
WORDS = SimpleNamespace(
    license="mit", language=["en"], tags=[], summary="Tiny.", intended_use="Tests.", limits="Random."
)
ADAPTED = "moe: {experts_4bit: nf4, adapters: {rank: 4, alpha: 8}}\n"
LORA = "use_peft: true\nlora_r: 4\nlora_alpha: 8\nlora_target_modules: [q_proj, o_proj]\n"


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("moe") / "base"
    return Path(
        dense_base.write_model(folder, "mixtral", num_local_experts=4, num_experts_per_tok=2, head_dim=None)
    )


def recipe(base: Path, out: Path, *extra: str) -> str:
    return f"output_dir: {out}\nmodel_name_or_path: {base}\n{dense_base.RECIPE}{''.join(extra)}"


def adapters(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(checkpoint / "adapter_model.safetensors"))


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 263).view(2, 130)
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


@pytest.mark.parametrize("extra", ["", LORA])
def test_trained_stopped_continued_and_merged(
    run_here: RunHere, base: Path, tmp_path: Path, extra: str
) -> None:
    whole = run_here(recipe(base, tmp_path / "whole", ADAPTED, extra))
    run_here(recipe(base, tmp_path / "half", ADAPTED, extra), "budget.max_hours=1.0e-7")
    copied = shutil.copytree(tmp_path / "half", tmp_path / "again", ignore=shutil.ignore_patterns(".lock"))
    run_here(recipe(base, copied, ADAPTED, extra), "resume_from_checkpoint=auto")
    end, there = adapters(tmp_path / "whole/checkpoint-6"), adapters(copied / "checkpoint-6")
    assert end.keys() == there.keys()
    assert all(torch.equal(end[name], there[name]) for name in end)
    begin = adapters(tmp_path / "half/checkpoint-1")
    assert all(not torch.equal(begin[name], end[name]) for name in end)
    size = sum(path.stat().st_size for path in (tmp_path / "whole/checkpoint-6").glob("*.safetensors"))
    assert size < 100_000  # adapters, and not the 300 kB of the model

    # A weight in four bits is a parameter all the same, and the release has the adapters merged.
    facts = json.loads((copied / "summary.json").read_text())["model"]
    held = sum(p.numel() for p in AutoModelForCausalLM.from_pretrained(base).parameters())
    assert facts["parameters_total"] == held
    assert facts["parameters_merged"] == sum(tensor.numel() for tensor in end.values())

    # The experts were four bits wide in training; the release has the adapters on the original ones.
    assert len(list(quantised_experts(whole.model))) == 4
    build_release(copied, tmp_path / "release", WORDS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    unquantised = AutoModelForCausalLM.from_pretrained(base)
    assert (logits(plain) - logits(unquantised)).abs().max() > 1e-2
    if not extra:
        assert not load_expert_adapters(unquantised, copied / "checkpoint-6")
        assert (logits(plain) - logits(unquantised)).abs().max() <= 1e-5
    between = float((logits(whole.model) - logits(plain)).abs().max())
    assert 1e-4 < between < 2.0  # rounding to 16 levels, and nothing worse


def test_attention_alone_trains_over_experts_in_four_bits(
    run_here: RunHere, base: Path, tmp_path: Path
) -> None:
    trainer = run_here(
        recipe(base, tmp_path / "run", "moe: {experts_4bit: nf4_double}\n", LORA), "max_steps=2"
    )
    assert len(list(quantised_experts(trainer.model))) == 4
    assert {name.split(".")[-2] for name in adapters(tmp_path / "run/checkpoint-2")} == {"lora_A", "lora_B"}
    build_release(tmp_path / "run", tmp_path / "release", WORDS)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("moe: {experts_4bit: nf4}\n", "cannot be saved whole"),
        (ADAPTED + "load_in_4bit: true\n" + LORA, "before `moe.experts_4bit` has made"),
        (ADAPTED + "model_init_kwargs: {distributed_config: {fsdp_size: 2}}\n", "codes that are not sharded"),
    ],
)
def test_what_cannot_work_is_refused_at_once(
    run_here: RunHere, base: Path, tmp_path: Path, extra: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_here(recipe(base, tmp_path / "run", extra))


def test_a_dense_model_has_no_experts_to_quantise(run_here: RunHere, base: Path, tmp_path: Path) -> None:
    dense = dense_base.write_model(tmp_path / "dense")
    with pytest.raises(Exception, match="no experts to quantise"):
        run_here(recipe(dense, tmp_path / "run", ADAPTED))
