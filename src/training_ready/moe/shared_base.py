"""How to train experts that share one dense feed-forward, and still end in a plain mixture of experts?

Expert e computes with ``W + s * B_e A_e`` on gate, up and down, but that weight never exists: the frozen dense
products run once per *token*, whatever the number of experts per token, and only the thin products run per
routed (token, expert) pair. The weighted sum over the experts of a token is taken before the dense down
projection, which is linear, so that it too runs once per token. Weights in memory are those of the dense
model and the adapters: 24.5 GB in bf16 instead of 77.3 GB for four experts of the Mistral-Nemo shape.

Attention, norms, router and the decoder layers are transformers' own Mixtral or Qwen3-MoE classes, so that
whatever watches or balances routers works as on the exported model.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from training_ready.moe.experts_lora import SplitLora
from training_ready.moe.families import MoEError, RoutedLayer, routed_layers
from training_ready.moe.upcycle_target import PROJECTIONS, target_config

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
"""What LoRA of PEFT may adapt beside the experts: every linear layer that is none of theirs, the output head aside."""
_LORA = re.compile(r"(?:^|\.)(model\.layers\.\d+\.self_attn\.[qkvo]_proj)\.lora_[AB]\.[^.]+\.weight$")
_OURS = re.compile(r"\.mlp\.(?:gate\.weight|experts\.adapters\.\w+\.[AB])$")


class SharedExperts(nn.Module):
    """E experts as one dense feed-forward and E low-rank differences on each of its projections.

    Takes the place of a sparse block's experts: (T, H), (T, k), (T, k) -> (T, H).
    """

    def __init__(
        self,
        shared: nn.Module,
        *,
        experts: int,
        rank: int,
        alpha: float,
        dropout: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.num_experts = experts
        self.shared = shared
        self.adapters = nn.ModuleDict()
        for name in PROJECTIONS:
            linear: Any = shared.get_submodule(name)
            self.adapters[name] = SplitLora(
                experts=experts,
                in_features=linear.in_features,
                out_features=linear.out_features,
                rank=rank,
                alpha=alpha,
                dropout=dropout,
                dtype=dtype,
                device=linear.weight.device,
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        tokens, k = top_k_index.shape
        shared: Any = self.shared
        expert_of_row, order = top_k_index.reshape(-1).sort()
        experts = torch.arange(self.num_experts, device=order.device)
        ends = torch.searchsorted(expert_of_row, experts.to(expert_of_row.dtype), right=True).int()
        token_of_row = order // k
        rows = hidden_states[token_of_row]

        def adapted(name: str) -> Tensor:
            dense: Tensor = shared.get_submodule(name)(hidden_states)
            difference: Tensor = self.adapters[name](rows, ends, rows.dtype)
            return dense[token_of_row] + difference

        inner = shared.act_fn(adapted("gate_proj")) * adapted("up_proj")  # (S, I), S = T * k
        # The weight of a pair is applied here and not to the expert's output: all that follows is linear.
        inner = (inner * top_k_weights.reshape(-1)[order][:, None]).to(rows.dtype)
        difference = self.adapters["down_proj"](inner, ends, inner.dtype)
        # Back to token order by gathering: index_add would sum in another order each time on CUDA.
        position = torch.empty_like(order).scatter_(
            0, order, torch.arange(order.numel(), device=order.device)
        )

        def summed(values: Tensor) -> Tensor:
            return values[position].view(tokens, k, -1).sum(dim=1)

        out: Tensor = shared.down_proj(summed(inner)) + summed(difference)
        return out


def build_shared_base(
    dense: Any,
    *,
    experts: int,
    top_k: int,
    rank: int,
    alpha: float,
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """A Mixtral or Qwen3-MoE model over the weights of a dense one, which is used up: its modules move over.

    Everything is frozen but the adapters (of type ``dtype``) and the routers (of the model's type). The
    routers start random; see :func:`set_router_rows`. Computes exactly as the dense model until trained.
    PEFT may add LoRA to the attention *afterwards*; it freezes all it does not know, so call
    :func:`train_shared_base` once more after it.

    Raises :class:`MoEError` for a dense model that the target does not hold.
    """
    if rank < 1:
        raise MoEError(f"the rank of expert adapters is {rank}, at least 1 is needed.")
    config = target_config(dense.config, experts=experts, top_k=top_k)
    name_or_path = getattr(dense.config, "_name_or_path", "")
    with torch.device("meta"):  # fused experts of full size that never exist
        model = AutoModelForCausalLM.from_config(
            config, attn_implementation=dense.config._attn_implementation
        )
    for routed in routed_layers(model):
        shared = dense.get_submodule(routed.name)
        block: Any = routed.block
        block.experts = SharedExperts(
            shared, experts=experts, rank=rank, alpha=alpha, dropout=dropout, dtype=dtype
        )
    for name, module in list(dense.named_modules()):
        if ".mlp." not in f"{name}." and not list(module.children()) and list(module.parameters()):
            model.set_submodule(name, module)
    weight = dense.get_input_embeddings().weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(weight.device)
    for routed in routed_layers(model):
        rows = torch.empty(experts, config.hidden_size, dtype=weight.dtype, device=weight.device)
        routed.router.weight = nn.Parameter(rows.normal_(std=config.initializer_range))
    model.config._name_or_path = name_or_path
    model.generation_config = dense.generation_config
    model.train(dense.training)
    train_shared_base(model)
    return model


def train_shared_base(model: nn.Module) -> None:
    """Gradients to the expert adapters and the routers; the shared weights frozen, all else left as it is.

    Of a fresh model everything else is frozen too; what PEFT added meanwhile stays trainable.

    Raises :class:`MoEError` when that is more than plain LoRA on the attention's projections: adapters on the shared
    feed-forward would move every expert's base, and nothing else is merged into what is exported.
    """
    fresh = not any("lora_" in name for name, _ in model.named_parameters())
    if fresh:
        model.requires_grad_(False)
    strange = [
        name
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and not _OURS.search(name) and lora_layer(name) is None
    ]
    if strange:
        raise MoEError(
            f"{strange[0]} would train ({len(strange)} such): beside a shared base that is plain LoRA on the attention "
            f"only. Name {', '.join(ATTENTION)} in lora_target_modules, or some of them, and nothing else."
        )
    for routed in routed_layers(model):
        shared_experts(routed).shared.requires_grad_(False)
        shared_experts(routed).adapters.requires_grad_(True)
        routed.router.requires_grad_(True)


def lora_layer(parameter: str) -> str | None:
    """The attention's projection, as ``model.layers.0.self_attn.q_proj``, that a factor of PEFT's LoRA belongs to."""
    match = _LORA.search(parameter)
    return match[1] if match else None


def lora_layers(model: nn.Module) -> list[str]:
    """The attention's projections that carry LoRA of PEFT."""
    return sorted({layer for name, _ in model.named_parameters() if (layer := lora_layer(name))})


def shared_experts(routed: RoutedLayer) -> SharedExperts:
    """The experts of a sparse block; raises :class:`MoEError` when they are not of this kind."""
    experts = routed.block.experts
    if not isinstance(experts, SharedExperts):
        raise MoEError(f"{routed.name}.experts is {type(experts).__name__}, not a shared base with adapters.")
    return experts


def shared_base_adapters(model: nn.Module) -> Iterator[tuple[int, str, SplitLora]]:
    """(Decoder layer, projection, its adapters) in order; through wrappers such as PEFT's."""
    for routed in routed_layers(model):
        for name, adapter in shared_experts(routed).adapters.items():
            if isinstance(adapter, SplitLora):
                yield routed.layer, name, adapter


@torch.no_grad()
def set_router_rows(model: nn.Module, rows: Tensor) -> None:
    """Set the routers of all layers, (L, E, H), in order of the decoder layers.

    Raises :class:`MoEError` for rows of another shape.
    """
    routers: list[Any] = [routed.router for routed in routed_layers(model)]
    needed = (len(routers), *routers[0].weight.shape)
    if tuple(rows.shape) != needed:
        raise MoEError(
            f"router rows of shape {tuple(rows.shape)}, this model needs {needed} (layers, experts, H)."
        )
    for router, layer_rows in zip(routers, rows, strict=True):
        router.weight.copy_(layer_rows)
