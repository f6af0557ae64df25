"""Settings of a mixture of experts that cannot both hold."""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.recipe.effective import Settings


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
