"""Can what the recipe wants to serve it with serve this architecture?"""

from __future__ import annotations

from collections.abc import Iterator

from training_ready.check.context import CheckContext
from training_ready.check.finding import Finding, failed, passed, warned


def probe_serving(context: CheckContext) -> list[Finding]:
    """What the release's export would refuse, asked of the configuration before anything is trained."""
    from training_ready.release.export import ExportError
    from training_ready.release.targets.table import gguf_row
    from training_ready.release.targets.tgi_config import tgi_config

    recipe, config = context.recipe, context.model_config
    if recipe.moe.shared_base is not None:
        config = context.model.config  # what leaves is the mixture, not the dense base
    target = recipe.release.target
    key = context.first_set("release.target", "model_name_or_path", "model.config")
    findings = [*_adapter(context, key)]
    text = config.get_text_config().to_dict()
    try:
        if target == "tgi":
            tgi_config(text)
        elif target in ("gguf", "ollama"):
            gguf_row(text, target)
    except ExportError as error:
        findings.append(failed(str(error), key=key, fix="name that target, or choose another model"))
    if target == "vllm":
        findings.append(warned("what vLLM serves was not measured here; its documentation lists it", key=key))
    return [
        *findings,
        passed(f"{target} and {text['model_type']}", target=target, model_type=text["model_type"]),
    ]


def _adapter(context: CheckContext, key: str | None) -> Iterator[Finding]:
    recipe = context.recipe
    adapted = bool(recipe.effective("use_peft")) or recipe.moe.adapters is not None
    if recipe.release.target == "adapter" and recipe.moe.shared_base is not None:
        yield failed("experts over a shared base leave as a whole mixture", key=key, fix="release.target: hf")
    elif recipe.release.target == "adapter" and not adapted:
        yield failed("nothing is adapted, so there is no adapter to serve", key=key, fix="release.target: hf")
