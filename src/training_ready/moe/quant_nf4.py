"""How does a weight become four bits? NF4 of QLoRA (arXiv 2305.14314), in plain torch, on any device.

Consecutive values form blocks of 64; each block is divided by its largest magnitude and every value replaced
by the nearest of 16 levels, quantiles of a normal distribution. Two codes per byte, the first in the high
half: the same codes and scales as bitsandbytes'. The scales cost 0.5 bit per value; quantised once more
(``double``), 0.127 bit.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from training_ready.moe.families import MoEError

BLOCK = 64
SCALES_PER_BLOCK = 256
LEVELS = (
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Nf4:
    """A weight of N values: codes (N / 2,) uint8 and the scales of its blocks."""

    packed: Tensor
    scales: Tensor
    """(N / 64,): fp32, or int8 steps around ``centre`` when quantised twice."""
    steps: Tensor | None = None
    """(ceil(N / 64 / 256),) fp32: size of a step per 256 scales; None: the scales are exact."""
    centre: Tensor | None = None
    """() fp32: mean of all scales."""

    @property
    def bytes(self) -> int:
        parts = (self.packed, self.scales, self.steps, self.centre)
        return sum(part.numel() * part.element_size() for part in parts if part is not None)


@torch.no_grad()
def quantise_nf4(weight: Tensor, *, double: bool = False) -> Nf4:
    """Any shape; the number of values must be a multiple of 64, and all of them finite.

    Raises :class:`MoEError` otherwise.
    """
    if weight.numel() % BLOCK or not weight.numel():
        raise MoEError(
            f"a weight of shape {tuple(weight.shape)} has {weight.numel()} values, NF4 needs a multiple of {BLOCK}."
        )
    blocks = weight.detach().reshape(-1, BLOCK).float()
    scales = blocks.abs().amax(dim=1)
    if not bool(torch.isfinite(scales).all()):
        raise MoEError(f"a weight of shape {tuple(weight.shape)} holds values that are not finite.")
    levels = torch.tensor(LEVELS, device=weight.device)
    between = (levels[1:] + levels[:-1]) / 2
    normed = blocks / scales.clamp(min=torch.finfo(torch.float32).tiny)[:, None]
    codes = torch.bucketize(normed.view(-1, 2), between, out_int32=True).to(torch.uint8)
    packed = codes[:, 0] << 4 | codes[:, 1]
    if not double:
        return Nf4(packed=packed, scales=scales)
    centre = scales.mean()
    padded = torch.nn.functional.pad(scales - centre, (0, -scales.numel() % SCALES_PER_BLOCK))
    groups = padded.view(-1, SCALES_PER_BLOCK)
    steps = groups.abs().amax(dim=1) / 127
    rounded = (groups / steps.clamp(min=torch.finfo(torch.float32).tiny)[:, None]).round().to(torch.int8)
    return Nf4(packed=packed, scales=rounded.view(-1)[: scales.numel()], steps=steps, centre=centre)


@torch.no_grad()
def dequantise_nf4(weight: Nf4, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """The 16-level approximation, each value rounded once to ``dtype``."""
    device = weight.packed.device
    levels = torch.tensor(LEVELS, device=device)
    byte = torch.arange(256, device=device)
    pairs = torch.stack([levels[byte >> 4], levels[byte & 15]], dim=1)  # one look-up per byte, not two
    values = pairs[weight.packed.int()].view(-1, BLOCK)
    return values.mul_(_scales(weight)[:, None]).to(dtype).view(shape)


def _scales(weight: Nf4) -> Tensor:
    if weight.steps is None or weight.centre is None:
        return weight.scales
    steps = weight.steps.repeat_interleave(SCALES_PER_BLOCK)[: weight.scales.numel()]
    return weight.scales * steps + weight.centre
