"""Are the packages here that this recipe needs, new enough?"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Iterator
from dataclasses import dataclass

from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, failed, passed, warned

_ALWAYS = ("torch", "transformers", "trl", "peft", "accelerate", "datasets")


@dataclass(frozen=True, kw_only=True, slots=True)
class Need:
    """A package that a recipe's key asks for, from a version on."""

    package: str
    version: str
    key: str
    why: str


_REPORTERS = {
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "mlflow": "mlflow",
    "trackio": "trackio",
    "comet_ml": "comet-ml",
    "swanlab": "swanlab",
    "clearml": "clearml",
}
_OPTIMIZERS = {
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "galore": "galore-torch",
    "apollo": "apollo-torch",
    "lomo": "lomo-optim",
    "schedule_free": "schedulefree",
    "grokadamw": "grokadamw",
    "torchao": "torchao",
    "4bit": "torchao",
    "stable_adamw": "torch-optimi",
}


def needs(context: CheckContext) -> Iterator[Need]:
    """What the recipe's own choices ask for, beyond what the package depends on."""
    recipe = context.recipe
    attention = str(recipe.effective("attn_implementation") or "")
    if attention == "flash_attention_2":
        yield Need(package="flash-attn", version="2.8", key="attn_implementation", why=attention)
    elif attention == "flash_attention_3":
        yield Need(package="flash-attn-3", version="3.0", key="attn_implementation", why=attention)
    elif "/" in attention:
        yield Need(package="kernels", version="0.11.1", key="attn_implementation", why=attention)
    for key in ("load_in_4bit", "load_in_8bit"):
        if recipe.effective(key):
            yield Need(package="bitsandbytes", version="0.46.1", key=key, why=f"{key}: true")
    optimizer = str(recipe.effective("optim"))
    for part, package in _OPTIMIZERS.items():
        if part in optimizer:
            yield Need(package=package, version="0", key="optim", why=optimizer)
            break
    yield from _reporting(context)
    if recipe.effective("use_liger_kernel"):
        yield Need(
            package="liger-kernel", version="0.5", key="use_liger_kernel", why="use_liger_kernel: true"
        )
    try:
        sharding = context.topology.sharding
    except Missing:
        return  # the probe of the topology says why
    if sharding.startswith("zero"):
        yield Need(package="deepspeed", version="0.19", key="launch.accelerate_config", why=sharding)


def _reporting(context: CheckContext) -> Iterator[Need]:
    asked = context.recipe.trl.get("report_to") or []
    for name in [asked] if isinstance(asked, str) else asked:
        if name in _REPORTERS:
            yield Need(package=_REPORTERS[name], version="0", key="report_to", why=name)


def probe_versions(context: CheckContext) -> list[Finding]:
    """Missing or old packages: a fault where the run would start, a remark on a machine that only looks."""
    from packaging.version import Version

    trains_here = context.starting or bool(context.recipe.effective("use_cpu"))
    findings = []
    for need in needs(context):
        have = _installed(need.package)
        if have is not None and Version(have) >= Version(need.version):
            continue
        wanted = need.package if need.version == "0" else f"{need.package} >= {need.version}"
        message = f"{need.why} needs {wanted}; here is {have or 'none'}"
        say = failed if trains_here else warned
        place = "" if trains_here else " on the machine that trains"
        findings.append(say(message, key=need.key, fix=f"install it{place}: pip install '{wanted}'"))
    found = {name: _installed(name) for name in _ALWAYS}
    text = ", ".join(f"{name} {version}" for name, version in found.items())
    return [*findings, passed(text, **found)]


def _installed(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
