"""What teachers gave once, before training: filled in every process, and opened where the task is built."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from asrkit.data.train_batches import TrainBatches
from asrkit.methods.distillation.cache import FEATURES, PosteriorCache
from asrkit.methods.distillation.features import FeatureCache, WhisperTeacher
from asrkit.methods.distillation.teachers import Teachers, match_tokenizer, open_teachers
from asrkit.training.run_writer import RunWriter


def fill_caches(
    max_duration: float,
    teachers: Mapping[str, Sequence[Path]],
    cache: Path | None,
    out: Path,
    whisper: str | None,
    run: RunWriter,
    batches: TrainBatches,
) -> None:
    """Run the teachers on the cuts that are not in their caches yet; every process does its share."""
    if cache is not None and teachers:
        matched = match_tokenizer(open_teachers(teachers), batches.tokenizer)
        posteriors = PosteriorCache(cache, matched, batches.tokenizer)
        for done in posteriors.fill(matched, batches.table, batches.tokenizer, run.world, max_duration):
            run.note(f"{cache}: stored the posteriors of {done} utterances")
    if whisper is not None:
        features = _feature_cache(whisper, cache, out)
        for done in features.fill(batches.table, run.world):
            run.note(f"{features.path}: stored Whisper's frames of {done} utterances")


def open_caches(
    matched: Teachers, cache: Path | None, out: Path, whisper: str | None, batches: TrainBatches
) -> tuple[PosteriorCache | None, FeatureCache | None]:
    """The posteriors of the teachers that ``match_tokenizer`` gave, and Whisper's frames; None of what is not used.

    Raises:
        UserError: what the batches need is not there.
    """
    posteriors = PosteriorCache(cache, matched, batches.tokenizer) if cache is not None and matched else None
    features = None if whisper is None else _feature_cache(whisper, cache, out)
    for each in (posteriors, features):
        if each is not None:
            each.open(batches.table)
    return posteriors, features


def _feature_cache(whisper: str, cache: Path | None, out: Path) -> FeatureCache:
    return FeatureCache((cache or out) / FEATURES, WhisperTeacher.find(whisper))
