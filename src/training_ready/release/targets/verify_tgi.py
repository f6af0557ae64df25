"""Does TGI's Python load it, and does it compute what was trained? Asked in an environment with TGI's own releases."""

from __future__ import annotations

import json
import stat
import tempfile
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from training_ready.release.targets.chat_template import methods_as_calls
from training_ready.release.targets.conversations import CONVERSATIONS, multilingual_text
from training_ready.release.targets.pinned import pinned_python, run_pinned
from training_ready.release.targets.pinned_reader import MAPPING_METHODS, STRING_METHODS
from training_ready.release.targets.proof import (
    Finding,
    compare_ids,
    compare_logits,
    compare_prompts,
    sample_inputs,
    trained_ids,
    trained_logits,
    trained_prompts,
)
from training_ready.release.targets.table import tgi_row
from training_ready.release.targets.tokenizer_files import read_json

# Names that TGI leaves out when it looks for weights.
_SKIPPED = ("arguments", "args", "training")
# TGI brings code of its own for these, and its transformers does not know them.
_OWN_CODE = ("deepseek_v2",)
_WIDENED = 1e-5


def verify(folder: Path, release: Path, cache: Path, dtype: str) -> list[Finding]:
    """Files, logits, token ids, prompts and the end of a turn. Raises PinnedError when the folder does not load."""
    from safetensors.torch import load_file

    config = read_json(release / "config.json")
    inputs, texts = sample_inputs(config), multilingual_text()
    settings = read_json(folder / "tokenizer_config.json")
    python = pinned_python(cache)
    with tempfile.TemporaryDirectory() as scratch:
        logits, given, tokens = (
            Path(scratch) / name for name in ("logits.safetensors", "texts.json", "tokens.json")
        )
        given.write_text(json.dumps(texts), encoding="utf-8")
        job: dict[str, Any] = {
            "folder": str(folder.resolve()),
            "inputs": inputs,
            "logits": str(logits),
            "dtype": dtype,
        }
        job |= {"texts": str(given), "tokens": str(tokens), "templates": template_jobs(settings)}
        if config["model_type"] in _OWN_CODE:
            job["inputs"] = None
        answer = run_pinned(python, job)
        served = load_file(logits)["logits"] if job["inputs"] else trained_logits(folder, inputs, dtype)
        ids = json.loads(tokens.read_text())
    size = sum(len(text.encode()) for text in texts)
    ends = read_json(folder / "generation_config.json")["eos_token_id"]
    return [
        _files(folder),
        _logits(
            config, compare_logits(trained_logits(release, inputs, dtype), served, _limit(config, folder))
        ),
        compare_ids(trained_ids(release, texts), ids, size),
        compare_prompts(trained_prompts(release), rendered(answer["rendered"])),
        Finding(
            check="end of a turn",
            result=f"eos_token_id {ends}, tokenizer.eos_token is id {answer['eos']}",
            passed=isinstance(ends, list) and answer["eos"] == ends[0],
        ),
    ]


def _limit(config: Mapping[str, Any], folder: Path) -> float:
    """What the architecture allows; heads widened with zeros compute the same sums in another rounding."""
    widened = bool(config.get("head_dim")) and "head_dim" not in read_json(folder / "config.json")
    return max(tgi_row(config).limit, _WIDENED if widened else 0.0)


def _logits(config: Mapping[str, Any], finding: Finding) -> Finding:
    if config["model_type"] not in _OWN_CODE:
        return finding
    return replace(
        finding, result=finding.result + "; read back by transformers 5, as 4.51.0 lacks this architecture"
    )


def template_jobs(settings: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Each conversation with what the router passes to the template: two special tokens, no tools, always a prompt."""
    template = methods_as_calls(
        settings["chat_template"], (*STRING_METHODS, *MAPPING_METHODS), "python_method"
    )
    passed = {"bos_token": settings.get("bos_token"), "eos_token": settings.get("eos_token"), "tools": None}
    return [
        {"template": template, "context": {"messages": messages, "add_generation_prompt": True, **passed}}
        for messages in CONVERSATIONS.values()
    ]


def rendered(answers: list[dict[str, str]]) -> dict[str, str | None]:
    """Conversation to prompt, None where the engine refused it."""
    return {name: answer.get("text") for name, answer in zip(CONVERSATIONS, answers, strict=True)}


def _files(folder: Path) -> Finding:
    from safetensors import safe_open

    faults: list[str] = []
    owner: dict[str, str] = {}
    for path in sorted(folder.iterdir()):
        mode = stat.S_IMODE(path.stat().st_mode)
        if mode != 0o644:
            faults.append(f"{path.name} has mode {mode:04o}, not 0644")
        if path.suffix in (".bin", ".pt", ".pth", ".py", ".jinja"):
            faults.append(f"{path.name} is not for TGI")
        if path.suffix == ".safetensors":
            if any(word in path.name for word in _SKIPPED):
                faults.append(f"TGI skips {path.name}")
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  (the handle is not a mapping)
                    if key in owner:
                        faults.append(f"{key} is in {owner[key]} and in {path.name}")
                    owner[key] = path.name
    result = (
        "; ".join(faults) or f"{len(owner)} tensors in {len(set(owner.values()))} files, all files mode 0644"
    )
    return Finding(check="files", result=result, passed=not faults)
