"""Is what was exported the trained model in the engine's words, and is everything else refused with a way out?"""

from __future__ import annotations

import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM

from training_ready.moe.adapter_files import save_expert_adapters
from training_ready.moe.experts_lora import add_expert_adapters, merge_expert_adapters
from training_ready.release.export import ExportError
from training_ready.release.targets.export import export_release
from training_ready.release.targets.tgi_config import tgi_config
from training_ready.release.targets.verify import verify_export

Build = Callable[..., Path]


def shaped(**settings: Any) -> dict[str, Any]:
    """A config.json with the keys that every architecture has."""
    rope = {"rope_type": "default", "rope_theta": 5e5}
    shape = {
        "hidden_size": 64,
        "num_attention_heads": 4,
        "max_position_embeddings": 512,
        "rope_parameters": rope,
    }
    return {**shape, **settings}


def content(path: Path) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads(path.read_bytes())
    return loaded


def numbers(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(torch.arange(4, 104).view(2, 50)).logits
    return result


@pytest.fixture(scope="module")
def tgi(tiny_release: Build, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tgi") / "mixtral"
    return export_release(tiny_release("mixtral"), folder, "tgi").folder


# --- tgi: the 21 differences


def test_the_tokenizer_is_read_by_the_class_that_adds_nothing(tgi: Path, tiny_release: Build) -> None:
    release, settings = tiny_release("mixtral"), content(tgi / "tokenizer_config.json")
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"  # 1, 4
    assert "backend" not in settings
    assert "extra_special_tokens" not in settings  # 2
    assert settings["additional_special_tokens"] == ["<|im_start|>", "<|im_end|>"]
    assert settings["added_tokens_decoder"]["3"]["content"] == "<|im_end|>"  # 3
    assert content(tgi / "special_tokens_map.json")["eos_token"] == "<|im_end|>"
    assert (tgi / "tokenizer.json").read_bytes() == (release / "tokenizer.json").read_bytes()


def test_the_chat_template_is_inlined_and_explicit(tgi: Path) -> None:
    assert not (tgi / "chat_template.jinja").exists()  # 5
    template = content(tgi / "tokenizer_config.json")["chat_template"]
    assert "generation %}" not in template  # 6
    assert "for message in messages" in template


def test_the_configuration_is_in_old_words(tgi: Path) -> None:
    config = content(tgi / "config.json")
    assert config["rope_theta"] == 50_000.0  # 7
    assert config["rope_scaling"] is None
    assert "rope_parameters" not in config
    assert config["torch_dtype"] == "float32"  # 8
    assert config.get("head_dim", 16) == 16  # 11
    assert content(tgi / "generation_config.json")["eos_token_id"] == [3]


def test_files_are_readable_by_everyone_and_only_the_models_weights_are_there(
    tiny_release: Build, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    release.mkdir()
    for path in tiny_release("mixtral").iterdir():
        (release / path.name).write_bytes(path.read_bytes())
    save_file({"model.norm.weight": torch.zeros(64)}, release / "optimizer.safetensors")
    old = os.umask(0o077)
    try:
        out = export_release(release, tmp_path / "out", "tgi").folder
    finally:
        os.umask(old)
    assert {stat.S_IMODE(path.stat().st_mode) for path in out.iterdir()} == {0o644}  # 19
    assert [path.name for path in out.glob("*.safetensors")] == ["model.safetensors"]
    keys = set(load_file(out / "model.safetensors"))
    assert "model.layers.0.block_sparse_moe.experts.3.w2.weight" in keys
    assert keys == set(load_file(release / "model.safetensors"))


@pytest.mark.parametrize(
    ("settings", "written"),
    [
        ({"model_type": "starcoder2"}, {"mlp_type": "default", "norm_type": "layer_norm"}),  # 12
        (
            {"model_type": "deepseek_v2", "qk_nope_head_dim": 16, "qk_rope_head_dim": 8},  # 13, 14
            {"qk_nope_dim": 16, "qk_rope_dim": 8, "rope_theta": 5e5},
        ),
        ({"model_type": "mixtral", "tie_word_embeddings": True}, {"tie_word_embeddings": False}),  # 16
        ({"model_type": "llama", "tie_word_embeddings": True}, {"tie_word_embeddings": True}),
        ({"model_type": "mistral", "head_dim": 32}, {"head_dim": 32}),
    ],
)
def test_keys_that_tgi_misses_are_written(settings: dict[str, Any], written: dict[str, Any]) -> None:
    config, _ = tgi_config(shaped(**settings))
    assert written.items() <= config.items()


def test_deepseek_without_yarn_gets_one_that_does_nothing() -> None:
    config, _ = tgi_config(shaped(model_type="deepseek_v2", qk_nope_head_dim=16, qk_rope_head_dim=8))
    assert config["rope_scaling"]["factor"] == 1.0
    assert config["rope_scaling"]["type"] == config["rope_scaling"]["rope_type"] == "yarn"


def test_rope_scaling_has_both_names_of_its_kind() -> None:
    rope = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0}
    config, _ = tgi_config(shaped(model_type="llama", rope_parameters=rope))
    assert config["rope_scaling"] == {"rope_type": "llama3", "type": "llama3", "factor": 8.0}
    assert config["rope_theta"] == 1e4


@pytest.mark.parametrize(
    "family",
    [
        *("qwen2_moe", "qwen3_moe", "olmoe", "granitemoe", "jetmoe", "phimoe", "deepseek_v3"),
        *("gemma2", "dbrx", "gpt_oss", "gpt2", "glm4_moe"),
    ],
)
def test_architectures_that_tgi_does_not_serve_faithfully_are_refused(family: str) -> None:
    with pytest.raises(
        ExportError, match=rf"tgi cannot serve {family} faithfully: .+ target that can: vllm\."
    ):
        tgi_config(shaped(model_type=family))  # 9, 10, 15, 21


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"model_type": "llama", "head_dim": 32}, "hidden/heads = 64/4 = 16"),  # 17
        ({"model_type": "qwen2", "head_dim": 8}, "hidden/heads"),
        ({"model_type": "mixtral", "head_dim": 8, "attention_bias": True}, "without bias"),
        (
            {
                "model_type": "llama",
                "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0},
            },
            "ignores",
        ),
        (
            {"model_type": "phi3", "rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4}},
            "nobody compared",
        ),
        ({"model_type": "qwen3", "layer_types": ["full_attention", "sliding_attention"]}, "no words"),
        ({"model_type": "gemma3_text", "layer_types": ["full_attention", "sliding_attention"]}, "no words"),
    ],
)
def test_settings_that_tgi_would_get_wrong_are_refused(settings: dict[str, Any], reason: str) -> None:
    with pytest.raises(ExportError, match=reason) as refusal:  # 18
        tgi_config(shaped(**settings))
    assert "Nearest target that can: vllm" in str(refusal.value)


