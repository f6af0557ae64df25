"""What files does this engine need? A release rewritten for one target: shard by shard, no GPU, no model loaded.

`export.json` is written last and says what the folder was made from; a folder without it is no export.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from training_ready.release.card import lay_card
from training_ready.release.contents import EXPORT, hash_file
from training_ready.release.export import ExportError, whole_folder
from training_ready.release.record import ReleaseRecord
from training_ready.release.targets import gguf_file
from training_ready.release.targets.adapter import write_adapter
from training_ready.release.targets.ollama import modelfile
from training_ready.release.targets.proof import compare_prompts, prompts_of, trained_prompts
from training_ready.release.targets.table import TARGETS, refuse
from training_ready.release.targets.tgi_config import tgi_config
from training_ready.release.targets.tokenizer_files import (
    TOKENIZER,
    read_json,
    special_tokens_map,
    tgi_tokenizer,
    write_json,
)
from training_ready.release.targets.weights import Progress, expert_by_expert, rewrite_weights

MARKER = EXPORT
# Beside the weights, in every target that is a folder of transformers' files.
_WORDS = ("*.md", "release.json", "*.png", "*.svg", "*.jpg", "license", "LICENSE", "notice", "NOTICE")


@dataclass(kw_only=True, slots=True, frozen=True)
class Exported:
    """One export: what was made of which release, and how large its files are."""

    folder: Path
    target: str
    files: dict[str, int]
    """Name to bytes, without export.json."""


def export_release(
    release: Path,
    out: Path,
    target: str,
    *,
    gguf_type: str = "f16",
    progress: Progress | None = None,
    record: ReleaseRecord | None = None,
) -> Exported:
    """Rewrite `release` for `target` into `out`, which appears whole or not at all; an earlier export is replaced.

    Args:
        release: a folder of `release build`; for the target "adapter" a folder with adapter_config.json.
        gguf_type: "f32", "f16" or "q8_0"; the targets gguf and ollama only.
        progress: called with (tensors done, tensors in all).
        record: of an adapter, which has no release beside it: what its card is written from. Without one it has none.

    Raises ExportError for what the target cannot serve faithfully, naming the nearest target that can.
    """
    if target not in TARGETS:
        raise ExportError(f"target {target!r} is none of {', '.join(TARGETS)}")
    if out.resolve() == release.resolve() or release.resolve() in out.resolve().parents:
        raise ExportError(f"{out} lies in the release {release}: export beside it")
    if target != "adapter" and (release / "adapter_config.json").is_file():
        raise refuse(target, f"{release}, an adapter", "it needs merged weights (release build)", "adapter")
    config = {} if target == "adapter" else read_json(release / "config.json")
    if config.get("quantization_config"):
        raise ExportError(
            f"{release}: its weights are quantised; build the release from the unquantised model"
        )
    writers: dict[str, Callable[[Path], None]] = {
        "hf": lambda folder: _write_hf(release, folder, config, progress),
        "vllm": lambda folder: _write_hf(release, folder, config, progress),
        "tgi": lambda folder: _write_tgi(release, folder, config, progress),
        "gguf": lambda folder: gguf_file.write_gguf(release, folder, config, gguf_type, progress),
        "ollama": lambda folder: _write_ollama(release, folder, config, gguf_type, progress),
        "adapter": lambda folder: _write_adapter(release, folder),
    }
    with whole_folder(out, marker=MARKER) as folder:
        writers[target](folder)
        if target != "adapter":
            _copy(release, folder, _WORDS)
        elif record is not None:
            lay_card(record, release.resolve().parent, folder)
        paths = sorted(path for path in folder.rglob("*") if path.is_file())
        files = {path.relative_to(folder).as_posix(): path.stat().st_size for path in paths}
        write_json(folder / MARKER, {"target": target, "release": identity(release), "files": files})
        for path in folder.rglob("*"):
            path.chmod(0o755 if path.is_dir() else 0o644)  # 19: safetensors writes 0600
    return Exported(folder=out, target=target, files=files)


def identity(release: Path) -> dict[str, str]:
    """Name to sha256 of the files that decide what a release computes: weights, configuration, tokenizer."""
    names = ("config.json", "adapter_config.json", *TOKENIZER)
    paths = [*(release / name for name in names), *release.glob("*.safetensors")]
    files = [hash_file(path, release) for path in sorted(paths) if path.is_file()]
    return {file.path: file.sha256 for file in files}


def _write_hf(release: Path, folder: Path, config: Mapping[str, Any], progress: Progress | None) -> None:
    """The release as it is, experts one by one; only the weights that config.json describes."""
    rewrite_weights(release, folder, [expert_by_expert(str(config["model_type"]))], progress)
    _copy(release, folder, ("config.json", "generation_config.json", *TOKENIZER))


def _write_tgi(release: Path, folder: Path, config: Mapping[str, Any], progress: Progress | None) -> None:
    written, changes = tgi_config(config)
    settings = tgi_tokenizer(release)
    _check_template(release, settings)
    write_json(folder / "config.json", written)
    write_json(folder / "tokenizer_config.json", settings)
    write_json(folder / "special_tokens_map.json", special_tokens_map(settings))
    _copy(release, folder, ("generation_config.json", "tokenizer.json"))
    rewrite_weights(release, folder, changes, progress)


def _check_template(release: Path, settings: Mapping[str, Any]) -> None:
    """Refuse a template that changed its meaning, or that plain text does not pass through."""
    passed = {name: settings[name] for name in ("bos_token", "eos_token") if settings.get(name)}
    found = compare_prompts(trained_prompts(release), prompts_of(settings["chat_template"], passed))
    if not found.passed:
        raise refuse("tgi", "this chat template", found.result, "vllm")


def _write_adapter(checkpoint: Path, folder: Path) -> None:
    """The adapter and the tokenizer that it was trained with. PEFT's README.md is a form to fill in, and stays."""
    write_adapter(checkpoint, folder)
    _copy(checkpoint, folder, TOKENIZER)


def _write_ollama(
    release: Path, folder: Path, config: Mapping[str, Any], gguf_type: str, progress: Progress | None
) -> None:
    text = modelfile(release, gguf_file.file_name(gguf_type))
    gguf_file.write_gguf(release, folder, config, gguf_type, progress, target="ollama")
    (folder / "Modelfile").write_text(text, encoding="utf-8")


def _copy(release: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for pattern in patterns:
        for path in release.glob(pattern):
            if path.is_file() and not path.is_symlink():
                shutil.copyfile(path, folder / path.name)
