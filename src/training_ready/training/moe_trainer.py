"""The stream trainer for mixtures of experts.

What it changes, and why:

* the routers' loss is ours: TRL takes the one inside the model, which pools layers, knows only a micro-batch, and
  does not exist or fails for some families;
* experts are watched, also by the domain of their tokens, and adapted at low rank beside PEFT's adapters;
* a checkpoint holds the experts' adapters, or those over a shared base, the balance window and the counted load.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import TrainerCallback
from trl import SFTConfig

from training_ready import TrainingReadyError
from training_ready.moe.monitor import LoadSnapshot
from training_ready.moe.routing import Routing, route_in_float32
from training_ready.moe.shared_base import train_shared_base
from training_ready.recipe.sections import MoeSection
from training_ready.training.expert_adapters import ExpertAdapterFiles, adapt_experts
from training_ready.training.expert_domains import DOMAINS, DomainCollator, ExpertDomains, domains_of
from training_ready.training.expert_load import ExpertLoadLog, save_load
from training_ready.training.moe_losses import RouterLosses, plan_balance
from training_ready.training.trained_part import TrainedPart
from training_ready.training.trainer import StreamSFTTrainer

logger = logging.getLogger(__name__)


class MoETrainer(StreamSFTTrainer):
    """:class:`StreamSFTTrainer` with the recipe's ``moe:`` section."""

    expert_load: ExpertLoadLog | None = None
    expert_domains: ExpertDomains | None = None
    router_losses: RouterLosses | None = None
    data_collator: Any

    def __init__(
        self,
        *,
        model: Any,
        args: SFTConfig,
        moe: MoeSection,
        part: TrainedPart | None = None,
        **kwargs: Any,
    ) -> None:
        """``part``: what of the model a checkpoint holds; None: all of it, or its adapters."""
        coefficient, args.router_aux_loss_coef = args.router_aux_loss_coef, 0.0
        text = model.config.get_text_config()
        own = getattr(text, "router_aux_loss_coef", None)
        if moe.experts_4bit is not None and args.ddp_broadcast_buffers is None:
            # The codes are buffers, and DDP would send them in every forward.
            args.ddp_broadcast_buffers = False
        super().__init__(model=model, args=args, **kwargs)
        if own is not None:
            text.router_aux_loss_coef = own  # TRL has set it to 0.0; it belongs to the model
        self._part = part
        for key in ("adapters", "shared_base", "experts_4bit"):
            if getattr(moe, key) is not None:
                self._refuse_where_unproven(key)
        if moe.shared_base is not None:
            train_shared_base(self.model)  # PEFT has frozen all but its own
        if moe.adapters is not None:
            logger.info(adapt_experts(self.model, moe.adapters))
            self._part = ExpertAdapterFiles()
        if moe.fp32_router:
            route_in_float32(self.model)
        if moe.watch:
            self.expert_load = ExpertLoadLog(self.model, moe, start=self._first_step)
            self._watch_domains()
        self._balance_experts(moe, coefficient)

    def _watch_domains(self) -> None:
        names = domains_of(self._packs, self._eval_packs)
        if len(names) > 1:  # one domain cannot prefer anything
            self.expert_domains = ExpertDomains(self.model, names)
            self.data_collator = DomainCollator(self.data_collator, names)

    def _balance_experts(self, moe: MoeSection, router_aux_loss_coef: float | None) -> None:
        adapters = self._part is not None or isinstance(self.model, PeftModel)
        plan = plan_balance(self.model, moe, router_aux_loss_coef, adapters=adapters)
        logger.info(f"balance: {plan.reason}")
        if not (plan.needs_gradient or plan.bias_rate):
            return
        if self.padding_free and self.args.pad_to_multiple_of:
            raise TrainingReadyError(
                "pad_to_multiple_of pads packs with tokens that no mask marks, so they would count as routed tokens: "
                "leave it out, or set packing: false"
            )
        reentrant = (self.args.gradient_checkpointing_kwargs or {}).get("use_reentrant")
        if self.args.gradient_checkpointing and reentrant and plan.needs_gradient:
            raise TrainingReadyError(
                "re-entrant activation checkpointing takes the gradient from the routers' losses while their value is "
                "still logged. Set moe.balance_coefficient: 0, or use_reentrant: false (TRL forces re-entrance for "
                "LoRA under ZeRO-3: choose ZeRO-2 or FSDP2 there)."
            )
        self.router_losses = RouterLosses(
            self.model, plan, micro_batches=self.args.gradient_accumulation_steps
        )
        if plan.bias_rate:
            self.add_callback(_BiasStep(self.router_losses))

    def _refuse_where_unproven(self, key: str) -> None:
        if self.is_fsdp_enabled or (self.is_deepspeed_enabled and self.args.deepspeed_plugin.zero_stage == 3):
            instead = ", or shard with model_init_kwargs.distributed_config" * (key == "adapters")
            raise TrainingReadyError(
                f"moe.{key} cannot be saved under accelerate's FSDP or ZeRO-3 yet: use DDP or ZeRO-2{instead}"
            )

    @property
    def can_give_up_a_step(self) -> bool:
        return self.router_losses is None and super().can_give_up_a_step  # the balance window has moved on

    def mark_step(self) -> Callable[[], None]:
        load, domains = self.expert_load, self.expert_domains
        marks = [*([load.monitor.mark()] if load else []), *([domains.mark()] if domains else [])]

        def forget() -> None:
            for back in marks:
                back()

        return forget

    # ------------------------------------------------------------------ losses
    def get_batch_samples(self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device) -> Any:
        samples, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.router_losses is not None and samples:
            tokens = sum(_real_tokens(sample) for sample in samples)
            exact = self.router_losses.plan.exact and len(samples) > 1
            counts = self._routed_without_gradient(samples, self.router_losses) if exact else None
            self.router_losses.begin_step(torch.as_tensor(tokens, device=device), counts)
        return samples, items

    def _routed_without_gradient(self, samples: list[dict[str, Any]], losses: RouterLosses) -> Tensor:
        """Pairs per expert (L, E) of this rank's step, with the random numbers that the step itself will draw."""
        counts: list[Tensor] = []
        self.model_wrapped.train()
        with ExitStack() as stack:
            stack.enter_context(torch.random.fork_rng())
            stack.enter_context(torch.no_grad())
            stack.enter_context(self.compute_loss_context_manager())
            if self.expert_load is not None:
                stack.enter_context(self.expert_load.monitor.paused())
            for sample in samples:
                inputs = self._prepare_inputs(
                    {k: v for k, v in sample.items() if k not in ("labels", DOMAINS)}
                )
                with losses.recording() as routing:
                    self.model_wrapped(**inputs, use_cache=False, logits_to_keep=1)
                counts.append(losses.counts(routing, inputs.get("attention_mask")))
        return torch.stack(counts).sum(dim=0)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | None = None,
    ) -> Any:
        mask, domains = inputs.get("attention_mask"), inputs.pop(DOMAINS, None)
        with self._routed_tokens(mask, domains) as routing:
            result = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        if routing is None or self.router_losses is None:
            return result
        extra = self.router_losses.loss(routing, mask)
        if extra is None:
            return result
        # As in TRL: the language loss is divided by the tokens of the whole step, a mean has to be divided here.
        extra = extra / (self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1)
        return (result[0] + extra, result[1]) if return_outputs else result + extra

    @contextmanager
    def _routed_tokens(self, mask: Tensor | None, domains: Tensor | None) -> Iterator[Routing | None]:
        """Watch the forwards inside, and record them where a router loss needs it."""
        with ExitStack() as stack:
            if self.expert_load is not None:
                stack.enter_context(self.expert_load.monitor.tokens(mask))
            if self.expert_domains is not None:
                stack.enter_context(self.expert_domains.tokens(domains, training=self.model.training))
            losses = self.router_losses if self.model.training else None
            yield stack.enter_context(losses.recording()) if losses else None

    # --------------------------------------------------------------------- logs
    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        step = self.state.global_step
        if "loss" in logs:
            if self.router_losses is not None:
                logs.update(self.router_losses.metrics())
            if self.expert_load is not None:
                logs.update(self.expert_load.since_last_log(step))
            if self.expert_domains is not None:
                logs.update(self.expert_domains.since_last_log())
        elif "eval_loss" in logs and self.expert_load is not None:
            picture = Path(self.args.output_dir) / "expert_load" / f"step-{step:06d}.png"
            title = f"Expert load, evaluation after step {step}"
            logs.update(self.expert_load.evaluation(picture if self.is_world_process_zero() else None, title))
            if self.expert_domains is not None:
                logs.update(self.expert_domains.evaluation())
        super().log(logs, start_time)

    def watched(self) -> tuple[LoadSnapshot | None, dict[str, Any] | None]:
        """The load of the whole run and what domains say about experts, as far as watched; a collective call."""
        load = None if self.expert_load is None else self.expert_load.total()
        return load, None if self.expert_domains is None else self.expert_domains.facts()

    # -------------------------------------------------------------- checkpoints
    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if self._part is not None and not isinstance(self.model, PeftModel):
            if self.args.should_save:  # the frozen model is not a part of the checkpoint
                folder.mkdir(parents=True, exist_ok=True)
                self.processing_class.save_pretrained(folder)
        else:
            super().save_model(output_dir, _internal_call)
        # Collective calls:
        counted = None if self.expert_load is None else self.expert_load.state()
        by_domain = None if self.expert_domains is None else self.expert_domains.counted()
        if not self.args.should_save:
            return
        if self._part is not None:
            self._part.write(self.model, folder)
        if self.router_losses is not None:
            self.router_losses.save(folder)
        if counted is not None:
            save_load(counted, folder)
        if self.expert_domains is not None and by_domain is not None:
            self.expert_domains.save(by_domain, folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        if self._part is not None:
            self._part.read(self.model, Path(resume_from_checkpoint))
        else:
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if self._part is not None:
            self._part.read(self.model, Path(str(self.state.best_model_checkpoint)))
        else:
            super()._load_best_model()

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is None:
            return
        if self.router_losses is not None:
            self.router_losses.load(Path(checkpoint))
        if self.expert_load is not None:
            self.expert_load.restore(Path(checkpoint), here=self.is_world_process_zero())
        if self.expert_domains is not None:
            self.expert_domains.restore(Path(checkpoint), here=self.is_world_process_zero())


class _BiasStep(TrainerCallback):
    """Moves the choice biases when the optimizer has moved the weights."""

    def __init__(self, losses: RouterLosses) -> None:
        self._losses = losses

    def on_optimizer_step(self, *_: Any, **__: Any) -> None:
        self._losses.step_biases()


def _real_tokens(sample: dict[str, Any]) -> Tensor:
    mask = sample.get("attention_mask")
    return torch.tensor(sample["input_ids"].numel()) if mask is None else mask.sum()
