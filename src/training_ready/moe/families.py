"""Which Mixture-of-Experts architecture is this, and where does it keep its router, its experts and its
numbers?

Configurations name the same things differently (``num_experts``, ``num_local_experts``, ``n_routed_experts``
...) and some promise what their code does not do. Each row of :data:`FAMILIES` was read from the modelling
code of transformers 5.23; the tests hold every row against a really built model.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from training_ready import TrainingReadyError


class MoEError(TrainingReadyError):
    """A Mixture-of-Experts model or measurement that cannot be handled correctly."""


@dataclass(frozen=True, kw_only=True, slots=True)
class FamilyLayout:
    """What every model of one ``model_type`` shares: class and attribute names in transformers 5.23."""

    router_class: str
    block_class: str
    """The sparse block: what ZeRO-3 needs as leaf module, so that all experts of a layer are gathered
    together."""
    decoder_layer_class: str
    router: str = "gate"
    """Attribute of the block that holds the router."""
    experts: str = "num_experts"
    """Attribute of the configuration that holds the number of routed experts."""
    balance: Literal["aux_loss", "bias", "none"] = "aux_loss"
    """How the architecture itself keeps experts alive: a loss that the model computes, a bias that somebody
    has to update after each step (transformers never does), or nothing."""
    bias: str | None = None
    """Path from the block to the balancing bias, shape (E,) or (1, E)."""
    renormalised: bool | None = None
    """Do the k routing weights of a token sum to one? None: ``norm_topk_prob`` of the configuration
    decides."""
    chosen_by_logits: bool = True
    """Are the chosen experts simply the k largest router logits? Not with a bias, groups or sampling."""


def _layout(
    name: str, *, block: str = "SparseMoeBlock", gate: str = "TopKRouter", **rest: Any
) -> FamilyLayout:
    return FamilyLayout(
        router_class=name + gate, block_class=name + block, decoder_layer_class=name + "DecoderLayer", **rest
    )


def _sigmoid_and_bias(name: str) -> FamilyLayout:
    """DeepSeek-V3's router: sigmoid scores, the choice corrected by a bias buffer that no gradient
    reaches."""
    return _layout(
        name,
        block="MoE",
        gate="TopkRouter",
        experts="n_routed_experts",
        balance="bias",
        bias="gate.e_score_correction_bias",
        chosen_by_logits=False,
    )


FAMILIES: Mapping[str, FamilyLayout] = {
    "mixtral": _layout("Mixtral", experts="num_local_experts", renormalised=True),
    "minimax": _layout("MiniMax", experts="num_local_experts", renormalised=True),
    "minimax_m2": _layout(
        "MiniMaxM2",
        experts="num_local_experts",
        renormalised=True,
        balance="bias",
        bias="e_score_correction_bias",
        chosen_by_logits=False,
    ),
    "qwen2_moe": _layout("Qwen2Moe"),
    "qwen3_moe": _layout("Qwen3Moe"),
    "qwen3_next": _layout("Qwen3Next"),
    "olmoe": _layout("Olmoe"),
    "flex_olmo": _layout("FlexOlmo"),
    # Granite and gpt-oss take the softmax over the k chosen logits only: the weights always sum to one.
    "granitemoe": _layout(
        "GraniteMoe", block="MoE", router="router", experts="num_local_experts", renormalised=True
    ),
    "granitemoeshared": _layout(
        "GraniteMoeShared", block="MoE", router="router", experts="num_local_experts", renormalised=True
    ),
    "gpt_oss": _layout(
        "GptOss", block="MLP", router="router", experts="num_local_experts", renormalised=True
    ),
    # SparseMixer samples the experts while training and weighs each with its own masked softmax.
    "phimoe": _layout(
        "Phimoe", router="router", experts="num_local_experts", renormalised=False, chosen_by_logits=False
    ),
    # Its norm_topk_prob is not read by the router of transformers 5.23. No loss, no bias.
    "deepseek_v2": _layout(
        "DeepseekV2",
        block="Moe",
        gate="TopkRouter",
        experts="n_routed_experts",
        balance="none",
        renormalised=False,
        chosen_by_logits=False,
    ),
    "deepseek_v3": _sigmoid_and_bias("DeepseekV3"),
    "glm4_moe": _sigmoid_and_bias("Glm4Moe"),
    "dots1": _sigmoid_and_bias("Dots1"),
    "ernie4_5_moe": _layout(
        "Ernie4_5_Moe",
        experts="moe_num_experts",
        renormalised=True,
        balance="bias",
        bias="gate.moe_statics.e_score_correction_bias",
        chosen_by_logits=False,
    ),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class MoEFamily:
    """One configuration read through its family's row."""

    model_type: str
    layout: FamilyLayout
    num_experts: int
    top_k: int
    renormalised: bool
    """True when the k routing weights of a token sum to one before any scaling factor."""
    aux_loss_coef: float | None
    """The configuration's own coefficient (for a loss whose balanced value is k), None where it has none."""

    @property
    def leaf_modules(self) -> list[str]:
        """Class names to mark as ZeRO-3 leaf modules."""
        return [self.layout.block_class]

    @property
    def router_learns_from_language_loss(self) -> bool:
        """False for top-1 with weights that sum to one: the only weight is then the constant 1."""
        return self.top_k > 1 or not self.renormalised