def test_a_template_that_drops_plain_text_is_refused(tiny_release: Build, tmp_path: Path) -> None:
    release = tmp_path / "release"
    shutil.copytree(tiny_release("mixtral"), release)
    template = (
        "{% for m in messages %}{% for p in m.content if p is mapping %}{{ p.KEY }}{% endfor %}{% endfor %}"
    )
    (release / "chat_template.jinja").write_text(template.replace("KEY", "caption"))
    with pytest.raises(ExportError, match=r"plain text does not reach the prompt.*vllm"):
        export_release(release, tmp_path / "out", "tgi")
    (release / "chat_template.jinja").write_text(
        template.replace("KEY", "text")
    )  # parts of text: made from text
    export_release(release, tmp_path / "out", "tgi")


def test_narrow_heads_become_wide_ones_that_compute_the_same(tiny_release: Build, tmp_path: Path) -> None:
    release = tiny_release("mixtral-narrow-heads")
    out = export_release(release, tmp_path / "out", "tgi").folder
    config = content(out / "config.json")
    assert "head_dim" not in config
    assert config["rope_theta"] == pytest.approx(50_000.0**2)
    weights = load_file(out / "model.safetensors")
    assert weights["model.layers.0.self_attn.q_proj.weight"].shape == (64, 64)
    trained = numbers(AutoModelForCausalLM.from_pretrained(release))
    assert (numbers(AutoModelForCausalLM.from_pretrained(out)) - trained).abs().max() < 1e-5


