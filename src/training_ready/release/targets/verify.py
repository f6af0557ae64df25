"""Does the engine compute what was trained? An export is loaded as its engine loads it, and compared with the release.

Every target is judged by numbers that are printed; a check that cannot run on this machine is an error, not a pass.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from training_ready.release.card import CARD
from training_ready.release.contents import strangers
from training_ready.release.export import ExportError
from training_ready.release.targets import verify_adapter, verify_gguf, verify_tgi
from training_ready.release.targets.conversations import multilingual_text
from training_ready.release.targets.export import MARKER, identity
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
from training_ready.release.targets.tokenizer_files import read_json


def verify_export(
    folder: Path, release: Path, target: str, *, cache: Path, dtype: str = "float32"
) -> list[Finding]:
    """Check `folder`, an export of `release` for `target`; findings that did not pass say so.

    Args:
        cache: where the isolated environment of the target tgi is kept.
        dtype: what logits are computed in: "float32", or "bfloat16" where memory does not hold the weights twice as
            wide; the limits are those of float32.

    Raises ExportError when `folder` is another export, or when nothing on this machine can judge it.
    """
    about = read_json(folder / MARKER)
    if about.get("target") != target:
        raise ExportError(f"{folder} was exported for {about.get('target')}, not for {target}")
    if about.get("release") != identity(release):
        raise ExportError(f"{folder} was not made from {release} as it is now: export again")
    # A card is written again when something was verified or published.
    made = {name: size for name, size in about["files"].items() if name != CARD}
    missing = {name for name, size in made.items() if not _is_whole(folder / name, size)}
    if missing:
        raise ExportError(f"{folder} is damaged: {', '.join(sorted(missing))}; export again")
    here = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    if added := strangers(here, about["files"]):
        raise ExportError(
            f"{folder} holds {', '.join(added)}, which `release export` did not write and an engine may load: remove it"
        )
    checks: dict[str, Callable[[], list[Finding]]] = {
        "hf": lambda: _verify_hf(folder, release, dtype),
        "vllm": lambda: _verify_hf(folder, release, dtype),
        "tgi": lambda: verify_tgi.verify(folder, release, cache, dtype),
        "gguf": lambda: verify_gguf.verify(folder, release, dtype),
        "ollama": lambda: [
            *verify_gguf.verify(folder, release, dtype),
            verify_gguf.compare_modelfile(folder, release),
        ],
        "adapter": lambda: verify_adapter.verify(folder, release),
    }
    return checks[target]()


def _is_whole(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def _verify_hf(folder: Path, release: Path, dtype: str) -> list[Finding]:
    """What transformers 5 makes of the folder."""
    from transformers import AutoTokenizer

    inputs = sample_inputs(read_json(release / "config.json"))
    texts = multilingual_text()
    ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)(list(texts))["input_ids"]
    return [
        compare_logits(trained_logits(release, inputs, dtype), trained_logits(folder, inputs, dtype), 0.0),
        compare_ids(trained_ids(release, texts), ids, sum(len(text.encode()) for text in texts)),
        compare_prompts(trained_prompts(release), trained_prompts(folder)),
    ]