def moe_family(config: Any) -> MoEFamily | None:
    """Read a transformers configuration; None for a dense model.

    Raises :class:`MoEError` for a mixture of experts that has no row in :data:`FAMILIES`, or whose
    configuration lacks what the row expects.
    """
    text = config.get_text_config(decoder=True) if hasattr(config, "get_text_config") else config
    model_type = str(getattr(text, "model_type", "") or "")
    layout = FAMILIES.get(model_type)
    if layout is None:
        signs = _signs_of_experts(text.to_dict() if hasattr(text, "to_dict") else vars(text))
        if not signs:
            return None
        raise MoEError(
            f"model_type {model_type!r} looks like a mixture of experts ({', '.join(signs)}) but has no row "
            "in training_ready.moe.families.FAMILIES: unknown are its router class, its sparse block class, "
            f"its decoder layer class and how it is balanced. Known: {', '.join(sorted(FAMILIES))}."
        )
    return MoEFamily(
        model_type=model_type,
        layout=layout,
        num_experts=_positive(text, layout.experts, model_type),
        top_k=_positive(text, "num_experts_per_tok", model_type),
        renormalised=_renormalised(text, layout, model_type),
        aux_loss_coef=getattr(text, "router_aux_loss_coef", None),
    )


def _positive(config: Any, attribute: str, model_type: str) -> int:
    value = getattr(config, attribute, None)
    if not isinstance(value, int) or value < 1:
        raise MoEError(
            f"{model_type}: configuration attribute {attribute!r} is {value!r}, a count >= 1 is needed."
        )
    return value


def _renormalised(config: Any, layout: FamilyLayout, model_type: str) -> bool:
    if layout.renormalised is not None:
        return layout.renormalised
    value = getattr(config, "norm_topk_prob", None)
    if value is None:
        raise MoEError(
            f"{model_type}: configuration lacks 'norm_topk_prob', which decides if the weights sum to one."
        )
    return bool(value)


def _signs_of_experts(config: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Settings that count experts, nested ones included: ``num_experts=64``."""
    found = []
    for key, value in config.items():
        if isinstance(value, Mapping):
            found += _signs_of_experts(value, f"{prefix}{key}.")
        elif re.search(r"experts?(_per_\w+)?$", str(key)) and type(value) is int and value > 1:
            found.append(f"{prefix}{key}={value}")
    return found


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutedLayer:
    """One sparse block found in a model."""

    layer: int
    """Index of the decoder layer, which is not the index among sparse layers where some layers are dense."""
    name: str
    block: nn.Module
    router: nn.Module

    def bias(self, family: MoEFamily) -> Tensor:
        """The balancing bias of this block, as stored. Raises MoEError where the family has none."""
        if family.layout.bias is None:
            raise MoEError(f"{family.model_type} is not balanced by a bias.")
        found: Any = self.block
        for step in family.layout.bias.split("."):
            found = getattr(found, step)
        if not isinstance(found, Tensor):
            raise MoEError(f"{self.name}.{family.layout.bias} is {type(found).__name__}, not a tensor.")
        return found


def routed_layers(model: nn.Module, family: MoEFamily | None = None) -> list[RoutedLayer]:
    """All sparse blocks with the router that really runs, ordered by decoder layer.

    Looks through wrappers (DDP, PEFT): of a router that PEFT copied for ``modules_to_save``, the trained copy
    counts. Raises :class:`MoEError` when a mixture-of-experts model shows no router.
    """
    family = family or moe_family(model_config(model))
    if family is None:
        return []
    layout = family.layout
    found = [
        RoutedLayer(layer=_layer_index(name), name=name, block=block, router=router)
        for name, block in model.named_modules()
        if _is_a(block, layout.block_class)
        for router in [_running_router(block, layout, name)]
    ]
    if not found:
        raise MoEError(
            f"{family.model_type}: no module of class {layout.block_class} in {type(model).__name__}, "
            f"although the configuration counts {family.num_experts} experts. Are all layers dense?"
        )
    return sorted(found, key=lambda routed: routed.layer)


def model_config(model: nn.Module) -> Any:
    """The transformers configuration of a model, through wrappers such as DDP."""
    inner: Any = model
    while not hasattr(inner, "config") and isinstance(getattr(inner, "module", None), nn.Module):
        inner = inner.module
    if not hasattr(inner, "config"):
        raise MoEError(
            f"{type(model).__name__} carries no configuration (.config), so its family is unknown."
        )
    return inner.config


def _is_a(module: nn.Module, class_name: str) -> bool:
    """By name along the ancestors: FSDP2 swaps in a subclass, and importing every family would be slow."""
    return any(ancestor.__name__ == class_name for ancestor in type(module).__mro__)


def _running_router(block: nn.Module, layout: FamilyLayout, name: str) -> nn.Module:
    candidates: list[tuple[str, nn.Module]] = [
        (path, module)
        for path, module in getattr(block, layout.router).named_modules()
        if _is_a(module, layout.router_class) and "original_module" not in path.split(".")
    ]
    if len(candidates) != 1:
        raise MoEError(
            f"{name}.{layout.router}: expected one {layout.router_class}, found {len(candidates)} "
            f"({', '.join(path or '(itself)' for path, _ in candidates)})."
        )
    return candidates[0][1]


def _layer_index(name: str) -> int:
    match = re.search(r"\.(\d+)\.", f".{name}.")
    if match is None:
        raise MoEError(f"{name}: no layer number in the module's name.")
    return int(match[1])
