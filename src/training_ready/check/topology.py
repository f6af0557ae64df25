"""Would this launch do what the recipe says? Each rule is what the stack refuses late, or ignores in silence."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

from training_ready.check.checkpointing import checkpointing_on, checkpointing_options
from training_ready.check.context import CheckContext, Missing
from training_ready.check.finding import Finding, counted, failed, not_run, passed, warned
from training_ready.check.topology_model import MODEL_RULES
from training_ready.check.topology_native import is_divided_while_loading, native_parallelism

_FILE = "launch.accelerate_config"
Rule = Callable[[CheckContext], Iterator[Finding]]


def probe_topology(context: CheckContext) -> list[Finding]:
    """Processes, sharding, precision and batch; then what the model's own architecture rules out."""
    findings = [finding for rule in RULES for finding in rule(context)]
    for rule in (native_parallelism, *MODEL_RULES):
        try:
            findings += rule(context)
        except Missing as missing:
            findings.append(not_run(f"the architecture is unknown: {missing.blame}"))
            break
    return [*findings, _measured(context)]


def _measured(context: CheckContext) -> Finding:
    t, recipe = context.topology, context.recipe
    micro = recipe.effective("per_device_train_batch_size")
    steps = recipe.effective("gradient_accumulation_steps")
    packs = t.processes * micro * steps
    length = recipe.effective("max_length")
    tokens = "" if length is None else f", at most {packs * length:,} tokens"
    return passed(
        f"{t.name}: {counted(t.processes, 'process', 'processes')} ({t.sharding}) x {counted(micro, 'pack')} x "
        f"{counted(steps, 'micro-batch', 'micro-batches')} = {counted(packs, 'pack')} per step{tokens}",
        processes=t.processes,
        sharding=t.sharding,
        packs_per_step=packs,
    )


