"""Batches: every cut once an epoch, any step at once, the same data for any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from lhotse import CutSet, Fbank, FbankConfig

from asrkit.config import from_dict
from asrkit.data.augment import (
    AugmentConfig,
    SpecAugmentConfig,
    add_noise,
    spec_augment,
    stretch,
    vocal_tract_warp,
)
from asrkit.data.batch import evaluation_batches
from asrkit.data.bucketing import BucketPlan
from asrkit.data.cut_audio import cut_features, feature_statistics
from asrkit.data.cut_table import CutTable
from asrkit.data.features import LOG_EPS, SILENCE, fbank
from asrkit.data.loader import _unless_cut_off, death_of, start_loader
from asrkit.data.manifests import text_of
from asrkit.data.text.tokenizer import Tokenizer, train_tokenizer
from asrkit.data.train_batches import DataConfig, TrainBatches, perturbed_features
from asrkit.errors import UserError
from helpers.tones import make_corpus

durations = st.lists(st.floats(0.3, 20.0), min_size=1, max_size=60).map(np.asarray)


@given(durations, st.floats(1.0, 60.0), st.integers(1, 8), st.integers(1, 4), st.integers(0, 3))
def test_an_epoch_holds_every_cut(durations: np.ndarray, most: float, buckets: int, slices: int, epoch: int) -> None:
    plan = BucketPlan(durations, most, buckets, slices, seed=7)
    first = epoch * plan.steps_per_epoch
    batches = [plan(step) for step in range(first, first + plan.steps_per_epoch)]
    assert set(np.concatenate(batches)) == set(range(len(durations)))
    for batch in batches:
        assert len(batch) % slices == 0
        assert durations[batch].max() * len(batch) <= most + 1e-6 or len(batch) == slices


@given(durations, st.integers(0, 40))
def test_a_step_is_known_without_the_steps_before(durations: np.ndarray, step: int) -> None:
    walked, jumped = (BucketPlan(durations, 30.0, 4, 1, seed=3) for _ in range(2))
    for earlier in range(step):
        walked(earlier)
    assert np.array_equal(walked(step), jumped(step))


def test_epochs_differ() -> None:
    plan = BucketPlan(np.linspace(1, 2, 40), 10.0, 2, 1, seed=1)
    one = [plan(step).tolist() for step in range(plan.steps_per_epoch)]
    two = [plan(step).tolist() for step in range(plan.steps_per_epoch, 2 * plan.steps_per_epoch)]
    assert one != two


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> tuple[CutSet, Tokenizer]:
    folder = tmp_path_factory.mktemp("corpus")
    cuts = CutSet.from_file(make_corpus(folder, 24)).to_eager()
    return cuts, train_tokenizer((text_of(cut) for cut in cuts), "bpe", 40, folder / "tokenizer.model")


def _batches(corpus: tuple[CutSet, Tokenizer], slices: int = 1, **settings: object) -> TrainBatches:
    cuts, tokenizer = corpus
    table = CutTable(cuts)
    data = from_dict(DataConfig, {"num_buckets": 3, **settings}, "test")
    return TrainBatches(table, BucketPlan(table.durations, 12.0, 3, slices, 1), slices, data, tokenizer, None, 1)


def test_the_table_gives_back_the_cuts(corpus: tuple[CutSet, Tokenizer]) -> None:
    table = CutTable(corpus[0])
    again = pickle.loads(pickle.dumps(table))
    assert [again[i] for i in range(len(table))] == list(corpus[0])


def test_processes_share_the_very_batch_of_one(corpus: tuple[CutSet, Tokenizer]) -> None:
    # SpecAugment masks by process; everything before it is drawn for each cut
    quiet = {"augment": {"spec_augment": None, "tempo": 0.1, "vocal_tract": 0.1}}
    shared = _batches(corpus, 2, **quiet)
    whole = TrainBatches(shared.table, shared.plan, 1, shared.settings, shared.tokenizer, None, 1)
    for step in range(3):
        parts, one = [shared[step * 2], shared[step * 2 + 1]], whole[step]
        for row in range(len(one.cut_ids)):
            batch, other = parts[row % 2], row // 2
            assert one.cut_ids[row] == batch.cut_ids[other]
            frames = int(one.feature_lens[row])
            assert frames == int(batch.feature_lens[other])
            torch.testing.assert_close(one.features[row, :frames], batch.features[other, :frames])


def test_loader_processes_do_not_change_the_batches(corpus: tuple[CutSet, Tokenizer]) -> None:
    batches = _batches(corpus, bpe_dropout=0.3)
    there = start_loader(batches, range(4, 9), 2)[0]  # its processes begin before this one has drawn anything
    here = start_loader(batches, range(4, 9), 0)[0]
    for mine, theirs in zip(here, there, strict=True):
        assert mine.cut_ids == theirs.cut_ids
        assert torch.equal(mine.features, theirs.features)
        assert torch.equal(mine.symbols, theirs.symbols)


def test_bpe_dropout_keeps_the_text(corpus: tuple[CutSet, Tokenizer]) -> None:
    batches = _batches(corpus, bpe_dropout=0.5)
    segmentations = set()
    for place in range(12):
        batch = batches[place]
        for row, text in enumerate(batch.texts):
            ids = batch.symbols[row, : batch.symbol_lens[row]].tolist()
            assert corpus[1].decode(ids) == text
            segmentations.add((text, tuple(ids)))
    assert len(segmentations) > len({text for text, _ in segmentations})


def test_evaluation_batches_hold_every_cut_once(corpus: tuple[CutSet, Tokenizer]) -> None:
    batches = list(evaluation_batches(corpus[0], 5.0))
    assert sorted(i for batch in batches for i in batch.cut_ids) == sorted(cut.id for cut in corpus[0])
    for batch in batches:
        assert batch.features.shape[1] * len(batch.cut_ids) * 0.01 <= 5.0 + 0.02 or len(batch.cut_ids) == 1
        for row, frames in enumerate(batch.feature_lens):
            assert torch.all(batch.features[row, frames:] == LOG_EPS)


def test_precomputed_features_are_taken_as_they_are(corpus: tuple[CutSet, Tokenizer], tmp_path: Path) -> None:
    cuts = corpus[0].subset(first=3)
    stored = cuts.compute_and_store_features(Fbank(FbankConfig(num_mel_bins=80)), tmp_path / "feats")
    for cut, plain in zip(stored, cuts, strict=True):
        torch.testing.assert_close(cut_features(cut), cut_features(plain), rtol=0, atol=2e-3)
    narrow = cuts.compute_and_store_features(Fbank(FbankConfig(num_mel_bins=40)), tmp_path / "narrow")
    with pytest.raises(UserError, match="40 bins"):
        cut_features(next(iter(narrow)))


def test_features_equal_the_device_s(corpus: tuple[CutSet, Tokenizer]) -> None:
    knf = pytest.importorskip("kaldi_native_fbank")
    samples = torch.from_numpy(next(iter(corpus[0])).load_audio()[0])
    options = knf.FbankOptions()
    options.frame_opts.dither, options.frame_opts.snip_edges = 0.0, False
    options.mel_opts.num_bins, options.mel_opts.high_freq = 80, -400.0
    device = knf.OnlineFbank(options)
    device.accept_waveform(16000, samples.tolist())
    device.input_finished()
    theirs = np.stack([device.get_frame(i) for i in range(device.num_frames_ready)])
    np.testing.assert_allclose(fbank(samples).numpy(), theirs, atol=5e-3)


def test_statistics_are_those_of_all_frames(corpus: tuple[CutSet, Tokenizer]) -> None:
    frames = torch.cat([cut_features(cut) for cut in corpus[0]])
    mean, std = feature_statistics(CutTable(corpus[0]))
    torch.testing.assert_close(mean, frames.mean(0), rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(std, frames.std(0, unbiased=False).clamp(min=0.01), rtol=1e-3, atol=1e-3)


def test_unreadable_audio_names_the_cut(corpus: tuple[CutSet, Tokenizer], tmp_path: Path) -> None:
    path = make_corpus(tmp_path, 1, name="gone")
    (tmp_path / "gone" / "0.wav").unlink()
    with pytest.raises(UserError, match="gone-0"):
        cut_features(next(iter(CutSet.from_file(path))))


@given(st.floats(0.8, 1.25), st.integers(1, 50))
def test_stretch_scales_the_length(factor: float, frames: int) -> None:
    ramp = torch.arange(frames, dtype=torch.float32)[:, None].expand(-1, 80)
    out = stretch(ramp, factor)
    assert len(out) == max(1, round(frames / factor))
    assert torch.all(out[1:] >= out[:-1]) and out.min() >= 0 and out.max() <= frames - 1


def test_vocal_tract_warp_moves_a_peak_and_leaves_factor_one_alone() -> None:
    features = torch.zeros(3, 4, 80)
    features[:, :, 30] = 1.0
    out = vocal_tract_warp(features, torch.tensor([0.9, 1.0, 1.1]))
    torch.testing.assert_close(out[1], features[1], rtol=0, atol=1e-5)
    places = (out * torch.arange(80)).sum(2) / out.sum(2)
    assert places[0, 0] > places[1, 0] > places[2, 0]


@settings(deadline=None)
@given(st.lists(st.integers(7, 200), min_size=1, max_size=4), st.integers(0, 1000))
def test_spec_augment_hides_no_more_than_it_may(lens: list[int], seed: int) -> None:
    options = SpecAugmentConfig(num_frequency_masks=0, time_mask_frames=20, max_time_fraction=0.3)
    features = torch.randn(len(lens), max(lens), 80, generator=torch.Generator().manual_seed(seed))
    out = spec_augment(features, torch.tensor(lens), options, np.random.default_rng(seed))
    changed = (out != features).any(2)
    for row, frames in enumerate(lens):
        assert not changed[row, frames:].any()
        assert changed[row].sum() <= 0.3 * frames


@settings(deadline=None)
@given(st.integers(1, 27), st.integers(0, 1000), st.integers(7, 300))
def test_a_frequency_mask_is_no_wider_than_asked(widest: int, seed: int, frames: int) -> None:
    """One stretch of neighboring bins, 0 to ``widest`` of them, in all real frames alike."""
    options = SpecAugmentConfig(num_frequency_masks=1, frequency_mask_bins=widest, num_time_masks=0)
    features = torch.randn(2, frames + 5, 80, generator=torch.Generator().manual_seed(seed))
    out = spec_augment(features, torch.tensor([frames, 7]), options, np.random.default_rng(seed))
    for row, length in enumerate((frames, 7)):
        masked = (out != features)[row, :length]
        assert torch.equal(masked, masked[:1].expand_as(masked)) and torch.equal(
            out[row, length:], features[row, length:]
        )
        bins = torch.nonzero(masked[0]).flatten().tolist()
        assert len(bins) <= widest and bins == list(range(bins[0], bins[0] + len(bins)) if bins else [])


def test_masks_have_every_width_and_reach_both_ends() -> None:
    """Widths 0 to 27 are as likely as each other; every bin can be the first and the last that is masked."""
    options = SpecAugmentConfig(num_frequency_masks=1, num_time_masks=1, time_mask_frames=9, max_time_fraction=1.0)
    features = torch.randn(4000, 30, 80, generator=torch.Generator().manual_seed(0))
    lens = torch.full((4000,), 25)
    only = [replace(options, num_time_masks=0), replace(options, num_frequency_masks=0)]
    in_bins, in_time = (spec_augment(features, lens, one, np.random.default_rng(0)) != features for one in only)
    for masked, widest, size in ((in_bins[:, 0], 27, 80), (in_time[..., 0], 9, 25)):
        widths = torch.bincount(masked.sum(1), minlength=widest + 1)
        assert len(widths) == widest + 1
        assert widths.float().std() < 4 * (4000 / (widest + 1)) ** 0.5 and int(widths.min()) > 0
        assert torch.nonzero(masked.any(0)).flatten().tolist() == list(range(size))


def test_what_silence_gives() -> None:
    """As lhotse and the runtime compute it; the padding of batches lies below."""
    import kaldi_native_fbank

    assert torch.allclose(fbank(torch.zeros(1600)), torch.tensor(SILENCE))
    options = kaldi_native_fbank.FbankOptions()
    options.mel_opts.num_bins, options.frame_opts.dither = 80, 0
    runtime = kaldi_native_fbank.OnlineFbank(options)
    runtime.accept_waveform(16000, [0.0] * 1600)
    assert runtime.get_frame(0) == pytest.approx(SILENCE) and LOG_EPS < SILENCE


def test_noise_has_the_asked_ratio() -> None:
    random = np.random.default_rng(0)
    speech, noise = torch.randn(16000), torch.randn(5000) * 3
    added = add_noise(speech, noise, 10.0, random) - speech
    ratio = 10 * torch.log10(speech.square().mean() / added.square().mean())
    assert abs(float(ratio) - 10.0) < 0.5
    assert torch.equal(add_noise(torch.zeros(100), noise, 10.0, random), torch.zeros(100))


def test_joined_utterances_join_their_texts(corpus: tuple[CutSet, Tokenizer]) -> None:
    batch = _batches(corpus, augment={"join": 1.0, "silence": 0.2, "channel_db": 3.0, "noise_probability": 1.0})[0]
    texts = {cut.id: text_of(cut) for cut in corpus[0]}
    for row, (cut_id, text) in enumerate(zip(batch.cut_ids, batch.texts, strict=True)):
        assert text.startswith(texts[cut_id] + " ") and text[len(texts[cut_id]) + 1 :] in texts.values()
        assert corpus[1].decode(batch.symbols[row, : batch.symbol_lens[row]].tolist()) == text
    assert bool(batch.features.isfinite().all())


def test_augmentation_off_is_the_plain_features(corpus: tuple[CutSet, Tokenizer]) -> None:
    off = AugmentConfig(speed=0.0, volume_db=0.0, spec_augment=None)
    cut = next(iter(corpus[0]))
    heard, untouched, added = perturbed_features(cut, off, np.random.default_rng(0), None, clean=True)
    assert torch.equal(heard, cut_features(cut)) and torch.equal(untouched, heard) and added == (0.0, 0.0)


def test_the_silence_that_was_added_is_known(corpus: tuple[CutSet, Tokenizer]) -> None:
    """Where a recording lies in its perturbed features: between silence of the returned length."""
    shifting = AugmentConfig(speed=0.1, tempo=0.3, silence=1.0, volume_db=0.0, spec_augment=None)
    for seed, cut in enumerate(corpus[0]):
        heard, _, (before, after) = perturbed_features(cut, shifting, np.random.default_rng(seed), None, clean=False)
        loudness = heard.amax(dim=1)
        loud = (loudness > loudness.max() - 5.0).nonzero().flatten()
        assert 0 <= int(loud[0]) - before < 15  # a chord swells
        assert 0 <= len(heard) - 1 - after - int(loud[-1]) < 30  # and 0.1 s of silence is its own


def test_clean_features_keep_the_timing_alone(corpus: tuple[CutSet, Tokenizer]) -> None:
    everything = {
        "silence": 0.2,
        "noise_probability": 1.0,
        "tempo": 0.1,
        "channel_db": 3.0,
        "vocal_tract": 0.1,
        "join": 0.5,
    }
    plain, both = _batches(corpus, augment=everything), _batches(corpus, augment=everything)
    both.clean = True
    for place in range(2):
        batch = both[place]
        assert torch.equal(plain[place].features, batch.features) and plain[place].clean.numel() == 0
        assert batch.clean.shape == batch.features.shape and not torch.equal(batch.clean, batch.features)
    # Where nothing but the timing is perturbed, the clean features are the perturbed ones.
    timing = {"silence": 0.2, "tempo": 0.1, "join": 0.5, "volume_db": 0.0, "spec_augment": None}
    timed = _batches(corpus, augment=timing)
    timed.clean = True
    assert torch.equal(timed[0].clean, timed[0].features)


def _killed_soon() -> None:
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_death_is_named_though_torch_raises_while_it_is_looked_for() -> None:
    """torch's handler raises wherever this process is when a loader process dies."""

    def raises(number: int, frame: object) -> None:
        raise RuntimeError("DataLoader worker is killed by signal")

    earlier = signal.signal(signal.SIGCHLD, raises)
    try:
        process = multiprocessing.get_context("fork").Process(target=_killed_soon)
        process.start()
        assert "was killed by SIGKILL" in str(death_of([process]))
    finally:
        signal.signal(signal.SIGCHLD, earlier)


HELD = """
import torch
from asrkit.data.loader import start_loader
held = start_loader(torch.arange(4), range(4), 2)
print(int(next(held[0])))
"""


@pytest.mark.slow
def test_loader_processes_do_not_keep_a_process_from_ending() -> None:
    """As where an exception still holds the loader at exit."""
    done = subprocess.run([sys.executable, "-c", HELD], timeout=120, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "0\n", "")


class _HookNames:
    """A batch source whose batches say what prints the errors of threads in the process that makes them."""

    def __getitem__(self, number: int) -> str:
        return sys.excepthook.__name__


def test_a_batch_that_is_cut_off_by_the_end_of_the_training_is_no_error(capfd: pytest.CaptureFixture[str]) -> None:
    made, _ = start_loader(_HookNames(), range(2), 1)
    assert list(made) == [_unless_cut_off.__name__] * 2
    for error in (EOFError(), ConnectionResetError(), ValueError("a real one")):
        _unless_cut_off(type(error), error, None)
    assert capfd.readouterr().err == "ValueError: a real one\n"
