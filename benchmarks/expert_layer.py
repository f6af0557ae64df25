"""One layer of experts, forward and backward, frozen weights and low-rank adapters: ours, PEFT's, PEFT's eager.

python benchmarks/expert_layer.py               # CPU: small shapes; GPU: E128 H2048 I768 K8 at 8k, 16k, 32k tokens
python benchmarks/expert_layer.py --tokens 4096 --rank 32 --note "otherwise idle machine"

Every variant gets the same weights, adapters, tokens and choices; `gradient_difference` is against PEFT's eager path in
fp32. `kept_mb` (CPU) is what autograd keeps for backward, `peak_mb` (GPU) the peak beyond weights and inputs. TFLOP/s
(GPU) counts the products with frozen weights and their gradients for x, 12 T K H I: what any such layer has to do.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from measure import (
    device,
    difference,
    kept_for_backward,
    machine,
    out_of_memory_as,
    peak_bytes,
    seconds,
    show,
    utilisation,
    write,
)
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from training_ready.moe.experts_lora import add_expert_adapters

GPU = {"experts": 128, "hidden": 2048, "intermediate": 768, "chosen": 8}
CPU = {"experts": 32, "hidden": 256, "intermediate": 256, "chosen": 4}


def build(shape: dict[str, int], dtype: torch.dtype) -> Any:
    """A model with one sparse layer; only its experts are used."""
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=shape["hidden"],
        moe_intermediate_size=shape["intermediate"],
        num_experts=shape["experts"],
        num_experts_per_tok=shape["chosen"],
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=shape["hidden"] // 4,
    )
    torch.manual_seed(0)
    with device():
        return AutoModelForCausalLM.from_config(config, dtype=dtype).requires_grad_(False)


def ours(model: Any, rank: int, factors: list[Tensor]) -> tuple[nn.Module, list[nn.Parameter]]:
    add_expert_adapters(model, rank=rank, alpha=2 * rank)
    experts = model.model.layers[0].mlp.experts
    adapters = [experts.split_lora[name] for name in ("gate_up_proj", "down_proj")]
    return experts, _filled([p for adapter in adapters for p in (adapter.A, adapter.B)], factors)


def peft(
    model: Any, rank: int, factors: list[Tensor], *, eager: bool = False
) -> tuple[nn.Module, list[nn.Parameter]]:
    if eager:
        model.set_experts_implementation("eager")
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=[], target_parameters=targets)
    outer = get_peft_model(model, config).base_model.model.model.layers[0].mlp.experts
    inner = outer.base_layer  # PEFT nests: the inner one adapts gate_up_proj
    parameters = [
        p for one in (inner, outer) for p in (one.lora_A["default"].weight, one.lora_B["default"].weight)
    ]
    stored = [
        factor.flatten(0, 1) if index % 2 == 0 else factor.permute(1, 2, 0).flatten(1)
        for index, factor in enumerate(factors)
    ]
    return outer, _filled(parameters, stored)


def stored_by_peft(factors: list[Tensor]) -> list[Tensor]:
    """A (E, r, in) as (E r, in), B (E, out, r) as (out, r E)."""
    return [
        factor.flatten(0, 1) if index % 2 == 0 else factor.permute(1, 2, 0).flatten(1)
        for index, factor in enumerate(factors)
    ]


def peft_eager(model: Any, rank: int, factors: list[Tensor]) -> tuple[nn.Module, list[nn.Parameter]]:
    return peft(model, rank, factors, eager=True)


VARIANTS: dict[str, Callable[..., tuple[nn.Module, list[nn.Parameter]]]] = {
    "ours": ours,
    "peft": peft,
    "peft_eager": peft_eager,
}


def _filled(parameters: list[nn.Parameter], values: list[Tensor]) -> list[nn.Parameter]:
    with torch.no_grad():
        for parameter, value in zip(parameters, values, strict=True):
            parameter.copy_(value)
    return parameters


def in_one_form(gradients: list[Tensor], shape: dict[str, int], rank: int) -> list[Tensor]:
    """Gradients as (E, r, in) and (E, out, r), whichever variant they come from."""
    experts = shape["experts"]
    return [
        gradient
        if gradient.ndim == 3
        else gradient.view(experts, rank, -1)
        if index % 2 == 0
        else gradient.view(gradient.shape[0], rank, experts).permute(2, 0, 1)
        for index, gradient in enumerate(gradients)
    ]


def choices(routing: str, tokens: int, shape: dict[str, int]) -> Tensor:
    """(T, k) distinct experts per token: equally often, or with probability ~ 1 / rank of the expert."""
    experts, generator = shape["experts"], torch.Generator().manual_seed(1)
    if routing == "balanced":
        first = torch.randperm(tokens, generator=generator)[:, None]
        return (first * shape["chosen"] + torch.arange(shape["chosen"])) % experts
    likely = 1 / torch.arange(1, experts + 1)
    return torch.multinomial(likely.expand(tokens, -1), shape["chosen"], generator=generator)


@dataclass(kw_only=True)
class Layer:
    """One variant with its inputs, ready to run."""

    experts: nn.Module
    adapters: list[nn.Parameter]
    inputs: Tensor
    chosen: Tensor
    weights: Tensor
    into: Tensor

    def forward(self) -> Tensor:
        """A scalar whose gradient for the layer's output is the given random one."""
        for leaf in (self.inputs, *self.adapters):
            leaf.grad = None
        out: Tensor = (self.experts(self.inputs, self.chosen, self.weights) * self.into).sum()
        return out

    def step(self) -> None:
        self.forward().backward()

    def gradients(self, shape: dict[str, int], rank: int) -> list[Tensor]:
        """Of x and of the adapters, after a step."""
        self.step()
        found = [leaf.grad for leaf in (self.inputs, *self.adapters) if leaf.grad is not None]
        return [found[0], *in_one_form(found[1:], shape, rank)]


