"""TRL's SFTTrainer, fed by a stream that does its own sharding and resumes from a position.

What it changes, and why:

* batches come from :func:`pack_stream` as they are: accelerate would split the data set a second time
  (``IterableDataset.shard``), or let every rank read and drop everybody else's rows;
* a resumed run starts at its position instead of reading again all it has seen (``ignore_data_skip``);
* a checkpoint is complete when the stream's state is written, after every rank has written its part.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from torch.utils.data import DataLoader
from transformers import PreTrainedModel, PrinterCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from trl import SFTConfig, SFTTrainer

from training_ready import TrainingReadyError
from training_ready.stream.dataset import pack_stream
from training_ready.stream.plan import PackPlan
from training_ready.training.checkpoints import ResumeError, StreamState


class StreamSFTTrainer(SFTTrainer):
    """Supervised fine-tuning on packs of conversations.

    ``args.max_steps`` must be set, and ``args.dataset_kwargs`` must skip TRL's own preparation.
    """

    def __init__(
        self,
        *,
        args: SFTConfig,
        plan: PackPlan,
        eval_plan: PackPlan | None,
        start: StreamState,
        **kwargs: Any,
    ) -> None:
        self._plan, self._eval_plan, self._start = plan, eval_plan, start
        super().__init__(
            args=args,
            train_dataset=pack_stream(plan, position=start.position),
            eval_dataset=None
            if eval_plan is None
            else pack_stream(eval_plan).take(eval_plan.packs_in_epoch(0)),
            **kwargs,
        )
        self.remove_callback(
            PrinterCallback
        )  # added because `disable_tqdm` is set; progress is shown by ours
        parallelism = self.accelerator.parallelism_config
        if parallelism is not None and parallelism.non_data_parallel_size > 1:
            raise TrainingReadyError(
                "tensor, context and sequence parallel ranks must share their packs, which this stream does not do "
                "yet: set tp_size, cp_size and sp_size to 1 in the accelerate config"
            )
        self._first_step: int = start.position // start.global_batch

    @property
    def packs_consumed(self) -> int:
        """Packs that the optimizer has seen, over all ranks and restarts."""
        steps: int = self.state.global_step - self._first_step
        return self._start.position + steps * self._start.global_batch

    def get_train_dataloader(self) -> DataLoader:  # type: ignore[type-arg]
        return self._loader(self._plan, position=self._start.position, micro_batch=self._train_batch_size)

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader:  # type: ignore[type-arg]
        if self._eval_plan is None:
            raise TrainingReadyError("evaluation needs data.eval_split in the recipe")
        batch = self.args.per_device_eval_batch_size
        packs = self._eval_plan.packs_in_epoch(0)
        # Every rank takes equally many packs, or the collective that gathers losses would wait for ever; up to
        # (ranks × batch − 1) packs from the beginning are evaluated twice to fill the last round.
        rounds = math.ceil(packs / (batch * self.accelerator.num_processes))
        return self._loader(self._eval_plan, position=0, micro_batch=batch, limit=rounds * batch)

    def _loader(
        self, plan: PackPlan, *, position: int, micro_batch: int, limit: int | None = None
    ) -> DataLoader:  # type: ignore[type-arg]
        packs = pack_stream(
            plan,
            position=position,
            rank=self.accelerator.process_index,
            world_size=self.accelerator.num_processes,
            micro_batch=micro_batch,
        )
        return DataLoader(
            packs if limit is None else packs.take(limit),
            batch_size=micro_batch,
            collate_fn=self.data_collator,
            pin_memory=self.args.device.type == "cuda",
        )

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        # Trainer saves experts one by one but on resume looks for fused ones, finds none, warns, and goes on with random
        # experts; `from_pretrained` converts. Remove when https://github.com/huggingface/transformers/issues/48805 is
        # mended (there in 5.23).
        if not isinstance(self.model, PreTrainedModel) or self.is_fsdp_enabled:
            super()._load_from_checkpoint(resume_from_checkpoint, model)
            return
        saved = type(self.model).from_pretrained(resume_from_checkpoint, dtype=self.model.dtype)
        self.model.load_state_dict(saved.state_dict(), strict=True)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        # What transformers says in a warning: part of the model was not in the checkpoint and stays as it was made.
        if load_result.missing_keys or load_result.unexpected_keys:
            raise ResumeError(
                f"the checkpoint does not fit the model: {len(load_result.missing_keys)} tensors are missing from it "
                f"({', '.join(load_result.missing_keys[:3])} …), {len(load_result.unexpected_keys)} are unknown to the "
                f"model ({', '.join(load_result.unexpected_keys[:3])} …)"
            )

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        self.accelerator.wait_for_everyone()
        if self.is_world_process_zero():
            folder = Path(self._get_output_dir(trial)) / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
            StreamState(
                position=self.packs_consumed,
                global_batch=self._start.global_batch,
                manifest_sha256=self._start.manifest_sha256,
                tokens=self._start.tokens,
                plan=self._start.plan,
            ).write(folder)

    def create_model_card(self, *_: Any, **__: Any) -> None:
        """Nothing: the card is the release's, generated from what happened (``release/card.py``)."""
