"""How does a run over a shared dense base leave? As a plain mixture of experts, written shard by shard.

Neither the base nor the mixture is ever whole in memory: of four experts of a 12B base the release has 77 GB.
"""

from __future__ import annotations

from pathlib import Path

from training_ready.release.export import (
    ExportError,
    end_of_turn_ids,
    generation_of,
    read_tokenizer,
    whole_folder,
    write_words,
)

_SETTINGS = "shared_base.json"
_BASE_FILES = ["config.json", "generation_config.json", "*.safetensors", "*.safetensors.index.json"]


def is_shared_base(checkpoint: Path) -> bool:
    """Does the checkpoint hold experts that need a dense base?

    Asked first: where the attention is adapted too, it also holds an adapter of PEFT, which alone is not the model.
    """
    return (checkpoint / _SETTINGS).is_file()


def write_shared_base_release(
    checkpoint: Path, folder: Path, *, target_role: str, shard_bytes: int = 4 * 10**9
) -> Path:
    """Write the weights of attention and experts, tokenizer, chat template and generation settings into `folder`.

    The base is looked for where the checkpoint says and must have the very weights that were trained over. An earlier
    release in `folder` is replaced as a whole.

    Raises ExportError when base or tokenizer cannot be used or something trained is not finite; MoEError when base and
    checkpoint do not fit.
    """
    import torch
    from transformers import AutoConfig, GenerationConfig

    from training_ready.moe.shared_base_files import read_shared_base, read_shared_lora
    from training_ready.moe.upcycle_export import export_upcycled

    settings, trained = read_shared_base(checkpoint)
    for layer, pair in read_shared_lora(checkpoint, settings).items():
        trained |= {f"{layer}.lora_A": pair.a, f"{layer}.lora_B": pair.b}
    for name, tensor in trained.items():
        if not bool(torch.isfinite(tensor).all()):
            raise ExportError(
                f"{name} holds values that are not finite: training diverged; go back to a checkpoint"
            )
    if not (checkpoint / "tokenizer.json").is_file():
        raise ExportError(f"{checkpoint} holds no tokenizer.json: it is not a checkpoint of a training run")
    tokenizer = read_tokenizer(checkpoint)
    base = _base_folder(settings.base, settings.base_revision, checkpoint)
    rows = AutoConfig.from_pretrained(base, trust_remote_code=False).vocab_size
    if len(tokenizer) > rows:
        raise ExportError(
            f"the tokenizer of {checkpoint} has {len(tokenizer)} tokens, the base {base} embeds {rows}"
        )
    own = GenerationConfig.from_pretrained(base) if (base / "generation_config.json").is_file() else None
    generation = generation_of(own, tokenizer, end_of_turn_ids(tokenizer, target_role), rows=rows)
    with whole_folder(folder) as building:
        export_upcycled(base, checkpoint, building, shard_bytes=shard_bytes, copied=())
        write_words(building, tokenizer, generation)
    return folder


def _base_folder(base: str, revision: str | None, checkpoint: Path) -> Path:
    """The base's files on this machine; those of a hub are downloaded."""
    if (Path(base) / "config.json").is_file():
        return Path(base)
    if Path(base).is_absolute() or base.startswith("."):
        raise ExportError(
            f"{checkpoint} was trained over {base}, which is not there: bring the base back, or correct `base` in "
            f"{checkpoint / _SETTINGS} (its weights are compared)."
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(base, revision=revision, allow_patterns=_BASE_FILES))
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        raise ExportError(
            f"the base {base} at revision {revision or 'main'} is neither a folder nor readable from the hub: {error}. "
            "Check HF_ENDPOINT and HF_TOKEN."
        ) from error
