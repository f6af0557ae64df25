"""Which files are the model? Safetensors, tokenizer and generation settings in one folder that engines load alike.

The folder is built beside its final place and renamed, so it is whole or absent. Files get mode 0644, because
safetensors writes 0600 (https://github.com/huggingface/safetensors/issues/782), which a server under another user
cannot read; remove the chmod when that is released.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from training_ready import TrainingReadyError
from training_ready.release.targets.conversations import multilingual_text

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

# Stands for a turn's text while the template is probed; private-use characters do not occur in templates.
_PROBES = {"user": "\ue000", "assistant": "\ue001"}
_COMPARED_BYTES = 100_000


class ExportError(TrainingReadyError):
    """The model cannot be released as it is."""


def end_of_turn_ids(tokenizer: PreTrainedTokenizerBase, role: str = "assistant") -> list[int]:
    """The token ids that end a turn of `role` ("assistant" or "user"): what the chat template writes after it, and EOS.

    Raises ExportError when there is no chat template or it ends turns with plain text, which no engine can stop at.
    """
    if not tokenizer.chat_template:
        raise ExportError(
            "the tokenizer has no chat template; the one used in training must be released with the model"
        )
    messages = [{"role": name, "content": probe} for name, probe in _PROBES.items()]
    rendered = str(tokenizer.apply_chat_template(messages, tokenize=False))
    frame = rendered.partition(_PROBES[role])[2]
    first = tokenizer(frame, add_special_tokens=False)["input_ids"][:1]
    if not first or first[0] not in tokenizer.added_tokens_decoder:
        raise ExportError(
            f"the chat template ends a turn of {role} with {frame[:20]!r}, not with a special token"
        )
    return list(
        dict.fromkeys([*first, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])])
    )


def load_checkpoint(
    checkpoint: Path, *, base_revision: str | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model and tokenizer of a training checkpoint, on the CPU in the checkpoint's own dtype.

    Adapters are merged into the base model that their configuration names, at `base_revision`.
    """
    from transformers import AutoModelForCausalLM

    _refuse_shards(checkpoint)
    if not (checkpoint / "tokenizer.json").is_file():
        raise ExportError(f"{checkpoint} holds no tokenizer.json: it is not a checkpoint of a training run")
    tokenizer = read_tokenizer(checkpoint)
    options: dict[str, Any] = {"dtype": "auto", "trust_remote_code": False, "use_safetensors": True}
    if not (checkpoint / "adapter_config.json").is_file():
        model, loaded = AutoModelForCausalLM.from_pretrained(checkpoint, output_loading_info=True, **options)
        if loaded["missing_keys"]:  # transformers only warns, and makes them up
            missing = sorted(loaded["missing_keys"])
            raise ExportError(
                f"{checkpoint} lacks {len(missing)} tensors of its model: {', '.join(missing[:3])} …"
            )
        return model.eval(), tokenizer
    base = json.loads((checkpoint / "adapter_config.json").read_bytes())["base_model_name_or_path"]
    model = AutoModelForCausalLM.from_pretrained(base, revision=base_revision or "main", **options)
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        raise ExportError(
            f"the tokenizer of {checkpoint} has tokens that the base model {base} has no embedding for"
        )
    return _merged(model, checkpoint).eval(), tokenizer


def _refuse_shards(checkpoint: Path) -> None:
    """What FSDP's SHARDED_STATE_DICT saves is described by a pickle, which a release does not open."""
    shards = checkpoint / "pytorch_model_fsdp_0"
    if shards.is_dir() and not (checkpoint / "config.json").is_file():
        raise ExportError(
            f"{checkpoint} holds an adapter in shards, as each rank of FSDP wrote its own, and nothing here joins "
            "those. Start such a run with `accelerate launch --fsdp_state_dict_type FULL_STATE_DICT`."
        )
    if shards.is_dir() and not any(checkpoint.glob("*.safetensors")):
        raise ExportError(
            f"{checkpoint} holds the weights in shards, as each rank of FSDP wrote its own. Join them once, then build "
            f"again:\n  accelerate merge-weights {shards} {checkpoint}"
        )


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint or release as everybody will load it.

    Raises ExportError when that is not what tokenizer.json says, which is what the model was trained with.
    """
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    fault = misreading(folder, loaded)
    if fault is not None:
        raise ExportError(f"{folder}: {fault}")
    return loaded


def misreading(folder: Path, loaded: PreTrainedTokenizerBase) -> str | None:
    """Why `loaded` from `folder` does not make the tokens of the tokenizer.json there; None if it does.

    transformers 5.23 reads every tokenizer beside a qwen2 configuration as Qwen2Tokenizer, which splits words its own
    way (`MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS` in its tokenization_auto.py).
    """
    from tokenizers import Tokenizer

    file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    file.no_truncation()
    file.no_padding()
    texts = list(multilingual_text(_COMPARED_BYTES))
    trained = [encoding.ids for encoding in file.encode_batch(texts)]
    wrong = sum(one != other for one, other in zip(trained, loaded(texts)["input_ids"], strict=True))
    if not wrong:
        return None
    config = folder / "config.json"
    kind = json.loads(config.read_bytes()).get("model_type") if config.is_file() else "base model's"
    return (
        f"transformers reads a tokenizer.json beside a {kind} configuration as {type(loaded).__name__}, which makes "
        f"other tokens of {wrong} in {len(texts)} paragraphs than this one says: whoever loads this model would feed "
        "it what it was not trained on. Train a model of this tokenizer under another model_type (llama, qwen3), or "
        "this model_type with the tokenizer that belongs to it."
    )


def _merged(model: PreTrainedModel, checkpoint: Path) -> PreTrainedModel:
    """The model with the checkpoint's adapters in its weights: those of experts by our exact sum, others by PEFT."""
    from peft import PeftConfig, PeftModel

    from training_ready.moe.adapter_files import adapts_experts, load_expert_adapters
    from training_ready.moe.experts_lora import merge_expert_adapters

    if not adapts_experts(checkpoint):
        merged: PreTrainedModel = PeftModel.from_pretrained(model, checkpoint).merge_and_unload(
            safe_merge=True
        )
        return merged
    others = load_expert_adapters(model, checkpoint)
    merge_expert_adapters(model)
    if not others:
        return model
    config = PeftConfig.from_pretrained(checkpoint)
    config.target_parameters = None  # merged already; PEFT leaves their tensors in the file unread
    adapted = PeftModel.from_pretrained(model, checkpoint, config=config)
    whole: PreTrainedModel = adapted.merge_and_unload(safe_merge=True)
    return whole


