"""Experts over one dense base, from a recipe to an answer of the service: the same model all the way."""

from __future__ import annotations

import json
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from training_ready import TrainingReadyError
from training_ready.moe.families import MoEError
from training_ready.recipe.faults import RecipeError
from training_ready.release.build import build_release
from training_ready.release.export import ExportError
from training_ready.release.targets.export import export_release
from training_ready.serving import listener
from training_ready.serving.commands import ask_service
from training_ready.serving.engine import Engine
from training_ready.serving.model import load_model
from training_ready.serving.service import create_app

from . import dense_base

SHARED = "moe: {shared_base: {experts: 4, top_k: 2, rank: 8, alpha: 16}}\n"
WORDS = SimpleNamespace(
    license="mit", language=["en"], tags=[], summary="Tiny.", intended_use="Tests.", limits="Random."
)
LORA = """
use_peft: true
lora_target_modules: [q_proj, v_proj, o_proj]
lora_r: 4
lora_alpha: 8
use_rslora: true
"""
RunHere = Callable[..., Any]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(dense_base.write_model(tmp_path_factory.mktemp("dense") / "base"))


def recipe(base: Path, out: Path, moe: str = SHARED) -> str:
    return f"output_dir: {out}\nmodel_name_or_path: {base}\n{dense_base.RECIPE}{moe}"


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    ids = torch.arange(3, 263).view(2, 130)
    found: torch.Tensor = model.eval()(input_ids=ids, use_cache=False).logits
    return found


def trained(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(checkpoint / "shared_base.safetensors"))


def attention(checkpoint: Path) -> dict[str, torch.Tensor]:
    return dict(load_file(checkpoint / "adapter_model.safetensors"))


def difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def test_trained_stopped_continued_released_and_served(run_here: RunHere, base: Path, tmp_path: Path) -> None:
    whole = run_here(recipe(base, tmp_path / "whole"))
    run_here(recipe(base, tmp_path / "half"), "budget.max_hours=1.0e-7")
    copied = shutil.copytree(tmp_path / "half", tmp_path / "again", ignore=shutil.ignore_patterns(".lock"))
    again = run_here(recipe(base, copied), "resume_from_checkpoint=auto")

    # Continued to the very same numbers.
    end, there = trained(tmp_path / "whole/checkpoint-6"), trained(copied / "checkpoint-6")
    assert end.keys() == there.keys()
    assert all(torch.equal(end[name], there[name]) for name in end)
    summaries = [json.loads((run / "summary.json").read_text()) for run in (tmp_path / "whole", copied)]
    assert summaries[0]["moe"] == summaries[1]["moe"]
    assert summaries[0]["moe"]["layers"][0]["entropy"] > 0.5

    # Adapters and routers moved, and nothing else is in the checkpoint.
    begin = trained(tmp_path / "half/checkpoint-1")
    assert all(not torch.equal(begin[name], end[name]) for name in end)
    files = {path.name for path in (tmp_path / "whole/checkpoint-6").iterdir()}
    assert {"shared_base.json", "shared_base.safetensors", "expert_load.safetensors"} <= files
    assert not any(name.startswith(("model", "pytorch_model")) for name in files)
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    frozen = {name: p for name, p in whole.model.named_parameters() if not p.requires_grad}
    assert sum(p.numel() for p in frozen.values()) == sum(t.numel() for t in untouched.values())
    assert torch.equal(
        frozen["model.layers.1.mlp.experts.shared.up_proj.weight"],
        untouched["model.layers.1.mlp.up_proj.weight"],
    )
    history = [logs for logs in whole.state.log_history if "aux_loss" in logs]
    assert len(history) == 6
    assert all(0.99 < logs["aux_loss"] < 4.01 for logs in history)

    # The release is a plain Mixtral with the trained model's logits, and is served.
    build_release(copied, tmp_path / "release", WORDS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert type(plain).__name__ == "MixtralForCausalLM"
    assert (plain.config.rms_norm_eps, plain.config.head_dim) == (3e-4, 8)
    assert summaries[0]["model"]["parameters_total"] == sum(p.numel() for p in plain.parameters())
    assert difference(logits(again.model), logits(AutoModelForCausalLM.from_pretrained(base))) > 1e-2
    assert difference(logits(again.model), logits(plain)) <= 1e-5
    engine = Engine(load_model(str(tmp_path / "release"), device="cpu"))
    try:
        with listener.in_background(create_app(engine)) as url:
            assert isinstance(ask_service(url, "I cannot sleep.", max_new_tokens=4), str)
    finally:
        engine.close()


def test_another_base_is_refused(run_here: RunHere, base: Path, tmp_path: Path) -> None:
    run_here(recipe(base, tmp_path / "run"), "max_steps=2")
    other = Path(shutil.copytree(base, tmp_path / "other"))
    state = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        state.model.norm.weight[0] += 1e-3
    state.save_pretrained(other, max_shard_size="40KB")
    with pytest.raises(TrainingReadyError, match="Name the base of that run"):
        run_here(
            recipe(other, tmp_path / "elsewhere"),
            f"resume_from_checkpoint={tmp_path / 'run/checkpoint-2'}",
        )
    settings = tmp_path / "run/checkpoint-2/shared_base.json"
    settings.write_text(settings.read_text().replace(str(base), str(other)))
    with pytest.raises(MoEError, match="nobody trained"):
        build_release(tmp_path / "run", tmp_path / "release", WORDS)
    settings.write_text(settings.read_text().replace(str(other), str(tmp_path / "gone")))
    with pytest.raises(TrainingReadyError, match="bring the base back"):
        build_release(tmp_path / "run", tmp_path / "release", WORDS)
    assert not (tmp_path / "release").exists()


def test_it_starts_from_what_upcycling_mixed(run_here: RunHere, base: Path, tmp_path: Path) -> None:
    from training_ready.moe.upcycle import STAGES, UpcyclePlan, upcycle
    from training_ready.moe.upcycle_branches import Branch

    branches = [Branch(domain=name, source=None) for name in ("psychology", "mental_health")]
    plan = UpcyclePlan(base=base, branches=branches, texts=None, rank=8)
    upcycle(plan, tmp_path / "up", until=STAGES[STAGES.index("mix")])
    start = tmp_path / "up/4-mix"
    moe = f"moe: {{shared_base: {{experts: 2, rank: 8, alpha: 16, start: {start}}}}}\n"
    with pytest.raises(MoEError, match="alpha 16, there"):
        run_here(recipe(base, tmp_path / "wrong", moe))
    alpha = json.loads((start / "shared_base.json").read_text())["alpha"]
    run_here(
        recipe(base, tmp_path / "run", moe.replace("alpha: 16", f"alpha: {float(alpha)}")),
        "learning_rate=1.0e-30",
        "max_steps=2",
    )
    settings = json.loads((tmp_path / "run/checkpoint-2/shared_base.json").read_text())
    assert settings["experts"] == ["psychology", "mental_health"]
    mixed, saved = trained(start), trained(tmp_path / "run/checkpoint-2")
    assert difference(mixed["layers.1.router"], saved["layers.1.router"]) < 1e-6


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("use_peft: true\n", "PEFT's choice: beside `moe.shared_base` only the attention"),
        ("use_peft: true\nlora_target_modules: [q_proj, up_proj]\n", "up_proj: beside .* only the attention"),
        ("use_peft: true\nlora_target_modules: all-linear\n", "all-linear: beside .* only the attention"),
        (LORA + "lora_modules_to_save: [gate]\n", "takes them from the base"),
        (LORA + "use_dora: true\n", "is no sum over the base's weights"),
        (LORA + "lora_dropout: 0\nlora_target_parameters: [experts.down_proj]\n", "are adapters already"),
        ("load_in_4bit: true\nuse_peft: true\n", "exact sums"),
        ("model_init_kwargs: {distributed_config: {fsdp_size: 2}}\n", "lies whole in each process"),
    ],
)
def test_what_cannot_hold_is_refused_before_anything_is_loaded(
    run_here: RunHere, base: Path, tmp_path: Path, extra: str, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        run_here(recipe(base, tmp_path / "run") + extra)


def test_the_attention_learns_beside_the_experts_and_leaves_in_the_release(
    run_here: RunHere, base: Path, tmp_path: Path
) -> None:
    whole = run_here(recipe(base, tmp_path / "whole") + LORA)
    run_here(recipe(base, tmp_path / "half") + LORA, "budget.max_hours=1.0e-7")
    begun = f"resume_from_checkpoint={tmp_path / 'half/checkpoint-1'}"
    with pytest.raises(TrainingReadyError, match="use_peft: true then, false now"):
        run_here(recipe(base, tmp_path / "without"), begun)
    copied = shutil.copytree(tmp_path / "half", tmp_path / "again", ignore=shutil.ignore_patterns(".lock"))
    again = run_here(recipe(base, copied) + LORA, "resume_from_checkpoint=auto")

    # Adapters and routers alone train and are saved, and a stopped run ends in the very same numbers.
    folders = (copied / "checkpoint-1", tmp_path / "whole/checkpoint-6", copied / "checkpoint-6")
    begin, end, there = (trained(folder) | attention(folder) for folder in folders)
    assert len(attention(folders[1])) == 2 * 3 * 2  # layers, projections, factors
    assert all(torch.equal(end[name], there[name]) for name in end)
    assert all(not torch.equal(begin[name], end[name]) for name in end)
    moving = sum(p.numel() for p in whole.model.parameters() if p.requires_grad)
    assert moving == sum(tensor.numel() for tensor in end.values())
    untouched = AutoModelForCausalLM.from_pretrained(base).state_dict()
    resting = sum(p.numel() for p in whole.model.parameters() if not p.requires_grad)
    assert resting == sum(tensor.numel() for tensor in untouched.values())

    # The release is the trained model, and would not be without what the attention learned.
    build_release(copied, tmp_path / "release", WORDS)
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "release")
    assert type(plain).__name__ == "MixtralForCausalLM"
    assert difference(logits(again.model), logits(plain)) <= 1e-5
    with again.model.disable_adapter():
        assert difference(logits(again.model), logits(plain)) > 1e-3
    facts = json.loads((copied / "summary.json").read_text())["model"]
    assert facts["parameters_total"] == sum(p.numel() for p in plain.parameters())
    assert facts["parameters_trainable"] == moving
    kept = "model.layers.1.self_attn.k_proj.weight"
    assert torch.equal(plain.state_dict()[kept], untouched[kept])

    # A part of it is not taken for the whole.
    with pytest.raises(ExportError, match="the attention's alone"):
        export_release(folders[2], tmp_path / "adapter", "adapter")
    adapter = folders[2] / "adapter_model.safetensors"
    save_file({name: tensor * torch.inf for name, tensor in attention(folders[2]).items()}, adapter)
    with pytest.raises(ExportError, match="lora_A holds values that are not finite"):
        build_release(copied, tmp_path / "elsewhere", WORDS)
    adapter.unlink()
    with pytest.raises(MoEError, match="not a readable PEFT adapter"):
        build_release(copied, tmp_path / "elsewhere", WORDS)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", LORA], ids=["experts", "experts and attention"])
