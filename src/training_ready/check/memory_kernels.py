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
    """torch's choice on CUDA: flash without a mask; with one the memory-efficient kernel, heads repeated and the mask in
    the type of the query; and no fused kernel at all for grouped heads in fp32."""
    half = query.dtype in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled("cpu")
    groups = getattr(module, "num_key_value_groups", 1)
    if attention_mask is None and half:
        return _flash(module, *(_half(one) for one in (query, key, value)), None)
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


AttentionInterface.register("traced_flash", _flash)
AttentionMaskInterface.register("traced_flash", flash_attention_mask)
AttentionInterface.register("traced_sdpa", _sdpa)
AttentionMaskInterface.register("traced_sdpa", sdpa_mask)
ATTENTION_ON_GPU = {
    "sdpa": "traced_sdpa",
    "flash_attention_2": "traced_flash",
    "flash_attention_3": "traced_flash",
}
"""Attention of a recipe -> the stand-in; ``eager`` is traced as it is, ``flex_attention`` compiles and is not traced."""


# --------------------------------------------------------------------------- the loss
@contextmanager
def triton_loss() -> Iterator[None]:
    """Inside, TRL's chunked loss holds what it holds on a GPU: one tile of logits, which Triton folds in place, and fp32
    sums that cuBLAS adds to. On CPU trl 1.16 folds with torch operators that make fp32 copies of every tile."""
    names = ("_forward_tile", "_backward_tile", "_addmm_fp32")
    kept = {name: getattr(chunked_logprob, name) for name in names}
    try:
        for name in names:
            setattr(chunked_logprob, name, lambda *_, **__: None)
        yield
    finally:
        for name, function in kept.items():
            setattr(chunked_logprob, name, function)
