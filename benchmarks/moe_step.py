"""A whole training step of a mixture of experts with adapters on experts and attention: ours, PEFT's, PEFT's eager.

python benchmarks/moe_step.py                 # CPU: a small model; GPU: the shape of Qwen3-30B-A3B, packed 4k and 8k
python benchmarks/moe_step.py --checkpointing --tokens 8192 --variants ours peft

Forward, chunked cross-entropy, backward, AdamW on the adapters. Weights are random from a configuration, ids are
random, routing is set from outside (balanced, or skewed as 1 / rank of the expert): every variant does the same work.
`gradient_difference` is against PEFT's eager path in the same type (fp32 on a CPU); where that does not fit in memory
it is left out. Model FLOPs are counted as 4 N + 3 x attention per token (N: parameters that one token multiplies with,
output head included; attention causal); what checkpointing computes again is not counted.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from expert_layer import choices, stored_by_peft
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
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, Qwen3MoeConfig

from training_ready.moe.experts_lora import PROJECTIONS, add_expert_adapters
from training_ready.moe.families import routed_layers
from training_ready.moe.parameters import describe_experts

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
GPU = {  # Qwen3-30B-A3B
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "moe_intermediate_size": 768,
}
CPU = {
    "vocab_size": 512,
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 128,
}
CHUNK = 1024  # tokens whose logits exist at once


class Step:
    """One variant: a model with adapters, a batch of one packed row, an optimizer."""

    def __init__(
        self, variant: str, shape: dict[str, int], tokens: int, rank: int, routing: str, recompute: bool
    ) -> None:
        on_gpu = device().type == "cuda"
        torch.manual_seed(0)
        with device():
            config = Qwen3MoeConfig(**shape, max_position_embeddings=tokens, norm_topk_prob=True)
            dtype = torch.bfloat16 if on_gpu else torch.float32
            base = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        self.model: Any = _adapted(base, variant, rank).train()
        if recompute:
            self.model.enable_input_require_grads()
            base.gradient_checkpointing_enable({"use_reentrant": False})
        _route(base, routing, tokens, shape)
        self.base = base
        generator = torch.Generator().manual_seed(3)
        self.ids = torch.randint(shape["vocab_size"], (1, tokens), generator=generator).to(device())
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-4, fused=on_gpu)

    def loss(self) -> Tensor:
        hidden = self.base.model(input_ids=self.ids, use_cache=False).last_hidden_state[0, :-1]
        parts = zip(hidden.split(CHUNK), self.ids[0, 1:].split(CHUNK), strict=True)
        losses = [checkpoint(self._chunk, rows, labels, use_reentrant=False) for rows, labels in parts]
        return torch.stack(losses).sum() / (self.ids.numel() - 1)

    def _chunk(self, rows: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(self.base.lm_head(rows).float(), labels, reduction="sum")

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self) -> list[Tensor]:
        """Of the attention's adapters, which every variant names alike and which lie under all experts but the last."""
        self.loss().backward()
        found = [
            p.grad.float().cpu()
            for name, p in self.model.named_parameters()
            if "self_attn" in name and p.grad is not None
        ]
        self.optimizer.zero_grad()
        return found


def _adapted(base: Any, variant: str, rank: int) -> Any:
    """Adapters with the same values in every variant."""
    settings = {"r": rank, "lora_alpha": 2 * rank, "lora_dropout": 0.0, "target_modules": ATTENTION}
    if variant == "ours":
        model = get_peft_model(base, LoraConfig(**settings))
        add_expert_adapters(model, rank=rank, alpha=2 * rank)
    else:
        if variant == "peft_eager":
            base.set_experts_implementation("eager")
        model = get_peft_model(base, LoraConfig(**settings, target_parameters=EXPERTS))
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for routed in routed_layers(model):
            experts: Any = routed.block.experts
            if variant == "ours":
                stacks = [getattr(experts.split_lora[name], part) for name in PROJECTIONS for part in "AB"]
                values = _random_like([tuple(stack.shape) for stack in stacks], generator)
            else:
                nested = (experts.base_layer, experts)  # the inner one adapts gate_up_proj
                stacks = [one["default"].weight for two in nested for one in (two.lora_A, two.lora_B)]
                values = stored_by_peft(_random_like(_stacked(stacks, rank), generator))
            for stack, value in zip(stacks, values, strict=True):
                stack.copy_(value)
        for name, parameter in model.named_parameters():
            if "self_attn" in name and "lora_" in name:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model


