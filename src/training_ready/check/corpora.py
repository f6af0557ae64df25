"""Which corpora does the recipe train on? ``data.corpus``, or every part of ``stream.mixture``."""

from __future__ import annotations

from dataclasses import dataclass

from training_ready.corpus.manifest import Manifest, Shard
from training_ready.recipe.recipe import Recipe
from training_ready.recipe.sections import MixturePart
from training_ready.storage.layout import locate
from training_ready.storage.objects import ObjectStore
from training_ready.storage.settings import StorageSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
    """A built corpus and its bucket."""

    manifest: Manifest
    store: ObjectStore

    @property
    def tokens_prefix(self) -> str:
        """Where its tokens lie: a key without a final slash."""
        return self.manifest.uri.removeprefix(self.store.uri("")).rpartition("/")[0]

    def shards(self, split: str) -> list[Shard]:
        return self.manifest.shards_of(split)


Origin = tuple[str, str]
"""(corpus as the recipe names it, split)."""


def mixture_parts(recipe: Recipe) -> dict[str, MixturePart]:
    """The parts of the mixture; without one, the rows of ``data`` as its only part."""
    if recipe.stream.mixture is not None:
        return dict(recipe.stream.mixture)
    return {"data": MixturePart.model_validate({"stages": recipe.data.stages})}


def origin_of(part: MixturePart, recipe: Recipe) -> Origin:
    return part.corpus or recipe.data.corpus, part.split or recipe.data.train_split


def trained_splits(recipe: Recipe) -> list[Origin]:
    """Every split that is trained on, once."""
    return list(dict.fromkeys(origin_of(part, recipe) for part in mixture_parts(recipe).values()))


def open_corpora(settings: StorageSettings, recipe: Recipe) -> dict[str, Corpus]:
    """The corpora of the recipe by their names in it.

    Raises:
        ManifestError, StorageError: one of them is not there, or cannot be read.
    """
    names = [recipe.data.corpus, *(corpus for corpus, _ in trained_splits(recipe))]
    found = {}
    for name in dict.fromkeys(names):
        place = locate(settings, name)
        store = ObjectStore(settings, place.bucket)
        found[name] = Corpus(manifest=Manifest.load(store, place.key), store=store)
    return found
