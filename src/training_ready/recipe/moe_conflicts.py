"""Settings of a mixture of experts that cannot both hold."""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.recipe.effective import Settings

_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")


def balance(s: Settings) -> Iterator[tuple[str, str]]:
    if s.get("moe.balance_coefficient") is not None and s.is_set("router_aux_loss_coef"):
        yield (
            "moe.balance_coefficient",
            f"excludes `router_aux_loss_coef` ({s.origin('router_aux_loss_coef')}): that one, times the experts per "
            "token, is the default of this one; keep one",
        )


def watch(s: Settings) -> Iterator[tuple[str, str]]:
    if s.get("moe.watch"):
        return
    for key in ("moe.warn_min_share", "moe.stop_on_dead_steps"):
        if s.get(key) is not None:
            yield key, f"judges the load that `moe.watch` records, and that is off ({s.origin('moe.watch')})"


def adapters(s: Settings) -> Iterator[tuple[str, str]]:
    chosen = s.get("moe.adapters")
    if chosen is None:
        return
    if s.get("model.config") is not None:
        yield (
            "moe.adapters",
            "adapts trained experts; `model.config` starts from random ones, which would stay frozen",
        )
    if s.get("lora_target_parameters"):
        yield (
            "lora_target_parameters",
            "adapts parameters through PEFT; with `moe.adapters` leave the experts to that",
        )
    if not s.get("use_peft"):
        return
    for key, ours, lora in (
        ("rank", chosen.rank, s.get("lora_r")),
        ("alpha", chosen.alpha, s.get("lora_alpha")),
    ):
        if ours != lora:
            name = {"rank": "lora_r", "alpha": "lora_alpha"}[key]
            yield (
                f"moe.adapters.{key}",
                f"{ours:g} is not {name} {lora:g}: one adapter file knows only one of each",
            )
    for key in ("use_rslora", "use_dora"):
        if s.get(key):
            yield (
                key,
                "scales adapters in a way that `moe.adapters` does not; one adapter file knows only one way",
            )


def shared_base(s: Settings) -> Iterator[tuple[str, str]]:
    chosen = s.get("moe.shared_base")
    if chosen is None:
        return
    if chosen.top_k > chosen.experts:
        yield (
            "moe.shared_base.top_k",
            f"each token chooses {chosen.top_k} of {chosen.experts} experts (moe.shared_base.experts)",
        )
    if s.get("model.config") is not None:
        yield (
            "moe.shared_base",
            "learns differences from a trained model; `model.config` starts from random weights, which would stay "
            "frozen",
        )
    yield from _leave_out(
        s,
        ("moe.adapters", "adapts experts that exist; those of `moe.shared_base` are adapters already"),
        (
            "moe.experts_4bit",
            "quantizes experts that exist; those of `moe.shared_base` share the dense weights",
        ),
        ("load_in_4bit", "quantizes the base, and the released experts are exact sums over its weights"),
        ("load_in_8bit", "quantizes the base, and the released experts are exact sums over its weights"),
    )
    yield from _whole(s, "moe.shared_base", "is built over a dense model that lies whole in each process")
    yield from _only_attention(s)


def _only_attention(s: Settings) -> Iterator[tuple[str, str]]:
    """What LoRA beside a shared base cannot be."""
    if not s.get("use_peft"):
        return
    targets = s.get("lora_target_modules") or ["PEFT's choice"]
    others = [target for target in targets if target.split(".")[-1] not in _ATTENTION]
    if others:
        yield (
            "lora_target_modules",
            f"{', '.join(others)}: beside `moe.shared_base` only the attention can be adapted, the feed-forward is the "
            f"base of all experts and they are its adapters; name {', '.join(_ATTENTION)} or some of them",
        )
    yield from _leave_out(
        s,
        (
            "lora_target_parameters",
            "adapts fused experts, and those of `moe.shared_base` are adapters already",
        ),
        ("lora_modules_to_save", "trains layers as a whole, and the release takes them from the base"),
        ("use_dora", "is no sum over the base's weights, and the release is"),
    )


def _leave_out(s: Settings, *reasons: tuple[str, str]) -> Iterator[tuple[str, str]]:
    """What is wrong with keys, (key, why) each, that may not be set."""
    for key, why in reasons:
        if s.get(key):
            yield key, f"{why}; leave it out"


def experts_4bit(s: Settings) -> Iterator[tuple[str, str]]:
    if s.get("moe.experts_4bit") is None:
        return
    if s.get("model.config") is not None:
        yield "moe.experts_4bit", "quantizes trained experts; `model.config` starts from random ones"
    if s.get("moe.adapters") is None and not s.get("use_peft"):
        yield (
            "moe.experts_4bit",
            "freezes the experts, and a quantized model cannot be saved whole: set `moe.adapters`, `use_peft: true`, "
            "or both",
        )
    for key in ("load_in_4bit", "load_in_8bit"):
        if s.get(key):
            yield (
                key,
                "puts the model on the GPU while it loads, before `moe.experts_4bit` has made the experts small, and "
                "leaves the experts as they are; take one of the two",
            )
    if s.get("lora_target_parameters"):
        yield (
            "lora_target_parameters",
            "adapts parameters through PEFT, and NF4 experts are none; use `moe.adapters`",
        )
    yield from _whole(s, "moe.experts_4bit", "keeps codes that are not sharded, whole in each process")


def _whole(s: Settings, key: str, what: str) -> Iterator[tuple[str, str]]:
    given = s.get("model_init_kwargs")
    if isinstance(given, dict) and given.get("distributed_config"):
        yield (
            key,
            f"{what}, and `model_init_kwargs.distributed_config` shards it while loading; leave one out",
        )