def write_release(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    end_of_turn_ids: Sequence[int],
) -> Path:
    """Write weights, configuration, tokenizer, chat template and generation settings into `folder`.

    An earlier release in `folder` is replaced as a whole; any other non-empty folder is refused.

    Args:
        end_of_turn_ids: ids that end an answer; written as `generation_config.eos_token_id`, always a list, because
            serving engines ignore a single number there.

    The chat template is written as chat_template.jinja and again inside tokenizer_config.json, for readers that know
    only one of the two places.

    Raises ExportError when a weight is not finite or missing (sharded), is quantised or an unmerged adapter, when
    padding and end of turn share an id, or when the written tokenizer does not load as it was.
    """
    _check_weights(model)
    rows = model.get_input_embeddings().weight.shape[0]
    generation = generation_of(model.generation_config, tokenizer, end_of_turn_ids, rows=rows)
    with whole_folder(folder) as building:
        model.save_pretrained(building)
        write_words(building, tokenizer, generation)
    return folder


def write_words(building: Path, tokenizer: PreTrainedTokenizerBase, generation: GenerationConfig) -> None:
    """Write everything beside the weights, read it back as a stranger would, and make all files readable for all."""
    tokenizer.save_pretrained(building)
    try:
        generation.save_pretrained(building)
    except ValueError as error:
        raise ExportError(f"the generation settings contradict each other: {error}") from error
    _inline_chat_template(building, tokenizer)
    _check_written(building, tokenizer)
    for path in building.rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)


def _check_weights(model: PreTrainedModel) -> None:
    import torch

    if hasattr(model, "merge_and_unload"):
        raise ExportError(
            "the model still carries an adapter: call merge_and_unload() and release its result"
        )
    if getattr(model, "is_quantized", False):
        raise ExportError(
            "the weights are quantised; load the base model unquantised and merge the adapter into that"
        )
    for name, weight in model.state_dict().items():
        if weight.is_meta or weight.numel() == 0:
            raise ExportError(
                f"{name} is not on this process (sharded or offloaded): gather the weights first"
            )
        if weight.is_floating_point() and not bool(torch.isfinite(weight).all()):
            raise ExportError(
                f"{name} holds values that are not finite: training diverged; go back to a checkpoint"
            )


def generation_of(
    given: GenerationConfig | None, tokenizer: PreTrainedTokenizerBase, ends: Sequence[int], *, rows: int
) -> GenerationConfig:
    """The model's own settings with the ids that end an answer; `rows`: of its embedding."""
    from transformers import GenerationConfig

    if not ends or not all(0 <= token < rows for token in ends):
        raise ExportError(
            f"end-of-turn ids {list(ends)} must be one or more ids below the vocabulary of {rows}"
        )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id in ends:
        raise ExportError(
            f"the padding token ({tokenizer.pad_token!r}, id {tokenizer.pad_token_id}) must exist and not be one of "
            f"the end-of-turn ids {list(ends)}: a padded batch would look finished. Set pad_token in the recipe."
        )
    generation = copy.deepcopy(given) if given is not None else GenerationConfig()
    generation.eos_token_id = [int(token) for token in ends]
    generation.pad_token_id = tokenizer.pad_token_id
    generation.bos_token_id = tokenizer.bos_token_id
    return generation


@contextmanager
def whole_folder(folder: Path, *, marker: str = "generation_config.json") -> Iterator[Path]:
    """A folder to fill; on success it takes the place of `folder` by renaming, on failure it is removed.

    A non-empty `folder` is replaced only when it holds `marker`, so that nothing but an earlier release is.
    """
    if folder.exists() and any(folder.iterdir()) and not (folder / marker).is_file():
        raise ExportError(f"{folder} is not empty and not an earlier release: choose another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    workplace = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
    building = workplace / "new"
    building.mkdir(mode=0o755)
    try:
        yield building
        if folder.exists():
            os.rename(folder, workplace / "old")
        os.rename(building, folder)
    finally:
        shutil.rmtree(workplace)


def _inline_chat_template(building: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    path = building / "tokenizer_config.json"
    settings = json.loads(path.read_bytes())
    settings["chat_template"] = tokenizer.chat_template
    path.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _check_written(building: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Load what was written, as a stranger would, and compare."""
    loaded = read_tokenizer(building)
    for what in ("chat_template", "eos_token", "pad_token", "bos_token"):
        if getattr(loaded, what) != getattr(tokenizer, what):
            raise ExportError(
                f"{what} was {getattr(tokenizer, what)!r} in training but loads as {getattr(loaded, what)!r} from the "
                "written release"
            )
    if loaded.get_vocab() != tokenizer.get_vocab():
        raise ExportError(
            "the vocabulary changed while it was written; the tokenizer has no faithful fast form"
        )