# --------------------------------------------------------------------------- device
def _processor(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    said = bool(recipe.effective("use_cpu"))
    if said and t.sharding.startswith(("fsdp", "zero")):
        yield failed(
            f"under use_cpu {t.sharding} is replaced by plain data parallelism without a word",
            key="use_cpu",
            fix="launch.accelerate_config: cpu, or a GPU",
        )
    elif said and t.path is not None and not t.launch_uses_cpu:
        yield failed(
            f"use_cpu trains on the processor, and the topology {t.name} is for GPUs: they would be paid and idle",
            key="use_cpu",
            fix="launch.accelerate_config: cpu, or use_cpu: false",
        )
    elif t.launch_uses_cpu and not said:
        yield failed(
            f"the topology {t.name} trains on the processor, and the recipe does not say use_cpu: true; TRL turns "
            "bf16 on and refuses to start",
            key="use_cpu" if context.is_set("use_cpu") else _FILE,
            fix="use_cpu: true and bf16: false, or a topology for GPUs",
        )
    if t.use_cpu and t.processes > 1 and not context.starting and t.path is not None:
        yield failed(
            f"accelerate starts one process on a CPU, whatever it is asked for; here {t.processes} are wanted",
            key="launch.num_processes",
            fix="launch.num_processes: 1, or torchrun --nproc_per_node with ACCELERATE_USE_CPU=1 and no launch file",
        )


def _attention(context: CheckContext) -> Iterator[Finding]:
    recipe = context.recipe
    if "flash" not in str(recipe.effective("attn_implementation") or ""):
        return
    if recipe.effective("use_cpu"):
        yield failed(
            "flash attention runs on GPUs only, and use_cpu is set",
            key="attn_implementation",
            fix="attn_implementation: sdpa",
        )
    full = recipe.effective("dtype") in (None, "float32")
    if full and recipe.trl.get("bf16") is False and not recipe.effective("fp16"):
        yield failed(
            "flash attention computes in bf16 or fp16; here weights are float32 and bf16 and fp16 are off",
            key="attn_implementation",
            fix="dtype: bfloat16, bf16: true, or attn_implementation: sdpa",
        )


def _precision(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    half = "fp16" if recipe.effective("fp16") else "no" if recipe.trl.get("bf16") is False else "bf16"
    file = str(t.mixed_precision or "")
    if t.deepspeed and file:
        yield failed(
            f"{t.path}: mixed_precision {file} beside a DeepSpeed file is refused: precision is DeepSpeed's there",
            key=_FILE,
            fix="take mixed_precision out of the launch file",
        )
    elif {file, half} == {"fp16", "bf16"}:
        yield failed(
            f"{t.path} says mixed_precision {file}, the recipe trains in {half}",
            key="fp16" if half == "fp16" else _FILE,
            fix="say the same in both",
        )
    for name in ("bf16", "fp16"):
        section = t.deepspeed.get(name)
        asked = section.get("enabled") if isinstance(section, dict) else None
        if isinstance(asked, bool) and asked != (half == name):
            yield failed(
                f"{t.name}: DeepSpeed has {name} {str(asked).lower()}, the recipe trains in {half}: DeepSpeed refuses",
                key=context.first_set(name, "bf16", "fp16", _FILE),
                fix=f"{name}: {str(asked).lower()} in the recipe, or the other in the JSON",
            )


# --------------------------------------------------------------------------- batch and numbers
_SAME = {
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_clipping": "max_grad_norm",
}


def _numbers(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    for theirs, ours in _SAME.items():
        written = t.deepspeed.get(theirs)
        if isinstance(written, int | float) and written != recipe.effective(ours):
            yield failed(
                f"{t.name}: DeepSpeed has {theirs} {written}, the recipe {ours} {recipe.effective(ours)}",
                key=context.first_set(ours, _FILE),
                fix='write "auto" in the JSON',
            )
    total = t.deepspeed.get("train_batch_size")
    micro, steps = (
        recipe.effective(_SAME["train_micro_batch_size_per_gpu"]),
        recipe.effective("gradient_accumulation_steps"),
    )
    if isinstance(total, int) and total != micro * steps * t.processes:
        yield failed(
            f"{t.name}: DeepSpeed has train_batch_size {total}, and {micro} x {steps} x {t.processes} processes = "
            f"{micro * steps * t.processes}",
            key=context.first_set("gradient_accumulation_steps", _FILE),
            fix='write "auto" in the JSON',
        )


def _lanes(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    micro, steps = (
        recipe.effective("per_device_train_batch_size"),
        recipe.effective("gradient_accumulation_steps"),
    )
    packs, lanes = t.processes * micro * steps, recipe.stream.lanes
    if lanes is not None and packs % lanes:
        yield failed(
            f"{lanes} lanes must divide the {packs} packs of a step; {packs} = {packs // lanes} x {lanes} + "
            f"{packs % lanes}",
            key="stream.lanes",
            fix="leave it out: null takes the largest divisor up to 16",
        )


def _parallel(context: CheckContext) -> Iterator[Finding]:
    t = context.topology
    for name in ("tp_size", "cp_size", "sp_size"):
        if t.parallel.get(name, 1) > 1:
            yield failed(
                f"{t.path}: {name} {t.parallel[name]}: such ranks would have to share packs, which the stream cannot",
                key=_FILE,
                fix=f"{name}: 1",
            )
    product = 1
    for size in t.parallel.values():
        product *= max(size, 1)
    if product > 1 and t.processes % product:
        yield failed(
            f"{t.path}: the sizes of parallelism_config multiply to {product}, and {t.processes} processes are no "
            "multiple of it",
            key=context.first_set("launch.num_processes", _FILE),
        )


def _alone(context: CheckContext) -> Iterator[Finding]:
    t = context.topology
    if t.processes == 1 and t.sharding.startswith(("fsdp", "zero2", "zero3")):
        offload = t.deepspeed.get("zero_optimization", {}).get("offload_optimizer")
        if not offload:
            yield warned(
                f"{t.sharding} with one process shards nothing",
                key=context.first_set("launch.num_processes", _FILE),
            )
    if t.machines > 1 and context.recipe.launch.ovh is not None:
        yield failed(
            f"{t.path}: num_machines {t.machines}, and launch.ovh is one job on one machine",
            key=_FILE,
            fix="num_machines: 1",
        )
    if t.processes % t.machines:
        yield failed(
            f"{t.processes} processes do not divide over {t.machines} machines",
            key=context.first_set("launch.num_processes", _FILE),
        )


def _two_places(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    for key, kind in (("deepspeed", "zero"), ("fsdp", "fsdp")):
        if recipe.trl.get(key) and t.path is not None:
            same = t.sharding.startswith(kind)
            what = "says it too, and one of the two is ignored" if same else f"shards by {t.sharding}"
            yield failed(
                f"`{key}` in the recipe shards the weights, and the topology {t.name} {what}",
                key=key,
                fix=f"take `{key}` out of the recipe: the topology is the launch file's",
            )


# --------------------------------------------------------------------------- memory savers
def _checkpointing(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    on = checkpointing_on(recipe)
    key = context.first_set("activation_checkpointing", _FILE)
    if on and t.fsdp.get("fsdp_activation_checkpointing"):
        yield failed(
            f"{t.path} has fsdp_activation_checkpointing, and the recipe activation_checkpointing: the Trainer "
            "refuses both",
            key=key,
            fix="fsdp_activation_checkpointing: false",
        )
    chosen = checkpointing_options(recipe)
    if chosen.get("selective"):
        forced = recipe.effective("use_peft") and t.sharding == "zero3"
        if not on:
            yield failed(
                "selective needs activation_checkpointing: true", key="activation_checkpointing_kwargs"
            )
        elif chosen.get("use_reentrant") or forced:
            why = (
                "TRL forces re-entrant checkpointing for LoRA under ZeRO-3"
                if forced
                else "use_reentrant is true"
            )
            yield failed(
                f"selective checkpointing is not re-entrant, and {why}", key="activation_checkpointing_kwargs"
            )


def _saving(context: CheckContext) -> Iterator[Finding]:
    t, recipe = context.topology, context.recipe
    if t.fsdp.get("fsdp_state_dict_type") == "SHARDED_STATE_DICT":
        then = "a release needs `accelerate merge-weights` first"
        if recipe.effective("use_peft"):
            then = "no release: nothing joins the parts of an adapter. FULL_STATE_DICT saves it whole"
        yield warned(f"{t.name}: SHARDED_STATE_DICT leaves weights in shards, so {then}", key=_FILE)
    gathers = t.deepspeed.get("zero_optimization", {}).get("stage3_gather_16bit_weights_on_model_save")
    if t.sharding == "zero3" and not gathers:
        yield failed(
            f"{t.name}: without stage3_gather_16bit_weights_on_model_save a checkpoint holds no weights that a release "
            "could be made of",
            key=_FILE,
            fix="stage3_gather_16bit_weights_on_model_save: true in the JSON",
        )
    if recipe.effective("save_only_model") and not is_divided_while_loading(recipe):
        yield failed(
            "a checkpoint without optimizer and scheduler cannot be continued",
            key="save_only_model",
            fix="save_only_model: false",
        )


def _launched(context: CheckContext) -> Iterator[Finding]:
    """In the process that trains: is this the launch that the recipe names?"""
    if not context.starting or context.topology.path is None:
        return
    t = context.topology
    running = "zero" if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" else ""
    running = "fsdp" if os.environ.get("ACCELERATE_USE_FSDP") == "true" else running
    wanted = next((kind for kind in ("zero", "fsdp") if t.sharding.startswith(kind)), "")
    if running != wanted:
        words = {"": "neither FSDP nor DeepSpeed", "zero": "DeepSpeed", "fsdp": "FSDP"}
        yield warned(
            f"the recipe names the topology {t.name} ({t.sharding}), and this process was launched with "
            f"{words[running]}",
            key=_FILE,
            fix=f"accelerate launch --config_file {t.path} scripts/run_sft.py {context.recipe.path}",
        )


RULES: tuple[Rule, ...] = (
    _processor,
    _attention,
    _precision,
    _numbers,
    _lanes,
    _parallel,
    _alone,
    _two_places,
    _checkpointing,
    _saving,
    _launched,
)
