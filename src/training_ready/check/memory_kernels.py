"""What do CUDA kernels hold? Stand-ins with the memory of kernels that cannot run on fake tensors on a CPU.

A trace on a machine without a GPU would otherwise record the CPU's kernels: attention without the workspace of its
backward pass, and TRL's loss with several fp32 copies of each tile of logits, where its Triton kernels need none.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from transformers import AttentionInterface
from transformers.integrations import moe
from transformers.integrations.sdpa_attention import repeat_kv
from transformers.masking_utils import AttentionMaskInterface, flash_attention_mask, sdpa_mask
from trl.kernels import chunked_logprob


# --------------------------------------------------------------------------- fused attention
# "flash_attn" in the name, because TRL's selective checkpointing recognises attention by it.
@torch.library.custom_op("training_ready::flash_attn_forward", mutates_args=())
def attention_forward(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """(B, T, Hq, D), twice (B, T, Hk, D) -> output like q, and the log-sum-exp (B, Hq, T) in fp32. Shapes only."""
    raise NotImplementedError("this operator has no arithmetic; it exists for fake tensors")


@attention_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=torch.float32)


@torch.library.custom_op("training_ready::flash_attn_backward", mutates_args=())
def attention_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the workspace: dq summed in fp32 with the row sums, dk and dv for every query head."""
    raise NotImplementedError("this operator has no arithmetic; it exists for fake tensors")


@attention_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    sums = q.new_empty(q.numel() + lse.numel(), dtype=torch.float32)
    grouped = q.shape[2] != k.shape[2]
    expanded = q.new_empty(2 * q.numel() if grouped else 0)
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), sums, expanded


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:3], *output, inputs[3])
    ctx.mark_non_differentiable(output[1])


def _backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, Tensor, Tensor, None]:
    *kept, mask = ctx.saved_tensors
    dq, dk, dv, *_workspace = attention_backward(grad.contiguous(), *kept, mask)
    return dq, dk, dv, None


attention_forward.register_autograd(_backward, setup_context=_keep)


def _flash(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **_: Any
) -> tuple[Tensor, None]:
    """FlashAttention 2: grouped heads as they are, no mask. (B, H, T, D) in, (B, T, H, D) out."""
    q, k, v = (one.transpose(1, 2) for one in (query, key, value))
    out, _lse = attention_forward(q, k, v, None)
    return out, None


def _sdpa(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """torch's choice on CUDA: flash without a mask; with one the memory-efficient kernel, heads repeated and the mask
    in the type of the query; and no fused kernel at all for grouped heads in fp32."""
    half = query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    groups = getattr(module, "num_key_value_groups", 1)
    if attention_mask is None and half:
        return _flash(module, _half(query), _half(key), _half(value), None)
    if attention_mask is None and groups > 1:
        with sdpa_kernel(SDPBackend.MATH):
            out = F.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=True
            )
        return out.transpose(1, 2).contiguous(), None
    key, value = repeat_kv(key, groups), repeat_kv(value, groups)
    query, key, value = (_half(one) for one in (query, key, value))
    bias = None if attention_mask is None else attention_mask.to(query.dtype)
    out, _lse = attention_forward(*(one.transpose(1, 2) for one in (query, key, value)), bias)
    return out.contiguous(), None


def _half(x: Tensor) -> Tensor:
    return x.to(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else x


AttentionInterface.register("traced_fused", _flash)
AttentionMaskInterface.register("traced_fused", flash_attention_mask)
AttentionInterface.register("traced_sdpa", _sdpa)
AttentionMaskInterface.register("traced_sdpa", sdpa_mask)


def attention_on_gpu(name: str) -> str:
    """The stand-in for a recipe's attention; ``eager`` is traced as it is."""
    if "flash" in name:
        return "traced_fused"
    return "traced_sdpa" if name == "sdpa" else name


# --------------------------------------------------------------------------- grouped products
@torch.library.custom_op("training_ready::grouped_product", mutates_args=())
def grouped_product(rows: Tensor, weight: Tensor) -> Tensor:
    """(S, K), (E, K, N) -> (S, N). Shapes only."""
    raise NotImplementedError("this operator has no arithmetic; it exists for fake tensors")


@grouped_product.register_fake
def _(rows: Tensor, weight: Tensor) -> Tensor:
    return rows.new_empty(rows.shape[0], weight.shape[2])


def _product_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
    rows, weight = ctx.saved_tensors
    to_rows, to_weight = ctx.needs_input_grad
    return torch.empty_like(rows) if to_rows else None, torch.empty_like(weight) if to_weight else None


grouped_product.register_autograd(
    _product_backward, setup_context=lambda ctx, inputs, output: ctx.save_for_backward(*inputs)
)


@contextmanager
def fake_grouped_products() -> Iterator[None]:
    """Inside, experts in fp32 can be traced. torch 2.13 computes their grouped products on every device, yet refuses
    the shapes of anything but bf16 (``Expected inputs of BF16 type``, in ``_meta_grouped_mm_common``); remove when it
    does not."""
    original = moe._grouped_mm

    def product(input: Tensor, weight: Tensor, offs: Tensor) -> Tensor:
        if weight.dtype == torch.bfloat16:
            bf16: Tensor = original(input, weight, offs)
            return bf16
        out: Tensor = grouped_product(input.to(weight.dtype), weight)
        return out

    with _replaced(moe, _grouped_mm=product):
        yield


# --------------------------------------------------------------------------- the loss
@contextmanager
def gpu_kernels() -> Iterator[None]:
    """Inside, TRL's chunked loss holds what it holds on a GPU: one tile of logits, which Triton folds in place, and
    fp32 sums that cuBLAS adds to. On CPU trl 1.16 folds with torch operators that make fp32 copies of every tile."""

    def in_place(*_: Any, **__: Any) -> None:
        return None

    tiles = dict.fromkeys(("_forward_tile", "_backward_tile", "_addmm_fp32"), in_place)
    with fake_grouped_products(), _replaced(chunked_logprob, **tiles):
        yield


@contextmanager
def _replaced(module: Any, **functions: Any) -> Iterator[None]:
    kept = {name: getattr(module, name) for name in functions}
    try:
        for name, function in functions.items():
            setattr(module, name, function)
        yield
    finally:
        for name, function in kept.items():
            setattr(module, name, function)
