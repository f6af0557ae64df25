"""What is in this folder, and may it leave? A release holds weights, tokenizer, card and pictures; nothing else."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Container, Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

from training_ready import TrainingReadyError

# Written last into an export, see :mod:`.targets.export`; says for which engine it is.
EXPORT = "export.json"
_WORDS = ("README.md", "release.json")
_TRANSFORMERS = ("config.json", "generation_config.json", "tokenizer.json", "*.safetensors", *_WORDS)
# What a folder must hold, by target; a release itself is read by transformers.
REQUIRED = {
    "hf": _TRANSFORMERS,
    "vllm": _TRANSFORMERS,
    "tgi": (*_TRANSFORMERS, EXPORT),
    "gguf": ("*.gguf", EXPORT, *_WORDS),
    "ollama": ("*.gguf", "Modelfile", EXPORT, *_WORDS),
    "adapter": ("adapter_config.json", "*.safetensors", "tokenizer.json", EXPORT, *_WORDS),
}
# Kinds of files that only these targets may hold, by lower-case name.
_OF_TARGET = {
    "gguf": ("*.gguf",),
    "ollama": ("*.gguf", "modelfile"),
    "adapter": ("adapter_model.safetensors", "adapter_config.json"),
}

# (pattern of the lower-case file name, why it stays). Order matters: the first that fits names the reason.
_REFUSED = (
    ("training_args.*", "a pickle of the trainer's arguments"),
    ("optimizer*", "optimizer state"),
    ("scheduler*", "scheduler state"),
    ("rng_state*", "random state of a training process"),
    ("trainer_state.json", "training state"),
    ("stream_state.json", "training state"),
    ("adapter_*", "an adapter beside full weights: engines load both; merge it or publish it alone"),
    ("consolidated*", "a second copy of the weights: engines load both"),
    ("*arguments*.safetensors", "a name that serving engines skip when they look for weights"),
    ("*args*.safetensors", "a name that serving engines skip when they look for weights"),
    ("*training*.safetensors", "a name that serving engines skip when they look for weights"),
    ("*.pkl", "a pickle runs code when it is loaded"),
    ("*.pickle", "a pickle runs code when it is loaded"),
    ("*.pt", "a pickle runs code when it is loaded"),
    ("*.pth", "a pickle runs code when it is loaded"),
    ("*.bin", "a pickle runs code when it is loaded"),
    ("*.ckpt", "a pickle runs code when it is loaded"),
    ("*.npy", "may hold a pickle, which runs code when it is loaded"),
    ("*.npz", "may hold a pickle, which runs code when it is loaded"),
    ("*.py", "a model that needs its own code is not loaded by anyone careful"),
    (".env*", "may hold secrets"),
    ("*.pem", "may hold secrets"),
    ("*.key", "may hold secrets"),
)
_ALLOWED = (
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "*.md",
    "*.png",
    "*.svg",
    "*.jpg",
    "*.yaml",
    "*.yml",
    ".gitattributes",
    "license",
    "notice",
)


# Nothing that an engine reads: these may come beside an export after it was made.
_BESIDE = (
    *("*.md", "*.png", "*.svg", "*.jpg", "license", "notice", ".gitattributes"),
    *("release.json", EXPORT, "verified-*.json", ".eval_results/*.yaml", ".*.tmp"),
)


class ContentsError(TrainingReadyError):
    """A folder that is not a release. The message lists every reason, one per line."""


class ReleaseFile(NamedTuple):
    """One file of a release: POSIX path relative to it, size in bytes, sha256 of the content."""

    path: str
    size: int
    sha256: str


def release_files(folder: Path, progress: Callable[[int, int], None] | None = None) -> list[ReleaseFile]:
    """Check `folder` and hash every file; `progress(done, total)` counts bytes.

    Raises ContentsError naming every file that must not leave, is damaged, or is missing.
    """
    paths = _checked_paths(folder)
    total = sum(path.stat().st_size for path in paths)
    files: list[ReleaseFile] = []
    done = 0
    for path in paths:
        files.append(hash_file(path, folder))
        done += files[-1].size
        if progress:
            progress(done, total)
    return files


def hash_file(path: Path, folder: Path) -> ReleaseFile:
    """Size and sha256 of one file, named relative to `folder`."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return ReleaseFile(path.relative_to(folder).as_posix(), file.tell(), digest)


