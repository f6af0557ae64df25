"""Which launch does this architecture rule out? The rules of the topology that need the model's configuration."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from training_ready.check.checkpointing import checkpointing_on, checkpointing_options
from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, warned
from training_ready.moe.families import MoEError, MoEFamily, moe_family

_FILE = "launch.accelerate_config"
_ATTENDS = ("full_attention", "sliding_attention", "chunked_attention", "attention")


def _family(context: CheckContext) -> MoEFamily | None:
    try:
        return moe_family(context.model_config)
    except MoEError:
        return None  # the probe of the parameters reports it


def _state_across_documents(context: CheckContext) -> Iterator[Finding]:
    """Attention is kept apart by position ids; a recurrent state or a convolution runs on over the border."""
    if not context.recipe.effective("packing"):
        return
    text: Any = context.model_config.get_text_config()
    kinds = set(getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ())
    recurrent = sorted(kind for kind in kinds if kind not in _ATTENDS)
    if recurrent or _is_stateful(context):
        what = ", ".join(recurrent) or text.model_type
        yield failed(
            f"{text.model_type} has layers that carry a state ({what}): in a pack it would run from one conversation "
            "into the next",
            key="packing",
            fix="packing: false",
        )


def _is_stateful(context: CheckContext) -> bool:
    return bool(getattr(type(context.base_model), "_is_stateful", False))


def _attention_supported(context: CheckContext) -> Iterator[Finding]:
    wanted = str(context.recipe.effective("attn_implementation") or "")
    kind = type(context.base_model)
    for name, attribute in (
        ("flash", "_supports_flash_attn"),
        ("sdpa", "_supports_sdpa"),
        ("flex", "_supports_flex_attn"),
    ):
        if wanted.startswith(name) and not getattr(kind, attribute, True):
            yield failed(
                f"{kind.__name__} has no {wanted}",
                key="attn_implementation",
                fix="attn_implementation: eager",
            )


def _one_expert(context: CheckContext) -> Iterator[Finding]:
    family = _family(context)
    if family is None or family.router_learns_from_language_loss or context.recipe.effective("use_peft"):
        return
    yield failed(
        f"{family.model_type} chooses 1 of {family.num_experts} experts and rescales its weight to 1: the router gets "
        "no gradient from the text",
        key=context.first_set("model.config.num_experts_per_tok", "model_name_or_path"),
        fix="num_experts_per_tok: 2",
    )


def _balance(context: CheckContext) -> Iterator[Finding]:
    """What the trainer itself would decide, and refuse, about router losses."""
    from training_ready.training.moe_losses import plan_balance

    recipe, family = context.recipe, _family(context)
    asked = recipe.trl.get("router_aux_loss_coef")
    if family is None:
        if asked is not None and not _many_experts(context):
            yield failed(
                "the model is dense, it has no router to balance",
                key="router_aux_loss_coef",
                fix="remove the key",
            )
        if recipe.moe.adapters is not None:
            yield failed(
                "the model is dense, it has no experts to adapt", key="moe.adapters", fix="remove the section"
            )
        return
    adapters = bool(recipe.effective("use_peft")) or recipe.moe.adapters is not None
    try:
        plan = plan_balance(context.model, recipe.moe, asked, adapters=adapters)
    except MoEError as error:
        yield failed(
            str(error), key=context.first_set("moe.balance_coefficient", "router_aux_loss_coef", "moe.z_loss")
        )
        return
    if not plan.needs_gradient or not checkpointing_on(recipe):
        return
    forced = recipe.effective("use_peft") and context.topology.sharding == "zero3"
    if forced or checkpointing_options(recipe).get("use_reentrant"):
        why = "TRL forces it for LoRA under ZeRO-3" if forced else "use_reentrant is true"
        yield failed(
            f"re-entrant checkpointing ({why}) takes the gradient from the routers' loss, whose value is still logged",
            key=context.first_set("activation_checkpointing_kwargs", "router_aux_loss_coef", _FILE),
            fix="moe: {balance_coefficient: 0}, use_reentrant: false, or ZeRO-2 or FSDP2",
        )


def _many_experts(context: CheckContext) -> bool:
    try:
        return moe_family(context.model_config) is not None
    except MoEError:
        return True


def _leaf_modules(context: CheckContext) -> Iterator[Finding]:
    """ZeRO-3 gathers weights in the order of use: ranks that choose different experts wait for each other for ever."""
    family, t = _family(context), context.topology
    if t.sharding != "zero3":
        return
    block = None if family is None else family.layout.block_class
    strict = [name for name in t.moe_leaf_classes if name != block]
    if strict:
        yield failed(
            f"{t.name} names {', '.join(strict)}, which this model has not: the run stops before its first step",
            key=_FILE,
            fix="deepspeed_moe_layer_cls_names: " + (block or "leave it out, or use zero3"),
        )
    listed = t.deepspeed.get("zero_optimization", {}).get("leaf_module", {}).get("classes", [])
    if block is not None and block not in (*t.moe_leaf_classes, *listed):
        yield failed(
            f"{t.name} does not name {block} as a leaf module: ranks would gather different experts and wait for each "
            "other for ever",
            key=_FILE,
            fix="launch.accelerate_config: zero3_moe",
        )


def _four_bit_experts(context: CheckContext) -> Iterator[Finding]:
    family, recipe = _family(context), context.recipe
    key = next((name for name in ("load_in_4bit", "load_in_8bit") if recipe.effective(name)), None)
    if family is None or key is None:
        return
    from training_ready.moe.parameters import describe_experts

    report = describe_experts(context.base_model)
    share = report["experts"].total / report.total
    yield failed(
        f"bitsandbytes leaves fused experts as they are: {share:.0%} of the model would stay in "
        f"{recipe.effective('dtype')}",
        key=key,
        fix=f"{key}: false, and ZeRO-3 or FSDP2 for the memory",
    )


def _expert_adapters(context: CheckContext) -> Iterator[Finding]:
    family, recipe, t = _family(context), context.recipe, context.topology
    if family is None:
        return
    if recipe.moe.adapters is not None and (t.sharding.startswith("fsdp") or t.sharding == "zero3"):
        yield failed(
            f"moe.adapters cannot be saved under {t.sharding} yet",
            key="moe.adapters",
            fix="launch.accelerate_config: ddp or zero2",
        )
    if recipe.effective("lora_target_parameters") and recipe.effective("use_peft"):
        if t.shards_weights:
            yield failed(
                f"peft adapts fused parameters by rebuilding them whole, which {t.sharding} holds in parts",
                key="lora_target_parameters",
                fix="moe: {adapters: ...} with ddp or zero2",
            )
        else:
            yield warned(
                "peft rebuilds the full weight of every expert in each forward for lora_target_parameters",
                key="lora_target_parameters",
                fix="moe: {adapters: {rank: ..., alpha: ...}} adapts them without",
            )


def _frozen_in_full_precision(context: CheckContext) -> Iterator[Finding]:
    recipe = context.recipe
    quantized = recipe.effective("load_in_4bit") or recipe.effective("load_in_8bit")
    if not recipe.effective("use_peft") or quantized or recipe.effective("use_cpu"):
        return
    if recipe.effective("dtype") in (None, "float32"):
        size = sum(parameter.numel() for parameter in context.base_model.parameters())
        yield warned(
            f"the frozen weights are loaded as float32: {size * 4:,} bytes instead of {size * 2:,}",
            key="dtype",
            fix="dtype: bfloat16",
        )


MODEL_RULES: tuple[Callable[[CheckContext], Iterator[Finding]], ...] = (
    _state_across_documents,
    _attention_supported,
    _one_expert,
    _balance,
    _leaf_modules,
    _four_bit_experts,
    _expert_adapters,
    _frozen_in_full_precision,
)
