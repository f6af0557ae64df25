"""Pairs of settings that cannot both hold. Each message carries the arithmetic and the way out."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from training_ready.recipe import moe_conflicts
from training_ready.recipe.effective import Settings, Unknowable
from training_ready.recipe.faults import Fault, Origin
from training_ready.recipe.typed import Typed

Finding = tuple[str, str]  # the key at fault, the message
Rule = Callable[[Settings], Iterator[Finding]]


def impossible_pairs(typed: Typed, missing: Origin) -> list[Fault]:
    """Every broken rule. ``missing`` is where faults of keys that are not written stand."""
    settings = Settings(typed)
    faults = []
    for rule in RULES:
        try:
            found = list(rule(settings))
        except Unknowable:
            continue
        faults += [Fault(settings.origin(key) or missing, key, message) for key, message in found]
    return faults


# --------------------------------------------------------------------------- the model
def _one_model(s: Settings) -> Iterator[Finding]:
    named, config = s.is_set("model_name_or_path"), s.get("model.config")
    if named and config is not None:
        message = f"excludes `model_name_or_path` ({s.origin('model_name_or_path')}): random weights or trained ones"
        yield "model.config", message
    if not named and config is None:
        yield (
            "model_name_or_path",
            "is missing; name a model to start from, or give `model.config` to start from scratch",
        )


def _from_scratch(s: Settings) -> Iterator[Finding]:
    config, tokenizer = s.get("model.config"), s.get("model.tokenizer")
    if config is None:
        if tokenizer is not None:
            yield "model.tokenizer", "needs `model.config`; a named model brings its own tokenizer"
        return
    if "model_type" not in config:
        yield "model.config", "needs `model_type`, for example `model_type: qwen3_moe`"
    if tokenizer is None:
        yield (
            "model.config",
            "needs `model.tokenizer: {vocab_size: ...}`; a model from scratch has no tokenizer",
        )
        return
    rows = config.get("vocab_size")
    if isinstance(rows, int) and tokenizer.vocab_size > rows:
        message = f"{tokenizer.vocab_size} tokens do not fit the {rows} rows of `model.config.vocab_size`"
        yield "model.tokenizer.vocab_size", message


def _scratch_excludes(s: Settings) -> Iterator[Finding]:
    if s.get("model.config") is None:
        return
    for key in ("load_in_4bit", "load_in_8bit"):
        if s.get(key):
            yield key, "quantizes trained weights; `model.config` starts from random ones"
    if s.is_set("model_revision"):
        yield "model_revision", "is a revision of `model_name_or_path`; `model.config` has none"
    if s.get("use_peft"):
        yield (
            "use_peft",
            "adapts trained weights; `model.config` starts from random ones, which would stay frozen",
        )


def _scratch_length(s: Settings) -> Iterator[Finding]:
    config, length = s.get("model.config"), s.get("max_length")
    positions = config.get("max_position_embeddings") if config else None
    if isinstance(positions, int) and length is not None and length > positions:
        written = "max_length" if s.is_set("max_length") else "model.config"
        yield written, f"max_length {length} > model.config.max_position_embeddings {positions}"


def _quantization(s: Settings) -> Iterator[Finding]:
    four, eight = s.get("load_in_4bit"), s.get("load_in_8bit")
    if four and eight:
        yield "load_in_8bit", f"excludes `load_in_4bit` ({s.origin('load_in_4bit')}); keep one"
    for key in ("load_in_4bit", "load_in_8bit"):
        if s.get(key) and not s.get("use_peft"):
            yield key, "works only with LoRA: quantized weights cannot be trained; set `use_peft: true`"


def _lora(s: Settings) -> Iterator[Finding]:
    if not s.get("use_peft"):
        for key in _LORA_KEYS:
            if s.is_set(key) and s.get(key) is not False and not s.is_set("use_peft"):
                yield (
                    key,
                    "has no effect without `use_peft: true`; set it, or say `use_peft: false` on purpose",
                )
        return
    targets = s.get("lora_target_modules") or []
    if "lm_head" in targets:
        yield (
            "lora_target_modules",
            "an adapter on `lm_head` is never trained by TRL's fused loss; remove `lm_head`",
        )
    if s.get("lora_target_parameters") and s.get("lora_dropout") != 0:
        message = f"cannot be combined with dropout, and lora_dropout is {s.get('lora_dropout')}; set `lora_dropout: 0`"
        yield "lora_target_parameters", message


_LORA_KEYS = (
    "lora_r",
    "lora_alpha",
    "lora_dropout",
    "lora_target_modules",
    "lora_target_parameters",
    "lora_modules_to_save",
    "use_rslora",
    "use_dora",
)


def _no_foreign_code(s: Settings) -> Iterator[Finding]:
    if s.get("trust_remote_code"):
        yield (
            "trust_remote_code",
            "runs code downloaded with a model; choose a model whose code is in transformers",
        )


# --------------------------------------------------------------------------- the data
def _packing(s: Settings) -> Iterator[Finding]:
    if s.get("max_length") is not None:
        return
    for key in ("packing", "eval_packing"):
        if s.get(key):
            yield (
                key,
                f"fills sequences of `max_length` tokens, and that is null ({s.origin('max_length')}); set a length",
            )


def _padding_free(s: Settings) -> Iterator[Finding]:
    if s.get("padding_free") and not s.get("packing") and s.get("max_length") is not None:
        yield (
            "padding_free",
            f"does not enforce max_length {s.get('max_length')} without `packing: true`; pack as well",
        )


def _eval_data(s: Settings) -> Iterator[Finding]:
    split = s.get("data.eval_split")
    asked = [key for key in ("eval_strategy", "do_eval", "eval_on_start") if s.get(key) not in (False, "no")]
    if split is None:
        for key in asked:
            yield key, "needs rows to evaluate on; set `data.eval_split: val`"
    elif split == s.get("data.train_split"):
        yield (
            "data.eval_split",
            f"{split!r} is also `data.train_split`: the loss would be measured on learned rows",
        )


def _roles(s: Settings) -> Iterator[Finding]:
    if s.get("assistant_only_loss") and s.get("data.target_role") == "user":
        message = (
            f"learns the therapist's turns, but `data.target_role` is user ({s.origin('data.target_role')})"
        )
        yield "assistant_only_loss", message


# --------------------------------------------------------------------------- the schedule
def _warm_up(s: Settings) -> Iterator[Finding]:
    steps, warm_up = s.get("max_steps"), s.get("warmup_steps")
    if steps <= 0 or warm_up < 1:
        return
    if warm_up > steps:
        yield (
            "warmup_steps",
            f"{warm_up} steps of warm-up > {steps} steps of the run: the learning rate never gets there",
        )
        return
    decay = _scheduler_arguments(s).get("num_decay_steps")
    if (
        s.get("lr_scheduler_type") == "warmup_stable_decay"
        and isinstance(decay, int)
        and warm_up + decay > steps
    ):
        message = f"warm-up {warm_up} + decay {decay} = {warm_up + decay} steps > max_steps {steps}"
        yield "lr_scheduler_kwargs", message


def _scheduler(s: Settings) -> Iterator[Finding]:
    name, given = s.get("lr_scheduler_type"), _scheduler_arguments(s)
    if isinstance(s.get("lr_scheduler_kwargs"), str):
        return
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr"):
        both = [key for key in ("min_lr", "min_lr_rate") if given.get(key) is not None]
        if len(both) != 1:
            wanted = "`lr_scheduler_kwargs` with exactly one of min_lr (absolute) and min_lr_rate (a share)"
            yield "lr_scheduler_type", f"{name} needs {wanted}; {len(both)} are set"
    if name == "warmup_stable_decay" and given.get("num_decay_steps") is None:
        yield "lr_scheduler_type", f"{name} needs `lr_scheduler_kwargs: {{num_decay_steps: ...}}`"
    if name in ("reduce_lr_on_plateau", "greedy") and s.get("eval_strategy") == "no":
        yield "lr_scheduler_type", f"{name} follows the evaluation loss; set `eval_strategy: steps`"


def _scheduler_arguments(s: Settings) -> dict[str, Any]:
    given = s.get("lr_scheduler_kwargs")
    return given if isinstance(given, dict) else {}


def _best_model(s: Settings) -> Iterator[Finding]:
    save, evaluate = s.get("save_strategy"), s.get("eval_strategy")
    if save == "best" and evaluate == "no":
        yield "save_strategy", "best is chosen by evaluation, and `eval_strategy` is no"
    if not s.get("load_best_model_at_end") or save == "best":
        return
    if save != evaluate:
        message = f"needs a checkpoint at every evaluation, but save_strategy is {save} and eval_strategy {evaluate}"
        yield "load_best_model_at_end", message
    elif save == "steps":
        yield from _checkpoint_at_evaluations(s)


def _checkpoint_at_evaluations(s: Settings) -> Iterator[Finding]:
    every, evaluated = s.get("save_steps"), s.get("eval_steps") or s.get("logging_steps")
    key = "save_steps" if s.is_set("save_steps") else "load_best_model_at_end"
    if (every < 1) != (evaluated < 1):
        yield (
            key,
            f"save_steps {every} and eval_steps {evaluated} must both be steps or both be shares of the run",
        )
    elif round(every * 1_000_000) % round(evaluated * 1_000_000) != 0:
        remainder = (
            "" if every < 1 else f": {every} = {every // evaluated} x {evaluated} + {every % evaluated}"
        )
        yield key, f"save_steps {every} is not a multiple of eval_steps {evaluated}{remainder}"


# --------------------------------------------------------------------------- the machine
def _precision(s: Settings) -> Iterator[Finding]:
    for half, brain in (("fp16", "bf16"), ("fp16_full_eval", "bf16_full_eval")):
        if s.get(half) and s.get(brain):
            yield half, f"excludes `{brain}` ({s.origin(brain)}); an H100 wants bf16"


def _loader(s: Settings) -> Iterator[Finding]:
    if s.get("dataloader_num_workers") > 0:
        return
    for key in ("dataloader_prefetch_factor", "dataloader_persistent_workers"):
        if s.get(key):
            yield key, "needs `dataloader_num_workers` > 0; it is 0, so no worker exists"


def _one_sharding(s: Settings) -> Iterator[Finding]:
    if s.get("deepspeed") and s.get("fsdp"):
        yield "fsdp", f"excludes `deepspeed` ({s.origin('deepspeed')}): both would shard the same weights"


def _job(s: Settings) -> Iterator[Finding]:
    ovh = s.get("launch.ovh")
    if ovh is None:
        return
    hours, processes = s.get("budget.max_hours"), s.get("launch.num_processes")
    if hours is not None and ovh.timeout_hours is not None and hours >= ovh.timeout_hours:
        message = (
            f"{hours:g} h >= launch.ovh.timeout_hours {ovh.timeout_hours:g} h: the job dies before it saves"
        )
        yield "budget.max_hours", message
    if processes is not None and processes != ovh.gpus:
        yield (
            "launch.num_processes",
            f"{processes} processes on {ovh.gpus} GPUs (launch.ovh.gpus): one process per GPU",
        )


RULES: tuple[Rule, ...] = (
    _one_model,
    _from_scratch,
    _scratch_excludes,
    _scratch_length,
    _quantization,
    _lora,
    _no_foreign_code,
    _packing,
    _padding_free,
    _eval_data,
    _roles,
    _warm_up,
    _scheduler,
    _best_model,
    _precision,
    _loader,
    _one_sharding,
    _job,
    moe_conflicts.balance,
    moe_conflicts.watch,
    moe_conflicts.adapters,
    moe_conflicts.shared_base,
    moe_conflicts.experts_4bit,
)
