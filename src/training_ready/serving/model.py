"""Which model is being served? Resolve it, load it safely, and state the facts that the API reports."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import ModelCard, constants, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError
from safetensors import SafetensorError

from training_ready.release.connection import PublishError, hub_endpoint, is_public_hub
from training_ready.serving.errors import ServingError

# Weights only as safetensors, and no Python files: nothing that is downloaded can be executed.
RELEASE_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "*.model",
    "*.txt",
    "README.md",
]


@dataclass(kw_only=True, frozen=True, slots=True)
class ServedModel:
    """A causal language model in evaluation mode, its tokenizer, and what is true about them."""

    network: Any  # transformers.PreTrainedModel
    tokenizer: Any  # a fast tokenizer: character offsets are needed
    name: str
    commit: str | None  # the hub's commit; None for a local folder
    pipeline_tag: str | None  # from the model card
    device: torch.device
    max_total_tokens: int  # prompt and answer together, from max_position_embeddings
    end_ids: frozenset[int]  # any of these ends an answer, from generation_config
    special_tokens: dict[int, str]  # the tokens that ``skip_special_tokens`` leaves out of a text

    @property
    def dtype(self) -> str:
        return str(self.network.dtype).removeprefix("torch.")

    @property
    def max_input_tokens(self) -> int:
        return self.max_total_tokens - 1


def load_model(
    model: str, *, revision: str | None = None, device: str = "auto", endpoint: str | None = None
) -> ServedModel:
    """Load a release for answering.

    Args:
        model: a local folder, or a repository of the hub that ``HF_ENDPOINT`` names.
        revision: branch, tag or commit of the repository; not for a folder.
        device: ``auto`` takes the accelerator that torch finds, else the CPU; or torch's name of a device.
        endpoint: the hub's address; without it that of ``HF_ENDPOINT`` when this process began.

    Raises:
        ServingError: it is not there, not safetensors, needs code of its own, misses weights, or has no length limit.
    """
    folder, commit = _resolve(model, revision, endpoint or constants.ENDPOINT)
    if not any(folder.glob("*.safetensors")):
        found = ", ".join(sorted(path.name for path in folder.iterdir())[:8]) or "nothing"
        raise ServingError(
            f"{folder}: no *.safetensors file to serve (found {found}). Pickled weights are never loaded."
        )
    network = _load_network(folder)
    tokenizer = _load_tokenizer(folder, rows=network.get_input_embeddings().weight.shape[0])
    target = _pick_device(device)
    return ServedModel(
        network=network.to(target),
        tokenizer=tokenizer,
        name=model,
        commit=commit,
        pipeline_tag=_pipeline_tag(folder),
        device=target,
        max_total_tokens=_context_length(folder, network.config),
        end_ids=_end_ids(network.generation_config.eos_token_id),
        special_tokens={n: str(each) for n, each in tokenizer.added_tokens_decoder.items() if each.special},
    )


def _resolve(model: str, revision: str | None, endpoint: str) -> tuple[Path, str | None]:
    folder = Path(model).expanduser()
    if folder.is_dir():
        if revision is not None:
            raise ServingError(
                f"{model} is a local folder, which has no revision {revision!r}; leave --revision out"
            )
        return folder.resolve(), None
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        raise ServingError(f"{model}: no such folder (a hub repository is written owner/name)")
    try:
        endpoint = hub_endpoint(endpoint)
    except PublishError as error:
        raise ServingError(str(error)) from error
    try:
        snapshot = Path(
            snapshot_download(
                model,
                revision=revision,
                allow_patterns=RELEASE_FILES,
                endpoint=endpoint,
                token=_hub_token(endpoint),
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, HFValidationError, OSError) as error:
        at = f" at revision {revision}" if revision else ""
        raise ServingError(
            f"{model}{at}: neither a local folder nor readable from the hub: {error}. Check the name, HF_ENDPOINT "
            "and, for a private repository, HF_TOKEN."
        ) from error
    return snapshot, snapshot.name  # the cache names a snapshot's folder after its commit


def _hub_token(endpoint: str) -> str | bool | None:
    """``HF_TOKEN``; else the stored login (None), but only for the public Hub, to which it belongs."""
    return os.environ.get("HF_TOKEN") or (None if is_public_hub(endpoint) else False)


def _load_network(folder: Path) -> Any:
    try:
        network, report = transformers.AutoModelForCausalLM.from_pretrained(
            folder,
            dtype="auto",
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        )
    except (OSError, ValueError, RuntimeError, KeyError, SafetensorError) as error:
        raise ServingError(f"{folder}: cannot be loaded as a causal language model: {error}") from error
    missing = sorted(report["missing_keys"]) + sorted(str(key) for key in report["mismatched_keys"])
    if missing:
        raise ServingError(
            f"{folder}: {len(missing)} weights missing or of the wrong shape, first {missing[0]}"
        )
    if getattr(network, "_is_stateful", False):
        raise ServingError(
            f"{folder}: {network.config.model_type} keeps a recurrent state, which is not served yet"
        )
    if getattr(network.config, "output_router_logits", False):
        network.config.output_router_logits = False  # only the training loss needs them
    return network.eval()


def _load_tokenizer(folder: Path, *, rows: int) -> Any:
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    except (OSError, ValueError, KeyError) as error:
        raise ServingError(f"{folder}: the tokenizer cannot be loaded: {error}") from error
    if not tokenizer.is_fast:
        raise ServingError(f"{folder}: no tokenizer.json; character offsets need a fast tokenizer")
    highest = max(tokenizer.get_vocab().values())
    if highest >= rows:
        raise ServingError(f"{folder}: token id {highest} has no embedding (the model has {rows} rows)")
    return tokenizer


def _pick_device(device: str) -> torch.device:
    if device == "auto":
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        return accelerator if accelerator is not None else torch.device("cpu")
    try:
        picked = torch.device(device)
        torch.empty(0, device=picked)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ServingError(f"--device {device}: not usable here: {reason}") from error
    return picked


def _context_length(folder: Path, config: Any) -> int:
    length = getattr(config.get_text_config(decoder=True), "max_position_embeddings", None)
    if not isinstance(length, int) or length < 2:
        raise ServingError(
            f"{folder}/config.json: max_position_embeddings is {length!r}; without a context length no request can be "
            "admitted safely"
        )
    return length


def _end_ids(value: int | list[int] | None) -> frozenset[int]:
    if value is None:
        return frozenset()
    return frozenset([value] if isinstance(value, int) else value)


def _pipeline_tag(folder: Path) -> str | None:
    card = folder / "README.md"
    if not card.is_file():
        return None
    try:
        tag = ModelCard.load(card).data.get("pipeline_tag")
    except ValueError:  # a README without valid metadata says nothing about the task
        return None
    return str(tag) if tag else None
