"""One supervised fine-tuning run, from a recipe to a summary.

Read :func:`run_sft` top to bottom: corpus, tokenizer, tokens, where to start, model, trainer, training, summary.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import ExitStack, suppress
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig, SFTConfig

from training_ready.corpus.manifest import Manifest
from training_ready.moe.families import moe_family
from training_ready.moe.monitor import LoadSnapshot
from training_ready.moe.plots import plot_expert_load
from training_ready.moe.quant import quantise_experts
from training_ready.recipe.recipe import Recipe
from training_ready.storage.objects import ObjectStore
from training_ready.stream.render import ChatRenderer
from training_ready.training import summary
from training_ready.training.arguments import distributed_config, model_config, sft_config, world
from training_ready.training.callbacks import MetricsFile, MirrorCost, ProgressDisplay
from training_ready.training.checkpoint_keeper import CheckpointKeeper
from training_ready.training.checkpoints import Interrupted, ResumeError, StreamState, Unfinished
from training_ready.training.data import RunData, corpus_texts, open_corpus, order_facts, prepare_data
from training_ready.training.lora import lora_config
from training_ready.training.model import build_model, load_model
from training_ready.training.moe_trainer import MoETrainer
from training_ready.training.nodes import find_nodes
from training_ready.training.placement import PlacementCheck
from training_ready.training.plots import plot_loss
from training_ready.training.preemption import EvaluationAbandoned, StopReason, StopSignals, StopTogether
from training_ready.training.resume import bring_metrics, bucket_of, checkpoint_to_resume, open_mirror
from training_ready.training.run_folder import RunFolder
from training_ready.training.same_model import refuse_other_model
from training_ready.training.scratch import ModelError
from training_ready.training.shared_experts import share_base
from training_ready.training.tokenizer import load_tokenizer, trained_once
from training_ready.training.trained_part import TrainedPart
from training_ready.training.trainer import StreamSFTTrainer

logger = logging.getLogger(__name__)


def run_sft(recipe: Recipe, console: Console) -> Path:
    """Trains what the recipe says and returns the run folder; it holds ``summary.json`` if the run has finished.

    Raises:
        TrainingReadyError: anything that a person can mend; nothing is reported as done that is not.
    """
    started = time.time()
    folder = RunFolder(recipe.output_dir)
    if _already_done(folder, recipe):
        logger.info(f"{folder.path} is already trained with this very recipe: nothing to do")
        return folder.path
    deadline = time.monotonic() + recipe.budget.max_hours * 3600 if recipe.budget.max_hours else None

    # ---------------------------------------------------------------- corpus
    manifest, store = open_corpus(recipe.data.corpus)
    if world()[0] == 0:
        folder.open(recipe.to_yaml())

    # -------------------------------------------------- is there a checkpoint
    model_args = model_config(recipe)
    args = sft_config(recipe)  # from here on the ranks can speak to each other
    nodes, bucket = find_nodes(folder.path), bucket_of(recipe)
    checkpoint = checkpoint_to_resume(folder.path, recipe.trl.get("resume_from_checkpoint"), bucket, nodes)
    if checkpoint is not None:
        refuse_other_model(checkpoint, recipe)

    # ------------------------------------------------- tokenizer, then tokens
    tokenizer = _tokenizer(recipe, model_args, store, manifest, folder, checkpoint)
    renderer = ChatRenderer(tokenizer, recipe.data.target_role)
    global_batch = args.per_device_train_batch_size * args.gradient_accumulation_steps * world()[1]
    data = prepare_data(recipe, manifest, store, renderer, console, global_batch=global_batch)
    start = _start(recipe, args, data, global_batch, renderer.fingerprint, folder, checkpoint)

    with StopSignals() as signals, ExitStack() as held:
        mirror = open_mirror(recipe, bucket, nodes)
        if mirror is not None:
            held.enter_context(mirror).catch_up(folder.path)

        # ------------------------------------------------- model and trainer
        model, part = _model(recipe, model_args, tokenizer, args)
        trainer = _trainer_for(model, recipe, part)(
            model=model,
            args=args,
            packs=data.packs,
            eval_packs=data.eval_packs,
            start=start,
            checkpoints=CheckpointKeeper(folder.path, nodes, limit=args.save_total_limit, mirror=mirror),
            processing_class=tokenizer,
            peft_config=lora_config(model_args, model),
            callbacks=[
                MetricsFile(folder),
                ProgressDisplay(console),
                *([MirrorCost(mirror)] if mirror else []),
            ],
        )
        whole_steps = not trainer.can_give_up_a_step
        stop = StopTogether(signals, deadline=deadline, whole_steps=whole_steps, mark_step=trainer.mark_step)
        trainer.add_callback(stop)
        trainer.add_callback(PlacementCheck(trainer, recipe.launch))

        # ---------------------------------------------------------- training
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        evaluation: dict[str, float] = {}
        if stop.reason is StopReason.NONE and data.eval_packs is not None:
            with suppress(EvaluationAbandoned):  # a signal: `stop` knows
                evaluation = _final_evaluation(trainer)
        if stop.reason is not StopReason.NONE:
            return _stopped(stop, trainer, folder)
        load, domains = trainer.watched() if isinstance(trainer, MoETrainer) else (None, None)
        if mirror is not None:
            mirror.finish()  # a run is done when its last checkpoint is where it was promised to be

        # ----------------------------------------------------------- summary
        if trainer.is_world_process_zero():
            folder.finish(
                {
                    "run": recipe.name,
                    "started_at": datetime.fromtimestamp(started, UTC).isoformat(timespec="seconds"),
                    "finished_at": datetime.now(UTC).isoformat(timespec="seconds"),
                    "wall_seconds": round(time.time() - started, 1),
                    "steps": trainer.state.global_step,
                    "seed": args.seed,
                    "recipe": {
                        "path": str(recipe.path),
                        "sha256": recipe.sha256,
                        "resolved": recipe.to_yaml(),
                    },
                    "data": summary.data_facts(recipe, data),
                    "tokens": summary.token_facts(data, trainer.packs_consumed),
                    "loss": summary.loss_facts(folder, evaluation),
                    "moe": summary.moe_facts(load, domains, folder) if load else None,
                    "model": summary.model_facts(model, model_args),
                    "versions": summary.versions(),
                    "hardware": summary.hardware(args.device),
                    "checkpoint": str(summary.last_checkpoint(folder.path)),
                    "pictures": _draw(folder, recipe.name, load),
                }
            )
            logger.info(f"trained: {folder.path}/summary.json")
    return folder.path


def _stopped(stop: StopTogether, trainer: StreamSFTTrainer, folder: RunFolder) -> Path:
    """Says why the run stops before its end and how to go on.

    Raises:
        Unfinished: its checkpoints hold no optimizer; in the first process only, whose exit status is the run's.
        Interrupted: a signal stopped it; in the first process only.
    """
    where = f"stopped at step {trainer.state.global_step} of {trainer.args.max_steps}"
    where += ": budget.max_hours is used up." if stop.reason is StopReason.BUDGET else " by a signal."
    if trainer.is_world_process_zero():
        if trainer.args.save_only_model:
            raise Unfinished(
                f"{where} It cannot be continued: its checkpoints hold weights only (save_only_model)."
            )
        where += " Continue with the same command and resume_from_checkpoint=auto."
        if stop.reason is StopReason.SIGNAL:
            raise Interrupted(where)
        logger.info(where)
    return folder.path


def _trainer_for(
    model: PreTrainedModel, recipe: Recipe, part: TrainedPart | None
) -> Callable[..., StreamSFTTrainer]:
    """The trainer of this kind of model."""
    if moe_family(model.config) is not None:
        return partial(MoETrainer, moe=recipe.moe, part=part)
    if recipe.moe.adapters is not None:
        raise ModelError(f"moe.adapters: {type(model).__name__} is dense, it has no experts to adapt")
    return StreamSFTTrainer


def _final_evaluation(trainer: StreamSFTTrainer) -> dict[str, float]:
    """The evaluation of the final weights: the one that the last step ended with, or one made now."""
    last = [logs for logs in trainer.state.log_history if "eval_loss" in logs][-1:]
    if last and last[0]["step"] == trainer.state.global_step:
        return dict(last[0])
    return dict(trainer.evaluate())


def _already_done(folder: RunFolder, recipe: Recipe) -> bool:
    finished = folder.summary()
    if finished is None:
        return False
    if _what_is_trained(yaml.safe_load(finished["recipe"]["resolved"])) == _what_is_trained(
        recipe.resolved()
    ):
        return True
    raise ResumeError(
        f"{folder.path} holds a finished run of another recipe (its summary says {finished['recipe']['sha256'][:12]}, "
        f"this recipe is {recipe.sha256[:12]}). Give this run another output_dir, or remove that folder."
    )


_HOW_FAR = frozenset({"resume_from_checkpoint", "budget", "checkpoint"})


def _what_is_trained(resolved: Mapping[str, Any]) -> dict[str, Any]:
    """The resolved recipe without what says only how far one start may go."""
    return {key: value for key, value in resolved.items() if key not in _HOW_FAR}


def _tokenizer(
    recipe: Recipe,
    model_args: ModelConfig,
    store: ObjectStore,
    manifest: Manifest,
    folder: RunFolder,
    checkpoint: Path | None,
) -> PreTrainedTokenizerBase:
    if recipe.model.tokenizer is None:
        return load_tokenizer(
            str(model_args.model_name_or_path),
            revision=model_args.model_revision,
            chat_template_path=recipe.trl.get("chat_template_path"),
            pad_token=recipe.trl.get("pad_token"),
        )
    wanted = recipe.model.tokenizer
    texts = corpus_texts(store, manifest, recipe.data.train_split)
    return trained_once(
        folder.path / "tokenizer",
        texts,
        vocab_size=wanted.vocab_size,
        chat_template=wanted.chat_template,
        checkpoint=checkpoint,
    )


def _model(
    recipe: Recipe, model_args: ModelConfig, tokenizer: PreTrainedTokenizerBase, args: SFTConfig
) -> tuple[PreTrainedModel, TrainedPart | None]:
    """The model to train, and what of it a checkpoint holds where that is not the model's own affair."""
    if recipe.model.config is not None:
        return build_model(recipe.model.config, tokenizer, model_args=model_args, seed=args.seed), None
    model = load_model(model_args, distributed=distributed_config(recipe))
    if recipe.moe.shared_base is not None:
        return share_base(model, recipe.moe.shared_base, seed=args.seed)
    if recipe.moe.experts_4bit is not None:
        size = quantise_experts(model, double=recipe.moe.experts_4bit == "nf4_double", device=args.device)
        logger.info(f"experts in NF4: {size / 1e9:.3f} GB")
    return model, None


