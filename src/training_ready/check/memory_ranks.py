"""What does one process of several hold? Computed from the trace of one process and the way the run is sharded.

Activations and loss are a process's own; weights, gradients and optimizer state are divided; weights of others come and
go. The traced step of a sharded run has its weights in bf16, as they are while they compute.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from training_ready.check.memory_arithmetic import Weights
from training_ready.check.memory_trace import FORWARD, PeakMemory, Split
from training_ready.check.processes import Sharding

COMPUTE = 2
"""Bytes of a weight or gradient in bf16."""
MASTER = 12
"""Bytes of optimizer state per weight in DeepSpeed's bf16 training: fp32 copy and two moments."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Ranks:
    """How a run is divided.

    Args:
        reshard: FSDP lets go of a layer's weights after its forward.
        bucket: elements of a gradient message (ZeRO); 0 with ZeRO-3 means hidden².
        overlap: two such messages at a time.
        live: most gathered elements that ZeRO-3 keeps. ``group``: elements of one of its optimizer steps.
        optimizer_offloaded, weights_offloaded: in host memory.
    """

    sharding: Sharding = "single"
    processes: int = 1
    reshard: bool = True
    bucket: int = 500_000_000
    overlap: bool = True
    live: int = 1_000_000_000
    group: int = 1_000_000_000
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False

    @property
    def deepspeed(self) -> bool:
        return self.sharding.startswith("zero")


def on_one_rank(peak: PeakMemory, weights: Weights, ranks: Ranks) -> PeakMemory:
    """The moments of one process. ``peak`` of a DeepSpeed run is traced without an optimizer."""
    if ranks.sharding == "single" or (ranks.sharding == "ddp" and ranks.processes == 1):
        return peak
    if ranks.sharding == "ddp":
        # torch's reducer keeps buckets as large as all gradients (`gradient_as_bucket_view` is off in accelerate)
        buckets = weights.gradient_bytes
        return replace(peak, moments={n: s.plus(gathers=buckets) for n, s in peak.moments.items()})
    moments = dict(peak.moments)
    if ranks.deepspeed:
        moments["optimizer"] = Split(gradients=weights.gradient_bytes)
    rank = _zero if ranks.deepspeed else _fsdp
    return replace(peak, moments={n: rank(n, s, weights, ranks) for n, s in moments.items()})


def _fsdp(moment: str, traced: Split, weights: Weights, ranks: Ranks) -> Split:
    """FSDP2 as accelerate sets it up: trained weights, their gradients and moments in fp32, computation in bf16; a unit
    per decoder layer, one for the embedding, one for final norm and head, which stays from forward to backward."""
    count = ranks.processes
    there = traced.gradients / weights.gradient_bytes  # the share of the gradients that exists at this moment
    gathers = 0
    if moment != "optimizer":
        two = COMPUTE * 2 * max(weights.layers)  # the layer that computes and the one that is on its way
        gathers = COMPUTE * weights.ends + (two if ranks.reshard else COMPUTE * sum(weights.layers))
        if moment not in (FORWARD, "loss"):  # a layer's gradients, and their copy in the message
            gathers += round(COMPUTE * 2 * max(weights.layers) * weights.trainable / weights.all)
    return replace(
        traced,
        parameters=(4 * weights.trainable + weights.bytes_each * weights.frozen) // count,
        gradients=round(4 * weights.trainable * there) // count,
        optimizer=round(traced.optimizer * 4 * weights.trainable / weights.gradient_bytes) // count,
        gathers=gathers,
    )


def _zero(moment: str, traced: Split, weights: Weights, ranks: Ranks) -> Split:
    """ZeRO in bf16: weights 2 bytes, gradients 2, optimizer 12; its step takes an fp32 copy of its gradients."""
    count, stage = ranks.processes, int(ranks.sharding[-1])
    there = traced.gradients / weights.gradient_bytes
    mine = -(-weights.trainable // count)
    held = COMPUTE * (weights.all // count if stage == 3 else weights.all)
    state = MASTER * (mine if stage >= 1 else weights.trainable)
    gradients = round(COMPUTE * there * (mine if stage >= 2 else weights.trainable))
    message = COMPUTE * min(ranks.bucket, weights.trainable) * (2 if ranks.overlap else 1)
    gathers = message
    if moment == "optimizer":
        gathers = 4 * (min(ranks.group, mine) if stage == 3 else mine)
    elif stage == 3:
        gathers += COMPUTE * min(weights.all, max(ranks.live, max(weights.layers)))
    return replace(
        traced,
        parameters=0 if stage == 3 and ranks.weights_offloaded else held,
        gradients=gradients,
        optimizer=0 if ranks.optimizer_offloaded else state,
        gathers=gathers if not (ranks.optimizer_offloaded and moment == "optimizer") else 0,
    )
