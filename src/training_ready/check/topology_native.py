"""Does transformers divide the model while it loads, and would the experts be where the recipe says?

The rules of ``model_init_kwargs.distributed_config`` (transformers' FSDP2 and expert parallelism) and of
``parallelism_config``: each is what transformers 5.23 and accelerate 1.15 refuse late, or pass over in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, warned
from training_ready.moe.families import MoEError, moe_family
from training_ready.recipe.recipe import Recipe

if TYPE_CHECKING:
    from transformers.distributed import DistributedConfig

_KEY = "model_init_kwargs.distributed_config"


def is_divided_while_loading(recipe: Recipe) -> bool:
    """Whether the recipe asks transformers to divide the model."""
    return bool((recipe.effective("model_init_kwargs") or {}).get("distributed_config"))


def native_parallelism(context: CheckContext) -> Iterator[Finding]:
    """Faults of the sizes; for experts also those that only the architecture shows."""
    from training_ready.training.arguments import ArgumentsError, distributed_config

    recipe, t = context.recipe, context.topology
    if recipe.trl.get("parallelism_config"):
        yield failed(
            "transformers hands a recipe's mapping on as it is, and accelerate dies of it before the first step",
            key="parallelism_config",
            fix="take it out; tensor, context and sequence parallel ranks cannot share the packs of the stream anyway",
        )
    try:
        chosen = distributed_config(recipe, ranks=t.processes)
    except ArgumentsError as error:
        yield failed(str(error), key="model_init_kwargs")
        return
    if chosen is None:
        return
    if recipe.model.config is not None:
        yield failed(
            "a model from scratch is not loaded, so nothing would divide it", key=_KEY, fix="remove it"
        )
        return
    if t.sharding.startswith(("fsdp", "zero")):
        yield failed(
            f"transformers has divided the weights when {t.name} ({t.sharding}) would divide them again",
            key=_KEY,
            fix="launch.accelerate_config: ddp",
        )
    if chosen.enable_sequence_parallel:
        yield failed("enable_sequence_parallel is not connected to anything in transformers 5.23", key=_KEY)
    yield warned("such a run saves weights without the optimizer: it cannot be continued", key=_KEY)
    if chosen.ep_size != 1:
        yield from _experts(context, chosen)


def _experts(context: CheckContext, chosen: DistributedConfig) -> Iterator[Finding]:
    from transformers.distributed.expert_parallel import EPImplementationInterface

    known = EPImplementationInterface().valid_keys()
    if chosen.ep_implementation not in known:
        yield failed(f"ep_implementation {chosen.ep_implementation} is none of {', '.join(known)}", key=_KEY)
    try:
        family = moe_family(context.model_config)
    except MoEError:
        return  # the probe of the parameters reports it
    if family is None:
        yield failed(
            "the model is dense, it has no experts to spread over ranks", key=_KEY, fix="leave ep_size out"
        )
    elif family.num_experts % chosen.ep_size:
        yield failed(
            f"{family.num_experts} experts do not divide over ep_size {chosen.ep_size} ranks: "
            f"{family.num_experts} = {family.num_experts // chosen.ep_size} x {chosen.ep_size} + "
            f"{family.num_experts % chosen.ep_size}",
            key=_KEY,
        )
    elif chosen.ep_plan is None and not context.base_model.ep_plan:
        yield failed(
            f"transformers has no plan for the experts of {family.model_type}: it would refuse to load the model",
            key=_KEY,
            fix="leave ep_size out: fsdp_size divides the weights of every expert",
        )