def _start(
    recipe: Recipe,
    args: SFTConfig,
    data: RunData,
    global_batch: int,
    tokens: str,
    folder: RunFolder,
    checkpoint: Path | None,
) -> StreamState:
    """The position to train from; sets ``args.max_steps`` from the epochs."""
    order = order_facts(recipe, global_batch)
    if args.max_steps <= 0:
        args.max_steps = data.packs.plan.steps(global_batch)
    start = StreamState(
        position=0,
        step=0,
        global_batch=global_batch,
        manifests={uri: manifest.sha256 for uri, manifest in data.manifests.items()},
        tokens=tokens,
        order=order,
    )
    if checkpoint is not None:
        saved = StreamState.read(checkpoint)
        saved.refuse_unless_same_data(start, checkpoint, recipe.stream.resume_allow)
        saved.refuse_weights_only(checkpoint, args.max_steps)
        logger.info(f"continuing from {checkpoint}, pack {saved.position}")
        start = replace(start, position=saved.position, step=saved.step)
    if world()[0] == 0:
        if checkpoint is not None:
            bring_metrics(checkpoint, folder.path)
        folder.forget_metrics_after(start.step)
    return start


def _draw(folder: RunFolder, name: str, load: LoadSnapshot | None) -> list[str]:
    """Draws the run's pictures and returns their file names."""
    plot_loss(
        folder.series("loss"),
        folder.series("eval_loss"),
        folder.path / "loss.png",
        title=f"{name}: training loss",
    )
    if load is None:
        return ["loss.png"]
    plot_expert_load(load, folder.path / "expert_load.png", title=f"{name}: expert load")
    return ["loss.png", "expert_load.png"]