# --- every target


@pytest.mark.parametrize("target", ["hf", "vllm"])
def test_the_release_itself_computes_the_same(tiny_release: Build, tmp_path: Path, target: str) -> None:
    release = tiny_release("mixtral")
    out = export_release(release, tmp_path / "out", target).folder
    findings = verify_export(out, release, target, cache=tmp_path)
    assert [finding.passed for finding in findings] == [True] * 3
    assert findings[0].difference == 0.0
    assert content(out / "config.json") == content(release / "config.json")


def test_fused_experts_are_written_one_by_one(tiny_release: Build, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(release := tiny_release("mixtral"))
    fused = tmp_path / "fused"
    fused.mkdir()
    for path in release.glob("*.json"):
        (fused / path.name).write_bytes(path.read_bytes())
    (fused / "chat_template.jinja").write_bytes((release / "chat_template.jinja").read_bytes())
    model.save_pretrained(fused, save_original_format=False)
    assert any(key.endswith("gate_up_proj") for key in load_file(fused / "model.safetensors"))
    out = export_release(fused, tmp_path / "out", "hf").folder
    written, expected = load_file(out / "model.safetensors"), load_file(release / "model.safetensors")
    assert written.keys() == expected.keys()
    assert all(written[key].equal(expected[key]) for key in expected)


def test_qwen2_with_a_tokenizer_of_its_own_is_not_what_transformers_loads(
    tiny_release: Build, tmp_path: Path
) -> None:
    release = tmp_path / "release"
    shutil.copytree(tiny_release("qwen2"), release)
    for tokenizer_of, right in (("qwen2", True), ("llama", False)):
        shutil.copyfile(tiny_release(tokenizer_of) / "tokenizer.json", release / "tokenizer.json")
        out = export_release(release, tmp_path / tokenizer_of, "hf").folder
        ids = verify_export(out, release, "hf", cache=tmp_path)[1]
        assert (ids.check, ids.passed) == ("token ids", right)


def test_another_folder_is_never_replaced_and_a_refusal_leaves_nothing(
    tiny_release: Build, tmp_path: Path
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("years of work")
    release = tiny_release("mixtral")
    with pytest.raises(ExportError, match="not an earlier"):
        export_release(release, tmp_path / "home", "hf")
    with pytest.raises(ExportError, match="export beside it"):
        export_release(release, release / "tgi", "tgi")
    with pytest.raises(ExportError, match="none of"):
        export_release(release, tmp_path / "out", "onnx")
    with pytest.raises(ExportError, match=r"gguf cannot serve qwen2 faithfully.*vllm"):
        export_release(tiny_release("qwen2"), tmp_path / "out", "gguf")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["home"]


def test_an_export_of_another_release_or_a_damaged_one_is_not_judged(
    tiny_release: Build, tmp_path: Path
) -> None:
    release = tiny_release("mixtral")
    out = export_release(release, tmp_path / "out", "hf").folder
    with pytest.raises(ExportError, match="exported for hf, not for tgi"):
        verify_export(out, release, "tgi", cache=tmp_path)
    with pytest.raises(ExportError, match="not made from"):
        verify_export(out, tiny_release("mixtral-tied"), "hf", cache=tmp_path)
    (out / "tokenizer.json").write_text("{}")
    with pytest.raises(ExportError, match=r"damaged: tokenizer\.json"):
        verify_export(out, release, "hf", cache=tmp_path)


def test_memory_does_not_grow_with_the_model(tiny_release: Build, tmp_path: Path) -> None:
    """320 MB of weights in ten shards leave through a buffer of 64 MB."""
    release = tmp_path / "release"
    release.mkdir()
    for path in tiny_release("llama").iterdir():
        if path.suffix != ".safetensors":
            (release / path.name).write_bytes(path.read_bytes())
    owner = {}
    for shard in range(10):
        name = f"model-{shard + 1:05d}-of-00010.safetensors"
        tensors = {
            f"model.layers.{shard}.mlp.{part}.weight": torch.full((2048, 1024), shard * 1.0)
            for part in "abcd"
        }
        save_file(tensors, release / name)
        owner |= dict.fromkeys(tensors, name)
    (release / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": owner}))
    program = (
        "import resource, sys; from pathlib import Path\n"
        "from training_ready.release.targets import export, weights\n"
        "import torch, safetensors.torch\n"
        "weights.SHARD_BYTES = 64_000_000\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "export.export_release(Path(sys.argv[1]), Path(sys.argv[2]), 'tgi')\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    command = [sys.executable, "-c", program, str(release), str(tmp_path / "out")]
    grown = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) * 1024
    assert grown < 200_000_000, f"{grown:,} bytes"
    assert len(list((tmp_path / "out").glob("*.safetensors"))) >= 5


# --- adapters


@pytest.fixture
def adapter(tiny_release: Build, tmp_path: Path) -> tuple[Path, Any]:
    """A checkpoint with a dense and an expert adapter, and the model with the experts' one merged."""
    base = tiny_release("mixtral")
    torch.manual_seed(5)
    model = AutoModelForCausalLM.from_pretrained(base)
    add_expert_adapters(model, rank=4, alpha=8.0, projections=["gate_up_proj", "down_proj"])
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(".B"):
                weight.normal_(std=0.2)
    checkpoint = tmp_path / "checkpoint"
    dense = get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj"])
    )
    dense.save_pretrained(checkpoint)
    save_expert_adapters(model, checkpoint, base_model=str(base))
    merge_expert_adapters(model)
    return checkpoint, model


def test_expert_adapters_leave_as_matrices_that_add_the_same(
    adapter: tuple[Path, Any], tiny_release: Build, tmp_path: Path
) -> None:
    checkpoint, merged = adapter
    out = export_release(checkpoint, tmp_path / "out", "adapter").folder
    findings = verify_export(out, checkpoint, "adapter", cache=tmp_path)
    assert all(finding.passed for finding in findings)
    config = content(out / "adapter_config.json")
    assert config["target_modules"] == ["q_proj", "w1", "w2", "w3"]
    assert "target_parameters" not in config
    pairs = load_file(out / "adapter_model.safetensors")
    # Add each pair to its own weight on disk and compare with the experts merged in memory.
    weights = load_file(tiny_release("mixtral") / "model.safetensors")
    for key in [key for key in pairs if key.endswith(".lora_A.weight") and ".experts." in key]:
        stem = key.removesuffix(".lora_A.weight")
        name = stem.removeprefix("base_model.model.") + ".weight"
        weights[name] = weights[name] + 8.0 / 4 * pairs[f"{stem}.lora_B.weight"] @ pairs[key]
    folder = tmp_path / "sum"
    folder.mkdir()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    AutoConfig.from_pretrained(tiny_release("mixtral")).save_pretrained(folder)
    added = AutoModelForCausalLM.from_pretrained(folder)
    assert (numbers(added) - numbers(merged.eval())).abs().max() < 1e-5
    assert (
        numbers(added) - numbers(AutoModelForCausalLM.from_pretrained(tiny_release("mixtral")))
    ).abs().max() > 1e-2


def test_an_adapter_goes_to_no_other_target_and_what_cannot_be_split_is_refused(
    adapter: tuple[Path, Any], tmp_path: Path
) -> None:
    checkpoint, _ = adapter
    with pytest.raises(ExportError, match=r"merged weights .* Nearest target that can: adapter"):
        export_release(checkpoint, tmp_path / "out", "tgi")  # 20
    config = content(checkpoint / "adapter_config.json")
    (checkpoint / "adapter_config.json").write_text(json.dumps({**config, "use_rslora": True}))
    with pytest.raises(ExportError, match="use_rslora"):
        export_release(checkpoint, tmp_path / "out", "adapter")
