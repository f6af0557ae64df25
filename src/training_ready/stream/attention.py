"""Do packed conversations stay apart? The back-end must be one that can, and the model is asked.

A pack has no attention mask: positions that begin at 0 again say where a conversation begins, and whether that is
heeded depends on the attention back-end *and* on the model, whose state-space, convolution or position layers may not
look at it. So two short texts are run packed and alone: the logits must agree, and those of the second must not move
when the first is changed.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from training_ready import TrainingReadyError

SEPARATING = ("eager", "sdpa", "flex_attention", "flash_attention_2", "flash_attention_3")
"""Back-ends that keep packed conversations apart in models of plain attention."""
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}  # of the logits' standard deviation
_HALF_TOLERANCE = 0.1
_LENGTHS = (7, 9)


class LeakError(TrainingReadyError):
    """Packed conversations would see each other."""


def refuse_unknown_backend(implementation: str) -> None:
    """
    Raises:
        LeakError: the back-end is not known to keep packed conversations apart.
    """
    name = implementation.rpartition("/")[2].replace("flash-attn", "flash_attention_")
    if name not in SEPARATING:
        raise LeakError(
            f"packing: true with attn_implementation {implementation!r}: not known to keep the conversations of a pack "
            f"apart. Use one of {', '.join(SEPARATING)}, or packing: false."
        )


def leak(model: torch.nn.Module, *, vocab_size: int, device: torch.device, half: bool = False) -> str | None:
    """What is wrong with packing for this model; None when its conversations stay apart.

    Args:
        half: run under bfloat16 autocast, as the training will.
    """
    random = torch.Generator().manual_seed(0)
    first, second, other = (
        torch.randint(vocab_size // 2, vocab_size, (1, n), generator=random).to(device)
        for n in (*_LENGTHS, _LENGTHS[0])
    )
    training = model.training
    model.eval()
    try:
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=half):
            alone = _logits(model, [second])
            packed, changed = _logits(model, [first, second]), _logits(model, [other, second])
    except (ValueError, NotImplementedError) as error:  # some models say themselves that they cannot
        return f"{type(error).__name__}: {error}"
    finally:
        model.train(training)
    weights = next(parameter.dtype for parameter in model.parameters() if parameter.is_floating_point())
    tolerance = _HALF_TOLERANCE if half else _TOLERANCE.get(weights, _HALF_TOLERANCE)
    scale = float(alone.std())
    seen = float((packed - changed).abs().max()) / scale
    moved = float((packed - alone).abs().max()) / scale
    if seen > tolerance:
        return f"the second conversation of a pack sees the first (its logits change by {seen:.2g} of their deviation)"
    if moved > tolerance:
        return f"a conversation gets other logits in a pack than alone (by {moved:.2g} of their deviation)"
    return None


def refuse_leak(model: torch.nn.Module, **asked: Any) -> None:
    """
    Raises:
        LeakError: the model lets packed conversations see each other.
    """
    found = leak(model, **asked)
    if found:
        kind, implementation = (
            getattr(model.config, name, None) for name in ("model_type", "_attn_implementation")
        )
        raise LeakError(
            f"packing: true does not keep conversations apart in a {kind} model with attn_implementation "
            f"{implementation!r}: {found}. Set packing: false, or another attn_implementation among "
            f"{', '.join(SEPARATING)}."
        )


def _logits(model: torch.nn.Module, texts: list[Tensor]) -> Tensor:
    """Logits (T, V) of the last text, all texts in one sequence as the trainer's collator lays them out."""
    lengths = [text.shape[1] for text in texts]
    borders = torch.tensor([0, *lengths], device=texts[0].device).cumsum(0).to(torch.int32)
    packed = {
        "cu_seq_lens_q": borders,
        "cu_seq_lens_k": borders,
        "max_length_q": max(lengths),
        "max_length_k": max(lengths),
    }
    positions = torch.cat([torch.arange(n, device=texts[0].device) for n in lengths])[None]
    out = model(input_ids=torch.cat(texts, 1), position_ids=positions, use_cache=False, **packed)
    return torch.as_tensor(out.logits[0, -lengths[-1] :].float())
