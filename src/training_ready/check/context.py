"""What several probes need, made once: the corpus, its records, the tokenizer, the configuration, the model without
weights.

Whatever cannot be made raises :class:`Missing`. The probe that owns it reports the fault; every other probe that needs
it says "not run: because ...".
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from training_ready import TrainingReadyError
from training_ready.check.processes import Topology, topology_of
from training_ready.recipe.faults import DEFAULT
from training_ready.recipe.recipe import Recipe

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from training_ready.check.corpora import Corpus
    from training_ready.check.sample import Sample, TokenSample
    from training_ready.check.steps import RunLength
    from training_ready.storage.settings import StorageSettings
    from training_ready.stream.render import ChatRenderer

T = TypeVar("T")


class Missing(Exception):
    """Something that a probe needs cannot be had.

    ``owner`` is the probe that reports it as a fault; with ``owner`` None (offline) nobody does.
    """

    def __init__(self, reason: str, *, owner: str | None, key: str | None = None) -> None:
        super().__init__(reason)
        self.reason, self.owner, self.key = reason, owner, key

    @property
    def blame(self) -> str:
        """The reason as another probe gives it."""
        return self.reason if self.owner is None else f"{self.owner} failed: {self.reason}"


class Made(Generic[T]):
    """A property that is made once, and whose failure is remembered too: a hub that does not answer is asked once."""

    def __init__(self, make: Callable[[CheckContext], T], owner: str, keys: Sequence[str]) -> None:
        self._make, self._owner, self._keys = make, owner, keys
        self.__doc__ = make.__doc__

    def __set_name__(self, owner: type, name: str) -> None:
        self._name = name

    def __get__(self, context: CheckContext, kind: type) -> T:
        if context is None:
            return self  # type: ignore[unreachable]  # the class itself is asked, as by help()
        if self._name not in context.made:
            context.made[self._name] = self._attempt(context)
        kept = context.made[self._name]
        if isinstance(kept, Missing):
            raise kept
        return kept  # type: ignore[no-any-return]

    def _attempt(self, context: CheckContext) -> T | Missing:
        try:
            return self._make(context)
        except Missing as missing:
            return missing
        except TrainingReadyError as error:
            key = getattr(error, "key", None) or context.first_set(*self._keys)
            return Missing(str(error), owner=self._owner, key=key)


def made_once(owner: str, *keys: str) -> Callable[[Callable[[CheckContext], T]], Made[T]]:
    """``owner``: the probe that reports a failure, at the first of ``keys`` that the recipe sets."""
    return lambda make: Made(make, owner, keys)


class CheckContext:
    """One recipe under examination.

    Args:
        offline: nothing may touch the bucket, the hub or the network.
        starting: the check runs in the process that is about to train, on the machine that will train.
        sample_records: records read of each source.
    """

    def __init__(
        self, recipe: Recipe, *, offline: bool = False, starting: bool = False, sample_records: int = 200
    ) -> None:
        self.recipe = recipe
        self.offline = offline
        self.starting = starting
        self.sample_records = sample_records
        self.made: dict[str, Any] = {}

    # ------------------------------------------------------------------ the recipe
    def where(self, key: str) -> str:
        """``file:line`` of a dotted key, or of the nearest section above it; the recipe itself for a default."""
        while True:
            inside = (
                origin for name, origin in self.recipe.origins.items() if f"{name}.".startswith(f"{key}.")
            )
            written = [origin for origin in inside if origin.source != DEFAULT]
            if written:
                return str(min(written, key=lambda origin: (origin.source, origin.line or 0)))
            if "." not in key:
                return str(self.recipe.path)
            key = key.rpartition(".")[0]

    def first_set(self, *keys: str) -> str | None:
        """The first of several keys that the recipe sets; the first of all if it sets none."""
        return next((key for key in keys if self.is_set(key)), keys[0] if keys else None)

    def is_set(self, key: str) -> bool:
        origin = self.recipe.origins.get(key)
        return origin is not None and origin.source != DEFAULT

    def need_network(self, what: str) -> None:
        """Raises :class:`Missing` when the check is offline."""
        if self.offline:
            raise Missing(f"{what} needs the network, and this check is --offline", owner=None)

    @made_once("topology", "launch.accelerate_config")
    def topology(self) -> Topology:
        """Processes of the run and what each holds."""
        return topology_of(self.recipe)

    # ------------------------------------------------------------------ the corpus
    @made_once("bucket")
    def settings(self) -> StorageSettings:
        """The store of the environment, with credentials."""
        from training_ready.storage.settings import StorageSettings

        self.need_network("the bucket")
        settings = StorageSettings.from_environment()
        settings.require_credentials()
        return settings

    @made_once("bucket", "stream.mixture", "data.corpus")
    def corpora(self) -> dict[str, Corpus]:
        """Every corpus that the recipe names, as it names them; ``data.corpus`` first."""
        from training_ready.check.corpora import open_corpora

        return open_corpora(self.settings, self.recipe)

    @property
    def corpus(self) -> Corpus:
        """``data.corpus``."""
        return self.corpora[self.recipe.data.corpus]

    @made_once("data", "stream.mixture", "data.train_split", "data.corpus")
    def sample(self) -> Sample:
        """The first records of each source of every split that is trained on."""
        from training_ready.check.corpora import trained_splits
        from training_ready.check.sample import read_sample

        return read_sample(self.corpora, trained_splits(self.recipe), self.sample_records)

    # ------------------------------------------------------------------ the tokens
    @made_once("template", "pad_token", "model_name_or_path", "model.tokenizer")
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer; for a model from scratch the run's own, or one learned from the sample."""
        from training_ready.check.tokenizer import tokenizer_of

        return tokenizer_of(self)

    @made_once("template", "chat_template_path", "model.tokenizer.chat_template", "model_name_or_path")
    def renderer(self) -> ChatRenderer:
        """The same renderer that training uses."""
        from training_ready.stream.render import ChatRenderer

        return ChatRenderer(self.tokenizer, self.recipe.data.target_role)

    @made_once("loss_mask", "data.target_role")
    def tokens(self) -> TokenSample:
        """The sample as tokens: lengths before the length policy, learned tokens, what truncation would cut."""
        from training_ready.check.sample import tokenise_sample

        return tokenise_sample(self.sample, self.renderer, self.recipe.effective("max_length"))

    @made_once("schedule", "max_steps", "num_train_epochs")
    def length(self) -> RunLength:
        """Steps, packs and tokens of the run."""
        from training_ready.check.steps import run_length

        return run_length(self)

    # ------------------------------------------------------------------ the model
    @made_once("parameters", "model_name_or_path", "model.config")
    def model_config(self) -> PretrainedConfig:
        """The transformers configuration: the hub's, a folder's, or the recipe's own ``model.config``."""
        from training_ready.check.meta_model import config_of

        return config_of(self)

    @made_once("parameters", "model_name_or_path", "model.config")
    def base_model(self) -> PreTrainedModel:
        """The model on the meta device: shapes without weights. Shared by the probes: do not change it."""
        from training_ready.check.meta_model import build_on_meta

        return build_on_meta(self.recipe, self.model_config)

    @made_once("parameters", "lora_target_modules", "lora_target_parameters", "use_peft")
    def model(self) -> PreTrainedModel | PeftModel:
        """What would be trained, on the meta device, ``requires_grad`` as in training. Its own copy of the base."""
        from training_ready.check.meta_model import adapted, build_on_meta

        return adapted(self.recipe, build_on_meta(self.recipe, self.model_config))
