"""TRL's SFTTrainer, fed by a stream that does its own sharding and resumes from a position.

What it changes, and why:

* batches come from :func:`pack_stream` as they are: accelerate would split the data set a second time
  (``IterableDataset.shard``), or let every rank read and drop everybody else's rows;
* a resumed run starts at its position instead of reading again all it has seen (``ignore_data_skip``);
* a checkpoint is complete when the stream's state is written, after every rank has written its part.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import IterableDataset
from peft import PeftModel
from safetensors import SafetensorError
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from training_ready import TrainingReadyError
from training_ready.stream.attention import refuse_leak, refuse_unknown_backend
from training_ready.stream.dataset import pack_stream
from training_ready.stream.groups import PackReader
from training_ready.stream.sight import StreamSight
from training_ready.training.checkpoint_keeper import CheckpointKeeper
from training_ready.training.checkpoints import ResumeError, StreamState
from training_ready.training.preemption import EvaluationAbandoned

logger = logging.getLogger(__name__)


class StreamSFTTrainer(SFTTrainer):
    """Supervised fine-tuning on packs of conversations.

    ``args.max_steps`` must be set, and ``args.dataset_kwargs`` must skip TRL's own preparation.
    """

    def __init__(
        self,
        *,
        args: SFTConfig,
        packs: PackReader,
        eval_packs: PackReader | None,
        start: StreamState,
        checkpoints: CheckpointKeeper,
        **kwargs: Any,
    ) -> None:
        self._packs, self._eval_packs, self._start = packs, eval_packs, start
        self._first_step = start.step
        self._checkpoints = checkpoints
        super().__init__(
            args=args,
            train_dataset=pack_stream(packs, position=start.position, global_batch=start.global_batch),
            eval_dataset=None
            if eval_packs is None
            else pack_stream(eval_packs).take(eval_packs.plan.packs_per_pass),
            **kwargs,
        )
        # TRL counts from zero at every start.
        self._total_train_tokens = sum(part.tokens for part in packs.plan.count(start.position).values())
        self.remove_callback(
            PrinterCallback
        )  # added because `disable_tqdm` is set; progress is shown by ours
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise TrainingReadyError(
                "tensor, context and sequence parallel ranks must share their packs, which this stream does not do "
                "yet: set tp_size, cp_size and sp_size to 1 in the accelerate config"
            )

        if args.packing:
            self._refuse_leaks()

    def _refuse_leaks(self) -> None:
        """Packing is proven on the model itself, where it lies whole in one process."""
        refuse_unknown_backend(self.model.config._attn_implementation)
        if (
            self.is_deepspeed_enabled
            or self.is_fsdp_enabled
            or any(map(_is_sharded, self.model.parameters()))
        ):
            logger.info(
                "packing: not proven on this model, whose weights are sharded; prove it on one process"
            )
            return
        refuse_leak(
            self.model,
            vocab_size=self.model.config.get_text_config().vocab_size,
            device=self.args.device,
            half=self.args.bf16,
        )

    @property
    def packs_consumed(self) -> int:
        """Packs that the optimizer has seen, over all ranks and restarts."""
        steps: int = self.state.global_step - self._first_step
        return self._start.position + steps * self._start.global_batch

    @property
    def can_give_up_a_step(self) -> bool:
        """Whether the micro-batches of a step that is not complete can be forgotten without a trace."""
        return not self.is_deepspeed_enabled  # its engine counts micro-batches and keeps gradients by itself

    def mark_step(self) -> Callable[[], None]:
        """Called before a step that can be given up; what is returned forgets all that it has counted since."""
        return lambda: None

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        packs = pack_stream(
            self._packs,
            position=self._start.position,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            global_batch=self._start.global_batch,
        )
        self._sight = StreamSight(self._packs, self.args.max_length, self._start.position)
        # A run that was stopped after its last step has none left, and Trainer would train one more.
        trained = self._start.step >= self.args.max_steps
        return self._loader(packs.take(0) if trained else packs, self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:  # type: ignore[type-arg]
        if self._eval_packs is None:
            raise TrainingReadyError("evaluation needs data.eval_split in the recipe")
        batch, ranks = self.args.per_device_eval_batch_size, self.accelerator.num_processes
        # Every rank takes equally many packs, or the collective that gathers losses would wait for ever; up to
        # (ranks × batch − 1) packs from the beginning are evaluated twice to fill the last round: empty ones would
        # count as batches with a loss of 0.
        rounds = math.ceil(self._eval_packs.plan.packs_per_pass / (batch * ranks))
        packs = pack_stream(
            self._eval_packs,
            rank=self.accelerator.process_index,
            world_size=ranks,
            global_batch=batch * ranks,
        )
        return self._loader(packs.take(rounds * batch), batch)

    def _loader(self, packs: IterableDataset, micro_batch: int) -> DataLoader:  # type: ignore[type-arg]
        return DataLoader(
            packs,
            batch_size=micro_batch,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs and self.is_world_process_zero():
            logs.update(self._sight.since_last_log(self.packs_consumed))
        super().log(logs, start_time)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer saves experts one by one but on resume looks for fused ones, finds none, warns, and goes on with
        # random experts; `from_pretrained` converts. Remove when
        # https://github.com/huggingface/transformers/issues/48805 is mended (it is there in 5.23).
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict(), strict=True)

    def _load_rng_state(self, checkpoint: str | None) -> None:
        super()._load_rng_state(checkpoint)
        if checkpoint is not None:
            # The first step comes after a data loader has been made, and that draws a number.
            again = partial(super()._load_rng_state, checkpoint)
            self.add_callback(_BeforeTheFirstStep(again))

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # What transformers says in a warning: part of the model was not in the checkpoint and stays as it was made.
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ResumeError(
                f"the checkpoint does not fit the model: {len(load_result.missing_keys)} tensors are missing from it "
                f"({', '.join(load_result.missing_keys[:3])} …), {len(load_result.unexpected_keys)} are unknown to the "
                f"model ({', '.join(load_result.unexpected_keys[:3])} …)"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        step, keeper = self.state.global_step, self._checkpoints
        try:
            keeper.make_room(step, self.state.best_model_checkpoint)
            self.accelerator.wait_for_everyone()
            with self._rotation_is_ours():
                super()._save_checkpoint(model, trial)
            self.accelerator.wait_for_everyone()
            keeper.complete(step)
            self.accelerator.wait_for_everyone()
            reached = replace(self._start, position=self.packs_consumed, step=step)
            keeper.seal(step, reached, self.state.best_model_checkpoint)
        except (OSError, RuntimeError, SafetensorError) as error:  # what a full disk raises
            raise keeper.failed(step, error) from error

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        super().save_model(output_dir, _internal_call)
        folder = Path(output_dir or self.args.output_dir)
        if self.is_fsdp_enabled and self.args.should_save and not (folder / "config.json").exists():
            # With SHARDED_STATE_DICT Trainer leaves all this out, and shards alone are no model.
            self.processing_class.save_pretrained(folder)
            if not isinstance(self.model, PeftModel):  # an adapter would be read as a whole model
                self.model.config.save_pretrained(folder)
                self.model.generation_config.save_pretrained(folder)

    @contextmanager
    def _rotation_is_ours(self) -> Iterator[None]:
        """Trainer would delete older checkpoints before the new one is sealed."""
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            yield
        finally:
            self.args.save_total_limit = limit

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        try:
            return dict(super()._evaluate(*args, **kwargs))
        except EvaluationAbandoned:
            return {}

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        return bool(metrics) and bool(super()._determine_best_metric(metrics, trial))

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the card is the release's, generated from what happened (``release/card.py``)."""


class _BeforeTheFirstStep(TrainerCallback):
    """Does something once, when the first optimizer step begins."""

    def __init__(self, action: Callable[[], None]) -> None:
        self._action: Callable[[], None] | None = action

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        if self._action is not None:
            self._action()
            self._action = None


def _is_sharded(parameter: torch.Tensor) -> bool:
    return isinstance(parameter, DTensor)
