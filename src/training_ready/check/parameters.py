"""Which weights would move? Counted on the model itself, built without weights, adapters included."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, passed, warned

if TYPE_CHECKING:
    from training_ready.moe.families import MoEFamily
    from training_ready.moe.parameters import ParameterReport

_EXPERT_NAMES = re.compile(
    r"experts?\b|gate_up_proj|(gate|up|down)_proj|\bw[123]\b|all-linear", re.IGNORECASE
)


def probe_parameters(context: CheckContext) -> list[Finding]:
    """Groups of parameters; adapters that match nothing, miss the experts they name, or adapt the router unasked."""
    from training_ready.moe.families import MoEError, moe_family
    from training_ready.moe.parameters import describe_experts

    model = context.model
    try:
        report, family = describe_experts(model), moe_family(context.model_config)
    except MoEError as error:
        return [failed(str(error), key=context.first_set("model_name_or_path", "model.config"))]
    findings = [*_length(context), *_experts_per_token(context, family)]
    if report.trainable == 0:
        findings.append(
            failed("nothing is trainable", key=context.first_set("use_peft", "model_name_or_path"))
        )
    if context.recipe.effective("use_peft"):
        findings += [*_unmatched(context, model), *_experts_missed(context, report, family)]
        findings += _router_adapted(context, report, family)
    findings += _rank(context)
    return [*findings, _counts(report, _unlearned(context))]


def _unlearned(context: CheckContext) -> str:
    """What the count lacks while the tokenizer of a model from scratch knows fewer tokens than it may learn."""
    wanted = context.recipe.model.tokenizer
    rows = int(context.model_config.get_text_config().vocab_size)
    if wanted is None or rows >= wanted.vocab_size:
        return ""
    ends = (context.base_model.get_input_embeddings(), context.base_model.get_output_embeddings())
    widths = {
        id(part.weight): part.weight.shape[1] for part in ends if part is not None
    }  # once where they are tied
    more = (wanted.vocab_size - rows) * sum(widths.values())
    return (
        f"; this is with {rows:,} tokens, and the corpus may teach the tokenizer {wanted.vocab_size:,}: up to {more:,} "
        "parameters more"
    )


def _counts(report: ParameterReport, unlearned: str) -> Finding:
    groups = ", ".join(f"{g.name} {g.trainable:,} of {g.total:,}" for g in report.groups)
    share = report.trainable / report.total if report.total else 0
    text = (
        f"{report.trainable:,} of {report.total:,} parameters train ({share:.2%}), {report.active:,} are used per "
        f"token: {groups}{unlearned}"
    )
    measured = {g.name: {"total": g.total, "trainable": g.trainable} for g in report.groups}
    return passed(text, total=report.total, trainable=report.trainable, active=report.active, groups=measured)


def _length(context: CheckContext) -> Iterator[Finding]:
    positions = getattr(context.model_config.get_text_config(), "max_position_embeddings", None)
    length = context.recipe.effective("max_length")
    if isinstance(positions, int) and length is not None and length > positions:
        yield failed(
            f"max_length {length} > the model's {positions} positions (max_position_embeddings)",
            key=context.first_set("max_length", "model_name_or_path"),
            fix=f"max_length: {positions}, or a model with more positions",
        )


def _experts_per_token(context: CheckContext, family: MoEFamily | None) -> Iterator[Finding]:
    if family is not None and family.top_k > family.num_experts:
        yield failed(
            f"each token chooses {family.top_k} of {family.num_experts} experts",
            key=context.first_set("model.config.num_experts_per_tok", "model_name_or_path"),
        )


# --------------------------------------------------------------------------- adapters
def _listed(context: CheckContext, key: str) -> Sequence[str]:
    value = context.recipe.trl.get(key) or []
    return [value] if isinstance(value, str) else value


def _unmatched(context: CheckContext, model: Any) -> Iterator[Finding]:
    """PEFT is content when one name of a list matches; the others are skipped without a word."""
    from peft.tuners.lora import LoraLayer

    modules = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    for target in _listed(context, "lora_target_modules"):
        if target != "all-linear" and target.isidentifier() and not _suffix(target, modules):
            yield _nothing("lora_target_modules", target, _near(target, context))
    parameters = [name for name, _ in context.base_model.named_parameters()]
    for target in _listed(context, "lora_target_parameters"):
        if not _suffix(target, parameters):
            yield _nothing("lora_target_parameters", target, _near(target, context))
    everything = [name for name, _ in context.base_model.named_modules()]
    for target in _listed(context, "lora_modules_to_save"):
        if not _suffix(target, everything):
            yield _nothing("lora_modules_to_save", target, _near(target, context))


def _suffix(target: str, names: Any) -> bool:
    return any(name == target or name.endswith(f".{target}") for name in names)


def _nothing(key: str, target: str, near: str) -> Finding:
    return failed(
        f"{target!r} matches nothing in this model, and peft would skip it without a word",
        key=key,
        fix=near or "remove it, or correct the name",
    )


def _near(target: str, context: CheckContext) -> str:
    from training_ready.recipe.faults import did_you_mean

    last = {name.rpartition(".")[2] for name, _ in context.base_model.named_modules()}
    last |= {".".join(name.split(".")[-2:]) for name, _ in context.base_model.named_parameters()}
    return did_you_mean(target, {name for name in last if name and not name.isdigit()}, most=2)


def _experts_missed(
    context: CheckContext, report: ParameterReport, family: MoEFamily | None
) -> Iterator[Finding]:
    if family is None or report["experts"].trainable or context.recipe.moe.adapters is not None:
        return
    named = [name for name in _listed(context, "lora_target_modules") if _EXPERT_NAMES.search(name)]
    if named:
        yield failed(
            f"{', '.join(named)} would name the experts, and none of their {report['experts'].total:,} parameters is "
            f"adapted: transformers keeps them in fused parameters, not in modules of those names",
            key="lora_target_modules",
            fix="moe: {adapters: {rank: ..., alpha: ...}} adapts experts; take those names out of lora_target_modules",
        )


def _router_adapted(
    context: CheckContext, report: ParameterReport, family: MoEFamily | None
) -> Iterator[Finding]:
    if family is None or not report["router"].trainable:
        return
    names = [
        *_listed(context, "lora_target_modules"),
        *_listed(context, "lora_target_parameters"),
        *_listed(context, "lora_modules_to_save"),
    ]
    router = family.layout.router
    if not any(re.search(rf"(^|\.){re.escape(router)}(\.weight)?$", name) for name in names):
        yield failed(
            f"{report['router'].trainable:,} parameters of the routers would be adapted, and nothing in the recipe "
            f"names them ({router!r}): {', '.join(names)} matches them too",
            key=context.first_set("lora_target_modules", "use_peft"),
            fix="name the projections one by one, or name the router on purpose",
        )


def _rank(context: CheckContext) -> Iterator[Finding]:
    rank, adapters = context.recipe.effective("lora_r"), context.recipe.moe.adapters
    half = str(context.recipe.effective("dtype")) in ("bfloat16", "float16")
    if adapters is not None and adapters.rank % 8 and half:
        yield failed(
            f"moe.adapters.rank is {adapters.rank} = {adapters.rank // 8} x 8 + {adapters.rank % 8}: grouped products "
            "in bf16 need rows of 16 bytes, so a multiple of 8",
            key="moe.adapters.rank",
            fix=f"rank {-(-adapters.rank // 8) * 8}",
        )
    elif rank % 8 and half and context.recipe.effective("use_peft"):
        yield warned(
            f"lora_r {rank} is no multiple of 8: bf16 kernels fall off their fast path", key="lora_r"
        )
