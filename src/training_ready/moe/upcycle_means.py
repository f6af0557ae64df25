"""Where should a token of each domain be sent before any router was trained?

To the expert whose row points where that domain's hidden states lie: the mean input of the feed-forward over a
domain's tokens, minus the mean over domains, at unit length. What one toy seed says of it
stands in ``docs/moe.md``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from training_ready.moe.families import MoEError
from training_ready.moe.upcycle_shards import ShardedTensors

Labelled = tuple[int, Tensor]
"""Index of the domain, token ids (T,)."""


class DomainMeans:
    """Running sums of hidden states per layer and domain: (L, D, H) whatever the number of tokens."""

    def __init__(self, *, layers: int, domains: Sequence[str], hidden: int) -> None:
        self.domains = list(domains)
        self.sums = torch.zeros(layers, len(self.domains), hidden, dtype=torch.float64)
        self.tokens = torch.zeros(layers, len(self.domains), dtype=torch.int64)

    @torch.no_grad()
    def add(self, layer: int, hidden: Tensor, domains: Tensor, mask: Tensor | None = None) -> None:
        """``hidden`` (B, T, H), ``domains`` (B,) indices of the rows' domains, ``mask`` (B, T) marks real tokens."""
        real = torch.ones(hidden.shape[:2]) if mask is None else mask.to("cpu", torch.float32)
        member = torch.nn.functional.one_hot(domains.cpu(), len(self.domains)).float()  # (B, D)
        weights = member[:, None, :] * real[:, :, None]  # (B, T, D)
        weights = weights.flatten(0, 1).to(hidden.device)
        self.sums[layer] += (weights.mT @ hidden.flatten(0, 1).float()).double().cpu()
        self.tokens[layer] += weights.sum(dim=0).long().cpu()

    @contextmanager
    def watching(self, model: Any, domains: Tensor, mask: Tensor | None = None) -> Iterator[None]:
        """Count the feed-forward inputs of the forward passes within; dense or with experts, it is the same input."""
        handles = [
            layer.mlp.register_forward_pre_hook(
                lambda _, inputs, index=index: self.add(index, inputs[0], domains, mask)
            )
            for index, layer in enumerate(model.get_decoder().layers)
        ]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def router_rows(self) -> Tensor:
        """(L, D, H) fp32, unit rows; the rows of a layer sum to zero before they are scaled.

        Raises :class:`MoEError` for a domain without tokens or one that looks like the mean of all.
        """
        silent = [
            name for name, count in zip(self.domains, self.tokens[0].tolist(), strict=True) if not count
        ]
        if silent:
            raise MoEError(f"no tokens of {', '.join(silent)}: their router rows would be unknown.")
        means = self.sums / self.tokens[:, :, None]
        rows = means - means.mean(dim=1, keepdim=True)
        lengths = rows.norm(dim=2, keepdim=True)
        if bool((lengths <= 1e-6 * means.norm(dim=2, keepdim=True)).any()):
            layer, domain, _ = (lengths <= 1e-6 * means.norm(dim=2, keepdim=True)).nonzero()[0].tolist()
            raise MoEError(
                f"layer {layer}: the mean of {self.domains[domain]} is the mean of all domains; their texts do not "
                "tell them apart."
            )
        unit: Tensor = (rows / lengths).float()
        return unit


def read_labelled_texts(
    path: Path, base: Path, domains: Sequence[str], *, max_tokens: int, max_per_domain: int
) -> list[Labelled]:
    """Rows ``{"domain": ..., "text": ...}`` or ``{"domain": ..., "messages": [...]}`` of a JSONL file, tokenised.

    The first ``max_per_domain`` rows of each domain, cut at ``max_tokens``. Rows of other domains are passed over.
    Raises :class:`MoEError` with the line of a row that cannot be used.
    """
    tokenizer = AutoTokenizer.from_pretrained(base, trust_remote_code=False)
    taken = dict.fromkeys(domains, 0)
    found: list[Labelled] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                domain = row["domain"]
                if domain not in taken or taken[domain] >= max_per_domain:
                    continue
                text = row["text"] if "text" in row else _rendered(tokenizer, row["messages"])
            except (ValueError, KeyError, TypeError) as error:
                raise MoEError(
                    f"{path}:{number}: needs 'domain' and 'text' or 'messages' ({error!r})."
                ) from error
            ids = tokenizer(text, return_tensors="pt").input_ids[0, :max_tokens]
            if ids.numel():
                found.append((list(domains).index(domain), ids))
                taken[domain] += 1
    return found


def _rendered(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    if not tokenizer.chat_template:
        raise ValueError("the base model's tokenizer has no chat template: give 'text' instead of 'messages'")
    return str(tokenizer.apply_chat_template(messages, tokenize=False))


@torch.no_grad()
def streamed_means(
    base: Path,
    texts: Iterable[Labelled],
    domains: Sequence[str],
    *,
    scratch: Path,
    device: torch.device | str = "cpu",
) -> DomainMeans:
    """Domain means of a dense checkpoint that need not fit into memory: layer by layer over all texts.

    One layer's weights are in memory at a time; the hidden states between two layers rest in ``scratch``. Texts
    run one by one, so nothing is padded.
    """
    config = AutoConfig.from_pretrained(base, trust_remote_code=False)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa").eval().get_decoder()
    rotary = type(model.rotary_emb)(config).to(device)
    means = DomainMeans(layers=config.num_hidden_layers, domains=domains, hidden=config.hidden_size)
    window = getattr(config, "sliding_window", None)
    states: list[_Resting] = []
    tensors = ShardedTensors(base)
    embeddings = tensors.get("model.embed_tokens.weight")
    for number, (domain, ids) in enumerate(texts):
        resting = _Resting(scratch / f"{number:06d}.hidden", domain, embeddings.dtype)
        resting.put(embeddings[ids[:window]][None])
        states.append(resting)
    del embeddings
    for index, layer in enumerate(model.layers):
        prefix = f"model.layers.{index}."
        names = [name for name, _ in layer.named_parameters()]
        weights = {name: tensors.get(prefix + name).to(device, copy=True) for name in names}
        layer.load_state_dict(weights, assign=True)
        del weights
        _run_layer(layer, index, states, means, rotary, device)
        layer.to("meta")
    for resting in states:
        resting.path.unlink()
    return means


def _run_layer(
    layer: nn.Module,
    index: int,
    states: list[_Resting],
    means: DomainMeans,
    rotary: nn.Module,
    device: torch.device | str,
) -> None:
    for resting in states:
        hidden = resting.get().to(device)
        positions = torch.arange(hidden.shape[1], device=device)[None]
        domain = torch.tensor([resting.domain])
        handle = layer.get_submodule("mlp").register_forward_pre_hook(
            lambda _, inputs, domain=domain: means.add(index, inputs[0], domain)
        )
        try:
            # Without a mask the attention is causal, and one text needs no other.
            after: Any = layer(hidden, position_embeddings=rotary(hidden, positions), attention_mask=None)
        finally:
            handle.remove()
        resting.put(after[0] if isinstance(after, tuple) else after)


class _Resting:
    """Hidden states (1, T, H) of one text, in a file between two layers."""

    def __init__(self, path: Path, domain: int, dtype: torch.dtype) -> None:
        self.path, self.domain, self.dtype = path, domain, dtype
        self._shape: torch.Size = torch.Size()

    def put(self, hidden: Tensor) -> None:
        self._shape = hidden.shape
        self.path.write_bytes(hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes())

    def get(self) -> Tensor:
        content = bytearray(self.path.read_bytes())
        return torch.frombuffer(content, dtype=self.dtype).view(self._shape)