def test_killed_it_continues_to_bit_equal_adapters(
    base: Path, train: Callable[..., str], launch: Callable[..., Any], tmp_path: Path, lora: str
) -> None:
    path = tmp_path / "shared.yaml"
    path.write_text(recipe(base, tmp_path / "unused") + lora, encoding="utf-8")
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    train(path, f"output_dir={whole}")
    process = launch(path, f"output_dir={broken}")
    while not (broken / "checkpoint-4" / "stream_state.json").exists():
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert not (broken / "summary.json").exists()
    train(path, f"output_dir={broken}", "resume_from_checkpoint=auto")
    for read in (trained, attention) if lora else (trained,):
        end, there = read(whole / "checkpoint-6"), read(broken / "checkpoint-6")
        assert end.keys() == there.keys()
        assert all(torch.equal(end[name], there[name]) for name in end)


@pytest.mark.slow
@pytest.mark.parametrize("lora", ["", LORA + "lora_dropout: 0\n"], ids=["experts", "experts and attention"])
def test_two_ranks_train_what_one_trains(
    base: Path, train: Callable[..., str], tmp_path: Path, lora: str
) -> None:
    path = tmp_path / "shared.yaml"
    exact = SHARED.replace("moe: {", "moe: {balance_counts: exact, ")
    path.write_text(recipe(base, tmp_path / "unused", exact) + lora, encoding="utf-8")
    plain = ["optim=sgd", "learning_rate=1.0", "max_grad_norm=0", "max_steps=2"]
    train(path, f"output_dir={tmp_path / 'one'}", *plain)
    train(path, f"output_dir={tmp_path / 'two'}", *plain, "per_device_train_batch_size=1", processes=2)
    one, two = trained(tmp_path / "one/checkpoint-2"), trained(tmp_path / "two/checkpoint-2")
    assert max(float(tensor.abs().max()) for name, tensor in one.items() if name.endswith(".B")) > 1e-3
    if lora:
        one |= attention(tmp_path / "one/checkpoint-2")
        two |= attention(tmp_path / "two/checkpoint-2")
        assert max(float(tensor.abs().max()) for name, tensor in one.items() if "lora_B" in name) > 1e-3
    assert max(difference(one[name], two[name]) for name in one) < 1e-5
