"""Masked batches: a pure function of their number, cropped, without texts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from asrkit.config import from_dict
from asrkit.data.cut_table import CutTable
from asrkit.data.manifests import open_cuts, text_of
from asrkit.data.masked_batches import (
    MaskConfig,
    MaskedBatch,
    MaskedBatches,
    PretrainDataConfig,
    cropped,
    held_out_batches,
)
from asrkit.data.text.tokenizer import train_tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches
from asrkit.training.datasets import bucket_plan
from helpers.tones import make_corpus


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_corpus(tmp_path_factory.mktemp("corpus"), 12)


def make_batches(manifest: Path, slices: int = 1, **data: Any) -> MaskedBatches:
    settings = from_dict(PretrainDataConfig, {"max_duration": 8, "num_buckets": 2, **data}, "test")
    table = CutTable(open_cuts(manifest))
    plan = bucket_plan(np.minimum(table.durations, settings.crop), settings, slices, 1)
    return MaskedBatches(table, plan, slices, settings, MaskConfig(), None, 1)


def same(one: MaskedBatch, other: MaskedBatch) -> bool:
    names = ("features", "feature_lens", "hidden", "distractors")
    return one.cut_ids == other.cut_ids and all(torch.equal(getattr(one, n), getattr(other, n)) for n in names)


@pytest.mark.parametrize("slices", [1, 2])
def test_a_batch_is_a_function_of_its_number(manifest: Path, slices: int) -> None:
    batches, again = make_batches(manifest, slices, crop=1.0), make_batches(manifest, slices, crop=1.0)
    numbers = list(range(6))
    made = [batches[number] for number in numbers]
    assert all(same(again[number], made[number]) for number in reversed(numbers))
    assert not any(same(made[0], other) for other in made[1:])
    for batch in made:
        assert isinstance(batch, MaskedBatch) and batch.symbols.numel() == 0
        assert batch.distractors.shape == (*batch.hidden.shape, 100)
        moved = batch.to(torch.device("cpu"))
        assert isinstance(moved, MaskedBatch) and same(moved, batch)


def test_longer_cuts_are_cropped_anywhere_and_others_are_not(manifest: Path) -> None:
    batches = make_batches(manifest, crop=1.0)
    seen: dict[str, set[float]] = {}
    for number in range(3 * batches.plan.steps_per_epoch):
        batch = batches[number]
        whole = {cut.id: cut for cut in open_cuts(manifest)}
        for cut_id, seconds, row in zip(batch.cut_ids, batch.durations, batch.features, strict=True):
            assert seconds == pytest.approx(min(1.0, whole[cut_id].duration), abs=0.02)
            seen.setdefault(cut_id, set()).add(float(row[50].sum()))
    assert len(seen) == 12 and any(len(values) == 3 for values in seen.values())
    cut = next(iter(open_cuts(manifest)))
    assert cropped(cut, cut.duration, 0.0) is cut
    part = cropped(cut, 0.5, 0.3)
    assert part.id == cut.id and part.duration == 0.5
    assert np.array_equal(part.load_audio(), cut.load_audio()[:, 4800:12800])


def test_the_audio_is_that_of_other_training(manifest: Path, tmp_path: Path) -> None:
    """The same cuts, perturbed by the same random numbers, without symbols."""
    varied: dict[str, Any] = {"augment": {"speed": 0.1, "volume_db": 6.0, "channel_db": 3.0, "join": 0.5}}
    masked = make_batches(manifest, **varied)
    tokenizer = train_tokenizer(map(text_of, open_cuts(manifest)), "char", 30, tmp_path / "tokenizer.model")
    data = from_dict(DataConfig, varied, "test")
    plain = TrainBatches(masked.table, masked.plan, 1, data, tokenizer, None, 1)
    for number in range(2):
        one, other = masked[number], plain[number]
        assert torch.equal(one.features, other.features) and one.cut_ids == other.cut_ids
        assert other.symbols.numel() and not one.symbols.numel()
    nothing = PretrainDataConfig().augment
    assert nothing.spec_augment is None and nothing.speed == nothing.volume_db == 0


def test_held_out_batches_are_always_the_same(manifest: Path) -> None:
    cuts, data = list(open_cuts(manifest)), PretrainDataConfig(max_duration=5, crop=1.2)
    one, other = (list(held_out_batches(cuts, data, MaskConfig(), 1)) for _ in range(2))
    assert len(one) > 1 and sum(len(batch.cut_ids) for batch in one) == 12
    assert all(same(a, b) for a, b in zip(one, other, strict=True))
    assert max(batch.features.shape[1] for batch in one) == 120
