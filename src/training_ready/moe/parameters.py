"""Where are the weights of a mixture of experts, which of them train, and how many does one token use?"""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from training_ready.moe.families import MoEFamily, model_config, moe_family, routed_layers

GROUPS = ("router", "experts", "shared_experts", "attention", "feed_forward", "embeddings", "norms", "other")
"""``shared_experts``: what every token passes besides its chosen experts. ``feed_forward``: of dense layers.
``embeddings``: with the output head, counted once where they are tied."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterGroup:
    """Numbers of parameters, not bytes."""

    name: str
    total: int
    trainable: int


@dataclass(frozen=True, kw_only=True, slots=True)
class ParameterReport:
    """All groups of a model that have parameters, in the order of :data:`GROUPS`."""

    groups: list[ParameterGroup]
    total: int
    trainable: int
    active: int
    """Used by one token: everything but the experts that it did not choose."""

    def __getitem__(self, name: str) -> ParameterGroup:
        """The group of this name, empty if the model has none."""
        empty = ParameterGroup(name=name, total=0, trainable=0)
        return next((group for group in self.groups if group.name == name), empty)


def router_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Full name to parameter of every router that runs; empty for a dense model."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {
        names[id(parameter)]: parameter
        for routed in routed_layers(model)
        for parameter in routed.router.parameters()
        if parameter.ndim > 1 or parameter.requires_grad
    }


def describe_experts(model: nn.Module) -> ParameterReport:
    """Count parameters by group; adapters count with the group that they adapt. Dense models work too."""
    family = moe_family(model_config(model))
    sparse = [routed.name for routed in routed_layers(model, family)]
    routers = set(router_parameters(model)) if family else set()
    totals, trainable = dict.fromkeys(GROUPS, 0), dict.fromkeys(GROUPS, 0)
    for name, parameter in model.named_parameters():
        group = "router" if name in routers else _group(name, sparse, family)
        # DeepSpeed's ZeRO-3 leaves an empty tensor behind and keeps the true size beside it.
        size = int(getattr(parameter, "ds_numel", parameter.numel()))
        totals[group] += size
        trainable[group] += size if parameter.requires_grad else 0
    total = sum(totals.values())
    idle = (
        0 if family is None else totals["experts"] * (family.num_experts - family.top_k) // family.num_experts
    )
    return ParameterReport(
        groups=[
            ParameterGroup(name=name, total=totals[name], trainable=trainable[name])
            for name in GROUPS
            if totals[name]
        ],
        total=total,
        trainable=sum(trainable.values()),
        active=total - idle,
    )


def _group(name: str, sparse_blocks: list[str], family: MoEFamily | None) -> str:
    inside = next((name[len(block) + 1 :] for block in sparse_blocks if name.startswith(f"{block}.")), None)
    if inside is not None and inside.startswith("experts.shared."):  # one for all experts (shared_base)
        return "shared_experts"
    if inside is not None and family is not None:
        return {"experts": "experts", family.layout.router: "router"}.get(
            inside.split(".")[0], "shared_experts"
        )
    parts = name.split(".")
    if any("norm" in part for part in parts):
        return "norms"
    if any("attn" in part or "attention" in part for part in parts):
        return "attention"
    if any(part in ("mlp", "feed_forward", "shared_mlp", "block_sparse_moe") for part in parts):
        return "shared_experts" if "shared_mlp" in parts else "feed_forward"
    if any("embed" in part or part == "lm_head" for part in parts):
        return "embeddings"
    return "other"
