"""Where does a run go on? From the newest checkpoint that every node can have, on its disk or from the bucket."""

from __future__ import annotations

import logging
import shutil
from dataclasses import dataclass
from pathlib import Path

from training_ready import TrainingReadyError
from training_ready.recipe.recipe import Recipe
from training_ready.storage.objects import ObjectNotFound, ObjectStore
from training_ready.storage.settings import StorageSettings
from training_ready.storage.uri import parse_s3_uri
from training_ready.training.checkpoint_bucket import BucketCheckpoints, DamagedCheckpoint
from training_ready.training.checkpoint_mirror import CheckpointMirror, MirrorPart
from training_ready.training.checkpoints import ResumeError, StreamState, checkpoints_in, folder_of, step_of
from training_ready.training.nodes import RunNodes, gathered
from training_ready.training.run_folder import METRICS

logger = logging.getLogger(__name__)

_AUTO = ("auto", "true", "True")


@dataclass(frozen=True, kw_only=True, slots=True)
class _Offer:
    """The steps that one run folder can provide."""

    here: frozenset[int]
    in_bucket: frozenset[int]

    @property
    def steps(self) -> frozenset[int]:
        return self.here | self.in_bucket


def bucket_of(recipe: Recipe) -> BucketCheckpoints | None:
    """The place in the bucket that ``checkpoint.mirror`` names; None when it names none."""
    wanted = recipe.checkpoint.mirror
    if wanted is False:
        return None
    settings = StorageSettings.from_environment()
    if wanted is True:
        bucket, prefix = settings.checkpoint_bucket, f"{settings.root_prefix}runs/{recipe.name}/"
    else:
        place = parse_s3_uri(wanted)
        if place is None:
            raise ResumeError(f"checkpoint.mirror: {wanted!r} is no s3:// address")
        bucket, prefix = place.bucket, f"{place.key.rstrip('/')}/{recipe.name}/"
    return BucketCheckpoints(ObjectStore(settings, bucket), prefix, recipe.name)


def open_mirror(recipe: Recipe, bucket: BucketCheckpoints | None, nodes: RunNodes) -> CheckpointMirror | None:
    """The mirror of this process's run folder, at work on what an earlier start left unfinished."""
    if bucket is None or not nodes.keeper:
        return None
    part = MirrorPart(attempt=nodes.attempt, node=nodes.node, others=nodes.others if nodes.first else ())
    chosen = recipe.checkpoint
    return CheckpointMirror(bucket, part, keep=chosen.keep_remote, patience=chosen.patience_minutes * 60)


def checkpoint_to_resume(
    output_dir: Path, wanted: str | None, bucket: BucketCheckpoints | None, nodes: RunNodes
) -> Path | None:
    """The checkpoint that ``resume_from_checkpoint`` means: a folder, ``auto`` for the newest complete one, or None.

    A checkpoint that is complete in the bucket only is brought to the run folder first. A collective call.

    Raises:
        ResumeError: the named checkpoint is incomplete, or newer ones are there; or checkpoints are there and nothing
            says what to do with them.
        StorageError: the bucket cannot be read; a run never starts anew because of that.
    """
    offers = _offers(output_dir, bucket, nodes)
    if wanted in _AUTO:
        return _newest(output_dir, bucket, nodes, offers)
    there = offers[0].steps
    if wanted:
        chosen = Path(wanted)
        StreamState.read(chosen)
        newer = sorted(step for step in there if step > step_of(chosen)) if chosen.name[-1:].isdigit() else []
        if newer:
            raise ResumeError(
                f"{chosen} is not the newest checkpoint of this run: step {newer[-1]} is complete too, and after an "
                "interruption `auto` would go on from that. Remove the newer ones, or give this run another output_dir."
            )
        return chosen
    if there:
        where = output_dir if max(there) in offers[0].here else bucket.uri if bucket else output_dir
        raise ResumeError(
            f"{where} already holds checkpoint-{max(there)}. Continue it with resume_from_checkpoint=auto, or give "
            "this run another output_dir."
        )
    return None


def bring_metrics(checkpoint: Path, output_dir: Path) -> None:
    """Metrics as they were at the checkpoint; what was logged after it will be logged again."""
    if (checkpoint / METRICS).exists():
        shutil.copyfile(checkpoint / METRICS, output_dir / METRICS)


def _offers(output_dir: Path, bucket: BucketCheckpoints | None, nodes: RunNodes) -> list[_Offer]:
    """What each run folder can provide, the first node's first."""
    offer = None
    if nodes.keeper:
        complete, incomplete = checkpoints_in(output_dir)
        for path in incomplete:
            logger.warning(f"ignoring {path}: incomplete, its save was interrupted")
        in_bucket: list[int] = []
        if bucket is not None:
            in_bucket, unfinished = bucket.survey()
            for step in unfinished:
                logger.warning(f"ignoring {bucket.uri}step-{step}: incomplete, its upload was interrupted")
        offer = _Offer(here=frozenset(map(step_of, complete)), in_bucket=frozenset(in_bucket))
    return [one for one in gathered(offer) if one is not None]


def _newest(
    output_dir: Path, bucket: BucketCheckpoints | None, nodes: RunNodes, offers: list[_Offer]
) -> Path | None:
    everywhere = frozenset.intersection(*(offer.steps for offer in offers))
    anywhere = frozenset.union(*(offer.steps for offer in offers))
    while everywhere:
        step = max(everywhere)
        for missing in sorted(one for one in anywhere if one > step):
            logger.warning(f"ignoring step {missing}: not every node can have it")
        damage = _obtain(output_dir, bucket, step) if nodes.keeper else None
        damages = [one for one in gathered(damage) if one is not None]
        if not damages:
            return folder_of(output_dir, step)
        for message in damages:
            logger.error(f"{message}. Trying the checkpoint before it.")
        everywhere, anywhere = everywhere - {step}, anywhere - {step}
    if anywhere:
        raise ResumeError(
            f"steps {sorted(anywhere)} exist on some nodes only, so there is nothing that all could continue from. Set "
            "checkpoint.mirror, or give all nodes one output_dir on a shared disk."
        )
    if any(offer.steps for offer in offers):
        raise ResumeError(
            f"no checkpoint of {output_dir} is whole, see above. Repair one, or start anew with another output_dir."
        )
    return None


def _obtain(output_dir: Path, bucket: BucketCheckpoints | None, step: int) -> str | None:
    """Have the step in the run folder; what is wrong with it, if it cannot be had."""
    folder = folder_of(output_dir, step)
    if folder in checkpoints_in(output_dir)[0]:
        return None
    if bucket is None:
        raise TrainingReadyError(f"{folder} is gone: something removed it a moment ago")
    logger.info(f"fetching step {step} from {bucket.uri}")
    try:
        bucket.download(step, output_dir)
    except (DamagedCheckpoint, ObjectNotFound) as error:
        return str(error)
    return None