def _checked_paths(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise ContentsError(
            f"{folder} is not a folder; export a release first (training-ready release build)"
        )
    target = target_of(folder)
    paths, faults = [], []
    for parent, folders, names in os.walk(folder, followlinks=False):
        for name in sorted(names + [child for child in folders if (Path(parent) / child).is_symlink()]):
            path = Path(parent) / name
            fault = _fault(path, target)
            faults += [f"{path.relative_to(folder)}: {fault}"] if fault else []
            paths.append(path)
    faults += [f"{name}: missing" for name in REQUIRED[target] if not any(folder.glob(name))]
    faults += _weight_faults(folder, sorted(folder.glob("*.safetensors")))
    if faults:
        listing = "\n  ".join(sorted(set(faults)))
        raise ContentsError(f"{folder} is not fit to be published:\n  {listing}\nNothing was sent.")
    return sorted(paths)


def strangers(found: Iterable[str], known: Container[str]) -> list[str]:
    """The files of an export, by path in it, that an engine might read and that are not the `known` ones."""
    return sorted(
        path
        for path in found
        if path not in known and not any(fnmatch(path.lower(), pattern) for pattern in _BESIDE)
    )


def target_of(folder: Path) -> str:
    """The engine that `folder` was exported for; "hf" for a release itself. Raises ContentsError."""
    if not (folder / EXPORT).is_file():
        return "hf"
    try:
        target = json.loads((folder / EXPORT).read_bytes())["target"]
    except (ValueError, KeyError, TypeError) as error:
        raise ContentsError(f"{folder / EXPORT} is not what `release export` writes: export again") from error
    if target not in REQUIRED:
        raise ContentsError(
            f"{folder / EXPORT} names a target {target!r} that is none of {', '.join(REQUIRED)}"
        )
    return str(target)


def _fault(path: Path, target: str) -> str | None:
    """Why this file must not leave, or None."""
    name = path.name.lower()
    if path.is_symlink():
        return "a symbolic link; copy the file itself"
    own = any(fnmatch(name, pattern) for pattern in _OF_TARGET.get(target, ()))
    for pattern, reason in _REFUSED:
        if fnmatch(name, pattern) and not own:
            return reason
    if not own and not any(fnmatch(name, pattern) for pattern in _ALLOWED):
        return "not a kind of file that a release holds"
    with path.open("rb") as file:
        start = file.read(4)
    if start[:1] == b"\x80" or start == b"PK\x03\x04":
        return "a pickle or archive under another name"
    if name.endswith(".json"):
        try:
            json.loads(path.read_bytes())
        except ValueError as error:
            return f"not JSON: {error}"
    return None


def _weight_faults(folder: Path, weights: list[Path]) -> list[str]:
    """Whether every safetensors file is whole, no tensor is in two of them, and the index names what is there."""
    from safetensors import SafetensorError, safe_open

    home: dict[str, str] = {}
    faults = []
    for path in weights:
        try:
            with safe_open(path, framework="numpy") as file:
                for key in file.keys():  # noqa: SIM118  (the handle is not a mapping)
                    if key in home:
                        faults.append(f"{path.name}: tensor {key} is also in {home[key]}")
                    home[key] = path.name
        except SafetensorError as error:
            faults.append(f"{path.name}: damaged or cut short ({error})")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and not faults:
        expected = json.loads(index.read_bytes()).get("weight_map")
        if expected != home:
            faults.append(f"{index.name}: does not describe the {len(home)} tensors in the files beside it")
    return faults