def layer(
    variant: str, shape: dict[str, int], tokens: int, rank: int, routing: str, dtype: torch.dtype
) -> Layer:
    """The same weights, adapters, tokens and choices for every variant."""
    where, generator = device(), torch.Generator().manual_seed(2)
    hidden, inner, experts = shape["hidden"], shape["intermediate"], shape["experts"]
    sizes = [(rank, hidden), (2 * inner, rank), (rank, inner), (hidden, rank)]
    factors = [0.02 * torch.randn(experts, *size, generator=generator) for size in sizes]
    x, into = (torch.randn(tokens, hidden, generator=generator).to(where, dtype) for _ in range(2))
    module, adapters = VARIANTS[variant](build(shape, dtype), rank, [factor.to(where) for factor in factors])
    return Layer(
        experts=module,
        adapters=adapters,
        inputs=x.requires_grad_(),
        chosen=choices(routing, tokens, shape).to(where),
        weights=torch.full((tokens, shape["chosen"]), 1 / shape["chosen"], device=where, dtype=dtype),
        into=into,
    )


def measure(
    shape: dict[str, int], tokens: int, rank: int, routing: str, repeats: int
) -> list[dict[str, Any]]:
    on_gpu = device().type == "cuda"
    dtype = torch.bfloat16 if on_gpu else torch.float32
    exact = layer("peft_eager", shape, tokens, rank, routing, torch.float32).gradients(shape, rank)
    flops = 12 * tokens * shape["chosen"] * shape["hidden"] * shape["intermediate"]
    rows = []
    for variant in VARIANTS:
        row: dict[str, Any] = {
            "variant": variant,
            "routing": routing,
            "tokens": tokens,
            "rank": rank,
            **shape,
        }
        row["dtype"] = str(dtype).removeprefix("torch.")
        with out_of_memory_as(row):
            one = layer(variant, shape, tokens, rank, routing, dtype)
            row["gradient_difference"] = difference(one.gradients(shape, rank), exact)
            row |= seconds(one.step, repeats=repeats)
            if on_gpu:
                row["tflops"] = flops / row["median_s"] / 1e12
                row["utilisation"] = utilisation(flops, row["median_s"])
                row["peak_mb"] = peak_bytes(one.step) / 1e6
            else:
                row["kept_mb"] = kept_for_backward(one.forward, one.experts.parameters()) / 1e6
        show(row)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of a step; default by device")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--note", help="what a reader of the numbers should know about the machine")
    chosen = parser.parse_args()
    on_gpu = device().type == "cuda"
    shape = GPU if on_gpu else CPU
    facts = machine(chosen.note)
    rows = []
    for tokens in chosen.tokens or ([8192, 16384, 32768] if on_gpu else [512]):
        for routing in ("balanced", "skewed"):
            rows += measure(shape, tokens, chosen.rank, routing, chosen.repeats)
    write("expert-layer", rows, facts)


if __name__ == "__main__":
    main()
