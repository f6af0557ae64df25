"""Does llama.cpp compute what was trained, and does ollama write the prompt that was trained?"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path

import gguf
import pytest
import torch
from transformers import AutoModelForCausalLM

from training_ready.release.export import ExportError
from training_ready.release.targets.conversations import CONVERSATIONS
from training_ready.release.targets.export import export_release
from training_ready.release.targets.ollama import modelfile, turns_of
from training_ready.release.targets.proof import sample_inputs, trained_logits
from training_ready.release.targets.render import jinja_renderer
from training_ready.release.targets.tokenizer_files import chat_template, read_json
from training_ready.release.targets.verify import verify_export

Build = Callable[..., Path]
needs_llama_cpp = pytest.mark.skipif(
    importlib.util.find_spec("llama_cpp") is None, reason="llama-cpp-python is not installed"
)


@needs_llama_cpp
@pytest.mark.parametrize(
    "family",
    [
        *("llama3-rope", "mixtral"),
        *(
            pytest.param(name, marks=pytest.mark.slow)
            for name in ("llama", "mixtral-top1", "mixtral-tied", "mixtral-narrow-heads")
        ),
    ],
)
def test_llama_cpp_computes_what_was_trained(tiny_release: Build, tmp_path: Path, family: str) -> None:
    release = tiny_release(family)
    out = export_release(release, tmp_path / "out", "gguf", gguf_type="f32").folder
    findings = verify_export(out, release, "gguf", cache=tmp_path)
    assert [finding.check for finding in findings if finding.passed] == [
        "logits",
        "token ids",
        "chat template",
    ]
    assert findings[0].difference is not None
    assert findings[0].difference < 1e-4


@needs_llama_cpp
@pytest.mark.parametrize("gguf_type", [pytest.param("f16", marks=pytest.mark.slow), "q8_0"])
def test_rounded_weights_stay_close(tiny_release: Build, tmp_path: Path, gguf_type: str) -> None:
    release = tiny_release("mixtral")
    out = export_release(release, tmp_path / "out", "gguf", gguf_type=gguf_type).folder
    findings = verify_export(out, release, "gguf", cache=tmp_path)
    assert all(finding.passed for finding in findings)
    kinds = {
        tensor.name: tensor.tensor_type.name
        for tensor in gguf.GGUFReader(out / f"model-{gguf_type}.gguf").tensors
    }
    assert kinds["blk.0.ffn_gate_exps.weight"] == gguf_type.upper()
    assert kinds["blk.0.ffn_gate_inp.weight"] == kinds["blk.0.attn_norm.weight"] == "F32"


@pytest.mark.parametrize("family", ["llama", "llama3-rope"])
def test_transformers_reads_a_llama_back(tiny_release: Build, tmp_path: Path, family: str) -> None:
    release = tiny_release(family)
    out = export_release(release, tmp_path / "out", "gguf", gguf_type="f32").folder
    inputs = sample_inputs(read_json(release / "config.json"))
    model = AutoModelForCausalLM.from_pretrained(out, gguf_file="model-f32.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        served = torch.cat([model(torch.tensor([row])).logits for row in inputs])
    difference = float((served - trained_logits(release, inputs, "float32")).abs().max())
    # The reader drops the frequencies of Llama 3's scaling; llama.cpp applies them.
    assert (difference == 0.0) == (family == "llama")


@pytest.mark.parametrize(
    ("key", "value", "reason"),
    [
        ("attention_bias", True, "biases"),
        ("sliding_window", 64, "sliding window"),
        ("rope_parameters", {"rope_type": "yarn", "rope_theta": 1e4}, "yarn"),
    ],
)
def test_what_the_file_cannot_say_is_refused(
    tiny_release: Build, tmp_path: Path, key: str, value: object, reason: str
) -> None:
    release = copy_of(tiny_release("llama"), tmp_path / "release")
    config = {**read_json(release / "config.json"), key: value}
    (release / "config.json").write_text(json.dumps(config))
    with pytest.raises(ExportError, match=f"{reason}.*vllm"):
        export_release(release, tmp_path / "out", "gguf")


def test_a_tokenizer_that_llama_cpp_does_not_know_is_refused(tiny_release: Build, tmp_path: Path) -> None:
    release = copy_of(tiny_release("llama"), tmp_path / "release")
    content = read_json(release / "tokenizer.json")
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (release / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(ExportError, match="no name for the pre-tokenizer"):
        export_release(release, tmp_path / "out", "gguf")


def test_ollama_gets_the_template_in_its_own_language(tiny_release: Build, tmp_path: Path) -> None:
    release = tiny_release("mixtral")
    out = export_release(release, tmp_path / "out", "ollama", gguf_type="q8_0").folder
    text = (out / "Modelfile").read_text()
    assert text.startswith("FROM ./model-q8_0.gguf\n")
    assert 'PARAMETER stop "<|im_end|>"' in text
    assert '{{ if eq .Role "user" }}<|im_start|>user\n{{ .Content }}<|im_end|>\n{{ end }}' in text
    assert text.split('"""')[1].endswith("{{ end }}<|im_start|>assistant\n")
    render = jinja_renderer(chat_template(release), {})
    turns = turns_of(render)
    assert {name: turns.render(messages) for name, messages in CONVERSATIONS.items()} == {
        name: render(messages) for name, messages in CONVERSATIONS.items()
    }


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages %}{{ m.role }}: {{ m.content | trim }}\n{% endfor %}",
        "{% for m in messages %}{{ m.content if m.role != 'system' else raise_exception('no') }}{% endfor %}",
        "{% for m in messages %}{% if m.content %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}",
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% if not loop.last %}</s>{% endif %}{% endfor %}!",
    ],
)
def test_a_template_that_go_cannot_say_here_is_refused(
    tiny_release: Build, tmp_path: Path, template: str
) -> None:
    release = copy_of(tiny_release("mixtral"), tmp_path / "release")
    (release / "chat_template.jinja").write_text(template)
    with pytest.raises(ExportError, match="Nearest target that can: gguf"):
        modelfile(release, "model.gguf")


def copy_of(release: Path, folder: Path) -> Path:
    folder.mkdir()
    for path in release.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    return folder
