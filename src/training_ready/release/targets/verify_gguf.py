"""Does llama.cpp compute what was trained? Asked through llama-cpp-python; for llama, transformers' reader will do."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready.release.export import ExportError
from training_ready.release.targets.conversations import multilingual_text
from training_ready.release.targets.ollama import modelfile
from training_ready.release.targets.proof import (
    Finding,
    compare_ids,
    compare_logits,
    sample_inputs,
    trained_ids,
    trained_logits,
)
from training_ready.release.targets.tokenizer_files import chat_template, read_json

if TYPE_CHECKING:
    import torch

_F32 = 1e-4
"""float32 weights and cache: what differs is the order of sums."""
_F16 = 2e-2
_Q8_0 = 2e-1
_LIMITS = {"f32": _F32, "f16": _F16, "q8_0": _Q8_0}


def verify(folder: Path, release: Path, dtype: str) -> list[Finding]:
    """Logits, token ids and chat template of the one GGUF file in `folder`.

    Raises ExportError when nothing installed reads the file as what it is.
    """
    path = next(folder.glob("*.gguf"))
    inputs = sample_inputs(read_json(release / "config.json"))
    trained = trained_logits(release, inputs, dtype)
    limit = _LIMITS[path.stem.removeprefix("model-")]
    if importlib.util.find_spec("llama_cpp"):
        return _through_llama_cpp(path, release, inputs, trained, limit)
    config = read_json(release / "config.json")
    if config["model_type"] != "llama" or config["rope_parameters"].get("rope_type", "default") != "default":
        raise ExportError(
            "transformers reads a Mixtral GGUF as a dense model and drops the scaling of rotary frequencies, so only "
            "llama.cpp can verify this file: pip install llama-cpp-python, and run this again"
        )
    return _through_transformers(path, inputs, trained, limit)


def compare_modelfile(folder: Path, release: Path) -> Finding:
    """The Modelfile against the chat template, on every conversation."""
    expected = modelfile(release, next(folder.glob("*.gguf")).name)  # refuses what it cannot say
    same = (folder / "Modelfile").read_text(encoding="utf-8") == expected
    return Finding(check="Modelfile", result="says the chat template" if same else "was changed", passed=same)


def _through_llama_cpp(
    path: Path, release: Path, inputs: list[list[int]], trained: torch.Tensor, limit: float
) -> list[Finding]:
    import llama_cpp
    import torch

    length = len(inputs[0])
    model: Any = llama_cpp.Llama(
        str(path),
        n_ctx=length,
        n_batch=length,
        logits_all=True,
        type_k=0,
        type_v=0,
        flash_attn=False,
        verbose=False,
    )  # types 0: a float32 cache
    rows = []
    for row in inputs:
        model.reset()
        model.eval(row)
        rows.append(torch.tensor(model.scores[:length].copy()))
    texts = multilingual_text()
    ids = [model.tokenize(text.encode(), add_bos=True, special=True) for text in texts]
    template = model.metadata.get("tokenizer.chat_template")
    same = template == chat_template(release)
    model.close()
    return [
        compare_logits(trained, torch.stack(rows), limit),
        compare_ids(trained_ids(release, texts), ids, sum(len(text.encode()) for text in texts)),
        Finding(check="chat template", result="kept" if same else "differs from the release's", passed=same),
    ]


def _through_transformers(
    path: Path, inputs: list[list[int]], trained: torch.Tensor, limit: float
) -> list[Finding]:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32).eval()
    with torch.no_grad():
        served = model(torch.tensor(inputs)).logits
    return [compare_logits(trained, served, limit)]