def _random_like(shapes: list[tuple[int, ...]], generator: torch.Generator) -> list[Tensor]:
    return [0.02 * torch.randn(shape, generator=generator) for shape in shapes]


def _stacked(stored: list[Tensor], rank: int) -> list[tuple[int, ...]]:
    """(E, r, in) and (E, out, r) of PEFT's (E r, in) and (out, r E)."""
    return [
        (rows // rank, rank, columns) if index % 2 == 0 else (columns // rank, rows, rank)
        for index, (rows, columns) in enumerate(tuple(one.shape) for one in stored)
    ]


def _route(base: Any, routing: str, tokens: int, shape: dict[str, int]) -> None:
    """Replace what each router chose; its weights stay, so that gradients flow as always."""
    layout = {"experts": shape["num_experts"], "chosen": shape["num_experts_per_tok"]}
    chosen = choices(routing, tokens, layout).to(device())
    for routed in routed_layers(base):
        routed.router.register_forward_hook(lambda _, __, out: (out[0], out[1], chosen))


def flops_per_token(base: Any, shape: dict[str, int], tokens: int) -> float:
    """4 N + 3 x attention for a step that trains adapters only."""
    active = describe_experts(base).active - base.get_input_embeddings().weight.numel()
    width = shape["num_attention_heads"] * shape["head_dim"]
    attention = shape["num_hidden_layers"] * 2 * 2 * width * tokens / 2
    return 4 * active + 3 * attention


def measure(
    shape: dict[str, int],
    tokens: int,
    rank: int,
    routing: str,
    variants: list[str],
    repeats: int,
    recompute: bool,
) -> list[dict[str, Any]]:
    on_gpu = device().type == "cuda"
    expected: list[Tensor] | None = None
    rows = []
    for variant in sorted(variants, key=lambda name: name != "peft_eager"):  # the reference first
        row: dict[str, Any] = {"variant": variant, "routing": routing, "tokens": tokens, "rank": rank}
        row["checkpointing"] = recompute
        with out_of_memory_as(row):
            one = Step(variant, shape, tokens, rank, routing, recompute)
            found = one.gradients()
            expected = found if variant == "peft_eager" else expected
            if expected is not None:
                row["gradient_difference"] = difference(found, expected)
            flops = tokens * flops_per_token(one.base, shape, tokens)
            row |= seconds(one.step, repeats=repeats)
            row["tokens_per_s"] = tokens / row["median_s"]
            if on_gpu:
                row["utilisation"] = utilisation(flops, row["median_s"])
                row["peak_mb"] = peak_bytes(one.step) / 1e6
            else:
                row["kept_mb"] = kept_for_backward(one.loss, one.model.parameters()) / 1e6
        one = None  # type: ignore[assignment]
        show(row)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, nargs="+", help="tokens of the packed row; default by device")
    parser.add_argument("--layers", type=int, help="fewer layers of the same shape")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--variants", nargs="+", choices=["ours", "peft", "peft_eager"])
    parser.add_argument("--checkpointing", action="store_true")
    parser.add_argument("--note", help="what a reader of the numbers should know about the machine")
    chosen = parser.parse_args()
    on_gpu = device().type == "cuda"
    shape = dict(GPU if on_gpu else CPU)
    shape["num_hidden_layers"] = chosen.layers or shape["num_hidden_layers"]
    facts = machine(chosen.note) | {"shape": shape}
    rows = []
    for tokens in chosen.tokens or ([4096, 8192] if on_gpu else [512]):
        for routing in ("balanced", "skewed"):
            rows += measure(
                shape,
                tokens,
                chosen.rank,
                routing,
                chosen.variants or ["ours", "peft", "peft_eager"],
                chosen.repeats,
                chosen.checkpointing,
            )
    write("moe-step", rows, facts)


if __name__ == "__main__":
    main()
